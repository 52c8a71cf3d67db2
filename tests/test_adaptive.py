"""Adaptive policies: the law of their samples against plain enumeration, how many positions a step reveals, what the
samples must not depend on, and what ends a run early."""

import math
from collections import defaultdict
from dataclasses import replace
from io import StringIO
from itertools import islice, permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from test_graphs import Repeated, with_executor  # noqa: F401, a fixture
from test_llama import make
from toys import MASK, Toy, inconsistent, random_dit

from unmask import Ancestral, Blocks, Categorical, Confidence, LogitsDenoiser, RemaskConfidence, Sampler
from unmask import run as run_module
from unmask.adaptive import trajectory
from unmask.graphs import Padded
from unmask.kernels import sample_head
from unmask.progress import Lines, Progress
from unmask.reveal import parse

NUM_SAMPLES, SMALLEST_P, LENGTH, NUM_IDS = 20_000, 1e-3, 3, 3

PLAIN = Categorical()

# ---- The law, by enumeration ----


def tempered(p, choose):
    """The law that a token is drawn from, and that at temperature 1 where it is drawn greedily."""
    shown = p if choose.temperature == 0 else p ** (1 / choose.temperature)
    shown = shown / shown.sum()
    if choose.top_k is not None:
        shown[np.argsort(-shown, kind="stable")[choose.top_k :]] = 0
        shown /= shown.sum()
    drawn = np.eye(len(p))[shown.argmax()] if choose.temperature == 0 else shown
    return drawn, shown


def score(policy, p, shown, value):
    """Of a position whose network law is p and whose token is `value`, drawn from `shown`."""
    if policy.score == "margin":
        top, second = np.sort(shown)[::-1][:2]
        return top - second
    if policy.score == "entropy":
        return (shown * np.log(np.where(shown > 0, shown, 1))).sum()
    base = p if policy.untempered else shown
    doubted = list(policy.doubted)
    return 0.0 if value in doubted else base[value] / (1 - base[doubted].sum())


def entropy(p):
    return -(p * np.log(np.where(p > 0, p, 1))).sum()


def kept(policy, count, scores, entropies):
    """[(indices that keep their token, probability)], by the definition of the rule."""
    ranked = np.argsort(-np.array(scores), kind="stable").tolist()
    if policy.score == "random" or policy.temperature_of_order:
        weight = np.ones(len(scores))
        if policy.score != "random":
            weight = np.exp(np.array(scores) / policy.temperature_of_order)
        found = defaultdict(float)
        for order in permutations(
            range(len(scores)), min(int(count), len(scores))
        ):  # one after the other, no replacement
            left, probability = weight.sum(), 1.0
            for one in order:
                probability, left = probability * weight[one] / left, left - weight[one]
            found[frozenset(order)] += probability
        return list(found.items())
    if policy.threshold is not None:
        least = -policy.threshold if policy.score == "entropy" else policy.threshold
        chosen = [i for place, i in enumerate(ranked) if scores[i] >= least or place < (policy.per_step or 1)]
    elif policy.entropy_bound is not None:
        chosen = [ranked[0]]
        for i in ranked[1:]:
            together = [entropies[j] for j in [*chosen, i]]
            if sum(together) - max(together) > policy.entropy_bound:
                break
            chosen.append(i)
    else:
        chosen = ranked[:count]
    return [(frozenset(chosen), 1.0)]


def law(policy, toy, template, choose=PLAIN, guide=None):
    """{finished state: probability}; states hold real ids, None where masked. guide: state -> conditional."""
    inner = getattr(policy, "policy", policy)
    masked = [i for i, value in enumerate(template) if value is None]
    size = getattr(policy, "length", len(masked))
    states = {template: 1.0}
    for start in range(0, len(masked), size):
        window = masked[start : start + size]
        counts = inner.counts(len(window))
        for step in range(inner.num_steps(len(window))):
            following = defaultdict(float)
            for state, weight in states.items():
                open_ = [i for i in window if state[i] is None]
                count = 0 if counts is None else counts[step]
                for written, share in advanced(inner, toy, state, open_, count, counts, choose, guide):
                    following[written] += weight * share
            states = following
    return states


