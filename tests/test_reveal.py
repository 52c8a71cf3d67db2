"""Reveal policies against the laws their docstrings state."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

from unmask import reveal
from unmask.arguments import MAX_STEPS
from unmask.kernels.noise import reveal_times
from unmask.reveal import POLICIES, Ancestral, Blocks, FirstHitting, Fixed, Order, parse

# One line enrols a policy in every parametrised test. Explicit orders cover positions 0 to 39.
ENROLLED = (
    Ancestral(1),
    Ancestral(7),
    Ancestral(1000),
    Ancestral(5, "cosine"),
    Ancestral(3, (1, 0.5, 0.1, 0)),
    Ancestral(2, [1, 0.6, 0.2]),
    FirstHitting(),
    Fixed(1),
    Fixed(4),
    Fixed(64),
    Fixed(5, "first"),
    Blocks(Ancestral(5, "cosine"), 3),
    Blocks(FirstHitting(), 4),
    Blocks(Fixed(2, "first"), 5),
    Blocks(Order([int(i) for i in np.random.default_rng(8).permutation(40)]), 3),
    Order("left-to-right"),
    Order("right-to-left"),
    Order([int(i) for i in np.random.default_rng(7).permutation(40)]),
)
NAN = float("nan")


def uniform(num_sequences: int, n: int, seed: int = 0) -> np.ndarray:
    return reveal_times(seed, torch.arange(num_sequences)[:, None], torch.arange(n)[None]).numpy()


def counts_per_step(step: np.ndarray, num_steps: int) -> np.ndarray:
    """int64 [S, num_steps], how many positions each step reveals."""
    rows = np.arange(len(step))[:, None]
    return np.bincount((rows * num_steps + step).ravel(), minlength=len(step) * num_steps).reshape(len(step), num_steps)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> None:
    """Cells with less than 5 expected are pooled; the p-value and the tested share of the mass go in the message."""
    small = expected < 5
    kept = np.append(observed[~small], observed[small].sum()), np.append(expected[~small], expected[small].sum())
    if kept[1][-1] < 5:
        kept = kept[0][:-1], kept[1][:-1] * kept[0][:-1].sum() / kept[1][:-1].sum()
    result = stats.chisquare(*kept)
    mass = kept[1].sum() / expected.sum()
    assert result.pvalue > 1e-4, f"p = {result.pvalue:.2g} over {len(kept[0])} cells, {mass:.2%} of the mass"


def test_every_policy_is_enrolled():
    assert {type(policy) for policy in ENROLLED} == set(POLICIES)


@pytest.mark.parametrize("policy", ENROLLED, ids=str)
def test_contract(policy):
    """Shapes, dtypes and ranges; steps only from times; larger times never later; equal rates inside an event."""
    positions = np.array([0, 3, 4, 9, 21, 22, 38, 39])
    times = uniform(50, len(positions))
    plan = policy.plan(times, positions)
    assert plan.step.shape == plan.mask_rate.shape == times.shape
    assert plan.step.dtype == np.int32 and plan.mask_rate.dtype == np.float64
    assert plan.step.min() >= 0 and plan.step.max() < policy.num_steps(len(positions))
    assert plan.mask_rate.min() > 0 and plan.mask_rate.max() <= 1
    assert np.array_equal(policy.plan(times, positions).step, plan.step)
    order = np.argsort(plan.step, axis=1, kind="stable")
    step, rate = (np.take_along_axis(a, order, axis=1) for a in (plan.step, plan.mask_rate))
    assert (np.diff(rate, axis=1) <= 0).all(), "mask rates fall along the trajectory"
    assert (np.diff(rate, axis=1)[np.diff(step, axis=1) == 0] == 0).all(), "one event, one mask rate"
    if not isinstance(policy, (Order, Blocks)):
        assert (np.diff(np.take_along_axis(plan.step, np.argsort(-times, axis=1), axis=1), axis=1) >= 0).all()


@pytest.mark.parametrize("policy", ENROLLED, ids=str)
def test_a_sequence_does_not_depend_on_its_neighbours(policy):
    positions, ids = np.arange(40), torch.arange(23)
    whole = policy.plan(reveal_times(5, ids[:, None], torch.arange(40)).numpy(), positions)
    for size in (1, 4, 23):
        parts = [
            policy.plan(reveal_times(5, chunk[:, None], torch.arange(40)).numpy(), positions)
            for chunk in ids.split(size)
        ]
        assert np.array_equal(np.concatenate([part.step for part in parts]), whole.step)
        assert np.array_equal(np.concatenate([part.mask_rate for part in parts]), whole.mask_rate)


@pytest.mark.parametrize("policy", ENROLLED, ids=str)
def test_text_round_trip(policy):
    assert parse(str(policy)) == policy and hash(parse(str(policy))) == hash(policy)


@pytest.mark.parametrize(
    "policy",
    [Ancestral(8), Ancestral(8, "cosine"), Ancestral(4, (1, 0.9, 0.3, 0.25, 0)), Ancestral(3, (1, 0.7, 0.4, 0.2))],
    ids=str,
)
def test_ancestral_counts_are_binomial(policy):
    """Each step reveals Binomial(n, m[k] - m[k+1]) positions, the leftover step included; steps jointly multinomial."""
    n, num_sequences = 12, 20_000
    rates = {
        "linear": lambda k: 1 - k / policy.steps,
        "cosine": lambda k: math.cos(math.pi / 2 * k / policy.steps),
    }.get(policy.grid, lambda k: ([*policy.grid, 0] if policy.grid[-1] else policy.grid)[k])
    shares = np.array([rates(k) - rates(k + 1) for k in range(policy.num_steps(n))])
    assert shares.sum() == pytest.approx(1)
    step = policy.plan(uniform(num_sequences, n), np.arange(n)).step
    counts = counts_per_step(step, len(shares))
    for k, share in enumerate(shares):
        chi_square(
            np.bincount(counts[:, k], minlength=n + 1), num_sequences * stats.binom.pmf(np.arange(n + 1), n, share)
        )
    pairs = np.bincount(step[:, 0] * len(shares) + step[:, 1], minlength=len(shares) ** 2)
    chi_square(pairs, num_sequences * np.outer(shares, shares).ravel())  # two positions are independent


def test_ancestral_leftover_step():
    assert Ancestral(2, (1, 0.6, 0.2)).num_steps(5) == 3
    assert Ancestral(2, (1, 0.6, 0)).num_steps(5) == 2
    plan = Ancestral(2, (1, 0.6, 0.2)).plan(np.array([[0.99, 0.6, 0.59, 0.2, 0.19, 1e-9]]), np.arange(6))
    assert plan.step.tolist() == [[0, 0, 1, 1, 2, 2]]  # m[k+1] <= t < m[k]
    assert plan.mask_rate.tolist() == [[1, 1, 0.6, 0.6, 0.2, 0.2]]


def test_ancestral_number_of_events():
    """E[events] = N (1 - (1 - 1/N)^L): 641 of 1000 steps at L = 1024."""
    step = np.sort(Ancestral(1000).plan(uniform(256, 1024), np.arange(1024)).step, axis=1)
    events = 1 + (np.diff(step, axis=1) > 0).sum(axis=1)
    expected = 1000 * (1 - (1 - 1 / 1000) ** 1024)
    assert events.mean() == pytest.approx(expected, rel=0.01)
    assert round(expected) == 641


def test_grids():
    assert Ancestral(4).mask_rates.tolist() == [1, 0.75, 0.5, 0.25, 0]
    cosine = Ancestral(1000, "cosine").mask_rates
    assert cosine[0] == 1 and cosine[-1] == 0
    assert np.array_equal(cosine * 2**40, np.round(cosine * 2**40)), "multiples of 2^-40"
    assert np.abs(cosine - np.cos(np.pi / 2 * np.arange(1001) / 1000)).max() < 2**-40
    assert (np.diff(Ancestral(MAX_STEPS, "cosine").mask_rates) < 0).all()


def test_finer_grids_split_steps():
    """Halving every step never moves a position out of its coarse step."""
    times = uniform(100, 30)
    coarse, fine = (Ancestral(steps).plan(times, np.arange(30)).step for steps in (16, 32))
    assert np.array_equal(fine // 2, coarse)


def test_first_hitting_is_a_uniform_permutation():
    times = uniform(24_000, 4)
    plan = FirstHitting().plan(times, np.array([2, 3, 5, 7]))
    assert np.array_equal(plan.step, np.argsort(np.argsort(-times, axis=1), axis=1))
    assert np.array_equal(plan.mask_rate, times)
    code = plan.step @ [1, 4, 16, 64]
    cells = [np.dot(p, [1, 4, 16, 64]) for p in itertools.permutations(range(4))]
    observed = np.array([(code == cell).sum() for cell in cells])
    assert observed.sum() == len(times)
    chi_square(observed, np.full(24, 1000.0))


@pytest.mark.parametrize("policy", [FirstHitting(), Fixed(100)], ids=str)
def test_ties_go_to_the_lower_position(policy):
    step = policy.plan(np.array([[0.5, 0.25] * 50]), np.arange(100)).step
    assert step.tolist() == [[i // 2 + 50 * (i % 2) for i in range(100)]]


@pytest.mark.parametrize(("n", "steps"), [(10, 4), (4, 10), (6, 6), (1, 3), (7, 1)])
def test_fixed_counts(n, steps):
    plan = Fixed(steps).plan(uniform(200, n), np.arange(n))
    wanted = [n * (k + 1) // steps - n * k // steps for k in range(steps)]
    assert (counts_per_step(plan.step, steps) == wanted).all()
    masked = n - np.cumsum([0, *wanted[:-1]])
    assert np.array_equal(plan.mask_rate, masked[plan.step] / n)


def test_fixed_subsets_are_uniform():
    """6 positions in 3 steps of 2: all 90 ordered partitions are equally likely."""
    step = Fixed(3).plan(uniform(45_000, 6), np.arange(6)).step
    _, observed = np.unique(step @ 3 ** np.arange(6), return_counts=True)
    assert len(observed) == 90
    chi_square(observed, np.full(90, 500.0))


@pytest.mark.parametrize(("n", "steps"), [(10, 4), (4, 10), (6, 6), (11, 8), (7, 1)])
def test_fixed_remainder_first(n, steps):
    """The counts of LLaDA's `get_num_transfer_tokens`: n // N, and one more in each of the first n % N steps."""
    plan = Fixed(steps, "first").plan(uniform(200, n), np.arange(n))
    wanted = [n // steps + (k < n % steps) for k in range(steps)]
    assert (counts_per_step(plan.step, steps) == wanted).all()
    assert np.array_equal(plan.mask_rate, (n - np.cumsum([0, *wanted[:-1]]))[plan.step] / n)


def test_blocks_are_groups_by_rank():
    """Groups of 3 masked positions, wherever they stand; each has the plan of its own policy, one behind the other."""
    positions, times = np.array([1, 2, 7, 8, 20, 21, 22, 30]), uniform(300, 8)
    policy = Blocks(Fixed(2, "first"), 3)
    plan = policy.plan(times, positions)
    assert policy.num_steps(8) == 6 and policy.num_steps(9) == 6 and policy.num_steps(2) == 2
    assert (counts_per_step(plan.step, 6) == [2, 1, 2, 1, 1, 1]).all()
    for group, first in ((slice(0, 3), 0), (slice(3, 6), 2), (slice(6, 8), 4)):
        alone = Fixed(2, "first").plan(times[:, group], positions[group])
        assert np.array_equal(plan.step[:, group], alone.step + first)
    assert np.array_equal(plan.mask_rate, (8 - np.array([0, 2, 3, 5, 6, 7]))[plan.step] / 8)


def test_blocks_tell_the_share_of_all_masked_positions():
    """Of an inner policy that tells a time, that time for its own group, and all of the groups behind it."""
    times = uniform(50, 10)
    rate = Blocks(FirstHitting(), 4).plan(times, np.arange(10)).mask_rate
    behind = np.array([6] * 4 + [2] * 4 + [0] * 2)
    np.testing.assert_allclose(rate, (times * np.array([4] * 8 + [2] * 2) + behind) / 10, atol=1e-15)


def test_one_block_is_no_block():
    times = uniform(50, 10)
    for policy in (Ancestral(7), FirstHitting(), Fixed(4), Order("right-to-left")):
        whole, one = policy.plan(times, np.arange(10)), Blocks(policy, 10).plan(times, np.arange(10))
        assert np.array_equal(whole.step, one.step) and np.allclose(whole.mask_rate, one.mask_rate, rtol=0, atol=1e-15)
        assert policy.num_steps(10) == Blocks(policy, 99).num_steps(10)


@dataclass(frozen=True)
class Adaptive:
    """What `Blocks` and `parse` may know of a policy that looks at scores."""

    per_step: int
    adaptive = True

    def __str__(self):
        return f"adaptive:{self.per_step}"

    def num_steps(self, num_masked):
        return -(-num_masked // self.per_step)


def test_blocks_keep_an_adaptive_policy(monkeypatch):
    monkeypatch.setattr(reveal, "_PARSERS", {})
    monkeypatch.setattr(reveal, "SPELLINGS", list(reveal.SPELLINGS))
    reveal.register("adaptive", lambda rest: Adaptive(int(rest[0])) if len(rest) == 1 else None, "adaptive:K")
    policy = Blocks(Adaptive(2), 5, stop_id=0)
    assert policy.adaptive and policy.num_steps(12) == 3 + 3 + 1 and not Blocks(Fixed(3), 2).adaptive
    for one in (policy, Blocks(Adaptive(3), 8)):
        assert parse(str(one)) == one
    assert str(policy) == "blocks:5:stop:0:adaptive:2"
    for text in ("blocks:5:adaptive", "adaptive:1:2", "blocks:5:adaptive:x"):
        with pytest.raises(ValueError, match=f'"adaptive:K", got {text!r}'):
            parse(text)


def test_orders():
    positions, times = np.array([1, 4, 5]), np.full((2, 3), 0.5)
    assert Order("left-to-right").plan(times, positions).step.tolist() == [[0, 1, 2]] * 2
    assert Order("right-to-left").plan(times, positions).step.tolist() == [[2, 1, 0]] * 2
    plan = Order([4, 0, 2, 1, 3, 5, 99]).plan(times, positions)  # 0, 2, 3 are given, 99 lies outside
    assert plan.step.tolist() == [[1, 0, 2]] * 2
    assert plan.mask_rate.tolist() == [[2 / 3, 1, 1 / 3]] * 2
    with pytest.raises(ValueError, match=r"order must name every masked position, got one that lacks \[4\]"):
        Order([5, 1]).plan(times, positions)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ancestral(0), ValueError, r"steps must lie between 1 and 1000000, got 0"),
        (lambda: Ancestral(-3), ValueError, r"steps .* got -3"),
        (lambda: Ancestral(MAX_STEPS + 1), ValueError, r"steps .* got 1000001"),
        (lambda: Ancestral(True), TypeError, r"steps must be a whole number, got True"),
        (lambda: Ancestral(8.0), TypeError, r"steps must be a whole number, got 8.0"),
        (lambda: Ancestral("8"), TypeError, r"steps must be a whole number, got '8'"),
        (lambda: Fixed(0), ValueError, r"steps .* got 0"),
        (lambda: Fixed(True), TypeError, r"steps .* got True"),
        (lambda: Fixed(2.5), TypeError, r"steps .* got 2.5"),
        (lambda: Fixed(4, "last"), ValueError, r'remainder must be "spread", "first", got \'last\''),
        (lambda: Blocks(Fixed(4), 0), ValueError, r"length must be at least 1, got 0"),
        (lambda: Blocks(Fixed(4), 2.0), TypeError, r"length must be a whole number, got 2.0"),
        (lambda: Blocks("fixed:4", 8), TypeError, r"policy must be a reveal policy .* got 'fixed:4'"),
        (lambda: Blocks(Blocks(Fixed(4), 2), 8), ValueError, r"policy must be .* single group, got 'blocks:2:fixed:4'"),
        (lambda: Blocks(Fixed(4), 8, 3), ValueError, r"stop_id must be None for .* 'fixed:4', got 3"),
        (lambda: Blocks(Adaptive(4), 8, -1), ValueError, r"stop_id must be at least 0, got -1"),
        (lambda: Ancestral(4, "sine"), ValueError, r'grid must be "linear", "cosine", or .* got \'sine\''),
        (
            lambda: Ancestral(4, (1, 0.5, 0)),
            ValueError,
            r"steps \+ 1 = 5 numbers .* got shape \[3\]: \[1.0, 0.5, 0.0\]",
        ),
        (lambda: Ancestral(1, 0.5), ValueError, r"grid .* got shape \[\]: 0.5"),
        (lambda: Ancestral(2, (0.9, 0.5, 0)), ValueError, r"grid .* got a start at 0.9"),
        (lambda: Ancestral(2, (NAN, 0.5, 0)), ValueError, r"grid .* got a start at nan"),
        (lambda: Ancestral(2, (1, 1, 0)), ValueError, r"grid .* got 1.0 and then 1.0 at 0 and 1"),
        (lambda: Ancestral(3, (1, 0.2, 0.4, 0)), ValueError, r"grid .* got 0.2 and then 0.4 at 1 and 2"),
        (lambda: Ancestral(3, (1, 0.2, NAN, 0)), ValueError, r"grid .* got 0.2 and then nan"),
        (lambda: Ancestral(2, (1, 0.5, -0.1)), ValueError, r"grid .* got an end at -0.1"),
        (lambda: Ancestral(1, ("a", "b")), TypeError, r"grid .* got \('a', 'b'\)"),
        (lambda: Order("upwards"), ValueError, r'order must be "left-to-right", .* got \'upwards\''),
        (lambda: Order([0, 2, 1, 2]), ValueError, r"order must be .*distinct positions, got 2 more than once"),
        (lambda: Order([0, -1]), ValueError, r"order .* got -1"),
        (lambda: Order([]), TypeError, r"order .* got \[\]"),
        (lambda: Order([0, 0.5]), TypeError, r"order .*whole numbers.* got \[0, 0.5\]"),
        (lambda: Order([True, False]), TypeError, r"order .*whole numbers.* got \[True, False\]"),
        (lambda: Order([[0], [1, 2]]), TypeError, r"order .* got \[\[0\], \[1, 2\]\]"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("times", "positions", "message"),
    [
        ([[0.5, 0.5]], [3, 1], r"positions must be ascending masked positions, at least one, got \[3, 1\]"),
        ([[0.5, 0.5]], [1, 1], r"positions .* got \[1, 1\]"),
        ([[0.5, 0.5]], [-1, 1], r"positions .* got \[-1, 1\]"),
        (np.zeros((2, 0)), [], r"positions .* at least one, got \[\]"),
        ([0.5, 0.5], [0, 1], r"times must have shape \[sequences, 2\], got \[2\]"),
        ([[0.5]], [0, 1], r"times must have shape \[sequences, 2\], got \[1, 1\]"),
        ([[0.5, 1.0]], [0, 1], r"times must lie strictly between 0 and 1, got 1.0"),
        ([[0.0, 0.5]], [0, 1], r"times .* got 0.0"),
        ([[NAN, 0.5]], [0, 1], r"times .* got nan"),
    ],
)
@pytest.mark.parametrize("policy", ENROLLED, ids=str)
def test_bad_plans(policy, times, positions, message):
    with pytest.raises(ValueError, match=message):
        policy.plan(np.array(times), np.array(positions, int))


def test_parse():
    assert parse("ancestral:1000") == parse("ancestral:1000:linear") == Ancestral(1000)
    assert parse("ancestral:64:cosine") == Ancestral(64, "cosine")
    assert parse("ancestral:2:1,0.5,0.25") == Ancestral(2, (1, 0.5, 0.25))
    assert parse("first-hitting") == FirstHitting()
    assert parse("fixed:64") == parse("fixed:64:spread") == Fixed(64)
    assert parse("fixed:64:first") == Fixed(64, "first")
    assert parse("blocks:32:fixed:8:first") == Blocks(Fixed(8, "first"), 32)
    assert parse("blocks:32:left-to-right") == Blocks(Order("left-to-right"), 32)
    assert parse("right-to-left") == Order("right-to-left")
    assert parse("order:2,0,1") == Order((2, 0, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"got ''"),
        ("ancestral", r"got 'ancestral'"),
        ("ancestral:", r"got 'ancestral:'"),
        ("ancestral:ten", r"got 'ancestral:ten'.*'ten'"),
        ("ancestral:0", r"got 'ancestral:0': steps must lie between"),
        ("ancestral:2.5", r"got 'ancestral:2.5'"),
        ("ancestral:8:sine", r"got 'ancestral:8:sine'"),
        ("ancestral:8:cosine:1", r"got 'ancestral:8:cosine:1'"),
        ("ancestral:2:1,0.5", r"grid must be"),
        ("first-hitting:3", r"got 'first-hitting:3'"),
        ("fixed:-1", r"steps must lie between"),
        ("order:1,1", r"1 more than once"),
        ("fixed:8:last", r"got 'fixed:8:last': remainder must be"),
        ("blocks:8", r"got 'blocks:8'"),
        ("blocks:fixed:8", r"got 'blocks:fixed:8'.*'fixed'"),
        ("blocks:0:fixed:8", r"length must be at least 1"),
        ("blocks:4:random", r"got 'blocks:4:random'$"),
        ("blocks:4:blocks:2:fixed:8", r"single group"),
        ("blocks:4:stop:2:fixed:8", r"stop_id must be None for the planned policy 'fixed:8', got 2"),
        ("random", r"got 'random'"),
    ],
)
def test_parse_errors_list_the_forms(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert 'reveal must be one of "ancestral:STEPS"' in str(error.value) and '"first-hitting"' in str(error.value)
