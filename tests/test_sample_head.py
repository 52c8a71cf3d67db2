"""sample_head: its law, its ties and ends, row invariance, agreement of implementations, and its error texts."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from unmask.kernels import NonFiniteLogits, dispatch, extension, noise, sample_head
from unmask.kernels.dispatch import UnsupportedImplementation
from unmask.kernels.sample_head import cpu, reference
from unmask.kernels.sample_head.call import HeadCall

usable, reason = extension.status()
ISAS = extension._cpu.isas() if usable else []
compiled = pytest.mark.skipif(not usable, reason=reason)
each_implementation = pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled)])
each_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("", marks=compiled)])


def keys(num_rows, sequence=0, draw=0):
    rows = torch.tensor([[sequence, 0, draw]]).repeat(num_rows, 1)
    rows[:, 1] = torch.arange(num_rows)
    return rows


@pytest.fixture(autouse=True)
def threads():
    """One thread, as the small operations here want; a test may ask for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def draw(logits, n, impl, seed=0, **options):
    """n tokens of one row of logits."""
    return sample_head(logits.expand(n, -1), None, keys=keys(n), seed=seed, impl=impl, **options).tokens


def check_law(tokens, logits):
    """Pearson's chi-square over ids with at least five expected draws, the rest pooled."""
    expected = len(tokens) * torch.softmax(logits.double(), dim=-1).numpy()
    observed = np.bincount(tokens.numpy(), minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    big = expected >= 5
    f_exp, f_obs = [*expected[big], expected[~big].sum()], [*observed[big], observed[~big].sum()]
    if f_exp[-1] < 5:
        f_exp, f_obs = f_exp[:-1], f_obs[:-1]
        f_exp = np.array(f_exp) * sum(f_obs) / sum(f_exp)
    p = stats.chisquare(f_obs, f_exp).pvalue
    assert p > 1e-3, f"chi-square p = {p:.2e} over {len(f_exp)} bins holding {sum(f_exp) / len(tokens):.4f} of the mass"


# --- law ------------------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("vocab_size", [500, 1000])
def test_law(impl, vocab_size):
    logits = normal(vocab_size, seed=vocab_size, scale=2.0)
    check_law(draw(logits, 200_000, impl), logits)


@compiled
@each_isa
def test_law_of_a_product_on_each_isa(isa):
    hidden, weight, offset = normal(1, 24), normal(700, 24, seed=1, scale=0.4), normal(700, seed=2)
    call = HeadCall(hidden.expand(200_000, -1), weight, offset, keys(200_000), seed=1)
    check_law(cpu.on_isa(isa, call).tokens, (hidden @ weight.T)[0] + offset)


@compiled
@pytest.mark.parametrize("vocab_size", [500, 50_258])
def test_law_over_a_million_draws(vocab_size):
    logits = normal(vocab_size, seed=vocab_size, scale=2.0)
    call = HeadCall(logits.expand(250_000, -1), None, None, keys(250_000), seed=3)
    tokens = [cpu.sample_head(replace(call, keys=keys(250_000, draw=n))).tokens for n in range(4)]
    check_law(torch.cat(tokens), logits)


@each_implementation
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_divides_the_logits(impl, temperature):
    logits = normal(300, seed=3, scale=1.5)
    check_law(draw(logits, 50_000, impl, temperature=temperature), logits / temperature)


@each_implementation
def test_logits_far_below_zero(impl):
    logits = normal(200, seed=4) - 1e4
    check_law(draw(logits, 50_000, impl), logits)


@each_implementation
def test_entropy_of_a_zipf_law(impl):
    p = 1 / torch.arange(1, 1001, dtype=torch.float64)
    p /= p.sum()
    counts = torch.bincount(draw(p.log().float(), 200_000, impl), minlength=1000)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * share.log()).sum() + (counts > 0).sum() / (2 * counts.sum())  # Miller and Madow's correction
    exact = -(p * p.log()).sum()
    assert abs(entropy - exact) < 0.01, f"entropy {entropy:.4f}, exact {exact:.4f}"


@compiled
def test_tail_of_many_improbable_ids():
    """262,144 ids, each 20.5 nats below the favourite: 32.76 tail draws expected in 100,000."""
    logits = torch.full((262_145,), -20.5)
    logits[100_000] = 0
    num_draws = 100_000
    tail = int((draw(logits, num_draws, "cpu") != 100_000).sum())
    mean = num_draws * 262_144 * math.exp(-20.5) / (1 + 262_144 * math.exp(-20.5))
    p = 2 * min(stats.poisson.cdf(tail, mean), stats.poisson.sf(tail - 1, mean))
    assert p > 1e-3, f"{tail} tail draws, expected {mean:.2f}"


@each_implementation
def test_tail_inside_one_block(impl):
    logits = torch.full((128,), -13.0)
    logits[77] = 0
    num_draws = 200_000
    tail = int((draw(logits, num_draws, impl) != 77).sum())
    mean = num_draws * 127 * math.exp(-13) / (1 + 127 * math.exp(-13))
    p = 2 * min(stats.poisson.cdf(tail, mean), stats.poisson.sf(tail - 1, mean))
    assert p > 1e-3, f"{tail} tail draws, expected {mean:.2f}"


@each_implementation
def test_draws_and_seeds_are_independent(impl):
    logits = torch.zeros(4096)
    runs = [
        sample_head(logits.expand(500, -1), None, keys=keys(500, sequence, draw), seed=seed, impl=impl).tokens
        for sequence, draw, seed in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**32)]
    ]
    assert all((a == b).sum() <= 4 for i, a in enumerate(runs) for b in runs[:i])


# --- options --------------------------------------------------------------------------------------------------------


