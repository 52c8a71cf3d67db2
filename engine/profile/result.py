"""What a profile says: phases, models, ticks, memory, and the file that holds them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from unmask.denoiser import Denoiser
from unmask.dtype import short
from unmask.info import environment
from unmask.profile.machine import HighWater
from unmask.profile.pieces import pieces
from unmask.profile.recorder import Times
from unmask.sampler import Sampler
from unmask.samples import Sample, Stats

SCHEMA = 1
LOGITS = "4 bytes × ids × positions × steps, of the steps whose model has a head of its own"


@dataclass(frozen=True, eq=False)
class Profile:
    """One sampling run, taken apart.

    sampler, request: what was asked for, as `Sampler.sample` takes it. dtype: of the weights. stats: see `Stats`.
    columns: integers of each tick. samples: the finished ones, ascending. num_masked: positions that each reveals.
    times: what took how long; host: the same by the host's clock, whose work a GPU's overlaps. ceiling: FLOP/s that a
    large product reaches here. partial: whether the run was interrupted. divided: whether the insides of ticks were
    timed in a second run.
    """

    sampler: Sampler
    request: dict
    dtype: torch.dtype
    stats: Stats
    columns: dict[str, list[int]]
    samples: list[Sample]
    num_masked: int
    times: Times
    host: Times
    ceiling: float
    high_water: HighWater
    partial: bool
    divided: bool

    @property
    def models(self) -> dict[str, Denoiser]:
        return self.sampler.models

    @property
    def device(self) -> torch.device:
        return next(iter(self.models.values())).device

    @property
    def total(self) -> float:
        return self.times.total

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        given = self.request.get("length")
        return min(model.spec.max_length for model in self.models.values()) if given is None else given

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds of disjoint parts of the run, which add up to "total".

        plan: reveal times and ticks. transfer: tokens into and out of their slots, integers to the device. body: hidden
        rows without their attention. head: with the draw. decode: texts. idle: no network call was at work and nothing
        else has a name. On a GPU the host plans and transfers while the device works, see `host_seconds`; the gathering
        of tokens is part of body.
        """
        are, alone = self.times.are, self.times.alone
        if self.device.type == "cpu":
            names = "plan", "transfer", "body", "attention", "head", "decode"
            spans = {name: are(name) for name in names} | {"body": are("body", "block")}
        else:
            rest = self.times.inside & ~are("attention", "head")
            spans = {"body": rest, "attention": are("attention"), "head": are("head")}
        found = {name: float(alone[chosen].sum()) for name, chosen in spans.items()}
        return found | {"idle": max(0.0, self.total - sum(found.values())), "total": self.total}

    @property
    def host_seconds(self) -> dict[str, float] | None:
        """What the host did while a GPU worked; None on a CPU."""
        if self.device.type == "cpu":
            return None
        names = "plan", "transfer", "capture", "decode"
        return {name: float(self.host.alone[self.host.are(name)].sum()) for name in names}

    @property
    def seen(self) -> bool:
        """Whether the insides of ticks were timed."""
        return bool(self.times.are("body").any())

    @cached_property
    def ticks(self) -> dict[str, np.ndarray]:
        """[num_ticks] each: integers, and seconds: start since that of the run, body with its attention, total."""
        count = len(self.columns["model"])
        of_ticks = self.times.are("tick")
        found = {"start": self.times.start[of_ticks], "total": self.times.seconds[of_ticks]}
        found |= {name: self.times.by_tick(name) for name in ("body", "attention", "head")}
        if not self.seen:
            found["body"] = found["total"]
        return {**self.columns, **{name: column[:count] for name, column in found.items()}}

    @cached_property
    def model_seconds(self) -> dict[str, dict]:
        """Of each model: its ticks; in them body, attention, head; each block, none where they cannot be seen."""
        found = {}
        for index, name in enumerate(self.models):
            chosen = np.equal(self.ticks["model"], index)
            sums = {key: float(self.ticks[key][chosen].sum()) for key in ("total", "body", "attention", "head")}
            found[name] = {**sums, "blocks": self.times.blocks(index)}
        return found

    @property
    def steps(self) -> list[int]:
        """The model of each step, as its index."""
        names = list(self.models)
        assigned = self.sampler.schedule.assign(self.sampler.reveal.num_steps(self.num_masked))
        return [names.index(name) for name, start, stop in assigned for _ in range(start, stop)]

    @property
    def tokens_per_second(self) -> float:
        return self.stats.num_tokens / self.total

    @property
    def flops_per_second(self) -> float:
        return self.stats.cost.total.total / self.total

    @property
    def logits_bytes_avoided(self) -> int:
        """Bytes that a sampler writes which stores the fp32 logits of all positions in every step, see `LOGITS`."""
        return 4 * self.vocab_size * self.num_positions * self.num_spared_steps

    @property
    def vocab_size(self) -> int:
        return next(iter(self.models.values())).spec.vocab_size

    @property
    def num_positions(self) -> int:
        """Of all samples."""
        return self.length * self.request["num_samples"]

    @property
    def num_spared_steps(self) -> int:
        """Steps of a trajectory whose model has a head of its own, so that no logits are written."""
        models = list(self.models.values())
        return sum(models[index].head.weight is not None for index in self.steps)

    @property
    def notes(self) -> list[str]:
        """What a reader must know to trust the numbers."""
        found = []
        if self.partial:
            found.append("interrupted: times and counts are of what was done until then")
        if self.divided:
            found.append("ticks were replayed as CUDA graphs; a second run without them tells how their time divides")
        elif not self.seen:
            found.append("the insides of ticks could not be timed: they count as body")
        sums = self.model_seconds.items()
        hidden = [name for name, each in sums if self.seen and each["total"] and not each["blocks"]]
        if hidden:
            found.append(f"no blocks or attention are visible in {', '.join(hidden)}: it counts as body")
        estimated = [name for name, model in self.models.items() if model.head.weight is None]
        if estimated:
            found.append(f"the FLOPs of {', '.join(estimated)} are estimated from the number of parameters")
        return found

    def to_json(self, num_texts: int) -> dict:
        """What `unmask profile --json` prints, with the first `num_texts` samples."""
        spec = ("num_blocks", "hidden_size", "vocab_size", "num_parameters")
        return {
            "kind": "profile",
            "schema": SCHEMA,
            "partial": self.partial,
            **environment(self.device),
            "request": self.settings,
            "models": [
                {"name": name, **{key: getattr(model.spec, key) for key in spec}} for name, model in self.models.items()
            ],
            "phases": self.phases,
            "host_seconds": self.host_seconds,
            "model_seconds": self.model_seconds,
            "ticks": {key: list(map(float, c)) if isinstance(c, np.ndarray) else c for key, c in self.ticks.items()},
            "num_ticks": self.stats.num_ticks,
            "occupancy": self.stats.occupancy,
            "max_batch": self.sampler.max_batch,
            "nfe": self.stats.nfe,
            "tokens_per_second": self.tokens_per_second,
            "flops": {name: flops.total for name, flops in self.stats.cost.flops.items()},
            "flops_per_second": self.flops_per_second,
            "flops_share": self.flops_per_second / self.ceiling,
            "ceiling_flops_per_second": self.ceiling,
            "peak_bytes": self.stats.peak_bytes,
            "rss_before_bytes": self.high_water.resident_before,
            "rss_peak_bytes": self.high_water.resident_peak,
            "device_peak_bytes": self.high_water.device_peak,
            "logits_bytes_avoided": self.logits_bytes_avoided,
            "logits_formula": LOGITS,
            "steps": {"num_steps": len(self.steps), "models": self.steps},
            "samples": [self._sample(sample) for sample in self.samples[:num_texts]],
            "notes": self.notes,
        }

    @property
    def settings(self) -> dict:
        """JSON-ready: the request, and what the sampler and this process add to it."""
        choose = self.sampler.choose
        return {
            **self.request,
            "length": self.length,
            "reveal": str(self.sampler.reveal),
            "schedule": str(self.sampler.schedule),
            "temperature": choose.temperature,
            "top_k": choose.top_k,
            "top_p": choose.top_p,
            "suppress": list(choose.suppress),
            "begin_suppress": list(choose.begin_suppress),
            "guidance": self.sampler.guidance,
            "caching": None if self.sampler.caching is None else str(self.sampler.caching),
            "max_batch": self.sampler.max_batch,
            "dtype": short(self.dtype),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }

    def _sample(self, sample: Sample) -> dict:
        tokenizer = self.sampler.tokenizer
        cut = None if tokenizer is None else pieces(sample.tokens.tolist(), tokenizer)
        return {**sample.to_json(), "pieces": cut}
