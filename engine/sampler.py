"""The sampler: validates a request, plans it, and starts the loop."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from tokenizers import Tokenizer

from unmask import memory
from unmask.adaptive import groups
from unmask.adaptive_run import AdaptiveSlots
from unmask.arguments import checked_ids
from unmask.cached_run import CachedRun, CachedSlots
from unmask.caching import Caching, KeyValues
from unmask.calibration import Calibration
from unmask.choose import Categorical
from unmask.confidence_run import ConfidenceRun
from unmask.constraints import Allow, Constraints
from unmask.cost import Meter
from unmask.denoiser import Denoiser, check_compatible
from unmask.kernels.noise import check_seed
from unmask.plan import Plan
from unmask.planner import Planner
from unmask.progress import Progress
from unmask.prompt import Prompt, Templates, check_count
from unmask.remask_run import RemaskRun
from unmask.reveal import Ancestral, Reveal
from unmask.rounds import Rounds
from unmask.run import Run, buffer_bytes, never_drawn
from unmask.samples import Samples
from unmask.schedule import Schedule
from unmask.slots import Slots
from unmask.spans import SILENT, Spans
from unmask.timeline import Limits, Tick, Timeline
from unmask.work import Load


class Sampler:
    """Samples from one or more masked diffusion denoisers, exactly.

    models: one denoiser, or several by name; they must share vocabulary size, mask id, tokenizer and device.
    schedule: which model takes which steps, "light:125 heavy:750 light:125" or in percent (see `Schedule`); may be left
        out for a single model.
    reveal: when positions are revealed. Planned: `Ancestral(steps)`, `FirstHitting()`, `Fixed(steps)`, `Order(order)`,
        `Remask(steps, schedule)`. By what the network is sure of: `Confidence(score, steps=N)`. Either in
        `Blocks(policy, length)`.
    choose: what token is written: `Categorical(temperature, top_k, top_p, suppress, begin_suppress)`.
    guidance: scale w of unsupervised classifier-free guidance (Nie et al. 2025, arXiv 2502.09992): tokens are drawn
        from logits (1 + w) l - w u, u those of the sequence with its given positions masked. Two network calls for one.
    caching: `Caching(kind)` keeps keys and values between the steps of a block, which changes the tokens; none if None.
    max_batch: sequences of one network call. max_resident: sequences in progress at once. Unless given, 16 times
        `max_batch`: more of them fill ticks better and cost only their tokens. Where one network decides alone what is
        revealed, `max_batch`: all would wait for each other.
    impl: implementation of the head, see `unmask info`; None picks the fastest.
    graphs: replay ticks as CUDA graphs; None: on a GPU, for the models that allow it. The bits are the same without.

    A sample depends on the seed, its index, the weights, the policies and the dtype, and on nothing else; where the two
    best scores of a token lie within the rounding of the logits, on a GPU also on what shares its network calls, since
    the library's products round differently in other shapes.
    """

    def __init__(
        self,
        models: Denoiser | Mapping[str, Denoiser],
        *,
        schedule: str | Schedule | None = None,
        reveal: Reveal | None = None,
        choose: Categorical | None = None,
        guidance: float = 0.0,
        caching: Caching | None = None,
        max_batch: int = 16,
        max_resident: int | None = None,
        impl: str | None = None,
        graphs: bool | None = None,
    ) -> None:
        if not isinstance(models, (Denoiser, Mapping)):
            raise TypeError(f"models must be a denoiser or a dictionary of them by name, got {type(models).__name__}")
        self.models = {models.name: models} if isinstance(models, Denoiser) else dict(models)
        if not self.models:
            raise ValueError("models must hold at least one denoiser, got none")
        if reveal is not None and not hasattr(reveal, "num_steps"):
            raise TypeError(f"reveal must be a policy such as Ancestral(1000), got {reveal!r}")
        if choose is not None and not isinstance(choose, Categorical):
            raise TypeError(f"choose must be a token choice such as Categorical(1.0), got {choose!r}")
        if not isinstance(guidance, (int, float)) or not 0 <= guidance < math.inf:
            raise ValueError(f"guidance must be a finite number, 0 or above, got {guidance!r}")
        check_compatible(self.models)
        check_count("max_batch", max_batch)
        if max_resident is not None:
            check_count("max_resident", max_resident)
        self.schedule = self._parse_schedule(schedule)
        self.reveal = Ancestral(1000) if reveal is None else reveal
        self.choose, self.guidance = Categorical() if choose is None else choose, float(guidance)
        self._policy, _ = groups(self.reveal, 1)
        if self.choose.draw_mask and not self.adaptive:
            raise ValueError(f"draw_mask must be False with a planned policy, got True with {self.reveal}")
        self.max_batch, self.max_resident, self.impl, self.graphs = max_batch, max_resident, impl, graphs
        self.caching = caching
        self._check_caching()
        first = next(iter(self.models.values()))
        tokenizers = (model.tokenizer for model in self.models.values())
        tokenizer = next((tokenizer for tokenizer in tokenizers if tokenizer is not None), None)
        max_length = min(model.spec.max_length for model in self.models.values())
        self._templates = Templates(first.spec, tokenizer, max_length)
        self._check_policy_ids()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the models, None when they have none."""
        return self._templates.tokenizer

    @property
    def mask_id(self) -> int:
        return self._templates.mask_id

    @property
    def _planner(self) -> Planner:
        return Planner(self.reveal, self.schedule, list(self.models), self.mask_id, self.choose.draw_mask)

    def _check_policy_ids(self) -> None:
        vocab_size = self._templates.vocab_size
        checked_ids("doubted", getattr(self._policy, "doubted", ()), vocab_size)
        stop_id = getattr(self.reveal, "stop_id", None)
        if stop_id is None:
            return
        checked_ids("stop_id", (stop_id,), vocab_size)
        if stop_id == self.mask_id:
            raise ValueError(f"stop_id must be a token that ends a sequence, got the mask id {stop_id}")

    def _check_caching(self) -> None:
        if not isinstance(self.caching, Caching | None):
            raise TypeError(f"caching must be what to keep, such as Caching('dual'), got {self.caching!r}")
        first = next(iter(self.models.values()))
        obstacles = {
            f"a planned policy, {self.reveal}": not self.adaptive,
            f"a policy that masks again, {self.reveal}": self._remasks,
            "several models": len(self.models) > 1,
            f"{first.name!r}, which cannot keep keys and values": not first.cacheable,
            f"guidance={self.guidance}": self.guidance,
            "graphs=True": self.graphs,
        }
        found = next((what for what, there in obstacles.items() if there), None)
        if self.caching is not None and found:
            raise ValueError(f"caching must be None with {found}; got {self.caching}")

    @property
    def adaptive(self) -> bool:
        """Whether the network decides which positions are revealed."""
        return getattr(self._policy, "adaptive", False)

    @property
    def _remasks(self) -> bool:
        return getattr(self._policy, "remasks", False)

    def _parse_schedule(self, schedule: str | Schedule | None) -> Schedule:
        names = tuple(self.models)
        if schedule is None:
            if len(names) > 1:
                raise ValueError(
                    f"schedule must say which of the models {', '.join(names)} takes which steps, got none; "
                    f"for example {names[1]}:12.5% {names[0]}:75% {names[1]}:12.5%"
                )
            return Schedule.single(names[0])
        if not isinstance(schedule, Schedule):
            return Schedule.parse(schedule, names)
        unknown = [name for name in schedule.models if name not in names]
        if unknown:
            raise ValueError(f"schedule must name known models ({', '.join(names)}), got {unknown[0]!r}")
        return schedule

    def plan(
        self,
        num_samples: int = 1,
        length: int | Sequence[int] | None = None,
        *,
        seed: int = 0,
        prompt: Prompt | Iterable[Prompt] | None = None,
        suffix: Prompt | Iterable[Prompt] | None = None,
        calibration: Calibration | None = None,
    ) -> Plan:
        """What `sample` with the same arguments will do: every network call, counted, without making one.

        With the calibration of a machine (`unmask.calibrate`) it also predicts the seconds of the run there. What a run
        may save on the way is not known before: a `stop_id` that is drawn, and what `caching` does not compute.

        Raises:
            ValueError: scores decide how many positions are revealed.
        """
        self._check_plannable()
        requests = self._requests(num_samples, length, prompt, suffix)
        timeline = self._timeline(requests, length, seed, num_samples)
        meter, loads, names = Meter(self.models, 2 if self.guidance else 1), Counter(), list(self.models)
        for tick in timeline:
            meter.add(tick)
            if calibration is not None:
                load = Load.of(tick.lengths.tolist(), tick.row_counts.tolist())
                loads[names[tick.model], load] += 2 if self.guidance else 1
        return Plan(
            num_samples=int(num_samples),
            num_tokens=self._num_masked(requests),
            reveal=str(self.reveal),
            schedule=str(self.schedule),
            num_ticks=timeline.stats.num_ticks,
            occupancy=timeline.stats.occupancy,
            cost=meter.cost,
            peak_bytes=self._buffer_bytes(timeline.limits) + timeline.nbytes,
            seconds=None if calibration is None else calibration.predict(self.models, loads),
        )

    def check(
        self,
        num_samples: int = 1,
        length: int | Sequence[int] | None = None,
        *,
        seed: int = 0,
        prompt: Prompt | Iterable[Prompt] | None = None,
        suffix: Prompt | Iterable[Prompt] | None = None,
        planned: bool = False,
    ) -> None:
        """Raise what `sample` would for these arguments, before anything runs: a prompt that does not fit, a schedule
        of other steps, ...; with `planned`, what `plan` would."""
        if planned:
            self._check_plannable()
        check_seed(seed)
        self._requests(num_samples, length, prompt, suffix)

    def _check_plannable(self) -> None:
        if self.adaptive and self._policy.counts(1) is None:
            raise ValueError(f"reveal must fix how many positions each step reveals, for a plan, got {self.reveal}")

    def sample(
        self,
        num_samples: int = 1,
        length: int | Sequence[int] | None = None,
        *,
        seed: int = 0,
        prompt: Prompt | Iterable[Prompt] | None = None,
        suffix: Prompt | Iterable[Prompt] | None = None,
        allow: Allow | Sequence[Allow | None] | None = None,
        progress: bool | Progress = False,
        spans: Spans = SILENT,
    ) -> Samples:
        """All samples of a run.

        num_samples: how many. length: tokens of each sample, given ones included; one number, or one per sample; the
        models' `max_length` when left out. seed: unsigned 64-bit. prompt, suffix: what stands at the start and at the
        end, as text or token ids, the same for all or one per sample; mask ids in ids, and `<mask>` or `<mask:12>` in
        text, leave gaps to fill. allow: ids that a position may draw, by position, the same for all samples or one
        mapping for each; the others draw any. progress: True shows one on standard error; or a `Progress` of your own.
        spans: is told of the parts of the run as they begin and end, see `unmask.spans`.

        Raises:
            ValueError, TypeError: an argument is out of range; nothing has run then.
            NonFiniteLogits: a network gave NaN or +∞; names sequence and position.
            MemoryError: the run does not fit; says how much it needs and which `max_batch` would fit.
        """
        view = progress if isinstance(progress, Progress) else Progress.on_stderr() if progress else Progress()
        requests = self._requests(num_samples, length, prompt, suffix)
        constraints = self._constraints(allow)
        constraints.check_count(int(num_samples))
        self._planner.check_lists(requests, constraints)
        run = self._run(requests, length, seed, num_samples, constraints, view.update, spans)
        with view:
            view.start(int(num_samples), self._num_masked(requests), list(self.models))
            samples = [view.finish(sample) for sample in run]
        return Samples(samples, check_seed(seed), run.stats)

    def stream(
        self,
        num_samples: int | None = None,
        length: int | Sequence[int] | None = None,
        *,
        seed: int = 0,
        prompt: Prompt | Iterable[Prompt] | None = None,
        suffix: Prompt | Iterable[Prompt] | None = None,
        allow: Allow | None = None,
    ) -> Run:
        """An iterator over samples as they finish, with `stats`; arguments as in `sample`.

        `num_samples` None goes on as long as an iterable of prompts does, else for ever. Prompts are read as slots come
        free, so memory does not grow with the number of samples, and a bad one is an error only when its turn comes;
        samples equal those of `sample` with the same seed. `allow` is one mapping for all of them.
        """
        if not isinstance(allow, Mapping | None):
            raise TypeError(f"allow must be one mapping from positions to ids for a stream, got {type(allow).__name__}")
        if num_samples is not None:
            check_count("num_samples", num_samples)
        requests = self._templates.requests(num_samples, length, prompt, suffix)
        return self._run(requests, length, seed, num_samples, self._constraints(allow), None)

    def _constraints(self, allow: Allow | Sequence[Allow | None] | None) -> Constraints:
        suppress = never_drawn(self.mask_id, self.choose)
        vocab_size = self._templates.vocab_size
        return Constraints(vocab_size, suppress=suppress, begin_suppress=self.choose.begin_suppress, allow=allow)

    def _requests(
        self,
        num_samples: int,
        length: int | Sequence[int] | None,
        prompt: Prompt | Iterable[Prompt] | None,
        suffix: Prompt | Iterable[Prompt] | None,
    ) -> list[tuple[np.ndarray, int]]:
        """All templates of a run that ends, each known to suit the reveal policy and the schedule."""
        check_count("num_samples", num_samples)
        requests = list(self._templates.requests(num_samples, length, prompt, suffix))
        planner = self._planner
        for template, _ in requests:
            planner.check(template)
        return requests

    def _run(
        self,
        requests: Iterable[tuple[np.ndarray, int]],
        length: int | Sequence[int] | None,
        seed: int,
        num_samples: int | None,
        constraints: Constraints,
        on_tick: Callable[[Run, Tick], object] | None,
        spans: Spans = SILENT,
    ) -> Run:
        limits, device = partial(self._limits, length, num_samples), next(iter(self.models.values())).device
        memory.check(device, self.max_batch, lambda max_batch: self._buffer_bytes(limits(max_batch)))
        timeline = self._timeline(requests, length, seed, num_samples, constraints)
        kind, options = Run, {}
        if self.adaptive and self._remasks:
            kind, options = RemaskRun, {"policy": self._policy}
        elif self.adaptive:
            kind, options = ConfidenceRun, {"policy": self._policy, "stop_id": getattr(self.reveal, "stop_id", None)}
        if self.caching is not None:
            kind, options = CachedRun, {**options, "caching": self.caching}
        return kind(
            self.models,
            timeline,
            seed=seed,
            choose=self.choose,
            constraints=constraints,
            guidance=self.guidance,
            **options,
            tokenizer=self.tokenizer,
            impl=self.impl,
            graphs=self.graphs,
            on_tick=on_tick,
            spans=spans,
        )

    def _timeline(
        self,
        requests: Iterable[tuple[np.ndarray, int]],
        length: int | Sequence[int] | None,
        seed: int,
        num_samples: int | None,
        constraints: Constraints | None = None,
    ) -> Timeline | Rounds:
        constraints = constraints or self._constraints(None)
        limits = {**self._limits(length, num_samples, self.max_batch)._asdict(), "num_models": len(self.models)}
        check_seed(seed)
        if self.adaptive:
            return Rounds(self._planner.adaptive(requests, constraints), **limits)
        return Timeline(self._planner.planned(requests, seed, constraints), **limits)

    def _buffer_bytes(self, limits: Limits) -> int:
        models = list(self.models.values())
        if self.caching is not None:
            return buffer_bytes(models, limits, CachedSlots) + KeyValues.nbytes(models[0], limits)
        return buffer_bytes(models, limits, AdaptiveSlots if self.adaptive else Slots)

    def _limits(self, length: int | Sequence[int] | None, num_samples: int | None, max_batch: int) -> Limits:
        # More would only wait: where the network decides, all sequences take equally many steps and fill every tick.
        most = max_batch if self.adaptive and len(self.models) == 1 else 16 * max_batch
        max_resident = self.max_resident or most
        if num_samples is not None:
            max_resident = min(max_resident, int(num_samples))
        max_length = self._templates.max_length if length is None else int(np.max(length))
        return Limits(max_batch, max_resident, max_length)

    def _num_masked(self, requests: list[tuple[np.ndarray, int]]) -> int:
        planner = self._planner
        return sum(len(planner.masked(template)) * count for template, count in requests)