def advanced(policy, toy, state, open_, count, counts, choose, guide):
    if not open_ or (counts is not None and count == 0):
        return [(state, 1.0)]
    network = [(guide or toy.conditional)(state, i).astype(float) for i in open_]
    for p in network:
        p[list(choose.suppress)] = 0
        p /= p.sum()
    laws = [tempered(p, choose) for p in network]
    ways = []
    for values in product(range(toy.num_ids), repeat=len(open_)):
        share = math.prod(drawn[value] for (drawn, _), value in zip(laws, values, strict=True))
        if share == 0:
            continue
        scores = [
            score(policy, p, shown, value) if policy.score != "random" else 0.0
            for p, (_, shown), value in zip(network, laws, values, strict=True)
        ]
        for indices, probability in kept(policy, count, scores, [entropy(shown) for _, shown in laws]):
            written = list(state)
            for index in indices:
                written[open_[index]] = values[index]
            ways.append((tuple(written), share * probability))
    return ways


@pytest.fixture(scope="module")
def toy():
    return inconsistent(NUM_IDS, LENGTH, seed=1)


def check(tokens, expected, toy):
    values = toy.values(tokens)
    counts = np.bincount(np.ravel_multi_index(values.T, (NUM_IDS,) * LENGTH), minlength=NUM_IDS**LENGTH)
    probabilities = np.zeros((NUM_IDS,) * LENGTH)
    for state, probability in expected.items():
        probabilities[state] += probability
    probabilities = probabilities.ravel()
    assert abs(probabilities.sum() - 1) < 1e-9 and not counts[probabilities == 0].any()
    likely = probabilities * len(values) >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(probabilities[likely], probabilities[~likely].sum()) * len(values)
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    p = float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue) if len(observed) > 1 else 1.0
    assert p > SMALLEST_P, f"p = {p:.3g}"


def draw(toy, policy, choose=None, prompt=None, guidance=0.0, num_samples=NUM_SAMPLES, seed=3):
    sampler = Sampler(toy, reveal=policy, choose=choose, guidance=guidance, max_batch=2048)
    return sampler.sample(num_samples, LENGTH, prompt=prompt, seed=seed).tokens


LAWS = {
    "one by one": (Confidence(per_step=1), {}),
    "two steps, the larger first": (Confidence(steps=2), {}),
    "margin": (Confidence("margin", per_step=1), {}),
    "entropy": (Confidence("entropy", steps=2), {}),
    "random": (Confidence("random", steps=2), {}),
    "threshold": (Confidence(threshold=0.6), {}),
    "threshold, two at least": (Confidence(threshold=0.35, per_step=2), {}),
    "threshold of the entropy": (Confidence("entropy", threshold=0.9), {}),
    "bound": (Confidence("entropy", entropy_bound=0.4), {}),
    "bound by confidence": (Confidence(entropy_bound=0.8), {}),
    "order drawn": (Confidence("entropy", per_step=1, temperature_of_order=0.3), {}),
    "warm": (Confidence(per_step=1), {"temperature": 1.7}),
    "warm, sure of the network's law": (Confidence(per_step=1, untempered=True), {"temperature": 1.7}),
    "hot, sure of the network's law": (Confidence(threshold=0.5, untempered=True), {"temperature": 3.0}),
    "cut, sure of the network's law": (Confidence(per_step=1, untempered=True), {"top_k": 2}),
    "doubted": (Confidence(per_step=1, doubted=(3,)), {}),  # the token id of real id 2
    "suppressed": (Confidence(per_step=1), {"suppress": (0,)}),
    "greedy": (Confidence(per_step=1), {"temperature": 0.0}),
    "blocks": (Blocks(Confidence(steps=2), 2), {}),
    "blocks of a threshold": (Blocks(Confidence(threshold=0.3), 2), {}),
}


