"""`unmask.generate`: the sampler that its options name, rows and padding, ends, every kind of model, errors."""

import re
from pathlib import Path

import pytest
import torch
from published import EOS, MASK, TinyModel, prompts
from toys import random_dit

import unmask
from unmask import Ancestral, Blocks, Categorical, Confidence, FirstHitting, Fixed, Order, Sampler
from unmask.generate import GenerateOutput

VOCAB = 48


@pytest.fixture(scope="module")
def dit():
    return random_dit("dit", 1, vocab_size=VOCAB, hidden=16, heads=2, mlp=32, length=64)


POLICIES = [
    ({}, Ancestral(12)),
    ({"steps": 6}, Ancestral(6)),
    ({"alg": "origin", "steps": 6, "block_length": 4}, Blocks(Ancestral(2), 4)),
    ({"alg": "random", "steps": 4}, Fixed(4)),
    ({"alg": "first_hitting"}, FirstHitting()),
    ({"alg": "low_confidence", "steps": 6, "block_length": 6}, Blocks(Confidence(steps=3), 6)),
    ({"alg": "maskgit_plus", "block_length": 8}, Blocks(Confidence(steps=8), 8)),
    ({"alg": "topk_margin", "steps": 5}, Confidence("margin", steps=5)),
    ({"alg": "entropy", "threshold": 1.5}, Confidence("entropy", threshold=1.5)),
    ({"alg": "low_confidence", "threshold": 0.3, "block_length": 5}, Blocks(Confidence(threshold=0.3), 5)),
    ({"alg": Order("left-to-right")}, Order("left-to-right")),
    ({"alg": Confidence(per_step=2), "block_length": 4}, Blocks(Confidence(per_step=2), 4)),
]


@pytest.mark.parametrize(("options", "policy"), POLICIES, ids=lambda one: str(one) if isinstance(one, dict) else "")
def test_options_name_a_sampler(dit, options, policy):
    prompt = torch.arange(10).view(2, 5)
    law = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "suppress_tokens": [3], "begin_suppress_tokens": [4, 5]}
    ours = unmask.generate(dit, prompt, max_new_tokens=12, **law, **options, cfg_scale=0.5, seed=7)
    choose = Categorical(0.8, 20, 0.9, suppress=(3,), begin_suppress=(4, 5))
    expected = Sampler(dit, reveal=policy, choose=choose, guidance=0.5).sample(2, 17, seed=7, prompt=prompt.numpy())
    assert torch.equal(ours, expected.tokens)


def test_rows_of_any_kind_are_padded_on_the_left(dit):
    rows = [[3, 4, 5], [6], [7, 8]]
    ours = unmask.generate(dit, rows, max_new_tokens=4, seed=1, pad_token_id=9)
    assert ours[:, :3].tolist() == [[3, 4, 5], [9, 9, 6], [9, 7, 8]]
    tensor, attention = ours[:, :3].clone(), torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]])
    tensor[attention == 0] = 0
    again = unmask.generate(dit, input_ids=tensor, attention_mask=attention, max_new_tokens=4, seed=1)
    assert torch.equal(again[:, 3:], ours[:, 3:]) and torch.equal(again[:, :3], tensor)
    lone = Sampler(dit, reveal=Ancestral(4)).sample(1, 7, seed=1, prompt=[3, 4, 5])
    assert torch.equal(lone.tokens[0], ours[0])
    assert torch.equal(unmask.generate(dit, [3, 4, 5], max_new_tokens=4, seed=1), ours[:1])


def test_gaps_are_filled_in_place(dit):
    mask = dit.spec.mask_id
    rows = torch.tensor([[1, mask, 3, mask, 5], [1, 2, 3, 4, 5]])
    output = unmask.generate(dit, rows, seed=2, return_dict_in_generate=True)
    assert isinstance(output, GenerateOutput) and output.text is None
    given = rows != mask
    assert torch.equal(output.sequences[given], rows[given]) and not (output.sequences == mask).any()
    assert torch.equal(output.reveal_step == -1, given) and torch.equal(output.logprobs == 0, given)
    assert output.stats.num_samples == 1 and output.logprobs[~given].max() < 0


def test_several_sequences_of_each_row(dit):
    ours = unmask.generate(dit, [[1, 2], [3, 4]], max_new_tokens=6, num_return_sequences=3, seed=3)
    assert ours[:, :2].tolist() == [[1, 2]] * 3 + [[3, 4]] * 3 and len({tuple(row) for row in ours.tolist()}) == 6
    nothing_given = unmask.generate(dit, max_new_tokens=6, num_return_sequences=2, seed=3)
    assert nothing_given.shape == (2, 6)


