"""dllm's `MDLMSampler` (github.com/ZHZisZZ/dllm), without its logits."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unmask.canvas import Canvas
from unmask.denoiser import Denoiser
from unmask.dropin import patching, plain, seeds
from unmask.dropin.rule import Rule
from unmask.dropin.transfer import Block, Transferred, binomial, common_steps, cut, even, linear, rounded
from unmask.sources import Model, denoiser_of


@dataclass
class MDLMSamplerConfig:
    """max_new_tokens: of each row; 0 or None where `max_length` counts those of the longest. steps: in all, shared
    equally among the blocks of `block_size`. stochastic_transfer: how many a step reveals is binomial. cfg_scale,
    cfg_keep_tokens: unsupervised guidance, and ids that stay in its unconditional input. suppress_tokens: never drawn.
    begin_suppress_tokens: drawn, but nothing is ever sure of them (as published; see `Confidence`). right_shift_logits:
    row i - 1 predicts position i. return_dict: return a `BaseSamplerOutput`. seed: unsigned 64-bit; None draws it from
    torch's generator.
    """

    return_dict: bool = False
    max_new_tokens: int | None = 128
    max_length: int | None = None
    block_size: int | None = 128
    steps: int = 128
    temperature: float = 0.0
    remasking: str = "low_confidence"
    stochastic_transfer: bool = False
    cfg_scale: float = 0.0
    cfg_keep_tokens: list[int] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    right_shift_logits: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def rule(self) -> Rule:
        named = self.suppress_tokens, self.begin_suppress_tokens, self.cfg_keep_tokens
        suppress, doubted, kept = (tuple(ids or ()) for ids in named)
        return Rule(self.temperature, self.remasking, suppress, doubted, self.cfg_scale, kept)

    @classmethod
    def of(cls, config: Any, given: dict[str, Any]) -> "MDLMSamplerConfig":
        """`given` first, then what `config` has of these fields."""
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in names]:
            raise TypeError(f"MDLMSampler knows no option {unknown[0]!r}; it knows {', '.join(names)}")
        return cls(**{name: getattr(config, name) for name in names if hasattr(config, name)} | given)


@dataclass
class BaseSamplerOutput:
    """sequences: int64 [B, T]. histories: the rows before the first step and after each."""

    sequences: Tensor
    histories: list[Tensor] | None = None


@dataclass
class MDLMSampler:
    """Fills masked positions block by block, the most confident first.

    model: a live module (see `unmask.wrap`), a denoiser, or where one is stored. tokenizer: anything with
    `mask_token_id`, `eos_token_id` and `bos_token_id`. scheduler: anything with `reverse_mask_prob(s=, t=)`, the share
    of what is masked at time t that still is at s; None is the linear one.
    """

    model: Model
    tokenizer: Any
    scheduler: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            self.model = denoiser_of(self.model, self.tokenizer.mask_token_id)

    def sample(self, inputs: Sequence[Tensor | list], config: Any = None, **options: Any) -> BaseSamplerOutput | Tensor:
        """Prompts, each with `max_new_tokens` after it, int64 [B, T]; shorter rows end in the end-of-text id.

        inputs: token ids of each prompt. config: a `MDLMSamplerConfig`, or the published one; keywords take precedence.
        At temperature 0 with low_confidence these are the published tokens, but for scores that differ by less than the
        rounding of the logits; otherwise they have its law. `stochastic_transfer`, `cfg_keep_tokens` with guidance, and
        mask ids in a prompt take the slow path, with a `SlowPathWarning`.
        """
        options = MDLMSamplerConfig.of(config, options)
        prompts, mask_id = self._rows(inputs, options), self.tokenizer.mask_token_id
        longest = max(map(len, prompts))
        num_new = options.max_new_tokens or (options.max_length or 0) - longest
        if num_new < 1:
            raise ValueError(
                f"max_length must be more than the {longest} tokens of the longest input, got {options.max_length}"
            )
        denoiser = denoiser_of(self.model, mask_id, shift=options.right_shift_logits)
        whole = [torch.cat([prompt, prompt.new_full((num_new,), mask_id)]) for prompt in prompts]
        canvas = self._canvas(whole, denoiser.device)
        starts = torch.tensor([len(prompt) for prompt in prompts], device=canvas.tokens.device)
        return self._run(denoiser, canvas, options, starts, num_new, infill=False)

    def infill(self, inputs: Sequence[Tensor | list], config: Any = None, **options: Any) -> BaseSamplerOutput | Tensor:
        """Rows of token ids with their mask ids filled, int64 [B, T]; shorter rows end in the end-of-text id.

        Blocks are cut from whole rows; `block_size` None is one block. All else as in `sample`; blocks that do not hold
        equally many mask ids take the slow path as well. On the fast one a position that drew the mask id may still be
        revealed in a later block.
        """
        options = MDLMSamplerConfig.of(config, options)
        denoiser = denoiser_of(self.model, self.tokenizer.mask_token_id, shift=options.right_shift_logits)
        canvas = self._canvas(self._rows(inputs, options), denoiser.device)
        starts = torch.zeros(len(canvas.tokens), dtype=torch.int64, device=canvas.tokens.device)
        return self._run(denoiser, canvas, options, starts, canvas.tokens.shape[1], infill=True)

    def _rows(self, inputs: Sequence[Tensor | list], options: MDLMSamplerConfig) -> list[Tensor]:
        """int64 [length] of each input; with shifted logits an empty list stands for the beginning of text."""
        if not len(inputs):
            raise ValueError("inputs must hold at least one row of token ids, got none")
        empty = [self.tokenizer.bos_token_id] if options.right_shift_logits else []
        return [torch.as_tensor(row if len(row) else empty, dtype=torch.int64, device="cpu") for row in inputs]

    def _canvas(self, rows: list[Tensor], device: torch.device) -> Canvas:
        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad(rows, batch_first=True, padding_value=self.tokenizer.eos_token_id)
        valid = pad([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        return Canvas(tokens.to(device), valid.to(device), self.tokenizer.mask_token_id)

    def _run(
        self,
        denoiser: Denoiser,
        canvas: Canvas,
        options: MDLMSamplerConfig,
        starts: Tensor,
        length: int,
        *,
        infill: bool,
    ) -> BaseSamplerOutput | Tensor:
        size = options.block_size or length
        shares = self._shares(math.ceil(options.steps / math.ceil(length / size)))
        generator, counts = plain.generator_of(options.seed), partial(rounded, shares=shares)
        if options.stochastic_transfer:
            counts = partial(binomial, shares=shares, generator=generator)
        blocks = cut(canvas, starts, length, size, counts, before=not infill)
        if reason := _needs_logits(options, canvas, blocks, size):
            plain.warn(reason)
            windows = [(block.window, block.counts) for block in blocks]
            steps = plain.reveal_blocks(denoiser, canvas, windows, options.rule, generator)
            history = list(steps) if options.return_dict else list(deque(steps, maxlen=1))
        else:
            sampler = options.rule.sampler(
                denoiser, size, len(canvas.tokens), Transferred, steps=len(shares), shares=shares
            )
            filled, num_steps = canvas.sample(sampler, seeds.resolve(options.seed)), sum(map(len, blocks))
            history = [filled.tokens]
            if options.return_dict:
                history = filled.history(common_steps(blocks, filled.steps), num_steps)
        tokens = history[-1] if history else canvas.tokens
        return BaseSamplerOutput(tokens, [canvas.tokens, *history]) if options.return_dict else tokens

    def _shares(self, steps: int) -> tuple[float, ...]:
        """Of what is still masked, the share that each of a block's steps reveals."""
        still_masked = linear if self.scheduler is None else self.scheduler.reverse_mask_prob
        return tuple(1 - still_masked(s=(steps - 1 - i) / steps, t=(steps - i) / steps) for i in range(steps))