@pytest.mark.parametrize("name", LAWS)
def test_every_adaptive_policy_has_its_law(name, toy):
    policy, options = LAWS[name]
    choose = Categorical(**options)
    ids = {int(token): value for value, token in enumerate(toy.ids)}
    stated = (
        replace(policy, doubted=tuple(ids[i] for i in policy.doubted)) if isinstance(policy, Confidence) else policy
    )
    expected = law(stated, toy, (None,) * LENGTH, replace(choose, suppress=tuple(ids[i] for i in choose.suppress)))
    check(draw(toy, policy, choose), expected, toy)


def test_those_laws_differ(toy):
    """Otherwise the test above could not tell one policy from another."""
    plain = {name: policy for name, (policy, options) in LAWS.items() if not options and name != "doubted"}
    laws = [law(policy, toy, (None,) * LENGTH) for policy in plain.values()]
    distances = [
        sum(abs(a.get(state, 0) - b.get(state, 0)) for state in a | b) / 2
        for i, a in enumerate(laws)
        for b in laws[i + 1 :]
    ]
    assert min(distances) > 0.005


def test_given_positions_are_conditions(toy):
    given = int(toy.ids[1])
    tokens = draw(toy, Confidence("margin", per_step=1), prompt=[given])
    check(tokens, law(Confidence("margin", per_step=1), toy, (1, None, None)), toy)


@pytest.mark.parametrize("policy", [Ancestral(3), Confidence(steps=2)], ids=str)
def test_guidance_combines_the_logits_with_those_of_masked_givens(policy, toy):
    """log p is (1 + w) log p(given) - w log p(masked), whichever policy draws from it."""
    w = 0.8

    def guide(state, position):
        blind = (None, *state[1:])
        p = toy.conditional(state, position) ** (1 + w) * toy.conditional(blind, position) ** -w
        return p / p.sum()

    if isinstance(policy, Ancestral):
        expected = ancestral_law(toy, guide)
    else:
        expected = law(policy, toy, (1, None, None), guide=guide)
    check(draw(toy, policy, prompt=[int(toy.ids[1])], guidance=w), expected, toy)


def test_the_head_is_tried_with_rows_as_guidance_makes_them(monkeypatch):
    """Rows that are combined in fp32 stay so, also beside a head in bf16."""
    dtypes = []

    def watched(hidden, *arguments, **options):
        dtypes.append((len(hidden), hidden.dtype))
        return sample_head(hidden, *arguments, **options)

    monkeypatch.setattr(run_module, "sample_head", watched)
    _, model = make("llada", torch.bfloat16)
    Sampler(model, reveal=Confidence(steps=2), guidance=1.0).sample(2, 12, prompt=[3])
    assert dtypes[0] == (0, torch.float32) and {dtype for _, dtype in dtypes} == {torch.float32}


def ancestral_law(toy, conditional, steps=3):
    """Over (1, None, None): each masked position is revealed with probability 1 / (steps left)."""
    states = {(1, None, None): 1.0}
    for step in range(steps):
        following, q = defaultdict(float), 1 / (steps - step)
        for state, weight in states.items():
            options = [
                [(value, q * p) for value, p in enumerate(conditional(state, i))] + [(None, 1 - q)]
                if state[i] is None
                else [(state[i], 1.0)]
                for i in range(LENGTH)
            ]
            for way in product(*options):
                following[tuple(value for value, _ in way)] += weight * math.prod(p for _, p in way)
        states = {state: weight for state, weight in following.items() if weight}
    return states


def test_the_mask_id_can_take_part(toy):
    """It takes its share of the law, and a position that draws it stays masked."""
    weighted = inconsistent(NUM_IDS, LENGTH, seed=1)
    weighted.table[..., MASK] = math.log(0.5)  # beside probabilities that sum to 1
    tokens = draw(weighted, Confidence("random", steps=1), Categorical(draw_mask=True))
    assert abs((tokens == MASK).double().mean() - 1 / 3) < 0.01
    assert not (draw(weighted, Confidence("random", steps=1), num_samples=500) == MASK).any()
    with pytest.raises(ValueError, match="draw_mask must be False with a planned policy"):
        Sampler(toy, reveal=Ancestral(3), choose=Categorical(draw_mask=True))