def test_torch_governs_the_seed(dit):
    torch.manual_seed(4)
    first, second = (unmask.generate(dit, max_new_tokens=8) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(unmask.generate(dit, max_new_tokens=8), first) and not torch.equal(first, second)


def ending(**options):
    """A model to which the end of text occurs now and then."""
    model = TinyModel(1, forbid_mask=True)
    model.head.bias.data[EOS] += 1.5
    given = {"max_new_tokens": 24, "eos_token_id": EOS, "seed": 5} | options
    output = unmask.generate(model, prompts(6, 3), mask_token_id=MASK, **given, return_dict_in_generate=True)
    return output.sequences[:, 3:], model.num_calls, output


@pytest.mark.parametrize("alg", ["ancestral", "low_confidence"])
def test_what_follows_the_end_is_padding(alg):
    new, _, _ = ending(alg=alg, pad_token_id=11)
    assert (new == EOS).any(1).sum() >= 2
    for row in new.tolist():
        if EOS in row:
            assert set(row[row.index(EOS) + 1 :]) <= {11} and EOS not in row[row.index(EOS) + 1 :]
    assert (ending(alg=alg)[0] != new).any()  # the end itself pads where there is nothing else


def test_no_block_begins_after_one_that_ended():
    options = {"alg": "low_confidence", "block_length": 4}
    stopped, fewer, _ = ending(**options)
    whole, more, _ = ending(**options, eos_token_id=None)
    for ours, row in zip(stopped.tolist(), whole.tolist(), strict=True):
        if EOS in row:
            end = row.index(EOS) + 1
            assert ours == row[:end] + [EOS] * (24 - end)
        else:
            assert ours == row
    assert fewer < more or all(EOS in row[20:] or EOS not in row for row in whole.tolist())


def test_text_goes_in_and_comes_out():
    texts, options = ["My fellow Americans", "God <mask:3> America"], {"max_new_tokens": 8, "steps": 11, "seed": 6}
    output = unmask.generate("sotu-light", texts, **options, return_dict_in_generate=True)
    model = unmask.load("sotu-light")
    lengths = [len(model.tokenizer.encode(text).ids) + 8 for text in ("My fellow Americans", "God  America")]
    assert output.text[0].startswith("My fellow Americans") and output.text[1].startswith("God")
    sampler = Sampler(model, reveal=Ancestral(11))
    samples = sampler.sample(2, [lengths[0], len(output.sequences[1])], seed=6, prompt=texts[0])
    assert output.text[0] == samples[0].text


def test_every_kind_of_model():
    model = TinyModel(3)
    live = unmask.generate(model, prompts(1, 4), max_new_tokens=6, mask_token_id=MASK, seed=8)
    wrapped = unmask.wrap(model, mask_id=MASK)
    assert torch.equal(unmask.generate(wrapped, prompts(1, 4), max_new_tokens=6, seed=8), live)
    folder = Path(unmask.__file__).parent / "assets" / "sotu-light"
    by_name, by_folder = (unmask.generate(one, max_new_tokens=6, seed=8) for one in ("sotu-light", folder))
    assert torch.equal(by_name, by_folder)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"max_new_tokens": None},
            ValueError,
            "max_new_tokens must be given where inputs hold no mask ids, got",
        ),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"steps": 7, "block_length": 4}, ValueError, "steps must be a multiple of the 2 blocks of 4 tokens, got 7"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"steps": 8, "alg": "first_hitting"}, ValueError, "steps must be left out with threshold, first_hitting or a"),
        ({"steps": 8, "alg": FirstHitting()}, ValueError, "steps must be left out with threshold, first_hitting or a"),
        ({"alg": "margin"}, ValueError, "alg must be one of ancestral, origin, first_hitting, random, low_confidence"),
        (
            {"alg": "ancestral", "threshold": 0.5},
            ValueError,
            "alg must be one of low_confidence, maskgit_plus, topk",
        ),
        ({"alg": 3}, TypeError, "reveal must be a policy such as Ancestral(1000), got 3"),
        ({"input_ids": torch.ones(1, 2)}, ValueError, "inputs must be left out where input_ids are given, got both"),
        (
            {"attention_mask": torch.ones(1, 2)},
            ValueError,
            "attention_mask must be left out unless inputs are a",
        ),
        ({"inputs": []}, ValueError, "inputs must hold at least one row, got none"),
        ({"inputs": [[1, 99]]}, ValueError, "inputs must hold ids from 0 to 47, got 99 at position 1"),
        ({"inputs": "text"}, ValueError, "inputs must be token ids because the model has no tokenizer"),
        ({"max_new_tokens": 100}, ValueError, "length must be from 1 to the models' max_length 64, got 102"),
        ({"temperature": -1.0}, ValueError, "temperature must"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1, got 0"),
        ({"mask_token_id": 3}, ValueError, "mask_id must be that of the model 'dit', 47, got 3"),
        ({"tokenizer": "tokenizer.json"}, ValueError, "tokenizer must be left out with a denoiser, got one with"),
        (
            {"model": 3},
            TypeError,
            "model must be a torch module, a denoiser, a bundled name, a folder or a hub id",
        ),
    ],
)
def test_bad_input_is_told(dit, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        unmask.generate(**({"model": dit, "inputs": [[1, 2]], "max_new_tokens": 8} | options))
