"""Predicted extra losses against the bound written out over every text and every mask of a toy."""

import json
from itertools import combinations, product

import numpy as np
import pytest
import torch
from toys import MASK, HiddenMarkov, Toy

from unmask import Ancestral, FirstHitting, Fixed, Order
from unmask.denoiser import Batch
from unmask.schedule import Schedule
from unmask.study.budget import best_predicted, every_placement
from unmask.study.identity import identity
from unmask.study.importance import importance
from unmask.study.placements import Placement
from unmask.study.prediction import Losses, Prediction, _of_models, exposure
from unmask.study.prices import Prices

NUM_IDS, LENGTH = 3, 4
SEQUENCES = np.array(list(product(range(NUM_IDS), repeat=LENGTH)))
NAMES = "heavy", "light", "tiny"


def markov(seed):
    rng = np.random.default_rng(seed)
    return HiddenMarkov(LENGTH, rng.dirichlet([2, 2]), rng.dirichlet([1, 1], 2), rng.dirichlet([1, 1, 1], 2))


@pytest.fixture(scope="module")
def models():
    return {name: markov(seed) for seed, name in enumerate(NAMES)}


def loss_of_masks(models):
    """By model and masked positions: nats that the model needs for each masked token, over the texts of the first."""
    law = np.exp(models["heavy"].log_law(SEQUENCES))
    tokens = torch.from_numpy(models["heavy"].ids[SEQUENCES])
    found = {}
    for size in range(1, LENGTH + 1):
        for masked in combinations(range(LENGTH), size):
            shown = tokens.clone()
            shown[:, list(masked)] = MASK
            rows = (torch.arange(len(tokens))[:, None] * LENGTH + torch.tensor(masked)).flatten()
            num = len(tokens)
            batch = Batch(shown.flatten(), (LENGTH,) * num, rows, (size,) * num, torch.ones(num))
            for name, model in models.items():
                logits = model.logits(batch).double().index_fill(1, torch.tensor([MASK]), -torch.inf)
                nats = -logits.log_softmax(1).gather(1, tokens.flatten()[rows][:, None]).view(num, size)
                found[name, masked] = dict(zip(masked, (law @ nats.numpy()).tolist(), strict=True))
    return found


def ancestral_bound(losses, rates, step_models):
    """Nats per token of the bound, over every step and every set that may be masked at its start."""
    total = 0.0
    for k, name in enumerate(step_models):
        now, then = rates[k], rates[k + 1]
        for (model, masked), nats in losses.items():
            if model == name:
                chance = now ** len(masked) * (1 - now) ** (LENGTH - len(masked))
                total += chance * (1 - then / now) * sum(nats.values())
    return total / LENGTH


def by_count(losses, name):
    """[LENGTH] nats per masked token, with n of the positions masked at random."""
    each = [[list(nats.values()) for (model, masked), nats in losses.items() if (model, len(masked)) == (name, n)]
            for n in range(1, LENGTH + 1)]  # fmt: skip
    return np.array([np.mean(one) for one in each])


@pytest.mark.parametrize("reveal", [Ancestral(8), Ancestral(5, "cosine"), Ancestral(2, (1, 0.6, 0.1))])
def test_predictions_are_the_difference_of_the_bounds(models, reveal):
    losses = loss_of_masks(models)
    predict = Prediction(Losses({name: by_count(losses, name) for name in NAMES}), reveal, LENGTH).of
    steps = reveal.num_steps(LENGTH)
    alone = ancestral_bound(losses, reveal.mask_rates, ["heavy"] * steps)
    for text in ("light", "light:25% heavy:75%", "heavy:50% tiny:50%", "tiny:20% heavy:40% light:40%"):
        schedule = Schedule.parse(text, NAMES)
        each = [name for name, start, stop in schedule.assign(steps) for _ in range(start, stop)]
        exact = ancestral_bound(losses, reveal.mask_rates, each) - alone
        assert exact > 0.01 and predict(schedule) == pytest.approx(exact, rel=1e-9)
    assert predict(Schedule.single("heavy")) == 0


def test_first_hitting_counts_the_masked_positions(models):
    """Step k of L reveals one of L - k: the mean over the steps of each one's gap."""
    losses = loss_of_masks(models)
    gap = by_count(losses, "light") - by_count(losses, "heavy")
    predict = Prediction(Losses({name: by_count(losses, name) for name in NAMES}), FirstHitting(), LENGTH).of
    assert predict(Schedule.parse("light:25% heavy:75%", NAMES)) == pytest.approx(gap[3] / 4)
    assert predict(Schedule.parse("heavy:50% light:50%", NAMES)) == pytest.approx((gap[0] + gap[1]) / 4)


