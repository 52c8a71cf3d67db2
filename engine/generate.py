"""One call for all models, in the manner of the ecosystem's `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.adaptive import Confidence
from unmask.caching import Caching
from unmask.canvas import Canvas, check_ids, valid_of
from unmask.choose import Categorical
from unmask.denoiser import Denoiser
from unmask.dropin import seeds
from unmask.prompt import Templates, check_count
from unmask.reveal import Ancestral, Blocks, FirstHitting, Fixed, Reveal
from unmask.sampler import Sampler
from unmask.samples import Stats
from unmask.sources import Model, denoiser_of

SCORES = {
    "low_confidence": "probability",
    "maskgit_plus": "probability",
    "topk_margin": "margin",
    "entropy": "entropy",
}
ALGORITHMS = ("ancestral", "origin", "first_hitting", "random", *SCORES)
MAX_BATCH = 32  # rows of one network call

Inputs = Tensor | str | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class GenerateOutput:
    """sequences: int64 [B, T]. text: of each row, without padding and what follows its end; None without a tokenizer.
    logprobs: float32 [B, T], of each sampled token when it was drawn, 0 where it was given. reveal_step: int64 [B, T],
    the step that revealed it, -1 where it was given. stats: of the run; None where nothing was masked.
    """

    sequences: Tensor
    text: list[str] | None
    logprobs: Tensor
    reveal_step: Tensor
    stats: Stats | None


def generate(
    model: Model,
    inputs: Inputs | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    max_new_tokens: int | None = None,
    steps: int | None = None,
    block_length: int | None = None,
    alg: str | Reveal = "ancestral",
    threshold: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cfg_scale: float = 0.0,
    caching: Caching | None = None,
    suppress_tokens: Sequence[int] = (),
    begin_suppress_tokens: Sequence[int] = (),
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    num_return_sequences: int = 1,
    seed: int | None = None,
    return_dict_in_generate: bool = False,
) -> Tensor | GenerateOutput:
    """Continue prompts, or fill their mask ids, with any masked diffusion model: int64 [B, T], prompts included.

    >>> import unmask
    >>> output = unmask.generate(
    ...     "sotu-heavy", ["My fellow Americans", "The state of"], max_new_tokens=32, steps=16,
    ...     alg="low_confidence", block_length=16, temperature=0, return_dict_in_generate=True,
    ... )  # fmt: skip
    >>> output.sequences.shape, output.text[0][:19]
    (torch.Size([2, 37]), 'My fellow Americans')

    model: a denoiser, a live torch module (see `wrap`), a bundled name, a folder or a hub id (see `load`).
    inputs or input_ids: token ids [B, P], lists of ids, or text, one or several; in text `<mask:12>` is a gap of 12
        tokens. Mask ids in them are filled. Left out: nothing is given. Shorter rows are padded on the left.
    attention_mask: of token ids, zeros are padding, which no network sees; on the left only where tokens are appended.
    tokenizer: of the model, where it brings none; see `wrap`.
    max_new_tokens: mask ids appended to each row. Left out: none, the inputs' own are filled.
    alg: when positions are revealed. "ancestral" (or "origin"): independently, the exact sampler. "random": equally
        many each step. "first_hitting": one at a time. By what the model is sure of: "low_confidence" (or
        "maskgit_plus"), "topk_margin", "entropy", see `Confidence`. Or any policy.
    steps: in all; one for each masked position unless given. block_length: the positions are revealed in blocks of so
        many, left to right, and `steps` are shared among them.
    threshold: with low_confidence, topk_margin and entropy, instead of `steps`: reveal all that score so well.
    temperature, top_k, top_p, suppress_tokens, begin_suppress_tokens: see `Categorical`. cfg_scale, caching: see
        `Sampler`.
    mask_token_id: of a live module that does not tell it itself.
    eos_token_id: what follows it among the appended tokens becomes `pad_token_id` (or `eos_token_id` itself). Where the
        model decides the order within blocks, none begins after one that holds it.
    num_return_sequences: rows for each input, next to each other.
    seed: unsigned 64-bit; None draws it from torch's generator, so `torch.manual_seed` governs.
    return_dict_in_generate: return a `GenerateOutput`.

    Raises ValueError and TypeError, which name the argument, before anything has run.
    """
    denoiser = denoiser_of(model, mask_token_id, tokenizer=tokenizer)
    num_new = 0 if max_new_tokens is None else _checked("max_new_tokens", max_new_tokens)
    pad_id = next((one for one in (pad_token_id, eos_token_id) if one is not None), 0)
    canvas = _canvas(denoiser, _one_of(inputs, input_ids), attention_mask, num_new, pad_id)
    check_count("num_return_sequences", num_return_sequences)
    canvas = canvas.repeat(num_return_sequences)
    sampler = Sampler(
        denoiser,
        reveal=_reveal(alg, canvas, steps, block_length, threshold, eos_token_id),
        choose=Categorical(temperature, top_k, top_p, suppress_tokens, begin_suppress_tokens),
        guidance=cfg_scale,
        caching=caching,
        max_batch=min(len(canvas.tokens), MAX_BATCH),
    )
    filled = canvas.sample(sampler, seeds.resolve(seed))
    ended = _after_end(filled.tokens, num_new, eos_token_id)
    sequences = filled.tokens.masked_fill(ended, pad_id)
    if not return_dict_in_generate:
        return sequences
    text = _text(denoiser, sequences, canvas.valid & ~ended)
    return GenerateOutput(sequences, text, filled.logprobs, filled.steps, filled.stats)


def _one_of(inputs: Inputs | None, input_ids: Tensor | None) -> Inputs | None:
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs must be left out where input_ids are given, got both")
    return input_ids if inputs is None else inputs


def _canvas(
    denoiser: Denoiser, inputs: Inputs | None, attention_mask: Tensor | None, num_new: int, pad_id: int
) -> Canvas:
    """The inputs with `num_new` mask ids after each."""
    if isinstance(inputs, Tensor):
        tokens = check_ids("inputs", inputs).to(denoiser.device)
        valid = valid_of(attention_mask, tokens, left=num_new > 0)
    else:
        if attention_mask is not None:
            raise ValueError(f"attention_mask must be left out unless inputs are a tensor, got {type(inputs).__name__}")
        tokens, valid = _padded(_rows(denoiser, inputs), pad_id, denoiser.device)
    pad = torch.nn.functional.pad
    mask_id = denoiser.spec.mask_id
    canvas = Canvas(pad(tokens, (0, num_new), value=mask_id), pad(valid, (0, num_new), value=True), mask_id)
    if not canvas.masked.any():
        raise ValueError("max_new_tokens must be given where inputs hold no mask ids, got neither")
    return canvas


def _rows(denoiser: Denoiser, inputs: Inputs | None) -> list[Tensor]:
    """int64 [length] of each of several texts or lists of ids."""
    if inputs is None:
        return [torch.empty(0, dtype=torch.int64)]
    if isinstance(inputs, str) or (len(inputs) and not isinstance(inputs[0], (str, Sequence, Tensor))):
        inputs = [inputs]
    if not len(inputs):
        raise ValueError("inputs must hold at least one row, got none")
    templates = Templates(denoiser.spec, denoiser.tokenizer, denoiser.spec.max_length)
    return [torch.from_numpy(templates.ids(row, "inputs")) for row in inputs]


def _padded(rows: list[Tensor], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows side by side with padding on their left, int64 [B, P], and which ids are theirs, bool [B, P]."""
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), pad_id)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    for place, row in enumerate(rows):
        tokens[place, length - len(row) :] = row
        valid[place, length - len(row) :] = True
    return tokens.to(device), valid.to(device)