def kept_law(logits, temperature=1.0, allow=None, top_k=None, top_p=None):
    """Probabilities [R, V] in fp64 by sorting ids: rows of logits after allow, temperature, top_k and top_p."""
    logits = logits.double() if allow is None else logits.double().masked_fill(~allow, -math.inf)
    p = (logits / torch.as_tensor(temperature).double().reshape(-1, 1)).softmax(1)
    order = p.argsort(dim=1, descending=True, stable=True)
    for row, ids in zip(p, order, strict=True):
        row[ids[top_k:] if top_k is not None else ids[:0]] = 0
        row /= row.sum()
        before = row[ids].cumsum(0) - row[ids]
        row[ids[before >= (2 if top_p is None else top_p)]] = 0
        row /= row.sum()
    return p


def bitmap(allowed):
    """bool [R, V] -> int32 [R, ceil(V / 32)], bit i % 32 of word i // 32."""
    packed = np.packbits(np.pad(allowed.numpy(), ((0, 0), (0, -allowed.shape[1] % 32))), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32))


@each_implementation
@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_k": 40}, {"top_p": 0.6}, {"top_k": 200, "top_p": 0.9}], ids=str)
def test_law_of_the_likeliest(impl, limits):
    logits = normal(500, seed=6, scale=2.0)
    tokens = draw(logits, 50_000, impl, temperature=1.4, **limits)
    p = kept_law(logits[None], 1.4, **limits)[0]
    assert (p[tokens] > 0).all()
    if limits != {"top_k": 1}:
        check_law(tokens, p.log())
        with pytest.raises(AssertionError):
            check_law(tokens, logits / 1.4)


@each_implementation
def test_ties_at_the_threshold_are_kept_from_the_lowest_id_on(impl):
    logits = torch.zeros(4, 400)
    logits[:, 300] = 1
    logits[1, :] = 0  # every id is tied
    logits[2, [3, 299]] = 1
    logits[3, [390, 7, 128, 127]] = 0.5
    for limits, kept in [
        ({"top_k": 3}, [[0, 1, 300], [0, 1, 2], [3, 299, 300], [7, 127, 300]]),
        ({"top_k": 1}, [[300], [0], [3], [300]]),
        ({"top_p": 0.006}, [[300], [0, 1, 2], [3], [300]]),
    ]:
        draws = torch.stack(
            [sample_head(logits, None, keys=keys(4, draw=n), seed=5, impl=impl, **limits).tokens for n in range(200)]
        )
        assert [column.unique().tolist() for column in draws.T] == kept