def _needs_logits(options: MDLMSamplerConfig, canvas: Canvas, blocks: list[Block], size: int) -> str | None:
    """Why the slow path is needed, or None."""
    if options.rule.kept and options.cfg_scale:
        return "cfg_keep_tokens ask for another unconditional input"
    if options.stochastic_transfer:
        return "stochastic_transfer counts the steps of each row by itself"
    if sum(int(block.num_masked.sum()) for block in blocks) < int(canvas.masked.sum()):
        return "mask ids in a prompt"
    if not even(blocks, size):
        return f"blocks of {size} tokens hold unequal numbers of mask ids"
    return None


def fits(obj: Any) -> bool:
    """Whether `obj` is a live `MDLMSampler`."""
    return patching.has(obj, "sample", "infill") and hasattr(obj, "model") and hasattr(obj, "tokenizer")


def patch(obj: Any, *, seed: int | None = None) -> None:
    """Serve `sample` and `infill` of a live sampler here."""

    def served(name: str):
        def call(self, inputs, config=None, **options):
            here = MDLMSampler(self.model, self.tokenizer, getattr(self, "scheduler", None))
            return getattr(here, name)(inputs, config, **{"seed": seed, **options})

        return call

    patching.replace(obj, {name: served(name) for name in ("sample", "infill")})


unpatch = patching.restore
