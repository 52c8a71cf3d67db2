"""Dream's `diffusion_generate` (github.com/DreamLM/Dream; Ye et al. 2025, arXiv 2508.15487), without its logits."""

import inspect
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from unmask.adaptive import Confidence
from unmask.canvas import Canvas, check_ids, valid_of
from unmask.choose import Categorical
from unmask.denoiser import Denoiser
from unmask.dropin import patching, plain, seeds
from unmask.dropin.hooks import Hooks, Steps, dream_loop
from unmask.reveal import Ancestral, Reveal
from unmask.sampler import Sampler
from unmask.sources import Model, denoiser_of

SCORES = {"maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"}
ALGORITHMS = ("origin", *SCORES)
DEFAULT_MAX_LENGTH = 20  # of the published configuration, where it counts new tokens


@dataclass
class DreamModelOutput:
    """sequences: int64 [B, T]. history: what they were after each step, a list of such tensors, or None."""

    sequences: Tensor
    history: list[Tensor] | None = None

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


@dataclass(frozen=True)
class Options:
    """The fields of the published `DreamGenerationConfig`. Without `max_length` and `max_new_tokens` 20 are new."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    eps: float = 1e-3
    steps: int = 512
    alg: str = "origin"
    alg_temp: float | None = None
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    output_history: bool = False
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def of(cls, model: Model, config: Any, given: Mapping[str, Any]) -> "Options":
        """`given` first, then the configuration; special ids also from those of the model."""
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in names]:
            raise TypeError(f"diffusion_generate knows no argument {unknown[0]!r}; it knows {', '.join(names)}")
        read = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
        if read.get("max_length") == DEFAULT_MAX_LENGTH:
            del read["max_length"]
        read |= given
        for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
            for name in ("mask_token_id", "pad_token_id"):
                if read.get(name) is None:
                    read[name] = getattr(source, name, None)
        return cls(**read)

    def __post_init__(self) -> None:
        if self.alg not in ALGORITHMS:
            raise ValueError(f"alg must be one of {', '.join(ALGORITHMS)}, got {self.alg!r}")
        for name in ("steps", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must satisfy 0 < eps < 1, got {self.eps}")
        Categorical(self.temperature, self.top_k, self.top_p)  # its checks

    def length(self, prompt_length: int) -> int:
        """Of the whole rows."""
        if self.max_new_tokens is not None:
            return prompt_length + self.max_new_tokens
        if self.max_length is None:
            return prompt_length + DEFAULT_MAX_LENGTH
        if self.max_length <= prompt_length:
            raise ValueError(
                f"max_length must be more than the {prompt_length} tokens of inputs, got {self.max_length}; "
                "or give max_new_tokens"
            )
        return self.max_length

    @property
    def reveal(self) -> Reveal:
        if self.alg == "origin":
            return Ancestral(self.steps, (*self.loop.times[:-1].tolist(), 0.0))
        score = SCORES[self.alg]
        return Confidence(score, steps=self.steps, eps=self.eps, temperature_of_order=self.alg_temp or 0.0)

    @property
    def loop(self) -> Steps:
        return Steps(self.steps, self.eps, self.alg, self.alg_temp, self.temperature, self.top_p, self.top_k)


@torch.no_grad()
def diffusion_generate(
    model: Model, inputs: Tensor, generation_config: Any = None, *, seed: int | None = None, **kwargs: Any
) -> DreamModelOutput | Tensor:
    """Prompts int64 [B, P] continued, int64 [B, T] on the model's device; mask ids in them are filled as well.

    With `alg` maskgit_plus, topk_margin or entropy, temperature 0 and no `alg_temp` these are the tokens of the
    published function, but for scores that differ by less than the rounding of the logits; otherwise they have its law.
    Two things differ: steps reveal as many positions of a row as its own mask ids ask for, not the mean of the batch;
    and with `alg="origin"` the mask id is never drawn.

    model: a live module (see `unmask.wrap`), a denoiser, or where one is stored. generation_config: anything with the
    attributes of `Options`; keywords take precedence. attention_mask: zeros are padding, which no network sees.
    generation_tokens_hook_func, generation_logits_hook_func: see `Hooks`. seed: unsigned 64-bit; None draws it from
    torch's generator. With `return_dict_in_generate` a `DreamModelOutput`, with its history if `output_history`.

    Hooks, and top_p together with top_k, take the slow path, with a `SlowPathWarning`. Raises ValueError for options
    out of range and for what a hook returns in the wrong shape, TypeError for unknown options.
    """
    hooks = Hooks(kwargs.pop("generation_tokens_hook_func", None), kwargs.pop("generation_logits_hook_func", None))
    attention_mask = kwargs.pop("attention_mask", None)
    options = Options.of(model, generation_config, kwargs)
    denoiser = denoiser_of(model, options.mask_token_id, shift=True)
    canvas = _canvas(check_ids("inputs", inputs).to(denoiser.device), attention_mask, options, denoiser.spec.mask_id)
    keep_history = options.return_dict_in_generate and options.output_history
    if slow := _needs_logits(options, hooks):
        plain.warn(slow)
        loop = dream_loop(denoiser, canvas, options.loop, hooks, plain.generator_of(seed))
        history = list(loop) if keep_history else deque(loop, maxlen=1)
        tokens = history[-1]
    else:
        tokens, history = _sample(denoiser, canvas, options, seeds.resolve(seed), keep_history)
    if not options.return_dict_in_generate:
        return tokens
    return DreamModelOutput(tokens, history if keep_history else None)


def _needs_logits(options: Options, hooks: Hooks) -> str | None:
    """Why all logits are needed, or None."""
    given = [name for name in ("tokens", "logits") if getattr(hooks, name) is not None]
    if given:
        return f"generation_{given[0]}_hook_func needs the logits of every step"
    if options.top_k is not None and options.top_p is not None and options.top_p < 1:
        return "top_p is taken before top_k here"
    return None


def _canvas(inputs: Tensor, attention_mask: Tensor | None, options: Options, mask_id: int) -> Canvas:
    if attention_mask is None and options.pad_token_id is not None and (inputs == options.pad_token_id).any():
        warnings.warn("inputs hold pad_token_id and there is no attention_mask: padding is read as text", stacklevel=4)
    valid = valid_of(attention_mask, inputs, left=False)
    num_new = options.length(inputs.shape[1]) - inputs.shape[1]
    tokens = torch.nn.functional.pad(inputs, (0, num_new), value=mask_id)
    valid = torch.nn.functional.pad(valid, (0, num_new), value=True)
    return Canvas(tokens, valid, mask_id).repeat(options.num_return_sequences)


def _sample(
    denoiser: Denoiser, canvas: Canvas, options: Options, seed: int, keep_history: bool
) -> tuple[Tensor, list[Tensor] | None]:
    top_k = None if options.top_k is None else min(options.top_k, denoiser.spec.vocab_size)
    adaptive = options.alg != "origin"
    choose = Categorical(options.temperature, top_k=top_k, top_p=options.top_p, draw_mask=adaptive)
    sampler = Sampler(denoiser, reveal=options.reveal, choose=choose, max_batch=len(canvas.tokens))
    filled = canvas.sample(sampler, seed)
    return filled.tokens, filled.history(filled.steps, options.steps) if keep_history else None


def fits(obj: Any) -> bool:
    """Whether `obj` is a live model of Dream's kind."""
    return patching.has(obj, "diffusion_generate")


def patch(obj: Any, *, seed: int | None = None) -> None:
    """Serve `diffusion_generate` of a live model here; it returns the model's own output class."""
    published = inspect.unwrap(obj.diffusion_generate)
    theirs = getattr(published, "__globals__", {}).get("DreamModelOutput", DreamModelOutput)

    def diffusion_generate_here(self, inputs=None, generation_config=None, **kwargs):
        output = diffusion_generate(self, inputs, generation_config, **{"seed": seed, **kwargs})
        return theirs(**vars(output)) if isinstance(output, DreamModelOutput) else output

    patching.replace(obj, {"diffusion_generate": diffusion_generate_here})


unpatch = patching.restore