@each_implementation
@pytest.mark.parametrize("vocab_size", [5_000, 130_000])
def test_many_ties_are_counted(impl, vocab_size):
    """All ids but one are tied at the threshold; the log-sum-exp tells how many of them were kept."""
    logits = torch.full((1, vocab_size), -1.0)
    logits[0, vocab_size // 2] = 0
    for top_p in (0.3, 0.5, 0.9):
        found = sample_head(logits, None, keys=keys(1), seed=0, top_p=top_p, want=("lse",), impl=impl)
        kept = (found.lse.double().exp() - 1) / math.exp(-1)
        exact = math.ceil((top_p * (1 + (vocab_size - 1) * math.exp(-1)) - 1) / math.exp(-1))
        assert abs(kept.item() - exact) < 1 + 3e-6 * vocab_size, f"{kept.item():.1f} ids kept at {top_p}, exact {exact}"


@each_implementation
@pytest.mark.parametrize("limits", [{}, {"top_k": 7}, {"top_p": 0.5}], ids=str)
def test_everything_wanted_against_fp64(impl, limits):
    hidden, weight, bias = normal(12, 40, scale=0.7), normal(700, 40, seed=1, scale=0.4), normal(700, seed=2)
    temperature = torch.tensor([1.0, 0.5, 2.0, 0.0]).repeat(3)
    allowed = torch.rand(12, 700, generator=torch.Generator().manual_seed(3)) < 0.8
    allowed[5] = False
    allowed[5, 413] = True
    want = "logprob", "lse", "max_prob", "argmax", "margin", "entropy"
    options = {"temperature": temperature, "allow": bitmap(allowed), "want": want, **limits}
    found = sample_head(hidden, weight, bias, keys=keys(12), seed=4, impl=impl, **options)
    logits = hidden.double() @ weight.double().T + bias.double()
    divisor = torch.where(temperature > 0, temperature, 1)
    p = kept_law(logits, divisor, allowed, **limits)
    best, second = p.topk(2).values.unbind(1)
    kept = torch.where(p > 0, logits / divisor.double()[:, None], -math.inf)
    exact = {
        "logprob": p.gather(1, found.tokens[:, None])[:, 0].log(),
        "lse": kept.logsumexp(1),
        "max_prob": best,
        "margin": best - second,
        "entropy": torch.special.entr(p).sum(1),
    }
    for name, value in exact.items():
        torch.testing.assert_close(
            getattr(found, name), value.float(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m
        )
    assert torch.equal(found.argmax, p.argmax(1))
    greedy = temperature == 0
    assert torch.equal(found.tokens[greedy], p.argmax(1)[greedy]) and found.tokens[5] == 413
    assert sample_head(hidden, weight, bias, keys=keys(12), seed=4, impl=impl)[1:] == (None,) * 6


@each_implementation
def test_temperature_by_row(impl):
    logits = normal(300, seed=3, scale=1.5)
    temperature = torch.tensor([0.5, 0.0, 1.7, 1.0]).repeat(12_500)
    tokens = draw(logits, 50_000, impl, temperature=temperature)
    for value in (0.5, 1.7, 1.0):
        check_law(tokens[temperature == value], logits / value)
    assert (tokens[temperature == 0] == logits.argmax()).all()


@each_implementation
def test_ids_that_are_not_allowed_are_never_drawn(impl):
    logits = torch.zeros(20_000, 300)
    allowed = torch.ones(20_000, 300, dtype=torch.bool)
    logits[:, 31] = 50
    logits[::2, 299] = math.nan  # a logit that is not allowed is not looked at
    allowed[:, 31], allowed[::2, 299], allowed[1::2, 160:] = False, False, False
    tokens = sample_head(logits, None, keys=keys(20_000), allow=bitmap(allowed), seed=1, impl=impl).tokens
    for half in (slice(0, None, 2), slice(1, None, 2)):
        check_law(tokens[half], torch.where(allowed[half][0], 0.0, -math.inf))


@each_implementation
def test_rows_are_gathered_and_tokens_scattered(impl):
    hidden, weight = normal(9, 33), normal(400, 33, seed=1, scale=0.5)
    rows = torch.tensor([8, 0, 3, 3, 8, 1])
    options = {"keys": keys(6), "seed": 7, "want": ("logprob", "lse"), "impl": impl}
    plain = sample_head(hidden[rows], weight, **options)
    buffer, positions = torch.full((4, 5), -1), torch.tensor([19, 2, 7, 0, 12, 5])
    gathered = sample_head(hidden, weight, rows=rows, out=(buffer, positions), **options)
    for ours, theirs in zip(gathered[:3], plain[:3], strict=True):
        assert torch.equal(ours, theirs)
    expected = torch.full((20,), -1).index_put((positions,), plain.tokens)
    assert torch.equal(buffer.view(-1), expected)


@each_implementation
def test_unchecked_rows_write_nothing(impl):
    logits = normal(4, 200)
    logits[1, 150], logits[2] = math.nan, -math.inf
    buffer = torch.full((4,), -5)
    options = {"keys": keys(4), "seed": 0, "out": (buffer, torch.arange(4)), "impl": impl}
    with pytest.raises(NonFiniteLogits, match=r"position 1 \(row 1\)"):
        sample_head(logits, None, **options)
    assert (buffer == -5).all()
    found = sample_head(logits, None, check=False, want=("lse",), **options)
    assert found.tokens[1:3].tolist() == [-1, -1] and (found.tokens[[0, 3]] >= 0).all()
    assert found.lse[1].isnan() and found.lse[2] == -math.inf and found.lse[[0, 3]].isfinite().all()
    assert buffer.tolist() == [found.tokens[0], -5, -5, found.tokens[3]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
def test_torch_compile_takes_it_whole():
    hidden, weight, buffer = normal(5, 8), normal(90, 8, seed=1), torch.zeros(9, dtype=torch.int64)

    def run(hidden):
        drawn = sample_head(
            hidden * 2, weight, keys=keys(5), seed=2**64 - 1, top_k=9, out=(buffer, torch.arange(5)), want=("lse",)
        )
        return drawn.tokens + 1, drawn.lse

    eager = run(hidden)
    buffer.zero_()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(hidden)
    assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])
    assert torch.equal(buffer[:5] + 1, eager[0]) and not buffer[5:].any()
    with pytest.raises(NonFiniteLogits):
        torch.compile(run, backend="aot_eager", fullgraph=True)(hidden * math.nan)


# --- ends -----------------------------------------------------------------------------------------------------------


@each_implementation
def test_forbidden_ids_are_never_drawn(impl):
    logits = torch.zeros(300)
    logits[[5, 130, 299]] = 50
    logits[299] = math.nan  # a forbidden logit is not looked at
    forbid = torch.tensor([299, 5, 130])
    tokens = draw(logits, 20_000, impl, forbid=forbid)
    assert not torch.isin(tokens, forbid).any()
    check_law(tokens, logits.index_fill(0, forbid, -math.inf))


@each_implementation
def test_ids_with_minus_infinity_are_never_drawn(impl):
    logits = torch.full((1000,), -math.inf)
    logits[[3, 640]] = torch.tensor([-5.0, -5.5])
    check_law(draw(logits, 5_000, impl), logits)


@each_implementation
def test_greedy_takes_the_lowest_of_equals(impl):
    logits = normal(4, 1000, seed=5)
    logits[0, [7, 9, 800]] = 9
    logits[1, [999, 256, 255]] = 9
    logits[2] = 0
    logits[3, :] = -3
    logits[3, 0] = -4
    result = sample_head(logits, None, keys=keys(4), seed=0, temperature=0, want=("lse", "logprob"), impl=impl)
    assert result.tokens.tolist() == [7, 255, 0, 1]
    torch.testing.assert_close(result.lse, logits.logsumexp(1))
    torch.testing.assert_close(result.logprob, logits.log_softmax(1).gather(1, result.tokens[:, None])[:, 0])


@each_implementation
@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129])
def test_few_rows_and_odd_vocabularies(impl, num_rows, vocab_size):
    hidden, weight = normal(num_rows, 5), normal(vocab_size, 5, seed=1)
    result = sample_head(hidden, weight, keys=keys(num_rows), seed=0, want=("lse", "logprob"), impl=impl)
    assert result.tokens.shape == result.lse.shape == result.logprob.shape == (num_rows,)
    assert result.tokens.dtype == torch.int64 and result.lse.dtype == torch.float32
    torch.testing.assert_close(result.lse, (hidden @ weight.T).logsumexp(1))


# --- values ---------------------------------------------------------------------------------------------------------

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float16),
]


@each_implementation
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_lse_and_logprob_against_fp64(impl, dtypes, temperature):
    hidden, weight = normal(9, 333, dtype=dtypes[0]), normal(1337, 333, seed=1, scale=0.1, dtype=dtypes[1])
    bias, forbid = normal(1337, seed=2), torch.tensor([3, 1336])
    options = {"temperature": temperature, "forbid": forbid, "want": ("lse", "logprob")}
    result = sample_head(hidden, weight, bias, keys=keys(9), seed=4, **options, impl=impl)
    exact = hidden.double() @ weight.double().T + bias.double()
    exact = exact.index_fill(1, forbid, -math.inf) / (temperature or 1)
    torch.testing.assert_close(result.lse, exact.logsumexp(1).float(), rtol=2e-6, atol=2e-6)
    logprob = exact.log_softmax(1).gather(1, result.tokens[:, None])[:, 0]
    torch.testing.assert_close(result.logprob, logprob.float(), rtol=1e-5, atol=1e-5)


