"""sample_head in Triton: the same tokens as the reference, every option, its law, and the same bits whatever the tiles.

On a machine without a GPU the kernels run in Triton's interpreter, from the same tests.
"""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from unmask.kernels import noise, sample_head
from unmask.kernels.dispatch import UnsupportedImplementation, triton_status
from unmask.kernels.sample_head import reference, triton_limits
from unmask.kernels.sample_head.call import EXTRAS, HeadCall, HeadSample

usable, reason = triton_status()
if not usable:
    pytest.skip(reason, allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from unmask.kernels import triton_noise  # noqa: E402
from unmask.kernels.sample_head import triton_kernel  # noqa: E402
from unmask.kernels.sample_head.triton_config import TABLES, Config, choose_config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def keys(num_rows):
    rows = torch.arange(num_rows)
    return torch.stack([rows % 7 + 2**32 - 9, rows, rows % 3], dim=1).to(DEVICE)


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype).to(DEVICE)


def integers(*shape, low=-3, high=4, seed=0, dtype=torch.int64):
    values = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def exact_logits(call):
    """Tempered logits [R, V] in fp64, -inf where an id cannot be drawn."""
    hidden = call.hidden.double() if call.rows is None else call.hidden.double()[call.rows]
    logits = hidden if call.weight is None else hidden @ call.weight.double().T
    ids = torch.arange(call.vocab_size, device=DEVICE)
    if call.offset is not None:
        logits = (logits + call.offset).masked_fill(call.offset == -math.inf, -math.inf)
    if call.allow is not None:
        logits = logits.masked_fill((call.allow[:, ids >> 5] >> (ids & 31) & 1) == 0, -math.inf)
    temperature = torch.as_tensor(call.temperature, dtype=torch.float64, device=DEVICE).expand(call.num_rows)
    return logits / torch.where(temperature > 0, temperature, 1)[:, None]


def race_gap(logits, call):
    """How far the best score is ahead of the second, in the narrower of a row's two races; greedy rows race unheard."""
    temperature = torch.as_tensor(call.temperature, device=DEVICE).expand(call.num_rows)
    blocks = torch.nn.functional.pad(logits, (0, 128 + -logits.shape[1] % 128), value=-math.inf).unflatten(1, (-1, 128))
    scores = blocks.logsumexp(2) + noise.block_gumbel(call.seed, call.keys, blocks.shape[1])
    winner = scores.argmax(1)
    inside = blocks[torch.arange(len(logits)), winner] + noise.winner_gumbel(call.seed, call.keys, winner)
    gaps = [(best := values.topk(2).values)[:, 0] - best[:, 1] for values in (scores, inside, logits.repeat(1, 2))]
    if logits.shape[1] > 1:
        gaps[2] = (best := logits.topk(2).values)[:, 0] - best[:, 1]
    return torch.where(temperature > 0, torch.minimum(gaps[0], gaps[1]), gaps[2])


def check_tokens(ours, call):
    """Those of the reference, except where two scores are closer than fp32 logits can tell."""
    theirs, gaps = reference.sample_head(call).tokens, race_gap(exact_logits(call), call)
    differ = ours != theirs
    print(f"\n{int(differ.sum())} of {len(ours)} tokens differ, {int((gaps < 2e-5).sum())} rows are near ties")
    assert (gaps[differ] < 2e-5).all()


def check_extras(sample, call):
    """Against fp64. The tolerance is some ulp of logits of size 10: zeros or a temperature 1 % off are far outside."""
    exact = exact_logits(call)
    law, lse = exact.softmax(1), exact.logsumexp(1)
    top, second = torch.nn.functional.pad(law, (0, 1)).topk(2).values.unbind(1)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(sample.lse, lse, **close)
    torch.testing.assert_close(sample.logprob, exact.gather(1, sample.tokens[:, None])[:, 0] - lse, **close)
    torch.testing.assert_close(sample.max_prob, top, **close)
    torch.testing.assert_close(sample.margin, top - second, **close)
    torch.testing.assert_close(sample.entropy, torch.special.entr(law).sum(1), **close)
    differ = sample.argmax != exact.argmax(1)
    assert ((top - second)[differ] < 1e-6).all()


