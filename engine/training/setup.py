"""What a training run is made of before its first step: text, sizes, network and optimisers."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from unmask.checkpoints import Checkpoint, read, read_tokenizer
from unmask.denoiser import fingerprint
from unmask.dtype import DTYPES, faster, short
from unmask.training.bound import mask_by_time
from unmask.training.config import SIZES, TEACHER_SHARE, TrainConfig
from unmask.training.corpus import END_OF_TEXT, MASK, Document, Stream, read_documents, split, train_tokenizer
from unmask.training.loss import head_loss
from unmask.training.model import MLP_RATIO, ModelShape, TrainableDenoiser


@dataclass(frozen=True)
class Text:
    tokenizer: Tokenizer
    train: Stream
    heldout: Stream
    heldout_documents: list[Document]

    @property
    def tokens_per_byte(self) -> float:
        return len(self.heldout.ids) / self.heldout.num_bytes


def read_text(config: TrainConfig, tokenizer: Tokenizer | str | Path | None) -> Text:
    """Both parts of the corpus, with this tokenizer, the one at this path, or a new one."""
    train, heldout = split(read_documents(config.data), config.heldout_share)
    if isinstance(tokenizer, Tokenizer):
        trained = tokenizer
    else:
        trained = read_tokenizer(tokenizer) if tokenizer else train_tokenizer(train, config.vocab_size)
    missing = [token for token in (END_OF_TEXT, MASK) if trained.token_to_id(token) is None]
    if missing:
        raise ValueError(f"tokenizer must have the token {missing[0]}, got {tokenizer} without it")
    text = Text(trained, Stream.encode(train, trained), Stream.encode(heldout, trained), heldout)
    for part, stream in (("training", text.train), ("held-out", text.heldout)):
        if len(stream.ids) <= config.length:
            raise ValueError(f"length must be below the {len(stream.ids)} tokens of {part} text, got {config.length}")
    return text


def check_out(folder: Path, config: TrainConfig) -> None:
    """Raise ValueError for a run that would write over what it reads."""
    for name in ("init", "teacher"):
        source = getattr(config, name)
        if source is not None and Path(source).exists() and Path(source).resolve() == folder.resolve():
            raise ValueError(f"out must be another folder than {name}, got {str(folder)!r} for both")


def origin_of(source: str) -> Checkpoint:
    """The checkpoint that a run begins with."""
    found = read(source)
    usual = found.spec.family == "unmask" and found.spec.intermediate_size == MLP_RATIO * found.spec.hidden_size
    if not usual or "output_layer.linear.weight" in found.parameters:
        raise ValueError(f"init must be a whole model that `unmask train` wrote, got {source!r}")
    return found


def sized(config: TrainConfig, origin: Checkpoint | None) -> TrainConfig:
    """The options with all sizes, those of `init` or the usual ones, and with the teacher's share."""
    sizes = SIZES
    if origin is not None:
        spec = origin.spec
        sizes = {"blocks": spec.num_blocks, "hidden_dim": spec.hidden_size, "heads": spec.num_heads}
        for name, size in sizes.items():
            if getattr(config, name) not in (None, size):
                raise ValueError(f"{name} must be {size}, as init has it, or be left out, got {getattr(config, name)}")
        if config.early_exit is not None and config.early_exit >= spec.num_blocks:
            raise ValueError(
                f"early_exit must leave after 1 to {spec.num_blocks - 1} blocks of init, got {config.early_exit}"
            )
    share = config.teacher and (config.teacher_share or TEACHER_SHARE)
    return replace(config, teacher_share=share, **{name: getattr(config, name) or size for name, size in sizes.items()})


def resumed(before: TrainConfig, config: TrainConfig, folder: Path) -> TrainConfig:
    """The options to go on with: those from before, but for the number of steps."""
    wanted = replace(config, dtype=before.dtype) if config.dtype == "auto" else config
    for name, value in asdict(before).items():
        got = getattr(wanted, name)
        if got != value and name != "steps":
            raise ValueError(
                f"{name} must be {value!r} to resume the run in {folder}, got {got!r}; use another folder for a new run"
            )
    return wanted


def shape_of(config: TrainConfig, tokenizer: Tokenizer, origin: Checkpoint | None) -> ModelShape:
    if origin is not None and origin.spec.tokenizer != fingerprint(tokenizer):
        raise ValueError(f"tokenizer must be that of init, {origin.spec.tokenizer}, got {fingerprint(tokenizer)}")
    leaves = config.early_exit is not None
    if leaves and config.length > origin.spec.max_length:
        raise ValueError(f"length must be at most the {origin.spec.max_length} tokens of init, got {config.length}")
    return ModelShape(
        vocab_size=tokenizer.get_vocab_size(),
        mask_id=tokenizer.token_to_id(MASK),
        hidden_dim=config.hidden_dim,
        n_blocks=config.early_exit if leaves else config.blocks,
        n_heads=config.heads,
        model_length=config.length,
        tied=not leaves,
    )


def network(config: TrainConfig, shape: ModelShape, origin: Checkpoint | None) -> TrainableDenoiser:
    net = TrainableDenoiser(shape)
    if origin is not None:
        tensors = {name: tensor.float() for name, tensor in origin.parameters.items()}
        net.load_state_dict(tensors) if config.early_exit is None else net.leave(tensors)
    return net


def optimizers(net: TrainableDenoiser, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for what else is trained: embedding, norms,
    biases, an early exit's head."""
    matrices = {f"blocks.{name}": weight for name, weight in net.blocks.named_parameters() if weight.ndim == 2}
    trained = net.trained()
    others = [parameter for name, parameter in trained.items() if name not in matrices]
    optimizers = [torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices.keys() & trained.keys():
        options = {"lr": learning_rate, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.insert(0, torch.optim.Muon(list(matrices.values()), **options))
    return optimizers


def faster_dtype(config: TrainConfig, shape: ModelShape) -> str:
    """Times training steps of this shape in both dtypes: as few as will do, since one may take long."""
    net = TrainableDenoiser(shape)
    rng = np.random.default_rng(0)
    clean = rng.integers(0, shape.mask_id, (config.batch_size, config.length))

    def step(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            masked = mask_by_time(clean, shape.mask_id, rng)
            hidden = net.hidden(masked.tokens, masked.rows)
            head_loss(hidden, *net.head, shape.mask_id, masked.targets, masked.weights).backward()

    return short(faster({dtype: partial(step, dtype) for dtype in DTYPES}, min_rounds=1).dtype)