def test_reference_computes_in_fp64_when_given_fp64():
    hidden, weight = normal(3, 40).double(), normal(500, 40, seed=1).double()
    sample = reference.sample_head(HeadCall(hidden, weight, None, keys(3), seed=0))
    torch.testing.assert_close(sample.lse, (hidden @ weight.T).logsumexp(1), rtol=1e-14, atol=0)


def race_gap(logits, rows_keys, seed):
    """How far the best score is ahead of the second, in the narrower of a row's two races."""
    blocks = torch.nn.functional.pad(logits, (0, -logits.shape[1] % 128), value=-math.inf).unflatten(1, (-1, 128))
    scores = blocks.logsumexp(2) + noise.block_gumbel(seed, rows_keys, blocks.shape[1])
    winner = scores.argmax(1)
    ids = winner[:, None] * 128 + torch.arange(128)
    inside = blocks[torch.arange(len(logits)), winner] + noise.token_gumbel(seed, rows_keys, ids)
    between, within = scores.topk(2).values.diff().abs()[:, 0], inside.topk(2).values.diff().abs()[:, 0]
    return torch.minimum(between, within)


@compiled
@each_isa
@pytest.mark.parametrize("dtypes", DTYPES)
def test_cpu_draws_the_tokens_of_the_reference(isa, dtypes):
    hidden, weight = normal(400, 130, dtype=dtypes[0]), normal(3001, 130, seed=1, scale=0.2, dtype=dtypes[1])
    offset = normal(3001, seed=2).index_fill(0, torch.tensor([0, 3000]), -math.inf)
    call = HeadCall(hidden, weight, offset, keys(400), seed=9, temperature=0.9)
    ours, theirs = cpu.on_isa(isa, call).tokens, reference.sample_head(call).tokens
    gaps = race_gap((hidden.float() @ weight.float().T + offset) / 0.9, keys(400), 9)
    differ = ours != theirs
    print(f"\n{isa}: {int(differ.sum())} of {len(ours)} tokens differ, {int((gaps < 1e-5).sum())} rows are near ties")
    assert (gaps[differ] < 1e-5).all()


EVERYTHING = "logprob", "lse", "max_prob", "argmax", "margin", "entropy"
LIMITS = [
    {},
    {"top_k": 1},
    {"top_k": 30},
    {"top_k": 2000},
    {"top_p": 1e-30},
    {"top_p": 0.4},
    {"top_k": 900, "top_p": 0.97},
]


def busy_call(num_rows, dtypes=(torch.float32, torch.float32), **limits):
    """Every option at once: repeated rows in any order, temperatures by row, ids not allowed, some of them NaN."""
    rng = torch.Generator().manual_seed(num_rows)
    hidden, weight = normal(90, 70, dtype=dtypes[0]), normal(3001, 70, seed=1, scale=0.3, dtype=dtypes[1])
    weight[[130, 2999], 5] = math.nan
    allowed = torch.rand(num_rows, 3001, generator=rng) < 0.9
    allowed[:, 130] = False
    return HeadCall(
        hidden,
        weight,
        normal(3001, seed=2).index_fill(0, torch.tensor([0, 2999]), -math.inf),
        keys(num_rows),
        seed=9,
        temperature=torch.tensor([1.0, 0.0, 0.7, 1.9])[torch.randint(4, (num_rows,), generator=rng)],
        allow=bitmap(allowed),
        rows=torch.randint(90, (num_rows,), generator=rng),
        want=EVERYTHING,
        **limits,
    )


def tempered(call):
    """Logits of a busy_call in fp64 with nothing truncated, and whether an id may be drawn."""
    bits = call.allow[:, torch.arange(3001) >> 5] >> (torch.arange(3001) & 31) & 1
    logits = call.hidden[call.rows].double() @ call.weight.double().T + call.offset.double()
    divisor = torch.where(call.temperature > 0, call.temperature, 1).double()
    return logits.masked_fill((bits == 0) | (call.offset == -math.inf), -math.inf) / divisor[:, None]


def clear_cut(logits, top_k=None, top_p=None):
    """Rows [R] whose kept ids do not hang on the rounding of a logit or of a mass."""
    p, clear = logits.softmax(1).sort(dim=1, descending=True).values, torch.ones(len(logits), dtype=torch.bool)
    if top_k is not None:
        clear = p[:, top_k - 1] > p[:, top_k] * (1 + 1e-4)
        p = p[:, :top_k] / p[:, :top_k].sum(1, keepdim=True)
    if top_p is not None:
        clear &= ((p.cumsum(1) - p - top_p).abs() > 1e-5)[:, 1:].all(1)  # the first is always kept
    return clear


