"""The bundled models: small enough, made for each other, described by numbers that were measured."""

import json

import pytest

import unmask
from unmask.places import ASSETS, bundled
from unmask.training.corpus import END_OF_TEXT, MASK

PAIR = ("sotu-heavy", "sotu-light")
OTHERS = ("sotu-exit", "sotu-scratch")  # light models made in other ways


def metrics(name):
    return json.loads((ASSETS / name / "metrics.json").read_text())


def test_they_are_there_and_small():
    assert bundled() == sorted(PAIR + OTHERS)
    assert sum((ASSETS / name / "model.safetensors").stat().st_size for name in PAIR + OTHERS) <= 16_000_000


def test_all_light_models_fit_the_heavy_one():
    models = unmask.load_all({name: name for name in (*PAIR, *OTHERS)})
    assert {name: model.spec.num_blocks for name, model in models.items()}.items() >= dict.fromkeys(OTHERS, 4).items()
    assert models["sotu-exit"].embedding is models["sotu-heavy"].embedding
    unmask.Sampler(models, schedule=" ".join(f"{name}:25%" for name in models), reveal=unmask.Fixed(4)).plan(1)


def test_the_pair_fits_together():
    heavy, light = map(unmask.load, PAIR)
    assert (heavy.spec.num_blocks, light.spec.num_blocks) == (12, 4)
    assert heavy.spec.hidden_size == light.spec.hidden_size and heavy.spec.tokenizer == light.spec.tokenizer
    assert (heavy.tokenizer.token_to_id(END_OF_TEXT), heavy.tokenizer.token_to_id(MASK)) == (0, heavy.spec.mask_id)
    unmask.Sampler({"heavy": heavy, "light": light}, schedule="light:50% heavy:50%", reveal=unmask.Fixed(2)).plan(1)


@pytest.mark.parametrize("name", PAIR + OTHERS)
def test_cards_give_the_measured_numbers(name):
    card = (ASSETS / name / "README.md").read_text()
    measured = metrics(name)
    assert measured["num_parameters"] == unmask.load(name).spec.num_parameters
    told = [
        *(f"{metrics(one)['heldout']['bits_per_byte']:.3f} ±" for one in PAIR + OTHERS),
        f"{measured['unigram_bits_per_byte']:.3f}",
        f"{measured['trigram_bits_per_byte']:.3f}",
        f"{measured['num_parameters']:,}",
        *measured["heldout_documents"],
    ]
    assert [number for number in told if number not in card] == []
    assert measured["heldout"]["bits_per_byte"] < measured["unigram_bits_per_byte"]


@pytest.mark.parametrize("name", PAIR + OTHERS)
def test_the_log_reaches_the_end(name):
    lines = [json.loads(line) for line in (ASSETS / name / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] * 32 * 256 == metrics(name)["seen_tokens"]


def test_prompted_texts_are_readable():
    """Greedy, left to right, after a common opening: words of the corpus, whatever the sense."""
    sampler = unmask.Sampler(unmask.load("sotu-heavy"), reveal=unmask.Order("left-to-right"))
    text = sampler.sample(1, 32, prompt="The Government of the United").text[0]
    assert text.startswith("The Government of the United States")
