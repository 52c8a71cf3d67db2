"""The training loop: resumable to the same losses, with an averaged copy of the weights."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from unmask.checkpoints import load, read, save, save_exit
from unmask.denoiser import Denoiser, fingerprint
from unmask.files import replace_whole
from unmask.training.baselines import trigram_nats, unigram_nats
from unmask.training.bound import (
    BATCH,
    Bound,
    Masked,
    heldout_bound,
    heldout_divergence,
    law_of,
    mask_by_time,
    spread_times,
)
from unmask.training.config import TrainConfig
from unmask.training.loss import Teaching, head_loss
from unmask.training.model import TrainableDenoiser
from unmask.training.setup import (
    check_out,
    faster_dtype,
    network,
    optimizers,
    origin_of,
    read_text,
    resumed,
    shape_of,
    sized,
)
from unmask.training.teacher import Teacher, check_teacher, random_prefixes


@dataclass(frozen=True)
class Report:
    """What a step of training tells: losses in nats per token, held-out bits per byte where it was measured."""

    step: int
    steps: int
    loss: float
    tokens: int
    tokens_per_second: float
    heldout_bits_per_byte: float | None = None


class Trainer:
    """One training run in a folder: `state.pt` to resume from, `log.jsonl`, and at the end a checkpoint.

    A step depends only on (config, step): crops, times and masks are drawn from a generator keyed by both, so a run
    that was killed goes on with the same losses from its last state. Files are replaced whole, never written in place.
    """

    def __init__(self, config: TrainConfig, folder: str | Path) -> None:
        self.folder = Path(folder)
        check_out(self.folder, config)
        before = self._config_before()
        origin = None if config.init is None else origin_of(config.init)
        config = sized(config, origin)
        teacher = None if config.teacher is None else read(config.teacher)
        given = (found.tokenizer for found in (origin, teacher) if found is not None)
        self._origins = {"init": origin and origin.digest, "teacher": teacher and teacher.digest}
        tokenizer = self.folder / "tokenizer.json" if before else config.tokenizer or next(given, None)
        self.text = read_text(config, tokenizer)
        self.shape = shape_of(config, self.text.tokenizer, origin)
        if before:
            self.config = resumed(before, config, self.folder)
        elif config.dtype == "auto":
            self.config = replace(config, dtype=faster_dtype(config, self.shape))
        else:
            self.config = config
        torch.manual_seed(self.config.seed)
        self.net = network(self.config, self.shape, origin)
        self.teacher = self._load_teacher()
        self.average = [parameter.detach().clone() for parameter in self.net.parameters()]
        self.optimizers = optimizers(self.net, self.config.learning_rate)
        self.step = 0
        self.seconds = 0.0
        self._resume()
        self._begin()

    def _load_teacher(self) -> Teacher | None:
        config = self.config
        if config.teacher is None:
            return None
        denoiser = load(config.teacher, dtype=config.dtype)
        ids = self.shape.vocab_size, self.shape.mask_id, fingerprint(self.text.tokenizer)
        check_teacher(denoiser, *ids, config.length)
        return Teacher(denoiser, config.batch_size, config.length)

    def run(self, on_step: Callable[[Report], None], *, state_every: int = 100, heldout_every: int = 250) -> dict:
        """Train to `config.steps`, write the checkpoint and return its metrics (see `metrics.json`)."""
        while self.step < self.config.steps:
            report = self._train_step()
            last = self.step == self.config.steps
            if self.step % heldout_every == 0 or last:
                report = replace(report, heldout_bits_per_byte=self._glance().bits_per_byte)
            if self.step % 10 == 0 or last or report.heldout_bits_per_byte is not None:
                self._log(report)
            if self.step % state_every == 0 or last:
                self._save_state()
            on_step(report)
        return self._finish()

    def _train_step(self) -> Report:
        started = time.perf_counter()
        self._set_learning_rates()
        masked, teaching = self._batch()
        scale = masked.weights / masked.tokens.numel()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            hidden = self.net.hidden(masked.tokens, masked.rows)
            loss = head_loss(hidden, *self.net.head, self.shape.mask_id, masked.targets, scale, teaching)
        if not loss.isfinite():
            raise ValueError(f"learning_rate must keep the loss finite, got {loss.item()} at step {self.step + 1}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._update_average()
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        size = masked.tokens.numel()
        return Report(self.step, self.config.steps, loss.item(), self.step * size, size / seconds)

    def _batch(self) -> tuple[Masked, Teaching | None]:
        """The windows of the next step, masked, and what the teacher says of them."""
        config, rng = self.config, np.random.default_rng([self.config.seed, self.step])
        clean, times, replaced = self._crops(rng), None, np.zeros(config.batch_size, bool)
        if config.random_prefix is not None:
            times = spread_times(config.batch_size, rng)
            clean, replaced = random_prefixes(clean, self._crops(rng), times, config.random_prefix, rng)
        masked = mask_by_time(clean, self.shape.mask_id, rng, times)
        if self.teacher is None:
            return masked, None
        share = torch.from_numpy(np.where(replaced, 1.0, config.teacher_share).astype(np.float32))
        return masked, self.teacher.teach(masked, share[masked.rows // config.length])

    def _crops(self, rng: np.random.Generator) -> np.ndarray:
        starts = rng.integers(0, len(self.text.train.ids) - self.config.length, self.config.batch_size)
        return self.text.train.crops(starts, self.config.length)

    def _set_learning_rates(self) -> None:
        config = self.config
        warm = min(1.0, (self.step + 1) / config.warmup_steps)
        left = (config.steps - self.step) / max(1.0, config.decay_share * config.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * warm * min(1.0, left)

    @torch.no_grad()
    def _update_average(self) -> None:
        # A young average follows the weights more closely, so that early held-out bounds mean something.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, list(self.net.parameters()), 1 - decay)

    def _glance(self) -> Bound:
        """The bound of the averaged weights on the first held-out windows."""
        net = TrainableDenoiser(self.shape)
        with torch.no_grad():
            for parameter, average in zip(net.parameters(), self.average, strict=True):
                parameter.copy_(average)
        windows = self.text.heldout.windows(self.config.length)[:128]
        return heldout_bound(net, windows, self.shape.mask_id, self.text.tokens_per_byte)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _config_before(self) -> TrainConfig | None:
        """The options that a run in this folder began with."""
        path = self.folder / "train.json"
        if not path.exists():
            return None
        try:
            return TrainConfig(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} must hold the options of a run, got a damaged file; delete the folder to start over"
            ) from error

    def _begin(self) -> None:
        """Write what decides the run, now that it is known to be sound, and cut the log to the steps that are kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_whole(self.folder / "tokenizer.json", lambda file: file.write_text(self.text.tokenizer.to_str()))
        replace_whole(
            self.folder / "train.json", lambda file: file.write_text(json.dumps(asdict(self.config), indent=1))
        )
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        kept = "".join(line + "\n" for line in lines if _logged_step(line) <= self.step)
        replace_whole(log, lambda file: file.write_text(kept))

    def _save_state(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "origins": self._origins,
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        replace_whole(self.folder / "state.pt", lambda file: torch.save(state, file))

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:  # a damaged file can make the reader stumble in any way
            raise ValueError(
                f"{path} must be the state of a run, got a damaged file; delete it to start over"
            ) from error
        for name, digest in self._origins.items():
            if state["origins"][name] != digest:
                raise ValueError(
                    f"{name} must be the checkpoint that the run in {self.folder} began with, got other weights at "
                    f"{getattr(self.config, name)!r}; use another folder for a new run"
                )
        self.step, self.seconds = state["step"], state["seconds"]
        self.net.load_state_dict(state["net"])
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _log(self, report: Report) -> None:
        entry = {
            "step": report.step,
            "loss": round(report.loss, 5),
            "seconds": round(self.seconds, 1),
            "heldout_bits_per_byte": report.heldout_bits_per_byte,
        }
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({key: value for key, value in entry.items() if value is not None}) + "\n")

    def _finish(self) -> dict:
        """Write the checkpoint, and measure it as its users will load it: `metrics.json`."""
        self._save_checkpoint()
        length, heldout = self.config.length, self.text.heldout
        trained, windows = load(self.folder), heldout.windows(length)
        law = law_of(trained, BATCH, length)
        bound = heldout_bound(law, windows, self.shape.mask_id, self.text.tokens_per_byte, draws=8)
        metrics = {
            "heldout": asdict(bound),
            **self._heldout_kl(trained, windows),
            **self._baselines(),
            "num_parameters": sum(parameter.numel() for parameter in self.net.parameters()),
            "train_tokens": len(self.text.train.ids),
            "seen_tokens": self.step * self.config.batch_size * length,
            "train_seconds": round(self.seconds, 1),
            "heldout_documents": sorted(document.name for document in self.text.heldout_documents),
        }
        replace_whole(self.folder / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=1)))
        return metrics

    def _heldout_kl(self, trained: Denoiser, windows: np.ndarray) -> dict:
        if self.config.teacher is None:
            return {}
        kl, error = heldout_divergence(load(self.config.teacher), trained, windows, draws=8)
        return {"heldout_kl": {"teacher": self.config.teacher, "nats_per_token": kl, "standard_error": error}}

    def _baselines(self) -> dict[str, float]:
        ids = self.text.train.ids, self.text.heldout.ids, self.shape.vocab_size
        scale = self.text.tokens_per_byte / math.log(2)
        return {
            "unigram_bits_per_byte": unigram_nats(*ids) * scale,
            "trigram_bits_per_byte": trigram_nats(*ids) * scale,
        }

    def _save_checkpoint(self) -> None:
        names = [name for name, _ in self.net.named_parameters()]
        config = {**self.shape.to_config(), "name": self.folder.name}
        tensors = dict(zip(names, self.average, strict=True))
        options = {"tokenizer": self.text.tokenizer, "dtype": torch.bfloat16}
        if self.config.early_exit is None:
            save(self.folder, config, tensors, **options)
        elif read(self.config.init).digest != self._origins["init"]:
            raise ValueError(
                f"init must stay as it is while its exit is trained, got other weights at {self.config.init!r}"
            )
        else:
            save_exit(self.folder, config, tensors, body=self.config.init, **options)


def _logged_step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        # The run was killed inside this line.
        return np.iinfo(np.int64).max