@pytest.mark.parametrize("policy", [Confidence(steps=5, eps=0.1), Blocks(Confidence("random", steps=4, eps=0.2), 9)])
def test_a_mask_id_that_is_never_drawn_changes_nothing(policy):
    """Shares of what is masked, reckoned on the device, are the counts that the host knows."""
    plain, drawn = (
        Sampler(Toy(40, 32), reveal=policy, choose=choose, max_batch=4).sample(6, LENGTHS, prompt=[5, 9])
        for choose in (Categorical(), Categorical(suppress=(MASK,), draw_mask=True))
    )
    assert same(plain, drawn)


def test_a_random_order_is_drawn_anew_in_each_step():
    """Where nothing but mask ids is drawn, each of four steps takes one of three positions."""
    toy = Toy(9, 3)
    choose = Categorical(suppress=tuple(i for i in range(9) if i != MASK), draw_mask=True)
    samples = Sampler(toy, reveal=Confidence("random", per_step=1), choose=choose, max_batch=64).sample(3000, 3)
    visited = np.bincount((samples.reveal_step >= 0).sum(1), minlength=4)[1:]
    assert stats.chisquare(visited, np.array([3, 18, 6]) / 27 * 3000).pvalue > SMALLEST_P


@pytest.mark.parametrize("doubted", [(7,), tuple(i for i in range(9) if i != MASK)])
def test_a_position_may_have_doubted_ids_only(doubted):
    sampler = Sampler(Toy(9, 6), reveal=Confidence(per_step=1, doubted=doubted), max_batch=4)
    samples = sampler.sample(5, 6, allow={position: (7,) if position == 2 else (0, 2, 3) for position in range(6)})
    assert (samples.tokens[:, 2] == 7).all() and (samples.tokens != MASK).all()
    assert (samples.reveal_step[:, 2] == (5 if len(doubted) == 1 else 2)).all()  # the last; or all in order


@pytest.mark.parametrize("policy", [Confidence(steps=3), Blocks(Confidence(threshold=0.05), 5)], ids=str)
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_time_conditioned_network_is_told_what_is_left(policy, guidance):
    """The share of what its template has masked, in both calls of guidance."""
    told = []

    def logits(tokens, mask_rate):
        told.append((mask_rate.tolist(), (tokens == MASK).sum(1).tolist()))
        return torch.sin(torch.arange(tokens.numel() * 12).view(*tokens.shape, 12) * 0.7)

    spec = replace(Toy(12, 16).spec, time_conditioned=True)
    model = LogitsDenoiser(logits, spec, max_bytes=2 * 4 * 12 * 16)  # two sequences at a time
    Sampler(model, reveal=policy, guidance=guidance, max_batch=4).sample(4, 16, prompt=[[2], [2, 3, 4]] * 2)
    assert all(len(rates) <= 2 for rates, _ in told)
    for (rates, masked), (same_rates, all_masked) in zip(told[::2], told[1::2], strict=True) if guidance else ():
        assert rates == same_rates
        for rate, left, more in zip(rates, masked, all_masked, strict=True):
            assert more - left in (1, 3) and rate == pytest.approx(left / (16 - (more - left)))
    for rates, masked in () if guidance else told:
        for rate, left in zip(rates, masked, strict=True):
            assert any(rate == pytest.approx(left / (16 - given)) for given in (1, 3))


# ---- How many a step reveals ----