def check_law(tokens, logits):
    """Pearson's chi-square over ids with at least five expected draws, the rest pooled."""
    expected = len(tokens) * torch.softmax(logits.double(), dim=-1).cpu().numpy()
    observed = np.bincount(tokens.cpu().numpy(), minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    big = expected >= 5
    f_exp, f_obs = np.append(expected[big], expected[~big].sum()), np.append(observed[big], observed[~big].sum())
    if f_exp[-1] < 5:
        f_exp, f_obs = f_exp[:-1] * (f_obs[:-1].sum() / f_exp[:-1].sum()), f_obs[:-1]
    p = stats.chisquare(f_obs, f_exp).pvalue
    assert p > 1e-3, f"chi-square p = {p:.2e} over {len(f_exp)} bins"


def assert_same(sample, other):
    """Bit for bit."""
    for name, ours, theirs in zip(HeadSample._fields, sample, other, strict=True):
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours, theirs), name


# --- values ---------------------------------------------------------------------------------------------------------

SIZES = [(1, 1, 5), (3, 127, 16), (3, 128, 33), (40, 129, 70), (130, 500, 50), (40, 3001, 130)]
DTYPES = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_extras_of_a_product(size, dtype):
    num_rows, vocab_size, dim = size
    hidden, weight = normal(num_rows, dim, dtype=dtype), normal(vocab_size, dim, seed=1, scale=0.3, dtype=dtype)
    call = HeadCall(hidden, weight, None, keys(num_rows), seed=2**63 + 5, temperature=0.8, want=EXTRAS)
    sample = triton_kernel.sample_head(call)
    check_tokens(sample.tokens, call)
    check_extras(sample, call)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("dim", [33, 256])
