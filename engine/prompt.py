"""What is given? Prompts become templates: token ids with the mask id wherever a token is to be sampled."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat

import numpy as np
from tokenizers import Tokenizer

from unmask.denoiser import DenoiserSpec

Prompt = str | Sequence[int] | np.ndarray

_GAP = re.compile(r"<mask(?::([^>]*)>?|>)")


class Templates:
    """Builds templates for one vocabulary.

    A template is int64 [L]. Prefix, suffix and infilling are the same thing: given positions hold their ids, all others
    the mask id. A prompt is token ids, in which mask ids mark gaps, or text, in which `<mask>` and `<mask:12>` mark
    gaps of 1 and 12 tokens.
    """

    def __init__(self, spec: DenoiserSpec, tokenizer: Tokenizer | None, max_length: int) -> None:
        self.mask_id, self.vocab_size = spec.mask_id, spec.vocab_size
        self.tokenizer, self.max_length = tokenizer, max_length

    def ids(self, prompt: Prompt | None, argument: str = "prompt") -> np.ndarray:
        """int64 ids of a prompt, checked against the vocabulary; `argument` names it in errors."""
        if prompt is None:
            return np.empty(0, np.int64)
        ids = self._encode(prompt, argument) if isinstance(prompt, str) else _as_array(prompt)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise TypeError(f"{argument} must be text or one row of integer token ids, got {prompt!r:.80}")
        bad = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if bad.size:
            raise ValueError(
                f"{argument} must hold ids from 0 to {self.vocab_size - 1}, "
                f"got {int(ids[bad[0]])} at position {int(bad[0])}"
            )
        return ids.astype(np.int64)

    def _encode(self, text: str, argument: str) -> np.ndarray:
        if self.tokenizer is None:
            raise ValueError(
                f"{argument} must be token ids because the model has no tokenizer, got text {text!r:.60}; "
                "or load the model with tokenizer="
            )
        pieces, start = [], 0
        for gap in _GAP.finditer(text):
            pieces.append(self._words(text[start : gap.start()]))
            pieces.append(np.full(self._gap_size(gap, argument), self.mask_id, np.int64))
            start = gap.end()
        return np.concatenate([*pieces, self._words(text[start:])])

    def _gap_size(self, gap: re.Match, argument: str) -> int:
        size = gap[1] if gap[1] is not None else "1"
        if not (gap[0].endswith(">") and size.isdecimal() and 1 <= int(size[:20]) <= self.max_length):
            raise ValueError(
                f"{argument} must have gaps of 1 to {self.max_length} tokens, <mask> or <mask:{self.max_length}>, "
                f"got {gap[0]:.40}"
            )
        return int(size)

    def _words(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def build(self, length: int, prompt: Prompt | None = None, suffix: Prompt | None = None) -> np.ndarray:
        """The template of `length` tokens that starts with `prompt` and ends with `suffix`.

        Raises:
            ValueError: length outside 1..max_length, a prompt and suffix longer than it, or no masked position left.
        """
        self._check_length(length)
        start, end = self.ids(prompt), self.ids(suffix, "suffix")
        if len(start) + len(end) > length:
            raise ValueError(
                f"prompt and suffix must fit length {length}, got {len(start)} and {len(end)} tokens; "
                f"use length {len(start) + len(end) + 1} or more"
            )
        template = np.full(length, self.mask_id, np.int64)
        template[: len(start)] = start
        template[length - len(end) :] = end
        if not (template == self.mask_id).any():
            raise ValueError(f"prompt must leave a masked position to sample, got {length} given tokens of {length}")
        return template

    def _check_length(self, length: int) -> None:
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
            raise TypeError(f"length must be a whole number of tokens, got {length!r}")
        if not 1 <= length <= self.max_length:
            raise ValueError(f"length must be from 1 to the models' max_length {self.max_length}, got {length}")

    def requests(
        self,
        num_samples: int | None,
        length: int | Sequence[int] | None,
        prompt: Prompt | Iterable[Prompt | None] | None,
        suffix: Prompt | Iterable[Prompt | None] | None,
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Templates and how many samples each gets, in the order of the samples.

        One prompt, suffix or length serves every sample; a list (of prompts, or of lengths) gives one to each. Where
        all are single values the same template comes in one pair; `num_samples` None then never ends. Lists are read as
        they are needed, and all end together: with `num_samples`, or with the shortest of them when it is None.
        """
        length = self.max_length if length is None else length
        length = length.tolist() if hasattr(length, "tolist") else length
        many = [_is_many(prompt), _is_many(suffix), np.ndim(length) > 0]
        if many[2]:  # they decide how much memory a run gets, so all are looked at before it starts
            if not hasattr(length, "__len__") or len(length) == 0:
                raise TypeError(f"length must be a whole number of tokens or a list of them, got {length!r:.80}")
            for one in length:
                self._check_length(one)
        if num_samples is not None:
            check_count("num_samples", num_samples)
            for name, value, listed in zip(("prompt", "suffix", "length"), (prompt, suffix, length), many, strict=True):
                if listed and hasattr(value, "__len__") and len(value) != num_samples:
                    raise ValueError(f"{name} must be one value or {num_samples} of them, got {len(value)}")
        if not any(many):
            template = self.build(length, prompt, suffix)
            return repeat((template, 1 << 16)) if num_samples is None else iter([(template, int(num_samples))])
        return self._each(num_samples, length, prompt, suffix, many)

    def _each(self, num_samples, length, prompt, suffix, many) -> Iterator[tuple[np.ndarray, int]]:
        columns = [
            iter(value) if listed else repeat(value)
            for value, listed in zip((length, prompt, suffix), (many[2], *many[:2]), strict=True)
        ]
        count = 0
        for one_length, one_prompt, one_suffix in islice(zip(*columns, strict=False), num_samples):
            try:
                template = self.build(one_length, one_prompt, one_suffix)
            except (ValueError, TypeError) as error:
                raise type(error)(f"sample {count}: {error}") from None
            yield template, 1
            count += 1
        if num_samples is not None and count < num_samples:
            raise ValueError(f"prompt and suffix must give {num_samples} of each, got {count}")


def _is_many(value: object) -> bool:
    """Whether `value` holds one prompt per sample rather than being a prompt."""
    if value is None or isinstance(value, str):
        return False
    if hasattr(value, "ndim"):
        return value.ndim > 1
    if isinstance(value, Sequence):
        return bool(len(value)) and not isinstance(value[0], (int, np.integer))
    return isinstance(value, Iterable)


def _as_array(prompt: object) -> np.ndarray:
    try:
        return np.asarray(prompt)
    except ValueError:  # lists of unequal depth or length
        return np.array(None)


def check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
