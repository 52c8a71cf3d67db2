"""The law of the samples, against laws computed by plain enumeration; and what the samples must not depend on.

Chi-square tests at fixed seeds, p > 1e-3; each prints its p-value and the total variation distance.
"""

import gc
from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from toys import HiddenMarkov, Toy, consistent, inconsistent, states_of

from unmask import Ancestral, Blocks, Categorical, FirstHitting, Fixed, Order, Remask, Sampler, load
from unmask.kernels.noise import reveal_times
from unmask.kernels.sample_head import OPERATOR

NUM_SAMPLES = 200_000
SMALLEST_P = 1e-3
CUSTOM, UNFINISHED = (1.0, 0.9, 0.2, 0.0), (1.0, 0.7, 0.3)

CATEGORICAL = Categorical()

# policy -> how each step reveals: step, masked positions, number masked at the start -> [(positions, probability)].
POLICIES = {
    Ancestral(1): lambda *at: independent((1, 0), *at),
    Ancestral(2): lambda *at: independent((1, 1 / 2, 0), *at),
    Ancestral(4): lambda *at: independent((1, 3 / 4, 1 / 2, 1 / 4, 0), *at),
    Ancestral(3, "cosine"): lambda *at: independent((1, np.cos(np.pi / 6), np.cos(np.pi / 3), 0), *at),
    Ancestral(3, CUSTOM): lambda *at: independent(CUSTOM, *at),
    Ancestral(2, UNFINISHED): lambda *at: independent((*UNFINISHED, 0), *at),
    FirstHitting(): lambda k, masked, n: equally_likely(masked, 1),
    Fixed(1): lambda k, masked, n: equally_likely(masked, n),
    Fixed(2): lambda k, masked, n: equally_likely(masked, n * (k + 1) // 2 - n * k // 2),
    Fixed(3): lambda k, masked, n: equally_likely(masked, n * (k + 1) // 3 - n * k // 3),
    Order("left-to-right"): lambda k, masked, n: [((min(masked),), 1.0)],
    Order("right-to-left"): lambda k, masked, n: [((max(masked),), 1.0)],
    Order((2, 0, 3, 1)): lambda k, masked, n: [((next(i for i in (2, 0, 3, 1) if i in masked),), 1.0)],
    Fixed(3, "first"): lambda k, masked, n: equally_likely(masked, n // 3 + (k < n % 3)),
    Blocks(Fixed(1), 2): lambda k, masked, n: [(masked[:2], 1.0)],
    Blocks(FirstHitting(), 3): lambda k, masked, n: equally_likely([i for i in masked if i < 3] or masked, 1),
    Blocks(Ancestral(2), 3): lambda k, masked, n: independent(
        (1, 1 / 2, 0), k % 2, [i for i in masked if i < 3 or k >= 2], n
    ),
}


def independent(rates, step, masked, _):
    """Each masked position by itself: probability 1 - m[k+1] / m[k]."""
    p = 1 - rates[step + 1] / rates[step]
    subsets = [subset for size in range(len(masked) + 1) for subset in combinations(masked, size)]
    return [(subset, p ** len(subset) * (1 - p) ** (len(masked) - len(subset))) for subset in subsets]


def equally_likely(masked, size):
    subsets = list(combinations(masked, size))
    return [(subset, 1 / len(subsets)) for subset in subsets]


def law(policy, toys, template, choose=CATEGORICAL):
    """{finished state: probability}, step by step over all partly masked states. `toys[k]` takes step k."""
    states, n = {template: 1.0}, template.count(None)
    for step in range(policy.num_steps(n)):
        following = defaultdict(float)
        for state, weight in states.items():
            masked = tuple(i for i, value in enumerate(state) if value is None)
            for subset, probability in POLICIES[policy](step, masked, n) if masked else [((), 1.0)]:
                for written, share in filled(state, subset, toys[step % len(toys)], choose):
                    following[written] += weight * probability * share
        states = following
    return states


def chosen(p, choose):
    """The law of one token under a token choice; p [num_ids] is the model's."""
    p = p ** (1 / choose.temperature) / (p ** (1 / choose.temperature)).sum()
    order = np.argsort(-p, kind="stable")
    if choose.top_k is not None:
        p[order[choose.top_k :]] = 0
        p /= p.sum()
    if choose.top_p is not None:
        p[order[np.append(0, p[order].cumsum()[:-1]) >= choose.top_p]] = 0
        p /= p.sum()
    return p


def filled(state, subset, toy, choose):
    """All ways to fill `subset`, its tokens independent of each other given `state`."""
    ways = [(state, 1.0)]
    for position in subset:
        p = chosen(toy.conditional(state, position), choose)
        ways = [
            ((*partial[:position], value, *partial[position + 1 :]), share * p[value])
            for partial, share in ways
            for value in range(toy.num_ids)
            if p[value] > 0
        ]
    return ways


def table(law, toy):
    result = np.zeros((toy.num_ids,) * toy.length)
    for state, probability in law.items():
        if probability > 0:  # a state with masks left must have none, and would index everything
            result[state] = probability
    assert abs(result.sum() - 1) < 1e-12
    return result


def draw(sampler, length, prompt=None, seed=0, num_samples=NUM_SAMPLES):
    """Tokens [S, L] as they finish; the collector is off because it looks at every sample again and again."""
    gc.disable()
    try:
        run = sampler.stream(num_samples, length, seed=seed, prompt=prompt)
        return torch.stack([sample.tokens for sample in run])
    finally:
        gc.enable()


def sampler_of(models, policy, **options):
    return Sampler(models, reveal=policy, max_batch=8192, max_resident=16384, **options)


def histogram(values, toy):
    flat = np.ravel_multi_index(values.T, (toy.num_ids,) * values.shape[1])
    return np.bincount(flat, minlength=toy.num_ids ** values.shape[1])


def goodness(counts, probabilities):
    """p-value and total variation of counts against a law. Outcomes expected fewer than 5 times are merged, rarest
    first; an outcome that the law excludes makes p zero."""
    counts, probabilities = np.ravel(counts), np.ravel(probabilities)
    total = counts.sum()
    variation = np.abs(counts / total - probabilities).sum() / 2
    if counts[probabilities == 0].any():
        return 0.0, variation
    order = np.argsort(probabilities)
    order = order[probabilities[order] > 0]
    expected = total * probabilities[order]
    enough = int(np.searchsorted(expected.cumsum(), 5)) + 1  # the rarest ones that together make a bin
    enough = max(enough, int(np.searchsorted(expected, 5)))
    observed = np.append(counts[order][:enough].sum(), counts[order][enough:])
    expected = np.append(expected[:enough].sum(), expected[enough:])
    if len(observed) == 1:
        return 1.0, variation
    return float(stats.chisquare(observed, expected * total / expected.sum()).pvalue), variation


@pytest.fixture
def fits(capsys, request):
    """Check counts against a law, and say how well they agree."""

    def check(counts, probabilities, what=""):
        p, variation = goodness(counts, probabilities)
        message = f"{request.node.name} {what}: p = {p:.3g}, total variation {variation:.5f}, {counts.sum():,} samples"
        with capsys.disabled():
            print(f"\n    {message}", end="")
        assert p > SMALLEST_P, message

    return check


@pytest.fixture(scope="module")
def contradictory():
    return inconsistent(num_ids=3, length=4, seed=1)


@pytest.fixture(scope="module")
def agreeing():
    return consistent(num_ids=4, length=4, seed=2)


# ---- The joint law of every planned policy ----


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_policy_has_its_law(policy, contradictory, fits):
    """On conditionals that belong to no joint law, so that every policy has a law of its own."""
    tokens = draw(sampler_of(contradictory, policy), 4)
    expected = table(law(policy, [contradictory], (None,) * 4), contradictory)
    fits(histogram(contradictory.values(tokens), contradictory), expected)


# Triton's interpreter, there on request only, would take an hour; its tokens are compared with the specification's.
@pytest.mark.parametrize("impl", [x.name for x in OPERATOR.implementations if x.status()[0] and not x.on_request()])
def test_every_implementation_of_the_head_has_the_law(impl, contradictory, fits):
    """Reveal times and tokens come from one generator: an implementation whose streams overlapped would show here."""
    tokens = draw(sampler_of(contradictory, FirstHitting(), impl=impl), 4, seed=13)
    expected = table(law(FirstHitting(), [contradictory], (None,) * 4), contradictory)
    fits(histogram(contradictory.values(tokens), contradictory), expected)


def test_those_laws_differ(contradictory):
    """Otherwise the test above could not tell one policy from another. Fixed(1) is Ancestral(1), rightly."""
    laws = {str(policy): table(law(policy, [contradictory], (None,) * 4), contradictory) for policy in POLICIES}
    distances = [np.abs(a - b).sum() / 2 for a, b in combinations(laws.values(), 2)]
    assert sorted(distances)[0] < 1e-12
    assert sorted(distances)[1] > 0.01


@pytest.mark.parametrize("policy", [FirstHitting(), Order("left-to-right"), Order((2, 0, 3, 1))], ids=str)
def test_one_by_one_gives_the_data_law(policy, agreeing, fits):
    """With consistent conditionals any order of single reveals gives the joint law itself."""
    np.testing.assert_allclose(table(law(policy, [agreeing], (None,) * 4), agreeing), agreeing.joint, atol=1e-12)
    tokens = draw(sampler_of(agreeing, policy), 4)
    fits(histogram(agreeing.values(tokens), agreeing), agreeing.joint)


def test_steps_have_a_price_and_the_test_sees_it(agreeing, fits):
    """Ancestral sampling in 2 steps has its own law, not that of infinitely many."""
    counts = histogram(agreeing.values(draw(sampler_of(agreeing, Ancestral(2)), 4)), agreeing)
    fits(counts, table(law(Ancestral(2), [agreeing], (None,) * 4), agreeing))
    p, variation = goodness(counts, agreeing.joint)
    assert p < 1e-12 and variation > 0.05


@pytest.mark.parametrize("policy", [Ancestral(2), FirstHitting(), Fixed(2), Order((2, 0, 3, 1))], ids=str)
def test_given_positions(policy, contradictory, fits):
    """A template: position 1 is given and in nobody's way, all others have the conditional law."""
    prompt = [1, int(contradictory.ids[2]), 1, 1]
    tokens = draw(sampler_of(contradictory, policy), 4, prompt)
    expected = law(policy, [contradictory], states_of(prompt, contradictory))
    fits(histogram(contradictory.values(tokens), contradictory), table(expected, contradictory))


@pytest.mark.parametrize("policy", [Ancestral(2), FirstHitting()], ids=str)
@pytest.mark.parametrize("choose", [Categorical(0.7), Categorical(top_k=2), Categorical(1.3, top_p=0.8)], ids=str)
def test_token_choices(policy, choose, contradictory, fits):
    tokens = draw(sampler_of(contradictory, policy, choose=choose), 4)
    expected = law(policy, [contradictory], (None,) * 4, choose)
    fits(histogram(contradictory.values(tokens), contradictory), table(expected, contradictory))
    plain = table(law(policy, [contradictory], (None,) * 4), contradictory)
    assert goodness(histogram(contradictory.values(tokens), contradictory), plain)[0] < 1e-12


@pytest.mark.parametrize(
    ("policy", "schedule", "who"),
    [
        (Ancestral(4), "a:1 b:2 a:1", "abba"),
        (FirstHitting(), "b:25% a:75%", "baaa"),
        (Ancestral(2, UNFINISHED), "a:2 b:1", "aab"),
    ],
    ids=str,
)
def test_schedules(policy, schedule, who, contradictory, fits):
    """Two models: the law of each step is that of the model that takes it."""
    models = {"a": contradictory, "b": inconsistent(num_ids=3, length=4, seed=8, name="b")}
    tokens = draw(sampler_of(models, policy, schedule=schedule), 4)
    expected = table(law(policy, [models[name] for name in who], (None,) * 4), contradictory)
    counts = histogram(contradictory.values(tokens), contradictory)
    fits(counts, expected)
    alone = table(law(policy, [contradictory], (None,) * 4), contradictory)
    assert goodness(counts, alone)[0] < 1e-12


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("choose", [CATEGORICAL, Categorical(0.7, top_k=2)], ids=str)
def test_log_probabilities_by_replay(policy, choose, contradictory):
    """Each token's log-probability, given what stood there before the step that `reveal_step` names."""
    sampler = sampler_of(contradictory, policy, choose=choose)
    prompt = [1, 1, int(contradictory.ids[0]), 1]
    for sample in sampler.sample(50, 4, seed=3, prompt=prompt):
        final, steps = contradictory.values(sample.tokens), sample.reveal_step.tolist()
        assert steps[2] == -1 and sample.logprobs[2] == 0 and final[2] == 0
        for position in (0, 1, 3):
            before = tuple(int(v) if steps[i] < steps[position] else None for i, v in enumerate(final))
            expected = np.log(chosen(contradictory.conditional(before, position), choose)[final[position]])
            assert sample.logprobs[position].item() == pytest.approx(expected, abs=2e-5)


def test_log_probabilities_add_up(agreeing):
    """One by one, with consistent conditionals, they sum to the log-probability of the whole sequence."""
    for policy in (FirstHitting(), Order("right-to-left")):
        samples = sampler_of(agreeing, policy).sample(2000, 4, seed=4)
        expected = np.log(agreeing.joint[tuple(agreeing.values(samples.tokens).T)])
        np.testing.assert_allclose(samples.logprobs.sum(1).numpy(), expected, atol=2e-5)


def test_greedy(contradictory):
    """Temperature 0 in a fixed order is one path, whatever the seed."""
    sampler = sampler_of(contradictory, Order("left-to-right"), choose=Categorical(0.0))
    state = (None,) * 4
    for position in range(4):
        state = (*state[:position], int(contradictory.conditional(state, position).argmax()), *state[position + 1 :])
    for seed in (0, 2**64 - 1):
        assert (contradictory.values(sampler.sample(5, 4, seed=seed).tokens) == state).all()


# ---- A longer chain ----


@pytest.fixture(scope="module")
def markov():
    start, transition = np.array([0.2, 0.5, 0.3]), np.array([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.0, 0.3, 0.7]])
    emission = np.array([[0.7, 0.1, 0.1, 0.1], [0.0, 0.6, 0.4, 0.0], [0.1, 0.0, 0.2, 0.7]])
    toy = HiddenMarkov(32, start, transition, emission)
    toy.num_ids = 4
    return toy


def window_law(toy, places):
    """Joint law of the tokens at ascending `places`: array [num_ids] * len(places)."""
    message, at = toy.start, 0  # [..., K], the hidden state at `at`
    for place in places:
        message = message @ np.linalg.matrix_power(toy.transition, place - at)
        message, at = message[..., None, :] * toy.emission.T, place
    return message.sum(-1)


def count_law(toy, value):
    """Law of how many of the L tokens are `value`."""
    message = np.zeros((toy.length + 1, len(toy.start)))
    message[0] = toy.start
    for i in range(toy.length):
        hit, miss = message * toy.emission[:, value], message * (1 - toy.emission[:, value])
        message = miss
        message[1:] += hit[:-1]
        if i + 1 < toy.length:
            message = message @ toy.transition
    return message.sum(1)


def direct(toy, num_samples, rng):
    """Sequences of the chain by running it forwards."""
    values = np.empty((num_samples, toy.length), np.int64)
    state = (rng.random(num_samples)[:, None] > toy.start.cumsum()).sum(1)
    for i in range(toy.length):
        values[:, i] = (rng.random(num_samples)[:, None] > toy.emission.cumsum(1)[state]).sum(1)
        state = (rng.random(num_samples)[:, None] > toy.transition.cumsum(1)[state]).sum(1)
    return values


# A network call of this toy is dear, so the second policy gets fewer samples; it has 200,000 in the tests above.
@pytest.mark.parametrize(
    ("policy", "num_samples"), [(FirstHitting(), NUM_SAMPLES), (Order("left-to-right"), 50_000)], ids=str
)
def test_a_hidden_markov_chain(policy, num_samples, markov, fits, capsys):
    """32 tokens one by one: windows, far pairs, counts, and the mean log-likelihood against direct draws."""
    sampler = Sampler(markov, reveal=policy, max_batch=4096, max_resident=8192)
    values = markov.values(draw(sampler, 32, seed=6, num_samples=num_samples))
    for places in ((0, 1, 2, 3), (14, 15, 16, 17), (28, 29, 30, 31), (0, 31), (3, 10, 17, 24)):
        fits(histogram(values[:, places], markov), window_law(markov, places), f"tokens at {places}")
    for value in range(4):
        counts = np.bincount((values == value).sum(1), minlength=33)
        fits(counts, count_law(markov, value), f"how many are {value}")
    ours = markov.log_law(values)
    theirs = markov.log_law(direct(markov, NUM_SAMPLES, np.random.default_rng(7)))
    p = stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    message = f"mean log-likelihood {ours.mean():.4f}, of direct draws {theirs.mean():.4f}: p = {p:.3g}"
    with capsys.disabled():
        print(f"\n    {message}", end="")
    assert p > SMALLEST_P, message


# ---- When positions are revealed ----


def test_reveal_counts_are_binomial(fits):
    """Ancestral(8) on 48 positions: how many positions step k reveals in a sequence, and all positions by step."""
    samples = Sampler(Toy(7, 48), reveal=Ancestral(8), max_batch=512).sample(4000, 48, seed=9)
    steps = samples.reveal_step.numpy()
    fits(np.bincount(steps.ravel(), minlength=8), np.full(8, 1 / 8), "all positions by step")
    for step in (0, 3, 7):
        counts = np.bincount((steps == step).sum(1), minlength=49)
        fits(counts, stats.binom.pmf(np.arange(49), 48, 1 / 8), f"positions of step {step}")


def test_reveal_steps_are_those_of_the_noise():
    """The documented times, by sequence and position of the request, decide the steps to the last bit."""
    template = [1, 3, 1, 1, 4, 1, 1, 1]
    masked = np.flatnonzero(np.array(template) == 1)
    times = reveal_times(2**63 + 5, torch.arange(40)[:, None], torch.from_numpy(masked)).numpy()
    expected = {
        Ancestral(4): np.floor(4 * (1 - times)),
        Ancestral(2, UNFINISHED): (times < 0.7).astype(int) + (times < 0.3),
        FirstHitting(): (times[:, None, :] > times[:, :, None]).sum(2),
        Fixed(3): (times[:, None, :] > times[:, :, None]).sum(2) // 2,
        Order("right-to-left"): np.broadcast_to(np.arange(6)[::-1], times.shape),
    }
    for policy, steps in expected.items():
        samples = Sampler(Toy(9, 8), reveal=policy, max_batch=7).sample(40, 8, seed=2**63 + 5, prompt=template)
        assert (samples.reveal_step.numpy()[:, masked] == steps).all(), policy
        assert (np.delete(samples.reveal_step.numpy(), masked, 1) == -1).all()


def test_expected_number_of_events():
    """N (1 - (1 - 1/N)^L) of N = 1000 steps at L = 1024."""
    plan = Sampler(Toy(7, 1024), reveal=Ancestral(1000), max_batch=64).plan(64, 1024, seed=1)
    expected = 1000 * (1 - (1 - 1 / 1000) ** 1024)
    assert plan.events_per_sequence == pytest.approx(expected, rel=0.01)
    assert int(expected) == 641


# ---- What a sample must not depend on ----


def same(one, other):
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.logprobs, other.logprobs)


REPRODUCIBLE = (
    Ancestral(6),
    FirstHitting(),
    Fixed(5),
    Order("left-to-right"),
    Blocks(Fixed(3, "first"), 7),
    Remask(9, eta=0.4),
    Blocks(Remask(4, "rescale", eta=0.5), 10),
)


@pytest.mark.parametrize("policy", REPRODUCIBLE, ids=str)
def test_one_model_in_every_segment_is_no_schedule(policy):
    alone = Sampler(Toy(9, 24), reveal=policy, max_batch=4).sample(10, 24, seed=5)
    for schedule in ("toy", "toy:100%", "toy:30% toy:70%"):
        assert same(alone, Sampler(Toy(9, 24), schedule=schedule, reveal=policy, max_batch=4).sample(10, 24, seed=5))
    twins = {"a": Toy(9, 24), "b": Toy(9, 24)}
    both = Sampler(twins, schedule="a:50% b:50%", reveal=policy, max_batch=4).sample(10, 24, seed=5)
    assert same(alone, both)
    assert twins["a"].num_calls and twins["b"].num_calls


@pytest.mark.parametrize("policy", REPRODUCIBLE, ids=str)
def test_a_plan_counts_what_a_run_does(policy):
    """Network calls of every shape, their FLOPs, and ticks, for ragged lengths and prompts."""
    toy = Toy(9, 24)
    request = {"length": [24, 3, 17, 24, 8], "seed": 3, "prompt": [[2], [], [3, 4], [], [5] * 7]}
    sampler = Sampler(toy, reveal=policy, max_batch=3, max_resident=4)
    plan, stats = sampler.plan(5, **request), sampler.sample(5, **request).stats
    assert plan.cost == stats.cost and plan.cost.num_events == toy.num_events
    assert plan.num_ticks == stats.num_ticks == toy.num_calls and plan.peak_bytes == stats.peak_bytes


@pytest.mark.parametrize("policy", [Ancestral(10), Remask(10, "loop", eta=0.3)], ids=str)
def test_a_sample_is_its_index_and_seed(policy):
    """The number of samples, the batch, the slots and the neighbours change nothing; the seed does."""
    few = Sampler(Toy(9, 24), reveal=policy, max_batch=2).sample(3, 24, seed=2**64 - 1)
    for max_batch, max_resident in ((1, 1), (7, 3), (64, 300), (16, None)):
        sampler = Sampler(Toy(9, 24), reveal=policy, max_batch=max_batch, max_resident=max_resident)
        many = sampler.sample(300, 24, seed=2**64 - 1)
        assert torch.equal(many.tokens[:3], few.tokens) and torch.equal(many.reveal_step[:3], few.reveal_step)
    assert len({tuple(sample.tokens.tolist()) for sample in many}) == 300


def test_all_bits_of_the_seed_count():
    """For the reveal times, and for the tokens, seen alone where the order of reveal is fixed."""
    ordered, random = (Sampler(Toy(9, 24), reveal=policy) for policy in (Order("left-to-right"), FirstHitting()))
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    assert len({tuple(ordered.sample(1, 24, seed=seed)[0].tokens.tolist()) for seed in seeds}) == len(seeds)
    assert len({tuple(random.sample(1, 24, seed=seed)[0].reveal_step.tolist()) for seed in seeds}) == len(seeds)


def test_ragged_neighbours_change_nothing():
    """Every sequence of a ragged run with prompts equals the same index of a run in which all look like it."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 25, 40).tolist()
    prompts = [[2] * int(rng.integers(0, 5)) for _ in lengths]
    mixed = Sampler(Toy(9, 24), reveal=Ancestral(5), max_batch=5, max_resident=11).sample(
        40, lengths, seed=1, prompt=prompts
    )
    for index in range(0, 40, 7):
        sampler = Sampler(Toy(9, 24), reveal=Ancestral(5), max_batch=40)
        uniform = sampler.sample(40, lengths[index], seed=1, prompt=prompts[index])
        assert torch.equal(mixed[index].tokens, uniform[index].tokens)
        assert torch.equal(mixed[index].reveal_step, uniform[index].reveal_step)


@pytest.fixture(scope="module")
def pair():
    return {"heavy": load("sotu-heavy"), "light": load("sotu-light")}


def differing(one, other):
    return (one != other).double().mean().item()


def test_packing_does_not_change_tokens(pair, capsys):
    """The bundled heavy model in fp32, 64 sequences of 256 tokens: whatever shares a tick, the tokens are the same.

    Only where the best two scores lie closer than the rounding of the logits could a token differ.
    """
    heavy, policy = pair["heavy"], Ancestral(8)
    base = Sampler(heavy, reveal=policy, max_batch=16).sample(64, 256, seed=11)
    alone = Sampler(heavy, reveal=policy, max_batch=1).sample(64, 256, seed=11)
    run = Sampler(heavy, reveal=policy, max_batch=3, max_resident=5).stream(64, 256, seed=11)
    streamed = torch.stack([sample.tokens for sample in sorted(run, key=lambda sample: sample.index)])
    rates = {
        "max_batch 1": differing(base.tokens, alone.tokens),
        "max_batch 3, 5 resident, streamed": differing(base.tokens, streamed),
    }
    with capsys.disabled():
        print(
            "".join(f"\n    {heavy.name}, {name}: {rate:.2%} of tokens differ" for name, rate in rates.items()), end=""
        )
    assert set(rates.values()) == {0.0}


def test_packing_does_not_change_tokens_of_a_schedule(pair, capsys):
    """The same for two models, ragged lengths and prompts: reference runs hold one sequence at a time."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(40, 257, 24).tolist()
    prompts = [rng.integers(0, 200, int(rng.integers(0, 30))).tolist() for _ in lengths]
    options = {"schedule": "light:25% heavy:50% light:25%", "reveal": Ancestral(8)}
    arguments = {"length": lengths, "seed": 12, "prompt": prompts}
    base = Sampler(pair, max_batch=1, max_resident=1, **options).sample(24, **arguments).tokens
    rates = {}
    for max_batch, resident in ((16, 256), (3, 7)):
        packed = Sampler(pair, max_batch=max_batch, max_resident=resident, **options).sample(24, **arguments)
        rates[f"max_batch {max_batch}, {resident} resident"] = differing(base, packed.tokens)
    with capsys.disabled():
        print("".join(f"\n    schedule, {name}: {rate:.2%} of tokens differ" for name, rate in rates.items()), end="")
    assert set(rates.values()) == {0.0}