def _reveal(
    alg: str | Reveal,
    canvas: Canvas,
    steps: int | None,
    block_length: int | None,
    threshold: float | None,
    eos_token_id: int | None,
) -> Reveal:
    num_masked = int(canvas.masked.sum(1).max())
    num_blocks = 1 if block_length is None else -(-num_masked // _checked("block_length", block_length))
    policy = _policy(alg, _share(steps, num_blocks, block_length or num_masked), steps is not None, threshold)
    if block_length is None:
        return policy
    return Blocks(policy, block_length, stop_id=eos_token_id if getattr(policy, "adaptive", False) else None)


def _share(steps: int | None, num_blocks: int, block_length: int) -> int:
    """The steps of each block."""
    if steps is None:
        return block_length
    if _checked("steps", steps) % num_blocks:
        raise ValueError(f"steps must be a multiple of the {num_blocks} blocks of {block_length} tokens, got {steps}")
    return steps // num_blocks


def _policy(alg: str | Reveal, steps: int, steps_given: bool, threshold: float | None) -> Reveal:
    """Of one block."""
    if steps_given and (threshold is not None or alg == "first_hitting" or not isinstance(alg, str)):
        raise ValueError(f"steps must be left out with threshold, first_hitting or a policy, got {steps} with {alg!s}")
    if threshold is not None and alg not in SCORES:
        raise ValueError(f"alg must be one of {', '.join(SCORES)} with threshold, got {alg!s}")
    if not isinstance(alg, str):
        return alg
    if alg in SCORES:
        counts = {"steps": steps} if threshold is None else {"threshold": threshold}
        return Confidence(SCORES[alg], **counts)
    policies = {"ancestral": Ancestral, "origin": Ancestral, "random": Fixed}
    if alg not in ALGORITHMS:
        raise ValueError(f"alg must be one of {', '.join(ALGORITHMS)}, or a reveal policy, got {alg!r}")
    return FirstHitting() if alg == "first_hitting" else policies[alg](steps)


def _checked(name: str, value: Any) -> int:
    check_count(name, value)
    return int(value)


def _after_end(tokens: Tensor, num_new: int, eos_token_id: int | None) -> Tensor:
    """bool [B, T]: what follows the first end among the last `num_new` tokens of a row."""
    ends = torch.zeros_like(tokens)
    if eos_token_id is not None:
        ends[:, tokens.shape[1] - num_new :] = tokens[:, tokens.shape[1] - num_new :] == eos_token_id
    return ends.cumsum(1) - ends > 0


def _text(denoiser: Denoiser, sequences: Tensor, valid: Tensor) -> list[str] | None:
    if denoiser.tokenizer is None:
        return None
    return [denoiser.tokenizer.decode(row[kept].tolist()) for row, kept in zip(sequences, valid, strict=True)]