@compiled
@each_isa
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_cpu_serves_every_option_as_the_reference_does(isa, limits):
    call = busy_call(260, **limits)
    found, expected = cpu.on_isa(isa, call), reference.sample_head(call)
    logits = tempered(call)
    clear = clear_cut(logits, **limits)
    p = kept_law(logits, **limits)
    kept = torch.where(p > 0, logits, -math.inf)
    ties = (race_gap(kept.float(), call.keys, 9) < 1e-5) & (call.temperature > 0)
    differ = clear & (found.tokens != expected.tokens)
    print(f"\n{isa}: {int(differ.sum())} tokens differ, {int(ties.sum())} near ties, {int((~clear).sum())} near cuts")
    assert clear.sum() >= 200 and (ties | ~differ).all()
    assert (p.gather(1, found.tokens[:, None]) > 0)[clear].all()
    best, second = p.topk(2).values.unbind(1)
    exact = {
        "logprob": kept.log_softmax(1).gather(1, found.tokens[:, None])[:, 0],
        "lse": kept.logsumexp(1),
        "max_prob": best,
        "margin": best - second,
        "entropy": torch.special.entr(p).sum(1),
    }
    for name, value in exact.items():
        ours = getattr(found, name)[clear]
        torch.testing.assert_close(ours, value.float()[clear], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(found.argmax, p.argmax(1))


@compiled
@each_isa
def test_wanted_values_are_as_good_as_torch_in_the_same_dtype(isa):
    """Against fp64, no farther than fp32 torch at its worst, plus 4e-7 and an ulp of lse, which merges blocks."""
    logits = normal(60, 5000, seed=8) * torch.tensor([0.01, 1.0, 8.0]).repeat(20)[:, None]
    logits += torch.tensor([0.0, -80.0, 300.0, 0.0])[torch.arange(60) % 4, None]
    found = cpu.on_isa(isa, HeadCall(logits, None, None, keys(60), seed=0, want=EVERYTHING))

    def values(logits):
        p = logits.softmax(1)
        top = p.topk(2).values
        return {
            "lse": logits.logsumexp(1),
            "max_prob": top[:, 0],
            "margin": top[:, 0] - top[:, 1],
            "entropy": torch.special.entr(p).sum(1),
        }

    for (name, exact), theirs in zip(values(logits.double()).items(), values(logits).values(), strict=True):
        scale = exact.abs().clamp(min=0.1)
        ours, torchs = ((one.double() - exact).abs() / scale for one in (getattr(found, name), theirs))
        slack = 4e-7 + found.lse.double().abs() * 2.0**-23
        assert (ours <= torchs.max() + slack).all(), f"{name}: {ours.max():.1e} from fp64, torch {torchs.max():.1e}"


@compiled
@each_isa
def test_truncation_among_many_equals(isa):
    """Integer logits of both signs, zeros of both signs: the kept ids are known exactly, and the draws lie in them."""
    logits = torch.randint(-3, 3, (40, 1000), generator=torch.Generator().manual_seed(0)).float()
    logits[::2] *= -1  # and 0 becomes -0.0
    logits[3::4, ::3] = -math.inf
    for limits in (
        {"top_k": 1},
        {"top_k": 77},
        {"top_k": 999},
        {"top_p": 0.03},
        {"top_p": 0.77},
        {"top_k": 300, "top_p": 0.6},
    ):
        p = kept_law(logits, **limits)
        for n in range(20):
            found = cpu.on_isa(isa, HeadCall(logits, None, None, keys(40, draw=n), seed=n, want=EVERYTHING, **limits))
            assert (p.gather(1, found.tokens[:, None]) > 0).all()
        kept = torch.where(p > 0, logits, -math.inf)
        torch.testing.assert_close(found.lse, kept.logsumexp(1), rtol=1e-6, atol=1e-6)
        assert torch.equal(found.argmax, kept.argmax(1))


@compiled
@each_isa
def test_one_id_kept_is_the_greedy_one(isa):
    logits = normal(50, 3000, seed=4).bfloat16().float()  # coarse: the largest are often equal
    logits[7, 100:110] = 9
    greedy = cpu.on_isa(isa, HeadCall(logits, None, None, keys(50), seed=0, temperature=0.0)).tokens
    assert torch.equal(greedy, logits.argmax(1))
    for limits in ({"top_k": 1}, {"top_p": 1e-38}, {"top_k": 5, "top_p": 1e-9}):
        found = cpu.on_isa(isa, HeadCall(logits, None, None, keys(50), seed=0, want=EVERYTHING, **limits))
        assert torch.equal(found.tokens, greedy) and (found.entropy < 1e-30).all() and not found.logprob.any()
        assert (found.max_prob == 1).all() and (found.margin == 1).all()


@compiled
@each_isa
@pytest.mark.parametrize("limits", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_rows_are_marked_and_the_others_unharmed(isa, limits, temperature):
    logits = normal(6, 700, seed=2)
    call = HeadCall(logits, None, None, keys(6), seed=0, temperature=temperature, want=EVERYTHING, **limits)
    good = cpu.on_isa(isa, call)
    logits[1, 690], logits[2, 5], logits[3] = math.nan, math.inf, -math.inf
    logits[4, 9] = -math.inf
    found = cpu.on_isa(isa, call)
    assert found.tokens[1:4].tolist() == found.argmax[1:4].tolist() == [-1, -1, -1]
    assert not found.lse[1:3].isfinite().any() and found.lse[3] == -math.inf
    for name in ("logprob", "max_prob", "margin", "entropy"):
        assert getattr(found, name)[1:4].isnan().all() and getattr(found, name)[[0, 4, 5]].isfinite().all()
    assert torch.equal(bits(found)[:, ::5], bits(good)[:, ::5])


@compiled
def test_every_output_and_buffer_is_written():
    """With torch's new tensors full of NaN and the allocator's memory full of large numbers, nothing changes."""
    program = """
import torch
from unmask.kernels.sample_head import cpu
from unmask.kernels.sample_head.call import EXTRAS, HeadCall
torch.set_num_threads(1)
hidden, weight, keys = torch.arange(150.0).view(-1, 1) % 7, torch.arange(1001.0).view(-1, 1) % 5, torch.zeros(150, 3)
plain = torch.empty
torch.empty = lambda *shape, dtype: plain(*shape, dtype=dtype).fill_(-7 if dtype == torch.int64 else torch.nan)
for top_k in (None, 9):
    call = HeadCall(hidden, weight, None, keys.long(), seed=0, temperature=9.0, top_k=top_k, want=EXTRAS)
    print([field.double().sum().item() for field in cpu.sample_head(call)])
"""
    plain, filled = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env).stdout
        for env in (os.environ, os.environ | {"MALLOC_PERTURB_": "128"})  # every byte 0x7f: 3.4e38
    )
    assert plain == filled and "nan" not in plain and "inf" not in plain and plain.count("[") == 2