@pytest.mark.parametrize(("num_masked", "steps"), [(10, 3), (8, 8), (3, 5), (128, 7), (1, 1)])
def test_equal_counts_have_the_remainder_first(num_masked, steps):
    counts = Confidence(steps=steps).counts(num_masked)
    assert len(counts) == steps and counts.sum() == num_masked
    assert set(counts) <= {num_masked // steps, num_masked // steps + 1} and (np.diff(counts) <= 0).all()


@pytest.mark.parametrize(
    ("num_masked", "steps", "eps"),
    [(10, 3, 1e-3), (128, 17, 1e-3), (512, 512, 1e-3), (64, 15, 0.2), (32, 8, 0.25), (16, 4, 0.5)],
)
def test_counts_of_a_time_grid_are_those_of_a_loop(num_masked, steps, eps):
    """The last three are others in fp64."""
    left = num_masked
    times = torch.linspace(1, eps, steps + 1)
    for i, count in enumerate(Confidence(steps=steps, eps=eps).counts(num_masked)):
        masked = torch.tensor([left]).sum() / 1
        wanted = int(masked * (1 - times[i + 1] / times[i])) if i < steps - 1 else int(masked)
        assert count == wanted
        left -= wanted
    assert left == 0


def test_steps_that_reveal_nothing_are_left_out():
    found = trajectory(Blocks(Confidence(steps=4), 2), np.array([3, 5, 8]))
    assert found.step.tolist() == [0, 1, 4] and found.end.tolist() == [6, 6, 9]
    assert found.count.tolist() == [1, 1, 1] and found.num_rows.tolist() == [2, 1, 1]
    assert found.group_end.tolist() == [6, 6, 9]


# ---- What samples must not depend on ----

POLICIES = {
    "steps": Confidence(steps=7),
    "order drawn": Confidence("entropy", per_step=3, temperature_of_order=0.5),
    "threshold": Confidence(threshold=0.05),
    "bound": Blocks(Confidence("entropy", entropy_bound=3.0), 5),
    "blocks": Blocks(Confidence("margin", steps=3), 6),
}
LENGTHS, CHOOSE = [17, 32, 5, 9, 32, 21], Categorical(0.7)


def sample(model, policy, max_batch=3, seed=0, **options):
    sampler = Sampler(model, reveal=policy, choose=CHOOSE, max_batch=max_batch, **options)
    return sampler.sample(len(LENGTHS), LENGTHS, prompt=[5, 9], seed=seed)


def same(one, other):
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.reveal_step, other.reveal_step)


@pytest.mark.parametrize("name", POLICIES)
def test_samples_do_not_depend_on_their_company(name):
    toy = Toy(40, 32)
    alone = sample(toy, POLICIES[name], 1)
    assert same(alone, sample(toy, POLICIES[name], 4)) and same(alone, sample(toy, POLICIES[name], 16, max_resident=2))
    assert not torch.equal(alone.tokens, sample(toy, POLICIES[name], 4, seed=1).tokens)
    assert (alone.tokens != MASK).all() and (alone.reveal_step[:, :2] == -1).all()
    assert (alone.logprobs[alone.reveal_step >= 0] < 0).all()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", [Padded, Repeated])