@pytest.mark.parametrize(
    "reveal",
    [Ancestral(7), Ancestral(300), Ancestral(9, "cosine"), Fixed(5), Fixed(7, "first"), Fixed(90), FirstHitting()],
)
@pytest.mark.parametrize("bins", [1, 4, 16, 40])
def test_exposures_are_those_of_drawn_plans(reveal, bins):
    length, num = 24, 4000
    rng = np.random.default_rng(3)
    step = reveal.plan(rng.random((num, length)), np.arange(length)).step
    masked = (step[:, None, :] >= step[:, :, None]).sum(2)  # at the start of the step that reveals each position
    seen = np.zeros((reveal.num_steps(length), bins))
    np.add.at(seen, (step, (masked * bins - 1) // length), 1 / step.size)
    found = exposure(reveal, length, bins)
    assert found.sum() == pytest.approx(1)
    assert np.abs(found.sum(0) - seen.sum(0)).max() < 0.01
    assert np.abs(found.cumsum(0) - seen.cumsum(0)).max() < 0.01
    assert found.min() >= 0


def test_an_order_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"reveal must be ancestral, first-hitting or fixed .* got 'left-to-right'"):
        exposure(Order("left-to-right"), 4, 2)


def test_measured_losses_predict_the_bound(models):
    """From sampled text and sampled masks to the exact value, within the noise of the losses."""
    losses, rng = loss_of_masks(models), np.random.default_rng(0)
    law = np.exp(models["heavy"].log_law(SEQUENCES))
    windows = models["heavy"].ids[SEQUENCES[rng.choice(len(law), 4000, p=law / law.sum())]]
    measured = importance(models, windows, bins=LENGTH, batch_size=1000)
    predict = Prediction(Losses.measured(measured), Ancestral(8), LENGTH).of
    alone = ancestral_bound(losses, Ancestral(8).mask_rates, ["heavy"] * 8)
    for segments in product(("heavy", "light"), repeat=4):
        exact = ancestral_bound(losses, Ancestral(8).mask_rates, np.repeat(segments, 2)) - alone
        assert predict(Placement(segments).schedule) == pytest.approx(exact, abs=0.02)


def test_intervals_of_predictions_cover_the_exact_value(models):
    """In 60 studies of 200 windows; and the spread of the predictions is the one that each study tells."""
    exact_losses, law = loss_of_masks(models), np.exp(models["heavy"].log_law(SEQUENCES))
    placements = [("light", "heavy", "tiny", "heavy"), ("heavy", "light", "light", "tiny")]
    alone = ancestral_bound(exact_losses, Ancestral(8).mask_rates, ["heavy"] * 8)
    found, exact = {one: [] for one in placements}, {}
    for one in placements:
        exact[one] = ancestral_bound(exact_losses, Ancestral(8).mask_rates, np.repeat(one, 2)) - alone
    for seed in range(60):
        rng = np.random.default_rng(seed)
        windows = models["heavy"].ids[SEQUENCES[rng.choice(len(law), 200, p=law / law.sum())]]
        measured = importance(models, windows, bins=LENGTH, batch_size=200, seed=seed)
        prediction = Prediction(Losses.measured(measured), Ancestral(8), LENGTH)
        for one in placements:
            found[one].append(prediction.interval(Placement(one).schedule))
    for one, intervals in found.items():
        values, lows, highs = map(np.array, zip(*intervals, strict=True))
        assert 52 <= ((lows <= exact[one]) & (exact[one] <= highs)).sum() <= 60
        assert ((highs - lows) / 2 / 1.96).mean() == pytest.approx(values.std(ddof=1), rel=0.25)


def test_exact_losses_have_no_spread(models):
    losses = loss_of_masks(models)
    prediction = Prediction(Losses({name: by_count(losses, name) for name in NAMES}), FirstHitting(), LENGTH)
    found = prediction.interval(Placement(("light", "heavy")).schedule)
    assert found.low == found.value == found.high == prediction.of(Placement(("light", "heavy")).schedule) > 0


# ---- The budget ----


def priced():
    """Three toys of falling price, and what they cost where every segment is as good as another."""
    models = {name: Toy(9, 32) for name in NAMES}
    for model, parameters in zip(models.values(), (1000, 500, 100), strict=True):
        model.spec = type(model.spec)(**{**vars(model.spec), "num_parameters": parameters})
    return models, Prices.typical(models, Ancestral(32), length=32, seed=0)


def test_the_best_predicted_are_those_of_brute_force():
    _, prices = priced()
    losses = Losses({"heavy": np.zeros(4), "light": np.array([4, 3, 2, 1.0]), "tiny": np.array([5, 5, 5, 6.0])})
    predict = Prediction(losses, Ancestral(32), 32).of
    every = [Placement(one) for one in product(NAMES, repeat=4)]
    saved = {one: prices.cost(one.schedule).saving.without_head for one in every}
    enough = [one for one in every if saved[one] >= 0.25 - 0.005]
    found = best_predicted(every_placement(NAMES, 4), prices, predict, saving=0.25, number=7)
    assert [predict(one.schedule) for one in found] == sorted(predict(one.schedule) for one in enough)[:7]
    assert all(saved[one] > 0.24 for one in found) and len(set(found)) == 7
    share = saved[Placement(("tiny", "heavy", "heavy", "heavy"))]
    assert share == pytest.approx(0.9 / 4, abs=0.005)  # a quarter of the steps, and hardly less by chance


@pytest.mark.parametrize(
    "reveal", [Ancestral(13), Ancestral(40, "cosine"), Ancestral(4, (1, 0.9, 0.3, 0.2, 0.1)), Fixed(7), FirstHitting()]
)
def test_few_prices_suffice_for_many_placements(reveal, monkeypatch):
    """Whatever the steps reveal: each model at each segment is asked for, and the whole order is that of all prices."""
    models = priced()[0]
    prices = Prices.typical(models, reveal, length=32, seed=0)
    rng = np.random.default_rng(0)
    predict = Prediction(Losses({name: rng.random(8) for name in NAMES}), reveal, 32).of
    every = list(every_placement(NAMES, 4))
    saved = {one: prices.cost(one.schedule).saving.without_head for one in every}
    expected = sorted(every, key=lambda one: (round(predict(one.schedule), 12), round(-saved[one], 12)))
    asked, cost = [], prices.cost
    monkeypatch.setattr(prices, "cost", lambda schedule: asked.append(schedule) or cost(schedule))
    found = best_predicted(iter(every), prices, predict, saving=0.4, number=100)
    assert found == [one for one in expected if saved[one] >= 0.4 - 0.005] and 10 < len(found) < 80
    assert len(asked) == 1 + 4 * 2


@pytest.mark.parametrize(
    ("saving", "number", "message"),
    [
        (0, 1, "saving must be a share between 0 and 1, such as 0.25, got 0"),
        (25, 1, "got 25"),
        (0.95, 1, r"saving must be at most the (89|90)\.\d% that these models can save, got 95.0%"),
        (0.2, 0, "verify must be at least 1, got 0"),
    ],
)
def test_bad_budgets(saving, number, message):
    _, prices = priced()
    with pytest.raises(ValueError, match=message):
        best_predicted(every_placement(NAMES, 2), prices, lambda schedule: 0.0, saving=saving, number=number)


def test_too_many_placements_to_predict():
    with pytest.raises(ValueError, match="got 12, which give 531,441 of 3 models"):
        every_placement(NAMES, 12)


# ---- The file ----


@pytest.fixture
def file(models, tmp_path):
    windows = models["heavy"].ids[SEQUENCES[:40]]
    content = importance(models, windows, bins=2).to_json()
    path = tmp_path / "importance.json"
    path.write_text(json.dumps(content))
    return path, content


def test_a_file_gives_the_losses_that_were_measured(models, file):
    path, content = file
    found = Losses.read(path, {name: models[name] for name in ("heavy", "tiny")}, LENGTH)
    assert list(found.of) == ["heavy", "tiny"]
    assert found.of["tiny"].tolist() == [one["loss"]["tiny"]["value"] for one in content["bins"]]
    assert np.array_equal(found.gap_covariance, np.array(content["gap_covariance"])[2:, 2:])


def test_a_file_serves_another_order_of_its_models(models):
    windows, names = models["heavy"].ids[SEQUENCES[:60]], ("tiny", "heavy", "light")
    others = {name: models[name] for name in names}
    measured, again = (importance(each, windows, bins=2, batch_size=60) for each in (models, others))
    found = _of_models(measured.gap_covariance, list(NAMES), list(names))
    assert found == pytest.approx(again.gap_covariance)
    assert np.linalg.eigvalsh(found).min() > -1e-12 and found.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("identities"), "which lacks 'identities'; make it again"),
        (lambda content: content.update(bins=[]), "lacks losses"),
        (lambda content: content["gap_covariance"].pop(), "gap_covariance is not that of its bins"),
        (lambda content: content["bins"][0]["loss"]["light"].update(value=float("inf")), "lacks losses"),
        (lambda content: content["bins"][0]["loss"]["light"].update(value="much"), "damaged or something else"),
        (
            lambda content: content.update(models=["heavy", "tiny"]),
            "must be of the models heavy, light, tiny, got heavy, tiny",
        ),
        (lambda content: content["identities"].pop("light"), "got another 'light'"),
        (lambda content: content.update(length=5), r"length of 4 tokens, got windows of 5 in .*importance\.json"),
        (lambda content: content.pop("length"), "which lacks 'length'; make it again"),
    ],
)
def test_files_that_are_refused(models, file, change, message):
    path, content = file
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Losses.read(path, models, LENGTH)


def test_a_file_of_other_weights_is_refused(models, file):
    path, _ = file
    with pytest.raises(ValueError, match=r"got another 'light' in .*: entropies is"):
        Losses.read(path, {**models, "light": markov(9)}, LENGTH)
    path.write_text("no JSON")
    with pytest.raises(ValueError, match="importance must be a file of unmask study importance"):
        Losses.read(path, models, LENGTH)
    missing = r"importance must be a file of .*, got '.*none\.json', which cannot be read: No such file"
    with pytest.raises(FileNotFoundError, match=missing):
        Losses.read(path.with_name("none.json"), models, LENGTH)
    with pytest.raises(OSError, match=r"importance must be .*cannot be read: Is a directory"):
        Losses.read(path.parent, models, LENGTH)


def test_an_identity_is_of_the_weights():
    assert identity(markov(0)) == identity(markov(0)) and identity(markov(0)) != identity(markov(1))
    json.dumps(identity(markov(0)), allow_nan=False)
