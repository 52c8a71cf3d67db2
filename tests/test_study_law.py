"""Exact laws of what schedules write: against sums over all orders, products of marginals, and the sampler itself."""

import gc
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from toys import Tabulated, Toy, consistent, inconsistent

from unmask import Ancestral, Categorical, FirstHitting, Fixed, LogitsDenoiser, Sampler, load, metrics
from unmask.denoiser import DenoiserSpec
from unmask.study import law as module
from unmask.study.law import output_law


def in_fp64(toy: Tabulated) -> Tabulated:
    """The same toy with a table that is not rounded to fp32."""
    exact = torch.full(toy.table.shape, 3.0, dtype=torch.float64)
    for state in np.ndindex(*(toy.num_ids + 1,) * toy.length):
        given = [None if value == 0 else value - 1 for value in state]
        tokens = tuple(1 if value is None else int(toy.ids[value]) for value in given)
        for position in range(toy.length):
            with np.errstate(divide="ignore"):
                exact[(*tokens, position)][toy.ids] = torch.from_numpy(np.log(toy.conditional(tuple(given), position)))
    toy.table = exact
    return toy


def of_real(toy, law):
    """The law without the mask id, which has none of it."""
    real = law[np.ix_(*(toy.ids,) * toy.length)]
    assert law.sum() == pytest.approx(1, abs=1e-12) and real.sum() == pytest.approx(1, abs=1e-12)
    return real


def by_orders(toys):
    """Σ over orders of Π of the k-th toy's conditionals / L!, text by text in plain loops."""
    length, num_ids = toys[0].length, toys[0].num_ids
    total, orders = np.zeros((num_ids,) * length), list(permutations(range(length)))
    for text in np.ndindex(*total.shape):
        for order in orders:
            state, chance = [None] * length, 1.0
            for toy, position in zip(toys, order, strict=True):
                chance *= toy.conditional(tuple(state), position)[text[position]]
                state[position] = text[position]
            total[text] += chance / len(orders)
    return total


@pytest.fixture(scope="module")
def agreeing():
    return in_fp64(consistent(3, 4, seed=1))


@pytest.fixture(scope="module")
def others():
    return {name: in_fp64(inconsistent(3, 4, seed=seed, name=name)) for seed, name in ((2, "a"), (3, "b"))}


def test_the_true_model_one_by_one_writes_the_law_of_the_data(agreeing):
    found = of_real(agreeing, output_law({"true": agreeing}, "true", FirstHitting(), 4))
    assert metrics.total_variation(found, agreeing.joint) < 1e-12
    many = of_real(agreeing, output_law({"true": agreeing}, "true", Ancestral(1000), 4))
    assert 1e-5 < metrics.total_variation(many, agreeing.joint) < 1e-2  # the price of steps falls, and never to nothing


def test_one_step_is_the_product_of_marginals(agreeing):
    found = of_real(agreeing, output_law({"true": agreeing}, "true", Ancestral(1), 4))
    marginals = [agreeing.conditional((None,) * 4, i) for i in range(4)]
    assert found == pytest.approx(np.einsum("a,b,c,d->abcd", *marginals), abs=1e-14)


@pytest.mark.parametrize(
    ("schedule", "who"), [("a", "aaaa"), ("b:25% a:75%", "baaa"), ("a:1 b:2 a:1", "abba")], ids=str
)
def test_first_hitting_is_the_mean_over_orders(schedule, who, others):
    found = of_real(others["a"], output_law(others, schedule, FirstHitting(), 4))
    assert found == pytest.approx(by_orders([others[name] for name in who]), abs=1e-13)


CHOICES = Categorical(0.7), Categorical(1.3, top_p=0.8), Categorical(top_k=2)