@pytest.mark.parametrize("lengths", [LENGTHS, [32] * 6], ids=["ragged", "equal"])
def test_rounded_shapes_give_the_same_samples(name, kind, lengths, with_executor):  # noqa: F811
    """As a GPU runs them: rows counted on the device, unused places, what scores decide learnt after a tick."""
    dit = random_dit("a", 2, vocab_size=60, hidden=32, length=32)
    options = {"reveal": POLICIES[name], "choose": CHOOSE, "max_batch": 4}
    expected = Sampler(dit, **options).sample(6, lengths, prompt=[5, 9])
    with_executor(kind, 4)
    found = Sampler(dit, **options).sample(6, lengths, prompt=[5, 9])
    assert same(expected, found) and torch.allclose(expected.logprobs, found.logprobs, atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_a_model_that_only_returns_logits_gives_the_same_samples(name):
    toy = Toy(40, 32)

    def logits(tokens):
        from unmask import Batch

        num, length = tokens.shape
        flat = torch.arange(num * length)
        batch = Batch(tokens.reshape(-1), (length,) * num, flat, (length,) * num, torch.ones(num))
        return toy.logits(batch).view(num, length, -1)

    wrapped = LogitsDenoiser(logits, toy.spec, max_bytes=1)  # a sequence at a time
    assert same(sample(toy, POLICIES[name]), sample(wrapped, POLICIES[name]))


@pytest.mark.parametrize("name", POLICIES)
def test_one_model_in_every_segment_changes_nothing(name):
    toy, other = Toy(40, 32), Toy(40, 32)
    alone = sample(toy, POLICIES[name])
    both = Sampler({"a": toy, "b": other}, schedule="a:30% b:70%", reveal=POLICIES[name], choose=CHOOSE, max_batch=2)
    together = both.sample(len(LENGTHS), LENGTHS, prompt=[5, 9])
    assert same(alone, together)
    # What scores decide is over before the half of its longest trajectory.
    assert together.stats.nfe["a"] > 0 and (together.stats.nfe["b"] > 0 or name == "threshold")


def test_each_model_takes_its_steps():
    """By number of the step: one that reveals nothing counts and is left out."""

    class Sure(Toy):
        def __init__(self, value):
            super().__init__(9, 8)
            self.value = value

        def logits(self, batch):
            return torch.where(torch.arange(9) == self.value, 40.0, 0.0).expand(len(batch.rows), 9)

    policy = Blocks(Confidence(steps=4), 5)  # counts 2 1 1 1 of five, then 1 1 1 0 of three
    models = {"a": Sure(2), "b": Sure(3), "c": Sure(4)}
    sampler = Sampler(models, schedule="a:2 b:3 c:3", reveal=policy, max_batch=2)
    samples = sampler.sample(3, 8)
    assert samples.stats.nfe == {"a": 2, "b": 3, "c": 2}
    for sample in samples:
        model = np.searchsorted([2, 5], sample.reveal_step.numpy(), side="right")
        assert sample.tokens.tolist() == (model + 2).tolist()
    assert sampler.plan(3, 8).cost == samples.stats.cost


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("name", ["steps", "blocks"])
def test_a_plan_counts_what_a_run_does(name, guidance):
    sampler = Sampler(Toy(40, 32), reveal=POLICIES[name], choose=CHOOSE, guidance=guidance, max_batch=3)
    plan, samples = sampler.plan(6, LENGTHS, prompt=[5, 9]), sampler.sample(6, LENGTHS, prompt=[5, 9])
    assert plan.cost == samples.stats.cost and plan.num_ticks == samples.stats.num_ticks
    assert plan.num_tokens == samples.stats.num_tokens == sum(LENGTHS) - 12
    with pytest.raises(ValueError, match="reveal must fix how many positions each step reveals"):
        Sampler(Toy(40, 32), reveal=POLICIES["threshold"]).plan(1, 32)


# ---- Stops, and lists of ids ----


@pytest.mark.parametrize("inner", [Confidence(steps=2), Confidence(threshold=0.2)], ids=str)
def test_a_stop_fills_what_follows_its_block(inner):
    toy, stop, size = Toy(12, 32), 4, 8
    free = Sampler(toy, reveal=Blocks(inner, size), max_batch=4).sample(12, 32, prompt=[stop])
    ended = Sampler(toy, reveal=Blocks(inner, size, stop_id=stop), max_batch=4).sample(12, 32, prompt=[stop])
    ends = []
    for one, other in zip(free, ended, strict=True):
        blocks = one.tokens[1:].split(size)
        last = next((k for k, block in enumerate(blocks) if (block == stop).any()), len(blocks))
        ends.append(min(1 + (last + 1) * size, 32))
        assert torch.equal(other.tokens[: ends[-1]], one.tokens[: ends[-1]])
        assert (other.tokens[ends[-1] :] == stop).all()
        assert (other.reveal_step[ends[-1] :] == other.reveal_step[: ends[-1]].max()).all()
        assert (other.logprobs[ends[-1] :] == 0).all()
    assert len(set(ends)) > 1 and min(ends) < 32  # the given stop ends nothing, some drawn ones do
    assert ended.stats.events < free.stats.events and len(ended) == ended.stats.num_samples == 12
    assert ended.stats.events == sum(len(one.reveal_step.unique()) - 1 for one in ended)  # none after the stop


@pytest.mark.parametrize("policy", [Ancestral(4), Confidence(steps=4)], ids=str)
def test_positions_draw_from_their_lists(policy):
    toy = Toy(70, 16)
    choose = Categorical(suppress=(3, 65), begin_suppress=(7, 40))
    allow = [{4: (7, 9), 5: (68,)}, None, {2: (40, 41, 65)}] * 40
    sampler = Sampler(toy, reveal=policy, choose=choose, max_batch=16)
    tokens = sampler.sample(120, 16, prompt=[3, 7], allow=allow, seed=1).tokens
    assert set(tokens[0::3, 4].tolist()) <= {7, 9} and set(tokens[0::3, 5].tolist()) == {68}
    assert set(tokens[2::3, 2].tolist()) == {41}  # 40 is not for the first, 65 for nobody
    drawn = tokens[:, 2:]
    assert not torch.isin(drawn, torch.tensor([3, 65, MASK])).any()
    assert not torch.isin(drawn[:, 0], torch.tensor([7, 40])).any()
    assert torch.isin(drawn[:, 1:], torch.tensor([7, 40])).any() and len(drawn.unique()) > 50
    with pytest.raises(ValueError, match="allow must be one mapping or 3 of them, got 2"):
        sampler.sample(3, 16, allow=[{}, {}])


@pytest.mark.parametrize("policy", [Ancestral(2), Confidence("random", steps=2)], ids=str)
def test_a_list_renormalises_the_law(policy, toy):
    """Position 0 draws from two of its three ids; the law of the others follows from what it drew."""
    ids = tuple(int(toy.ids[value]) for value in (0, 2))
    tokens = Sampler(toy, reveal=policy, max_batch=4096).sample(NUM_SAMPLES, 3, allow={0: ids}, seed=5).tokens
    first = toy.values(tokens)[:, 0]
    assert set(first) == {0, 2}
    one_step = Sampler(toy, reveal=Ancestral(1), max_batch=4096).sample(NUM_SAMPLES, 3, allow={0: ids}, seed=6).tokens
    p = toy.conditional((None,) * 3, 0)[[0, 2]]
    counts = np.bincount(toy.values(one_step)[:, 0], minlength=3)[[0, 2]]
    assert stats.chisquare(counts, p / p.sum() * counts.sum()).pvalue > SMALLEST_P


@pytest.mark.parametrize(
    ("choose", "allow", "message"),
    [
        ({"suppress": (70,)}, None, r"suppress must hold ids from 0 to 69, got 70"),
        ({}, {16: (3,)}, r"allow must have positions below the length 16, got 16"),
        ({}, {-1: (1,)}, r"allow must have positions from 0, got -1"),
        ({}, {1: (70,)}, r"allow\[1\] must hold ids from 0 to 69, got 70"),
        ({}, {1: (MASK,)}, r"allow\[1\] must leave an id that is not suppressed, got \[1\]"),
        ({"begin_suppress": (4,)}, {0: (4,)}, r"begin_suppress must leave an id that is not suppressed|allow\[0\]"),
    ],
)
def test_bad_lists_are_named(choose, allow, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Toy(70, 16), reveal=Ancestral(2), choose=Categorical(**choose)).sample(1, 16, allow=allow)


@pytest.mark.parametrize("stop_id", [None, 4])
def test_a_slot_keeps_nothing_of_who_was_there_before(stop_id):
    """Given positions of a sequence are those that its predecessor drew, the stop among them."""
    prompts = [[5], [4] * 20, [5], [4, 4]]
    sampler = Sampler(Toy(12, 32), reveal=Blocks(Confidence(steps=2), 8, stop_id), max_batch=1, max_resident=1)
    samples = sampler.sample(4, 32, prompt=prompts)
    for sample, prompt in zip(samples, prompts, strict=True):
        given = len(prompt)
        assert (sample.reveal_step[:given] == -1).all() and (sample.logprobs[:given] == 0).all()
    alone = Sampler(Toy(12, 32), reveal=Blocks(Confidence(steps=2), 8, stop_id), max_batch=4)
    assert same(samples, alone.sample(4, 32, prompt=prompts))


# ---- What is told of a run ----


class Watched(Progress):
    """What a view is told: who is finished, and how many positions were revealed."""

    def start(self, num_samples, num_masked, models):
        self.finished, self.num_revealed = [], 0

    def update(self, run, tick):
        self.finished += tick.sequences[tick.finished].tolist()
        self.num_revealed += tick.num_revealed
        assert len(np.repeat(tick.sequences, tick.row_counts)) == len(tick.row_position)


@pytest.mark.parametrize("stop_id", [None, 4])
@pytest.mark.parametrize("inner", [Confidence(steps=3), Confidence(threshold=0.3)], ids=str)
def test_a_view_learns_who_is_finished(inner, stop_id):
    view = Watched()
    samples = Sampler(Toy(12, 32), reveal=Blocks(inner, 8, stop_id), max_batch=4).sample(12, 32, progress=view)
    assert sorted(view.finished) == list(range(12))
    assert view.num_revealed == samples.stats.num_tokens == 12 * 32  # with those that a stop filled


@pytest.mark.parametrize("policy", [Confidence(threshold=0.3), RemaskConfidence(4)], ids=str)
def test_a_view_of_a_gpu_is_told_of_no_rows(policy):
    """Which positions were revealed, its host does not know."""
    run = Sampler(Toy(12, 32), reveal=policy, max_batch=2).stream(2, 32)
    next(run)
    (tick,) = islice(Sampler(Toy(12, 32), reveal=policy, max_batch=2).stream(2, 32).timeline, 1)
    run._device = SimpleNamespace(type="cuda")
    told = run._tell(tick)
    assert tick.row_counts.sum() > 0 and not told.row_counts.any()
    assert len(told.row_slot) == len(told.row_position) == told.num_revealed == 0
    view = Lines(file := StringIO())
    view.start(2, 64, ["toy"])
    view.update(run, replace(told, finished=np.ones(2, bool)))
    assert file.getvalue().startswith("sampling:   0%, 0 of 64 tokens, 2 of 2 sequences")


# ---- Options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of steps, per_step, threshold, entropy_bound must be given, got none"),
        ({"steps": 2, "threshold": 0.5}, "must be given, got steps and threshold"),
        (
            {"score": "loudness", "steps": 2},
            "score must be one of probability, margin, entropy, random, got 'loudness'",
        ),
        ({"steps": 0}, "steps must lie between 1 and"),
        ({"per_step": 0}, "per_step must be at least 1, got 0"),
        ({"threshold": -0.5}, "threshold must be finite and at least 0"),
        ({"steps": 2, "eps": 1.5}, "eps must lie between 0 and 1, got 1.5"),
        ({"per_step": 2, "eps": 0.5}, "eps must be given with steps only"),
        ({"threshold": 0.5, "temperature_of_order": 1.0}, "temperature_of_order must be 0 where scores decide"),
        ({"score": "margin", "steps": 2, "untempered": True}, "score must be 'probability' with untempered"),
        ({"score": "random", "threshold": 0.5}, "threshold must be left out with random scores"),
        ({"steps": 2, "doubted": (-1,)}, "doubted must hold ids from 0, got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Confidence(**options)


@pytest.mark.parametrize(
    "policy", [*(policy for policy, _ in LAWS.values()), Blocks(Confidence(steps=3), 4, 7)], ids=str
)
def test_policies_are_spelled(policy):
    assert parse(str(policy)) == policy


@pytest.mark.parametrize("text", ["confidence:probability", "confidence:margin:steps", "confidence:x:steps=2",
                                  "confidence:margin:speed=2", "confidence:margin:steps=two"])  # fmt: skip
def test_bad_spellings_are_named(text):
    with pytest.raises(ValueError, match="reveal must be one of"):
        parse(text)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Confidence(steps=2, doubted=(9,)), "doubted must hold ids from 0 to 8, got 9"),
        (Blocks(Confidence(steps=2), 4, stop_id=9), "stop_id must hold ids from 0 to 8, got 9"),
        (Blocks(Confidence(steps=2), 4, stop_id=MASK), "stop_id must be a token that ends a sequence, got the mask id"),
    ],
)
def test_ids_that_the_models_do_not_have_are_named(policy, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Toy(9, 8), reveal=policy)


@pytest.mark.parametrize("guidance", [-1.0, math.nan, math.inf, "2"])
def test_bad_guidance_is_named(guidance):
    with pytest.raises(ValueError, match="guidance must be a finite number, 0 or above"):
        Sampler(Toy(9, 8), guidance=guidance)