def test_hidden_rows_in_fp32_meet_narrower_weights(dtype, dim):
    """Weights are widened, hidden rows not rounded: the values are those of the weights in fp32."""
    hidden, weight = normal(40, dim), normal(700, dim, seed=1, scale=0.3, dtype=dtype)
    call = HeadCall(hidden, weight, None, keys(40), seed=2, want=EXTRAS)
    sample = sample_head(hidden, weight, keys=call.keys, seed=2, want=EXTRAS, impl="triton")
    check_tokens(sample.tokens, call)
    check_extras(sample, call)
    assert_same(sample, triton_kernel.sample_head(replace(call, weight=weight.float())))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_options_at_once(dtype):
    num_rows, vocab_size, dim = 40, 700, 48
    offset = normal(vocab_size, seed=2)
    offset[[3, 400, 699]] = -math.inf
    temperature = torch.linspace(0.3, 2.0, num_rows, device=DEVICE)
    temperature[::5] = 0
    buffer = torch.full((9, 10), -7, device=DEVICE)
    positions = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:num_rows].to(DEVICE)
    call = HeadCall(
        normal(25, dim, dtype=dtype), normal(vocab_size, dim, seed=1, scale=0.3, dtype=dtype), offset, keys(num_rows),
        seed=3, temperature=temperature, allow=integers(num_rows, 22, low=-(2**31), high=2**31, dtype=torch.int32),
        rows=integers(num_rows, low=0, high=25), want=EXTRAS, out=(buffer, positions),
    )  # fmt: skip
    sample = triton_kernel.sample_head(call)
    written = torch.full((90,), -7, device=DEVICE).index_copy(0, positions, sample.tokens)
    assert torch.equal(buffer.view(-1), written)
    check_tokens(sample.tokens, call)
    check_extras(sample, call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_logits(dtype):
    logits = normal(70, 1000, scale=3, dtype=dtype)
    call = HeadCall(logits, None, None, keys(70), seed=1, want=EXTRAS)
    sample = triton_kernel.sample_head(call)
    check_tokens(sample.tokens, call)
    check_extras(sample, call)
    columns = HeadCall(logits.T.contiguous().T, None, None, keys(70), seed=1, want=EXTRAS)
    assert_same(triton_kernel.sample_head(columns), sample)


def test_only_what_is_wanted_is_there():
    call = HeadCall(normal(3, 20), normal(200, 20), None, keys(3), seed=1)
    full = triton_kernel.race(HeadCall(call.hidden, call.weight, None, call.keys, 1, want=EXTRAS), choose_config(call))
    for want in [(), *itertools.combinations(EXTRAS, 1)]:
        part = HeadCall(call.hidden, call.weight, None, call.keys, 1, want=want)
        sample = triton_kernel.sample_head(part)
        present = {name for name, value in sample._asdict().items() if value is not None}
        assert present == {"tokens", "lse", *want}
        assert all(torch.equal(getattr(sample, name), getattr(full, name)) for name in present)


def test_strided_operands():
    hidden, weight = integers(37, 75, dtype=torch.float32), integers(800, 75, seed=1, dtype=torch.float32) / 8
    holes, wide = torch.zeros(37, 3, 150, device=DEVICE), torch.zeros(900, 80, device=DEVICE)
    holes[:, 1, ::2] = hidden
    wide[100:, 3:78] = weight
    spread = torch.zeros(37, 6, dtype=torch.int64, device=DEVICE)
    spread[:, ::2] = keys(37)
    plain = triton_kernel.sample_head(HeadCall(hidden, weight, None, keys(37), seed=2))
    strided = HeadCall(holes[:, 1, ::2], wide[100:, 3:78], None, spread[:, ::2], seed=2)
    assert_same(triton_kernel.sample_head(strided), plain)
    columns = HeadCall(hidden, weight.T.contiguous().T, None, keys(37), seed=2)
    assert_same(triton_kernel.sample_head(columns), plain)


# --- the same bits --------------------------------------------------------------------------------------------------


def exact_call(num_rows=24, vocab_size=700, **options):
    """A call whose products and sums of them are exact in fp32, so that no order of summation can blur it."""
    hidden, weight = integers(num_rows, 70, dtype=torch.float32), integers(vocab_size, 70, seed=1) / 8
    offset = (integers(vocab_size, seed=2) / 4).float()
    offset[[0, 299]] = -math.inf
    temperature = 2.0 ** integers(num_rows, low=-1, high=2, seed=3).float()
    temperature[1::6] = 0
    return HeadCall(hidden, weight.float(), offset, keys(num_rows), 11, temperature, **{"want": EXTRAS} | options)


CONFIGS = [
    Config(16, 128, 16, num_warps=4, num_stages=1, programs=9, finish_r=16, finish_splits=16, group=2),
    Config(32, 256, 64, num_warps=4, num_stages=1, programs=5, finish_r=32, finish_splits=16, group=1),
    Config(64, 512, 32, num_warps=8, num_stages=1, programs=1, finish_r=16, finish_splits=32),
]


@pytest.fixture(scope="module")
def whole():
    return triton_kernel.race(exact_call(), CONFIGS[2], splits=1)


@pytest.mark.parametrize("config", CONFIGS)
def test_tiles_and_splits_do_not_change_a_bit(config, whole):
    call = exact_call()
    check_extras(whole, call)
    for splits, chunk in [(None, None), (2, 16), (6, None)]:
        assert_same(triton_kernel.race(call, config, splits=splits, chunk=chunk), whole)


def test_a_row_does_not_depend_on_its_company(whole):
    call, config = exact_call(), CONFIGS[0]

    def run(rows):
        part = HeadCall(
            call.hidden[rows], call.weight, call.offset, call.keys[rows], call.seed, call.temperature[rows],
            want=EXTRAS,
        )  # fmt: skip
        return triton_kernel.race(part, config)

    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for rows in (shuffled, torch.tensor([5]), torch.arange(3, 20)):
        assert_same(run(rows), HeadSample(*(field[rows] for field in whole)))


def test_what_the_workspace_held_does_not_matter():
    """Deterministic mode fills new tensors with NaN and the largest integer."""
    call = exact_call()
    before = triton_kernel.sample_head(call), triton_kernel.sample_head(exact_call(3, top_k=40, top_p=0.9))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert_same(triton_kernel.sample_head(call), before[0])
        assert_same(triton_kernel.sample_head(exact_call(3, top_k=40, top_p=0.9)), before[1])
    finally:
        torch.use_deterministic_algorithms(False)


def test_launches_leave_the_arrivals_at_zero(whole):
    call = exact_call()
    for _ in range(2):
        assert_same(triton_kernel.race(call, CONFIGS[1], splits=2), whole)
        arrivals, zero = triton_kernel._zeros(call.hidden.device, 1)
        assert not arrivals.any() and not zero.any()


# --- law ------------------------------------------------------------------------------------------------------------

MANY_DRAWS = Config(4096, 256, 16, num_warps=8, num_stages=1, programs=1, finish_r=4096, finish_splits=16)


def draw(logits, num_draws, **options):
    call = HeadCall(logits.expand(num_draws, -1), None, None, keys(num_draws), seed=6, **options)
    config = MANY_DRAWS if DEVICE == "cpu" else choose_config(call)
    return triton_kernel.race(call, config).tokens


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_law(temperature):
    logits = normal(500, seed=1, scale=2.0) - 1e3
    check_law(draw(logits, 40_000, temperature=temperature), logits / temperature)


def test_tail_inside_one_block():
    logits = torch.full((128,), -13.0, device=DEVICE)
    logits[77] = 0
    num_draws = 60_000
    tail = int((draw(logits, num_draws) != 77).sum())
    mean = num_draws * 127 * math.exp(-13) / (1 + 127 * math.exp(-13))
    p = 2 * min(stats.poisson.cdf(tail, mean), stats.poisson.sf(tail - 1, mean))
    assert p > 1e-3, f"{tail} tail draws, expected {mean:.2f}"


@triton.jit
def gumbels_kernel(words, one, two, size: tl.constexpr):
    at = tl.arange(0, size)
    high, low = tl.load(words + at).to(tl.uint32), tl.load(words + size + at).to(tl.uint32)
    tl.store(one + at, triton_noise._gumbel(high))
    two_words = triton_noise._unit_of_two(high, low), triton_noise._unit_of_two(high ^ 0xFFFFFFFF, low ^ 0xFFFFFFFF)
    tl.store(two + at, triton_noise._gumbel_of(two_words[0], two_words[1]))


def test_gumbel_noise_to_its_ends():
    ends = torch.tensor([0, 1, 2, 3, 2**16, 2**30 - 1, 2**30, 2**31, 2**32 - 2, 2**32 - 1])
    words = torch.stack(torch.meshgrid(ends, ends, indexing="ij")).flatten(1)
    words = torch.cat([words, integers(2, 28, low=0, high=2**32).cpu()], dim=1).to(DEVICE)
    one, two = torch.empty(2, 128, device=DEVICE)
    gumbels_kernel[(1,)](words, one, two, size=128, enable_fp_fusion=False)
    high, low = words.tolist()
    for ours, bits, values in (one, 32, high), (two, 64, [a << 32 | b for a, b in zip(high, low, strict=True)]):
        uniforms = [Fraction(2 * value + 1, 2 ** (bits + 1)) for value in values]
        exact = torch.tensor([-math.log(-math.log1p(-v) if v < 0.5 else -math.log(1 - v)) for v in uniforms])
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.cpu(), exact.float(), rtol=1e-6, atol=2e-7)


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_rows_that_cannot_be_drawn(temperature):
    logits = normal(8, 600, seed=9)
    logits[1, 0] = logits[2, 599] = math.nan
    logits[3, 300] = math.inf
    logits[4] = -math.inf
    logits[5] = -math.inf
    logits[5, 200] = math.nan
    logits[6] = math.nan
    buffer = torch.full((8,), -7, device=DEVICE)
    call = HeadCall(
        logits, None, None, keys(8), 0, temperature, want=EXTRAS, out=(buffer, torch.arange(8, device=DEVICE))
    )
    sample = triton_kernel.sample_head(call)
    bad = torch.tensor([1, 2, 3, 4, 5, 6], device=DEVICE)
    good = torch.tensor([0, 7], device=DEVICE)
    assert (sample.tokens[bad] == -1).all() and (buffer[bad] == -7).all()
    assert not sample.lse[bad].isfinite().any() and not sample.logprob[bad].isfinite().any()
    assert sample.lse[4] == -math.inf and not (sample.lse[[1, 2, 3, 5, 6]] == -math.inf).any()
    assert torch.equal(buffer[good], sample.tokens[good])
    assert torch.equal(sample.tokens[good], reference.sample_head(call).tokens[good])


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("how", ["offset", "allow"])
def test_what_cannot_be_drawn_is_not_looked_at(how, temperature):
    logits = torch.zeros(50, 300, device=DEVICE)
    bad = [5, 130, 299]
    logits[:, bad] = torch.tensor([math.nan, math.inf, 50.0], device=DEVICE)
    offset, allow = torch.zeros(300, device=DEVICE), torch.full((50, 10), -1, dtype=torch.int32, device=DEVICE)
    offset[bad] = -math.inf
    for id in bad:
        allow[:, id >> 5] &= ~(1 << (id & 31))
    options = {"offset": offset} if how == "offset" else {"offset": None, "allow": allow}
    sample = triton_kernel.sample_head(
        HeadCall(logits, None, keys=keys(50), seed=0, temperature=temperature, want=EXTRAS, **options)
    )
    assert not torch.isin(sample.tokens, torch.tensor([-1, *bad], device=DEVICE)).any()
    torch.testing.assert_close(sample.lse, torch.full((50,), math.log(297), device=DEVICE))
    torch.testing.assert_close(sample.entropy, torch.full((50,), math.log(297), device=DEVICE))