@pytest.mark.parametrize(
    ("reveal", "schedule", "choose", "num"),
    [
        (Ancestral(4), "a:1 b:2 a:1", Categorical(), 200_000),
        (FirstHitting(), "b:50% a:50%", Categorical(), 200_000),
        (Ancestral(2, (1.0, 0.7, 0.3)), "a:2 b:1", Categorical(), 40_000),
        *((Ancestral(3), "b", choose, 20_000) for choose in CHOICES),
    ],
    ids=str,
)
def test_samples_have_this_law(reveal, schedule, choose, num, others):
    law = of_real(others["a"], output_law(others, schedule, reveal, 4, choose)).ravel()
    sampler = Sampler(others, schedule=schedule, reveal=reveal, choose=choose, max_batch=8192, max_resident=16384)
    gc.disable()  # it would look at every sample again and again
    try:
        tokens = torch.stack([sample.tokens for sample in sampler.stream(num, 4, seed=3)])
    finally:
        gc.enable()
    counts = np.bincount(np.ravel_multi_index(others["a"].values(tokens).T, (3,) * 4), minlength=81)
    likely = law * num >= 5
    assert not counts[law == 0].any()
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = num * np.append(law[likely], law[~likely].sum())
    chi = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    assert stats.chi2.sf(chi, len(observed) - 1) > 1e-3


def test_greedy_is_one_text(others):
    found = output_law(others, "a", Ancestral(1), 4, Categorical(0.0))
    best = tuple(int(others["a"].ids[others["a"].conditional((None,) * 4, i).argmax()]) for i in range(4))
    assert found[best] == 1 and found.sum() == 1


def test_a_time_conditioned_model_is_told_the_rate_of_its_step():
    """Two positions, two steps. At rate 1 the first id is drawn, at rate 1/2 the last: the text tells the steps."""

    def logits(tokens, rate):
        return torch.log(torch.stack([rate > 0.7, rate < 0, rate < 0.7], 1).double())[:, None].expand(-1, 2, -1)

    spec = DenoiserSpec("toy", 3, 1, 1, 0, 1, 1, 2, time_conditioned=True, num_parameters=1)
    model = LogitsDenoiser(logits, spec)
    found = output_law({"timed": model}, "timed", Ancestral(2), 2)
    assert found == pytest.approx(np.outer([0.5, 0, 0.5], [0.5, 0, 0.5]), abs=1e-7)
    with pytest.raises(ValueError, match="must be Ancestral for the time-conditioned model 'timed', got first-hitting"):
        output_law({"timed": model}, "timed", FirstHitting(), 2)


def test_a_head_makes_the_logits():
    """The law of one token is the softmax of the bundled model's head."""
    model = load("sotu-light")
    found = output_law({"light": model}, "light", Ancestral(1), 1)
    counts = np.bincount(Sampler(model, reveal=Ancestral(1)).sample(1000, 1).tokens[:, 0].numpy(), minlength=len(found))
    top = np.argsort(-found)[:20]
    assert found[model.spec.mask_id] == 0 and found.sum() == pytest.approx(1)
    assert np.abs(counts[top] / 1000 - found[top]).max() < 4 * (found.max() / 1000) ** 0.5


@pytest.mark.parametrize(
    ("length", "reveal", "message"),
    [
        (4, Fixed(2), "reveal must be Ancestral or FirstHitting for an exact law, got 'fixed:2'"),
        (1024, FirstHitting(), r"at most 1,048,576 partly masked .* got 50 ids \*\* 1024 tokens = 10 \*\* 1739.7"),
        (3, Ancestral(1_000_000), "at most 10,000,000,000 products .* got 970,299,000,000 of ancestral:1000000"),
        (0, FirstHitting(), "length must be between 1 and the models' 1024, got 0"),
    ],
)
def test_what_cannot_be_counted_is_refused_before_any_network_call(length, reveal, message):
    toy = Toy(50, 1024)
    with pytest.raises(ValueError, match=message):
        output_law({"toy": toy}, "toy", reveal, length)
    assert toy.num_calls == 0


def test_logits_that_are_no_law_are_an_error(others, monkeypatch):
    monkeypatch.setattr(others["a"], "logits", lambda batch: torch.full((len(batch.rows), 4), torch.nan))
    with pytest.raises(ValueError, match="model 'a' must give a finite largest logit"):
        output_law({"a": others["a"]}, "a", FirstHitting(), 4)


def test_tables_are_asked_in_small_calls(others, monkeypatch):
    whole = output_law(others, "a", FirstHitting(), 4)
    monkeypatch.setattr(module, "BATCH_TOKENS", 12)
    assert np.array_equal(output_law(others, "a", FirstHitting(), 4), whole)