# --- row invariance -------------------------------------------------------------------------------------------------


@compiled
@each_isa
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_row_does_not_depend_on_its_company(isa, dtypes, threads):
    hidden, weight = normal(150, 70, dtype=dtypes[0]), normal(1500, 70, seed=1, scale=0.2, dtype=dtypes[1])

    def run(rows):
        call = HeadCall(hidden[rows], weight, None, keys(150)[rows], seed=3, temperature=1.3)
        sample = cpu.on_isa(isa, call)
        return torch.stack([x.double() for x in (sample.tokens, sample.logprob, sample.lse)])

    threads(2)
    everything = run(torch.arange(150))
    shuffled = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(shuffled), everything[:, shuffled])
    threads(1)
    assert torch.equal(run(torch.arange(150)), everything)
    for size in (1, 2, 5, 7, 64):
        split = torch.cat([run(rows) for rows in torch.arange(70).split(size)], dim=1)
        assert torch.equal(split, everything[:, :70])


def pick(call, rows):
    """The call for some of its rows."""
    temperature = call.temperature[rows] if isinstance(call.temperature, torch.Tensor) else call.temperature
    of_rows = torch.arange(len(call.hidden)) if call.rows is None else call.rows
    allow = None if call.allow is None else call.allow[rows]
    return replace(call, keys=call.keys[rows], temperature=temperature, allow=allow, rows=of_rows[rows])


def bits(sample):
    return torch.stack([field.double() for field in sample]).nan_to_num()


@compiled
@each_isa
@pytest.mark.parametrize("limits", [{}, {"top_k": 50}, {"top_p": 0.8}], ids=str)
def test_no_option_makes_a_row_depend_on_its_company(isa, limits, threads):
    call = busy_call(300, (torch.bfloat16, torch.bfloat16), **limits)
    given = replace(call, hidden=normal(90, 3001, seed=6, scale=2.0), weight=None)
    for one in (call, given):
        threads(2)
        everything = bits(cpu.on_isa(isa, one))
        shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
        assert torch.equal(bits(cpu.on_isa(isa, pick(one, shuffled))), everything[:, shuffled])
        for num_threads, size in ((1, 300), (3, 7), (2, 127), (1, 128), (2, 129)):
            threads(num_threads)
            parts = [bits(cpu.on_isa(isa, pick(one, rows))) for rows in torch.arange(300).split(size)]
            assert torch.equal(torch.cat(parts, dim=1), everything)
        plain = cpu.on_isa(isa, replace(one, want=()))
        assert torch.equal(plain.tokens.double(), everything[0]) and torch.equal(plain.lse.double(), everything[2])


@compiled
def test_allow_may_be_shared_or_strided():
    call = busy_call(20)
    for words in (call.allow[:1].expand(20, -1), torch.stack([call.allow, call.allow], 2)[:, :, 1]):
        found, plain = (cpu.sample_head(replace(call, allow=allow)) for allow in (words, words.clone()))
        assert torch.equal(found.tokens, plain.tokens) and torch.equal(found.lse, plain.lse)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_logits_do_not_depend_on_company_or_strides(dtype, threads):
    logits = normal(140, 5000, scale=3, dtype=dtype)
    threads(2)
    everything = sample_head(logits, None, keys=keys(140), seed=1, impl="cpu", want=("lse",))
    columns = sample_head(logits.T.contiguous().T, None, keys=keys(140), seed=1, impl="cpu", want=("lse",))
    threads(1)
    alone = [sample_head(logits[i : i + 1], None, keys=keys(140)[i : i + 1], seed=1, impl="cpu") for i in range(140)]
    assert torch.equal(columns.tokens, everything.tokens) and torch.equal(columns.lse, everything.lse)
    assert torch.cat([one.tokens for one in alone]).equal(everything.tokens)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(impl, dtype):
    hidden, weight = normal(37, 150, dtype=dtype), normal(800, 150, seed=1, scale=0.2, dtype=dtype)
    holes = torch.zeros(13, 3, 150, dtype=dtype)
    holes[:, 1, ::2] = hidden[:13, :75]
    wide_keys = torch.zeros(13, 6, dtype=torch.int64)
    wide_keys[:, ::2] = keys(13)
    options = {"seed": 2, "impl": impl, "want": ("lse",)}
    plain = sample_head(hidden[:13, :75].clone(), weight[100:, 3:78].clone(), keys=keys(13), **options)
    strided = sample_head(holes[:, 1, ::2], weight[100:, 3:78], keys=wide_keys[:, ::2], **options)
    assert torch.equal(plain.tokens, strided.tokens)
    torch.testing.assert_close(plain.lse, strided.lse)


# --- errors ---------------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 700, 999])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_name_sequence_and_position(impl, bad, column, temperature):
    logits = torch.zeros(5, 1000)
    logits[2:, column] = bad
    with pytest.raises(NonFiniteLogits, match=r"sequence 41, position 2 \(row 2\): a logit is NaN or \+inf"):
        sample_head(logits, None, keys=keys(5, sequence=41), seed=0, temperature=temperature, impl=impl)


@each_implementation
def test_non_finite_weights(impl):
    weight = normal(300, 8)
    weight[129, 3] = math.nan
    with pytest.raises(NonFiniteLogits, match="sequence 0, position 0"):
        sample_head(normal(2, 8), weight, keys=keys(2), seed=0, impl=impl)