def test_a_row_with_nothing_allowed():
    allow = torch.zeros(3, 7, dtype=torch.int32, device=DEVICE)
    allow[1, 2] = 1 << 9
    call = HeadCall(normal(3, 8), normal(200, 8), None, keys(3), seed=0, allow=allow, want=EXTRAS)
    sample = triton_kernel.sample_head(call)
    assert sample.tokens.tolist() == [-1, 73, -1]
    assert sample.lse[0] == sample.lse[2] == -math.inf
    assert sample.logprob[1] == 0 and sample.max_prob[1] == 1 and sample.margin[1] == 1 and sample.entropy[1] == 0


def test_greedy_takes_the_lowest_of_equals():
    logits = normal(5, 1000, seed=5)
    logits[0, [7, 9, 800]] = 9
    logits[1, [999, 256, 255]] = 9
    logits[2] = 0
    logits[3], logits[3, 0] = -3, -4
    logits[4, [302, 301]] = 9
    for splits in (1, 2, 8):
        call = HeadCall(logits, None, None, keys(5), 0, temperature=0.0, want=("argmax", "margin"))
        sample = triton_kernel.race(call, CONFIGS[0], splits=splits)
        assert sample.tokens.tolist() == sample.argmax.tolist() == [7, 255, 0, 1, 301]
        assert not sample.margin.any()


