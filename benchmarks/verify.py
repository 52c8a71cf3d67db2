"""Whether an implementation may have its speed printed: it computes what the specification does, or, a sampler, draws
the law and the very tokens of the specification."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.cases import SEED
from benchmarks.cases.inputs import head_weight, picked, position_keys
from benchmarks.cases.sample_head import HeadCase, head_case
from unmask.kernels import noise, sample_head

Draw = Callable[[Tensor, Tensor | None, Tensor], Tensor]  # (hidden, weight, keys) -> tokens

MIN_P = 1e-4
_LAW_VOCAB = 1000  # not a multiple of the noise block
_CHUNK = 10_000
_COMPARED = 16
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Verdict:
    passed: bool
    detail: str


def check_agreement(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: Callable[[str], float]
) -> Verdict:
    """Results against the reference's: |found - expected| / |expected| of each output, by name."""
    off = {
        name: ((found[name].double() - right.double()).norm() / right.double().norm()).item()
        for name, right in expected.items()
    }
    wrong = [name for name in off if not off[name] <= allowed(name)]  # NaN is wrong
    name = wrong[0] if wrong else max(off, key=lambda name: off[name] / allowed(name))
    return Verdict(not wrong, f"{name} {off[name]:.1e} off, {allowed(name):.0e} allowed")


def check_law(draw: Draw, case: HeadCase, num_draws: int) -> Verdict:
    """Pearson's chi-square of draws from one row of a smaller vocabulary against the softmax of its logits, once for
    all cases of a part, a width and a dtype."""
    width = None if case.weight is None else case.hidden.shape[1]
    return _law(draw, case.part, width, min(case.vocab_size, _LAW_VOCAB), case.dtype, case.device, num_draws)


@lru_cache(maxsize=256)
def _law(
    draw: Draw,
    part: str,
    width: int | None,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    num_draws: int,
) -> Verdict:
    weight = head_weight(width or 1, vocab_size, dtype, device)
    case = head_case(part, weight, num_rows=1)
    logits = case.hidden.double() if case.weight is None else case.hidden.double() @ weight.double().T
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)
    torch.manual_seed(0)
    for first in range(0, num_draws, _CHUNK):
        size = min(_CHUNK, num_draws - first)
        tokens = draw(case.hidden.expand(size, -1).contiguous(), case.weight, position_keys(size, device, first))
        if not ((tokens >= 0) & (tokens < vocab_size)).all():
            return Verdict(False, f"tokens from {int(tokens.min())} to {int(tokens.max())} for {vocab_size} ids")
        counts += torch.bincount(tokens, minlength=vocab_size)
    p = chi_square(counts.double(), num_draws * logits.softmax(-1).squeeze(0))
    return Verdict(p >= MIN_P, f"χ² p = {p:.2g}")


def chi_square(observed: Tensor, expected: Tensor) -> float:
    """p-value over the bins with at least five expected, the rest pooled."""
    if (expected >= 5).sum() < 2:
        raise ValueError(f"expected must have two bins of at least 5, got {expected.topk(2).values.tolist()}")
    big = expected >= 5
    observed = torch.cat([observed[big], observed[~big].sum()[None]])
    expected = torch.cat([expected[big], expected[~big].sum()[None]])
    if expected[-1] < 5:  # into the last of the big ones
        observed, expected = _fold(observed), _fold(expected)
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc((len(expected) - 1) / 2 * torch.ones_like(statistic), statistic / 2).item()


def _fold(bins: Tensor) -> Tensor:
    return torch.cat([bins[:-2], bins[-2:].sum()[None]])


def check_tokens(case: HeadCase, tokens: Tensor) -> Verdict:
    """Some rows' tokens against the specification's: equal but where the two scores differ by no more than rounding."""
    rows = picked(case.num_rows, _COMPARED, tokens.device)
    right = sample_head(case.hidden[rows], case.weight, keys=case.keys[rows], seed=SEED, impl="reference").tokens
    drawn, near = tokens[rows], 0
    for row, ours, theirs in zip(rows.tolist(), drawn.tolist(), right.tolist(), strict=True):
        if ours == theirs:
            continue
        if not 0 <= ours < case.vocab_size or not _near_tie(case, row, ours, theirs):
            return Verdict(False, f"row {row}: token {ours}, the reference draws {theirs}")
        near += 1
    return Verdict(True, f"{len(rows) - near}/{len(rows)} tokens equal" + (f", {near} near ties" if near else ""))


def _near_tie(case: HeadCase, row: int, *tokens: int) -> bool:
    """Whether the noise leaves two tokens, or their blocks, closer than fp32 products of this size can tell."""
    keys = case.keys[row : row + 1]
    blocks = [token // noise.BLOCK for token in tokens]
    logits, slack = zip(*(_logits(case, row, block) for block in blocks), strict=True)
    if blocks[0] == blocks[1]:
        ids = torch.tensor([tokens], device=keys.device)
        scores = logits[0][ids[0] % noise.BLOCK] + noise.token_gumbel(SEED, keys, ids)[0]
    else:
        gumbels = noise.block_gumbel(SEED, keys, max(blocks) + 1)[0, blocks]
        scores = torch.stack([block.logsumexp(0) for block in logits]) + gumbels
    return abs(float(scores[0] - scores[1])) <= sum(slack)


def _logits(case: HeadCase, row: int, block: int) -> tuple[Tensor, float]:
    """One block's logits in fp64, and by how much fp32 may have them wrong."""
    ids, hidden = slice(block * noise.BLOCK, (block + 1) * noise.BLOCK), case.hidden[row].double()
    if case.weight is None:
        logits = hidden[ids]
        size = logits[logits.isfinite()].abs().max().item()
    else:
        weight = case.weight[ids].double()
        logits, size = weight @ hidden, hidden.norm().item() * weight.norm(dim=1).max().item()
    return logits, 4 * _EPS * (16 + size)  # 16: the noise is about as large as that
