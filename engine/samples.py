"""What comes out: samples, their statistics, and the files they are saved to."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask.cost import Cost, flops_dict
from unmask.files import check_file, replace_whole

SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, eq=False)
class Sample:
    """One finished sequence of L tokens.

    index: its id in the run; with the seed, weights, policy and dtype it decides the tokens. tokens: int64 [L].
    logprobs: float32 [L], log-probability of each sampled token when it was drawn, 0 where it was given.
    reveal_step: int32 [L], the step that revealed it, -1 where it was given. text: None without a tokenizer.
    """

    index: int
    tokens: Tensor
    logprobs: Tensor
    reveal_step: Tensor
    text: str | None

    def to_json(self) -> dict:
        return {
            "index": self.index,
            "tokens": self.tokens.tolist(),
            "text": self.text,
            "logprobs": self.logprobs.tolist(),
            "reveal_step": self.reveal_step.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Stats:
    """What a run did.

    num_tokens: positions revealed. cost: network calls and the FLOPs really done. num_ticks, occupancy: see
    `unmask.timeline`. seconds: "total" and its phases "plan" (reveal plans and tick packing), "body" (hidden rows),
    "head" (head, draw and write), "other".
    model_seconds: "body" and "head" of each model. On a GPU, which the host does not wait for, the device's own clock
    tells the time of whole ticks: it is all "body", with the gaps between launches of those that are not replayed.
    peak_bytes: as in `Plan`.
    """

    num_samples: int
    num_tokens: int
    cost: Cost
    num_ticks: int
    occupancy: float
    seconds: dict[str, float]
    model_seconds: dict[str, dict[str, float]]
    peak_bytes: int

    @property
    def events(self) -> int:
        return self.cost.num_events

    @property
    def nfe(self) -> dict[str, float]:
        """Network evaluations per finished sequence, mean, by model; those of unfinished ones count as well."""
        return {name: self.cost.events_of(name) / max(1, self.num_samples) for name in self.cost.flops}

    def __str__(self) -> str:
        nfe = ", ".join(f"{name} {value:.1f}" for name, value in self.nfe.items())
        return (
            f"{self.num_tokens:,} tokens in {self.seconds['total']:.1f} s "
            f"({self.num_tokens / self.seconds['total']:.3g} tokens/s); network calls per sequence: {nfe}; "
            f"{self.num_ticks:,} ticks, {self.occupancy:.0%} full; "
            f"{self.cost.saving.without_head:.1%} of block FLOPs saved against the costliest model alone"
        )

    def to_json(self) -> dict:
        return {
            "nfe": self.nfe,
            "events": self.events,
            "ticks": self.num_ticks,
            "occupancy": self.occupancy,
            "flops": {name: flops.total for name, flops in self.cost.flops.items()},
            "flops_total": flops_dict(self.cost.total),
            "saved": asdict(self.cost.saving),
            "seconds": {**self.seconds, "models": self.model_seconds},
            "peak_bytes": self.peak_bytes,
        }


class Samples(Sequence[Sample]):
    """The samples of a run in the order of their index.

    tokens, reveal_step, logprobs: [num_samples, longest L], filled with -1, -1 and 0 behind the end of shorter
    sequences;
    lengths: int64 [num_samples]. text: one string per sample, or None without a tokenizer.
    """

    def __init__(self, samples: Sequence[Sample], seed: int, stats: Stats) -> None:
        self._samples = sorted(samples, key=lambda sample: sample.index)
        self.seed, self.stats = seed, stats

    def __len__(self) -> int:
        return len(self._samples)

    def __repr__(self) -> str:
        return (
            f"Samples(num_samples={len(self)}, seed={self.seed}, lengths {self.lengths.min()} to {self.lengths.max()})"
        )

    def __getitem__(self, index):
        return self._samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(sample.tokens) for sample in self._samples])

    @property
    def tokens(self) -> Tensor:
        return _stack([sample.tokens for sample in self._samples], -1)

    @property
    def reveal_step(self) -> Tensor:
        return _stack([sample.reveal_step for sample in self._samples], -1)

    @property
    def logprobs(self) -> Tensor:
        return _stack([sample.logprobs for sample in self._samples], 0.0)

    @property
    def text(self) -> list[str] | None:
        texts = [sample.text for sample in self._samples]
        return None if None in texts else texts

    def to_json(self) -> dict:
        """What `unmask sample --json` prints."""
        rows = [sample.to_json() for sample in self]
        columns = {key: [row[key] for row in rows] for key in ("tokens", "reveal_step", "logprobs")}
        return {"seed": self.seed, "texts": self.text, **columns, "stats": self.stats.to_json()}

    def save(self, path: str | Path) -> None:
        """Write one row per sample (seed, index, tokens, text, logprobs, reveal_step) as `.jsonl` or `.parquet`.

        The file appears whole or not at all: a full disk or a kill leaves what stood at `path` as it was.

        Raises:
            ValueError: another suffix.
            OSError: the folder does not exist or the disk is full.
        """
        path = check_path(path)
        replace_whole(path, self._write_jsonl if path.suffix == ".jsonl" else self._write_parquet)

    def _write_jsonl(self, path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for sample in self:
                file.write(json.dumps({"seed": self.seed, **sample.to_json()}, ensure_ascii=False) + "\n")

    def _write_parquet(self, path: Path) -> None:
        schema = pa.schema(
            {
                "seed": pa.uint64(),
                "index": pa.int64(),
                "tokens": pa.list_(pa.int32()),
                "text": pa.string(),
                "logprobs": pa.list_(pa.float32()),
                "reveal_step": pa.list_(pa.int32()),
            }
        )
        rows = [{"seed": self.seed, **sample.to_json()} for sample in self]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def check_path(path: str | Path) -> Path:
    """`path`, if samples can be saved there; see `Samples.save` for the errors."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    check_file("path", path)
    return path


def decode(tokens: np.ndarray | Tensor, tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def _stack(rows: list[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