# --- top-k and top-p ------------------------------------------------------------------------------------------------

CUTS = [
    {"top_k": 1}, {"top_k": 9}, {"top_k": 700}, {"top_p": 0.05}, {"top_p": 0.9}, {"top_p": 0.999},
    {"top_k": 60, "top_p": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_top_k_and_top_p(cut):
    call = HeadCall(
        normal(4, 24), normal(700, 24, seed=1, scale=0.4), normal(700, seed=2), keys(4), seed=1,
        temperature=torch.tensor([1.0, 0.5, 0.0, 2.0], device=DEVICE), want=EXTRAS, **cut,
    )  # fmt: skip
    ours, theirs = triton_kernel.sample_head(call), reference.sample_head(call)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.argmax, theirs.argmax)
    for name in ("logprob", "lse", "max_prob", "margin", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 1}, [150]),
        ({"top_k": 3}, [150, 0, 1]),
        ({"top_k": 201}, [150, *range(150), *range(151, 200), 200, 201]),
        ({"top_p": 0.5}, [150, *range(75)]),
        ({"top_k": 101, "top_p": 0.5}, [150, *range(25)]),
    ],
)
def test_ties_at_the_threshold_are_kept_from_the_lowest_id_on(cut, kept):
    """Weights of exp(logits): 50 for id 150, one for each of the other 199 below 200, a tiny one for the rest."""
    logits = torch.full((2, 300), -40.0, device=DEVICE)
    logits[:, :200] = 0
    logits[1, :200:2] = -0.0  # and stays so: 0 would not, were it added
    logits[:, 150] = math.log(50)
    offset = torch.full((300,), -0.0, device=DEVICE)
    sample = triton_kernel.sample_head(HeadCall(logits, None, offset, keys(2), seed=1, want=("lse", "entropy"), **cut))
    law = logits[:, kept].double()
    torch.testing.assert_close(sample.lse.double(), law.logsumexp(1), rtol=1e-6, atol=1e-6)
    entropy = torch.special.entr(law.softmax(1)).sum(1)
    torch.testing.assert_close(sample.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    many = HeadCall(logits[1:].expand(12, -1), None, offset, keys(12), seed=1, **cut)
    if len(kept) < 30:  # or even a draw from too many would hardly show it
        assert torch.isin(triton_kernel.sample_head(many).tokens, torch.tensor(kept, device=DEVICE)).all()


def test_truncated_rows_that_cannot_be_drawn():
    logits = normal(3, 200, seed=9)
    logits[0, 7], logits[1] = math.nan, -math.inf
    call = HeadCall(logits, None, None, keys(3), seed=0, top_k=5, top_p=0.5)
    sample = triton_kernel.sample_head(call)
    assert sample.tokens[:2].tolist() == [-1, -1] and sample.lse[1] == -math.inf and sample.lse[0].isnan()
    assert sample.tokens[2] == reference.sample_head(call).tokens[2]


def test_truncation_by_chunks_changes_nothing():
    call = exact_call(5, vocab_size=300, top_k=20, top_p=0.8)
    config = choose_config(call)
    assert_same(triton_kernel.truncated(call, config, chunk=2), triton_kernel.truncated(call, config))


# --- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TABLES)
@pytest.mark.parametrize("vocab_size", [500, 50_258, 152_064, 1_000_000])
def test_the_workspace_stays_within_64_mb(architecture, vocab_size):
    hidden = torch.empty(65_536, 8, dtype=torch.bfloat16, device="meta")
    weight, rows_keys = hidden[:1].expand(vocab_size, 8), torch.empty(65_536, 3, device="meta")
    call = HeadCall(hidden, weight, None, rows_keys, 0, want=EXTRAS)
    table = TABLES[architecture]
    for config in (table.few, table.many, table.lean, table.single):
        rows, spans = triton_kernel._rows_of_a_launch(call, config), -(-vocab_size // config.block_v)
        splits = config.splits(rows, spans)
        assert rows % config.block_r == 0
        tensors = triton_kernel._workspace(call, config, rows, spans, splits)
        assert sum(tensor.nbytes for tensor in tensors) <= 64 << 20


def test_the_operator_reaches_the_kernel():
    hidden, weight, bias = normal(5, 12), normal(300, 12, seed=1), normal(300, seed=2)
    options = {"keys": keys(5), "seed": 2**64 - 1, "forbid": torch.tensor([4], device=DEVICE), "want": ("entropy",)}
    ours = sample_head(hidden, weight, bias, **options, impl="triton")
    theirs = sample_head(hidden, weight, bias, **options, impl="reference")
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.entropy, theirs.entropy)


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [
        (normal(2, 4).double(), normal(9, 4).double(), "needs hidden in float32, bfloat16 or float16, got float64"),
        (normal(2, 4).bfloat16(), normal(9, 4), "needs weight in bfloat16 for this hidden, got float32"),
    ],
)
def test_what_the_kernel_refuses(hidden, weight, message):
    with pytest.raises(UnsupportedImplementation, match=message):
        sample_head(hidden, weight, keys=keys(2), seed=0, impl="triton")
    assert triton_limits.refuses(HeadCall(hidden, weight, None, keys(2), 0)) == message