@each_implementation
def test_nan_among_minus_infinities(impl):
    logits = torch.full((2, 300), -math.inf)
    logits[:, 5] = 0
    logits[1, 200] = math.nan
    with pytest.raises(NonFiniteLogits, match=r"position 1 .*NaN"):
        sample_head(logits, None, keys=keys(2), seed=0, impl=impl)


@each_implementation
def test_everything_forbidden(impl):
    logits = torch.zeros(3, 200)
    logits[1] = -math.inf
    with pytest.raises(NonFiniteLogits, match=r"sequence 6, position 1 \(row 1\): every id is forbidden"):
        sample_head(logits, None, keys=keys(3, sequence=6), seed=0, impl=impl)
    with pytest.raises(NonFiniteLogits, match=r"sequence 6, position 0 .*every id is forbidden"):
        sample_head(normal(3, 4), normal(9, 4), keys=keys(3, 6), seed=0, forbid=torch.arange(9), impl=impl)


@each_implementation
def test_overflow_by_a_tiny_temperature_is_named(impl):
    with pytest.raises(NonFiniteLogits, match=r"after division by temperature 2e-38"):
        sample_head(torch.full((1, 9), 10.0), None, keys=keys(1), seed=0, temperature=2e-38, impl=impl)


BUFFER = torch.full((9,), -7)


def good():
    buffer = {"out": (BUFFER, torch.arange(4)), "want": ("lse",)}
    return {"hidden": normal(4, 6), "weight": normal(50, 6), "keys": keys(4), "seed": 0} | buffer


