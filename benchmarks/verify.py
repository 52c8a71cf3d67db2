"""Whether a sampler may have its speed printed: it draws the law, and the very tokens of the specification."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import SEED, HeadCase, Shape, head_case, head_weight, position_keys
from benchmarks.samplers import Draw
from unmask.kernels import noise, sample_head

MIN_P = 1e-4
_LAW_VOCAB = 1000  # not a multiple of the noise block
_CHUNK = 10_000
_COMPARED = 16
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Verdict:
    passed: bool
    detail: str


def check_law(draw: Draw, part: str, shape: Shape, dtype: torch.dtype, device: torch.device, num_draws: int) -> Verdict:
    """Pearson's chi-square of draws from one row of a smaller vocabulary against the softmax of its logits."""
    shape = shape._replace(vocab_size=min(shape.vocab_size, _LAW_VOCAB))
    weight = head_weight(shape, dtype, device)
    case = head_case(part, shape, weight, num_rows=1)
    logits = case.hidden.double() if case.weight is None else case.hidden.double() @ weight.double().T
    counts = torch.zeros(shape.vocab_size, dtype=torch.int64, device=device)
    torch.manual_seed(0)
    for first in range(0, num_draws, _CHUNK):
        size = min(_CHUNK, num_draws - first)
        tokens = draw(case.hidden.expand(size, -1).contiguous(), case.weight, position_keys(size, device, first))
        if not ((tokens >= 0) & (tokens < shape.vocab_size)).all():
            return Verdict(False, f"tokens from {int(tokens.min())} to {int(tokens.max())} for {shape.vocab_size} ids")
        counts += torch.bincount(tokens, minlength=shape.vocab_size)
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
    picked = torch.linspace(0, case.num_rows - 1, min(case.num_rows, _COMPARED)).long().unique().to(tokens.device)
    right = sample_head(case.hidden[picked], case.weight, keys=case.keys[picked], seed=SEED, impl="reference").tokens
    drawn, near = tokens[picked], 0
    for row, ours, theirs in zip(picked.tolist(), drawn.tolist(), right.tolist(), strict=True):
        if ours == theirs:
            continue
        if not 0 <= ours < case.shape.vocab_size or not _near_tie(case, row, ours, theirs):
            return Verdict(False, f"row {row}: token {ours}, the reference draws {theirs}")
        near += 1
    return Verdict(True, f"{len(picked) - near}/{len(picked)} tokens equal" + (f", {near} near ties" if near else ""))


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