BAD = [
    ({"hidden": [1.0]}, TypeError, r"hidden must be a tensor \[N, D\], got list"),
    ({"hidden": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "hidden must be float32 or .*, got int32"),
    ({"hidden": torch.zeros(4)}, ValueError, r"hidden must be a dense tensor \[N, D\], got shape \[4\]"),
    ({"hidden": torch.zeros(4, 0), "weight": torch.zeros(50, 0)}, ValueError, "hidden must have at least one column"),
    ({"weight": torch.zeros(50, 7)}, ValueError, r"weight must be \[V, 6\] for this hidden, got shape \[50, 7\]"),
    ({"weight": torch.zeros(0, 6)}, ValueError, r"weight must be \[V, 6\] for this hidden, got shape \[0, 6\]"),
    (
        {"weight": torch.zeros(50, 6, device="meta")},
        ValueError,
        "weight must be on the device of hidden, cpu, got meta",
    ),
    ({"bias": torch.zeros(49)}, ValueError, r"bias must be \[50\], one number per id, got shape \[49\]"),
    ({"bias": torch.zeros(50, dtype=torch.int64)}, TypeError, "bias must be float32 or"),
    ({"weight": None, "bias": torch.zeros(7)}, ValueError, r"bias must be \[6\], one number per id, got shape \[7\]"),
    ({"keys": keys(3)}, ValueError, r"keys must be \[4, 3\], one per row, got shape \[3, 3\]"),
    ({"keys": keys(4).int()}, TypeError, "keys must be int64, got int32"),
    ({"keys": keys(4) - 1}, ValueError, r"keys: sequence must be in \[0, 2\*\*32\), got -1 in row 0"),
    ({"keys": keys(4, sequence=2**32)}, ValueError, "keys: sequence must be in .*got 4294967296 in row 0"),
    ({"keys": keys(4, draw=2**24)}, ValueError, r"keys: draw must be in \[0, 2\*\*24\), got 16777216 in row 0"),
    ({"seed": -1}, ValueError, "seed must satisfy"),
    ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ({"temperature": -1.0}, ValueError, "temperature must be 0 or a positive normal fp32 number, got -1.0"),
    ({"temperature": math.nan}, ValueError, "temperature must be 0 or .*got nan"),
    ({"temperature": math.inf}, ValueError, "temperature must be 0 or .*got inf"),
    ({"temperature": 1e-40}, ValueError, "temperature must be 0 or .*got 1e-40"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
    ({"temperature": True}, TypeError, "temperature must be a number, got True"),
    ({"forbid": torch.tensor([50])}, ValueError, r"forbid must be in \[0, 50\), got 50"),
    ({"forbid": torch.tensor([-1])}, ValueError, r"forbid must be in \[0, 50\), got -1"),
    ({"forbid": [1]}, TypeError, r"forbid must be a tensor \[K\], got list"),
    ({"want": "lse"}, ValueError, "want must be a tuple of names"),
    ({"want": ("surprise",)}, ValueError, "want must be a tuple of names"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature must be a number or \[4\], got shape \[3\]"),
    ({"temperature": torch.ones(4).double()}, TypeError, "temperature must be float32, got float64"),
    ({"temperature": torch.tensor([1, 0, -1.0, 1])}, ValueError, "temperature must be 0 or .*got -1.0 in row 2"),
    ({"temperature": torch.tensor([1, 0, 1, math.nan])}, ValueError, "temperature must be 0 or .*got nan in row 3"),
    ({"allow": torch.ones(4, 3, dtype=torch.int32)}, ValueError, r"allow must be \[4, 2\], got shape \[4, 3\]"),
    ({"allow": torch.ones(4, 50, dtype=torch.bool)}, TypeError, "allow must be int32, got bool"),
    ({"rows": torch.tensor([0, 1, 2, 4])}, ValueError, r"rows must be in \[0, 4\), got 4"),
    ({"rows": torch.tensor([0])}, ValueError, r"keys must be \[1, 3\], one per row, got shape \[4, 3\]"),
    ({"rows": [0, 1]}, TypeError, r"rows must be a tensor \[R\], got list"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k": 2.0}, TypeError, "top_k must be an integer or None, got 2.0"),
    ({"top_k": True}, TypeError, "top_k must be an integer or None, got True"),
    ({"top_p": 0.0}, ValueError, "top_p must satisfy 0 < top_p <= 1, got 0.0"),
    ({"top_p": 1.1}, ValueError, "top_p must satisfy .*got 1.1"),
    ({"top_p": math.nan}, ValueError, "top_p must satisfy .*got nan"),
    ({"top_p": "most"}, TypeError, "top_p must be a number or None, got 'most'"),
    ({"out": torch.zeros(9, dtype=torch.int64)}, TypeError, "out must be a pair .buffer, positions., got Tensor"),
    ({"out": (BUFFER, torch.tensor([0, 1, 9, 3]))}, ValueError, r"out positions must be in \[0, 9\), got 9"),
    ({"out": (BUFFER, torch.tensor([0, 1]))}, ValueError, r"out positions must be \[4\], one per row, got shape \[2\]"),
    ({"out": (BUFFER.int(), torch.arange(4))}, TypeError, "out buffer must be an int64 tensor, got int32"),
    ({"out": (BUFFER.view(3, 3).T, torch.arange(4))}, ValueError, "out buffer must be contiguous .*got strides"),
    (
        {"impl": "gpu"},
        ValueError,
        "impl of sample_head must be None or one of 'cuda', 'triton', 'cpu', 'reference', got 'gpu'",
    ),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_arguments_write_nothing(change, error, message):
    BUFFER.fill_(-7)
    with pytest.raises(error, match=message):
        sample_head(**good() | change)
    assert (BUFFER == -7).all()


@compiled
@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": normal(4, 6).double()}, "needs hidden in float32, bfloat16 or float16, got float64"),
        ({"weight": normal(50, 6).double()}, "needs weight in float32, bfloat16 or float16, got float64"),
        ({"weight": normal(6, 50).T}, r"needs the columns of weight contiguous, got strides \(1, 50\)"),
    ],
)
def test_what_cpu_refuses_reference_serves(change, message):
    with pytest.raises(UnsupportedImplementation, match=message + ".*supported here: .*reference"):
        sample_head(**good() | change, impl="cpu")
    assert sample_head(**good() | change).tokens.shape == (4,)


@compiled
def test_the_border_of_the_extension_checks_for_itself():
    numbers = torch.tensor([1.0, math.nan]), torch.tensor([0, -1, 1])
    temperature, rows = (tensor.data_ptr() for tensor in numbers)
    hidden, weight = (1, "float32", (1, 4), (4, 1)), (1, "float32", (8, 4), (4, 1))

    def logits(hidden=hidden, weight=weight, rows=0, num_rows=1, temperature=temperature):
        return {"logits": (hidden, weight, rows, num_rows, 0, temperature)}

    good = logits() | {
        "allow": (0, 0), "keys": 1, "seed": 0, "top_k": 0, "top_p": 1.0, "threads": 1, "tokens": 1, "logprob": 1,
        "lse": 1, "max_prob": 0, "argmax": 0, "margin": 0, "entropy": 0,
    }  # fmt: skip
    for change, message in [
        (logits(hidden=(0, "float32", (1, 4), (4, 1))), "hidden must have an address"),
        (logits(hidden=(1, "float64", (1, 4), (4, 1))), "hidden must be float32, bfloat16 or float16, got float64"),
        (logits(hidden=(1, "float32", (1, 0), (4, 1))), "hidden must have at least one column"),
        (logits(weight=(1, "float32", (8, 5), (4, 1))), "weight must be"),
        (logits(weight=(1, "float32", (0, 4), (4, 1))), "weight must be"),
        (logits(weight=(1, "float32", (8, 4), (1, 8))), "weight must have contiguous columns"),
        (logits(num_rows=2), "rows must be given unless num_rows is that of hidden"),
        (logits(rows=rows, num_rows=-1), "rows must be given unless"),
        (logits(rows=rows, num_rows=2), "rows must be rows of hidden"),
        (logits(rows=rows + 16, num_rows=1), "rows must be rows of hidden"),
        (logits(temperature=temperature + 4), "temperature must be finite"),
        (logits(temperature=0), "temperature must have an address"),
        ({"top_k": -1}, "top_k must be positive, or 0"),
        ({"top_p": 0.0}, "top_p must satisfy"),
        ({"top_p": math.nan}, "top_p must satisfy"),
        ({"threads": 0}, "threads must be positive"),
        ({"tokens": 0}, "must have an address"),
        ({"isa": "sse9"}, "isa must be one of .*portable, got sse9"),
    ]:
        with pytest.raises(ValueError, match=message):
            extension._cpu.sample_head(**good | change)


# --- dispatch -------------------------------------------------------------------------------------------------------


def test_explain_lists_every_implementation_with_a_reason():
    lines = {line.implementation: line for line in dispatch.explain() if line.operator == "sample_head"}
    assert list(lines) == ["cuda", "triton", "cpu", "reference"]
    assert all(line.reason for line in lines.values())
    gpu = "cuda" if "cuda" in lines and lines["cuda"].usable else "triton"
    fastest = gpu if torch.cuda.is_available() else "cpu" if usable else "reference"
    assert [name for name, line in lines.items() if line.picked] == [fastest]


def test_without_the_extension_reference_serves():
    program = """
import sys
sys.modules["unmask.kernels._cpu"] = None
import torch
from unmask.kernels import dispatch, sample_head
arguments = dict(keys=torch.zeros(2, 3, dtype=torch.int64), seed=0)
print(sample_head(torch.zeros(2, 4), torch.zeros(9, 4), **arguments).tokens.shape)
try:
    sample_head(torch.zeros(2, 4), torch.zeros(9, 4), **arguments, impl="cpu")
except dispatch.UnsupportedImplementation as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "torch.Size([2])" in done.stdout
    assert "is missing" in done.stdout and "UNMASK_CPU=1" in done.stdout
    assert re.search("supported here: .*reference", done.stdout)
