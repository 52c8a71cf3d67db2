"""dllm's `MDLMSampler`: the published tokens where it is greedy, its counts and law where it draws, its options."""

import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from enumerated import confident, law_after, p_value, softmax
from published import EOS, MASK, TinyModel, module_of, prompts, silent

import unmask
from unmask import dropin
from unmask.dropin.dllm import BaseSamplerOutput, MDLMSampler, MDLMSamplerConfig
from unmask.dropin.patching import SlowPathWarning

BOS = 1
TOKENIZER = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, bos_token_id=BOS)
SAMPLED = [  # of `sample`
    {"max_new_tokens": 16, "block_size": 16, "steps": 16},
    {"max_new_tokens": 16, "block_size": 8, "steps": 6},
    {"max_new_tokens": 14, "block_size": 4, "steps": 9, "suppress_tokens": [5, 7]},
    {"max_new_tokens": 12, "block_size": 6, "steps": 12, "cfg_scale": 0.8},
    {"max_new_tokens": None, "max_length": 20, "block_size": 32, "steps": 7, "right_shift_logits": True},
    {"max_new_tokens": 12, "block_size": 12, "steps": 40, "begin_suppress_tokens": [4, 8, 9]},
]
SLOW = [
    {"max_new_tokens": 8, "block_size": 8, "steps": 5, "cfg_scale": 0.8, "cfg_keep_tokens": [10, 11, 12]},
]


class Cosine:
    """A schedule in the manner of the published ones."""

    def reverse_mask_prob(self, s, t):
        return (1 - math.cos(math.pi / 2 * s)) / (1 - math.cos(math.pi / 2 * t))


def still(s, t):
    """The linear schedule, in fp32."""
    s, t = torch.tensor([s, t])
    return float((1 - (1 - s)) / (1 - (1 - t)))


def counts(number, steps, schedule=still):
    found = []
    for t in range(steps, 0, -1):
        share = 1 - schedule(s=(t - 1) / steps, t=t / steps)
        found.append(min(number, int(torch.round(torch.tensor(number, dtype=torch.float64) * share))))
        number -= found[-1]
    return [count for count in found if count]


@torch.no_grad()
def published(model, x, windows, transfers, given, options):
    """The greedy loop for one row: what is there before the first step and after each.

    windows: the places of each block that may be revealed in it. transfers: how many in each of its steps. given: the
    places that were not masked.
    """
    x, history = list(x), [list(x)]
    get = lambda name: options.get(name) or []  # noqa: E731
    for window, block in zip(windows, transfers, strict=True):
        for count in block:
            logits = model(torch.tensor([x])).logits[0]
            if options.get("cfg_scale"):
                hidden = {place for place in given if x[place] not in get("cfg_keep_tokens")}
                blind = [MASK if place in hidden else token for place, token in enumerate(x)]
                blind = model(torch.tensor([blind])).logits[0]
                logits = blind + (options["cfg_scale"] + 1) * (logits - blind)
            logits[:, get("suppress_tokens")] = -math.inf
            if options.get("right_shift_logits"):
                logits = torch.cat([logits[:1], logits[:-1]])
            drawn = logits.argmax(-1).tolist()
            logits[:, get("begin_suppress_tokens")] = -math.inf
            law = logits.softmax(-1)
            masked = [place for place in window if x[place] == MASK]
            for place in sorted(masked, key=lambda place: -law[place, drawn[place]])[:count]:
                x[place] = drawn[place]
            history.append(list(x))
    return history


def expected(model, rows, options, schedule=still):
    """Of `sample`: histories of all rows, padded with the end of text."""
    options = {"max_new_tokens": 128, "block_size": 128, "steps": 128} | options
    longest = max(map(len, rows))
    num_new = options["max_new_tokens"] or options["max_length"] - longest
    size = options["block_size"]
    num_blocks = math.ceil(num_new / size)
    steps = math.ceil(options["steps"] / num_blocks)
    histories = []
    for row in rows:
        given, ends = len(row), [min((block + 1) * size, num_new) for block in range(num_blocks)]
        transfers = [counts(end - start, steps, schedule) for start, end in zip([0, *ends], ends, strict=False)]
        history = published(
            model, row + [MASK] * num_new, [range(given + end) for end in ends], transfers, range(given), options
        )
        histories.append([x + [EOS] * (longest - given) for x in history])
    return torch.tensor(histories).transpose(0, 1)


def check(output, history):
    assert isinstance(output, BaseSamplerOutput)
    assert torch.equal(torch.stack(output.histories), history) and torch.equal(output.sequences, history[-1])


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_greedy_tokens_are_those_of_the_published_loop(options):
    for seed in range(2):
        model = TinyModel(seed)
        rows = [prompts(length, seed=seed + length).tolist() for length in (5, 2, 7)]
        ours = MDLMSampler(model, TOKENIZER).sample(rows, return_dict=True, **options)
        check(ours, expected(model, rows, options))
        config = MDLMSamplerConfig(**options)
        tensors = [torch.tensor(row) for row in rows]
        assert torch.equal(MDLMSampler(model, TOKENIZER).sample(tensors, config), ours.sequences)


@pytest.mark.parametrize("options", SLOW, ids=str)
def test_what_needs_logits_takes_the_slow_path(options):
    model, rows = TinyModel(1), [prompts(5).tolist(), [10, 11, 12]]
    with pytest.warns(SlowPathWarning, match="cfg_keep_tokens ask for another unconditional input") as told:
        ours = MDLMSampler(model, TOKENIZER).sample(rows, return_dict=True, **options)
    assert [one.filename for one in told] == [__file__]
    check(ours, expected(model, rows, options))
    # Without guidance there is no unconditional input.
    MDLMSampler(model, TOKENIZER).sample(rows, **(options | {"cfg_scale": 0.0}))


def test_a_schedule_decides_the_counts():
    model, rows = TinyModel(2), [prompts(4).tolist()] * 2
    options = {"max_new_tokens": 20, "block_size": 10, "steps": 8}
    ours = MDLMSampler(model, TOKENIZER, Cosine()).sample(rows, return_dict=True, **options)
    history = expected(model, rows, options, Cosine().reverse_mask_prob)
    check(ours, history)
    assert not torch.equal(history[1], expected(model, rows, options)[1])


def test_an_empty_prompt_begins_the_text_where_logits_are_shifted():
    options = {"max_new_tokens": 6, "block_size": 6, "steps": 6, "right_shift_logits": True}
    model = TinyModel(2)
    ours = MDLMSampler(model, TOKENIZER).sample([[], [4, 5]], **options)
    assert torch.equal(ours, expected(model, [[BOS], [4, 5]], options)[-1])


def test_a_model_may_be_named():
    mask_id = unmask.load("sotu-light").spec.mask_id
    light = SimpleNamespace(mask_token_id=mask_id, eos_token_id=0, bos_token_id=0)
    tokens = MDLMSampler("sotu-light", light).sample([[5, 6], [7]], max_new_tokens=4, steps=2)
    assert tokens.shape == (2, 6) and not (tokens == mask_id).any()


def holed(*holes, length=10, seed=0):
    row = prompts(length, seed=seed)
    row[list(holes)] = MASK
    return row.tolist()


def filled(model, rows, options):
    """Of `infill`: the histories of all rows, each padded with its last state where others take more steps."""
    longest, size = max(map(len, rows)), options["block_size"] or max(map(len, rows))
    num_blocks = math.ceil(longest / size)
    steps = math.ceil(options["steps"] / num_blocks)
    windows = [range(start, start + size) for start in range(0, longest, size)]
    histories = []
    for row in rows:
        given = [place for place, token in enumerate(row) if token != MASK]
        own = [[place for place in window if place < len(row)] for window in windows]
        transfers = [counts(sum(row[place] == MASK for place in window), steps) for window in own]
        histories.append((published(model, row, own, transfers, given, options), [len(block) for block in transfers]))
    rounds = [max(lengths) for lengths in zip(*(lengths for _, lengths in histories), strict=True)]
    result = []
    for history, lengths in histories:
        states, at = [history[0]], 0
        for length, most in zip(lengths, rounds, strict=True):
            states += [history[at + min(step, length)] for step in range(1, most + 1)]
            at += length
        result.append([x + [EOS] * (longest - len(x)) for x in states])
    return torch.tensor(result).transpose(0, 1)


@pytest.mark.parametrize(
    ("rows", "options", "slow"),
    [
        ([holed(2, 3, 7), holed(0, 5, seed=1), holed(seed=2)], {"block_size": None, "steps": 5}, False),
        ([holed(2, 3, 7), holed(1, 4, 5, 6, 7, 8)], {"block_size": 32, "steps": 4, "cfg_scale": 0.5}, False),
        ([holed(4, 5, 6, 7, 8), holed(*range(8))], {"block_size": 4, "steps": 9}, False),
        ([holed(2, 3, 7), holed(1, 2, 5, 9, length=13)], {"block_size": 4, "steps": 8}, True),
    ],
)
def test_infilling_is_that_of_the_published_loop(rows, options, slow):
    model = TinyModel(3, forbid_mask=not slow)
    model.head.bias.data[MASK] += slow  # what draws the mask id stays masked
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = MDLMSampler(model, TOKENIZER).infill(rows, return_dict=True, **options)
    check(ours, filled(model, rows, options))
    reason = "blocks of 4 tokens hold unequal numbers of mask ids; the slow path serves this call and stores all logits"
    assert [str(one.message) for one in told] == [reason] * slow


def test_mask_ids_in_a_prompt_take_the_slow_path():
    model, rows = TinyModel(3), [holed(1, 4, length=6)]
    options = {"max_new_tokens": 8, "block_size": 4, "steps": 4}
    with pytest.warns(SlowPathWarning, match="mask ids in a prompt"):
        ours = MDLMSampler(model, TOKENIZER).sample(rows, return_dict=True, **options)
    check(ours, expected(model, rows, options))


def test_tokens_that_are_drawn_have_the_published_law():
    model = TinyModel(4, vocab_size=4, hidden=8, mask_id=3)
    tokenizer = SimpleNamespace(mask_token_id=3, eos_token_id=0, bos_token_id=0)
    options = {"max_new_tokens": 3, "block_size": 3, "steps": 2, "temperature": 0.5}  # 1.5 rounded to 2, then 1
    score = lambda logits, place, token: softmax(logits)[place, token]  # noqa: E731
    steps = [confident(model, 3, 4, count, lambda logits: softmax(logits / 0.5), score) for count in (2, 1)]
    ours = MDLMSampler(model, tokenizer).sample([[0]] * 2000, **options, seed=1)
    assert p_value(ours, law_after((0, 3, 3, 3), steps)) > 1e-3


def test_counts_of_stochastic_transfer_are_binomial():
    model = TinyModel(4, forbid_mask=True)
    options = {"max_new_tokens": 8, "block_size": 8, "steps": 2, "stochastic_transfer": True}
    with pytest.warns(SlowPathWarning, match="stochastic_transfer counts the steps of each row by itself"):
        ours = MDLMSampler(model, TOKENIZER).sample([[4]] * 400, **options, seed=3, return_dict=True)
    revealed = (ours.histories[1] != MASK).sum(1) - 1
    law = torch.distributions.Binomial(8, 0.5).log_prob(torch.arange(9.0)).exp()
    assert abs(revealed.float().mean() - 4) < 0.25 and abs(revealed.float().var() - 2) < 0.5
    assert p_value(revealed[revealed > 0, None], {(k,): float(law[k] / law[1:].sum()) for k in range(1, 9)}) > 1e-3
    assert not (ours.sequences == MASK).any()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"remasking": "entropy"}, ValueError, "remasking must be one of low_confidence, random, got 'entropy'"),
        ({"stepz": 4}, TypeError, "MDLMSampler knows no option 'stepz'; it knows return_dict, max_new_tokens, "),
        (
            {"max_new_tokens": 0, "max_length": 5},
            ValueError,
            "max_length must be more than the 5 tokens of the longest",
        ),
        ({"inputs": []}, ValueError, "inputs must hold at least one row of token ids, got none"),
        ({"suppress_tokens": [99]}, ValueError, "suppressed ids must be from 0 to 22, got 99"),
        ({"begin_suppress_tokens": [-1]}, ValueError, "suppressed ids must be from 0 to 22, got -1"),
        ({"temperature": -1.0}, ValueError, "temperature must"),
    ],
)
def test_bad_input_is_told(options, error, words):
    sampler = MDLMSampler(TinyModel(), TOKENIZER)
    with pytest.raises(error, match=re.escape(words)):
        sampler.sample(**({"inputs": [prompts(5).tolist()], "max_new_tokens": 4, "steps": 4} | options))


def test_a_live_sampler_is_patched_and_put_back():
    class Theirs(MDLMSampler):
        def sample(self, inputs, config=None, **options):
            return "theirs"

        infill = sample

    live, rows = Theirs(TinyModel(2), TOKENIZER), [holed(8, 9)]
    dropin.patch(live)
    ours = live.infill(rows, MDLMSamplerConfig(steps=2))
    assert torch.equal(ours, MDLMSampler(TinyModel(2), TOKENIZER).infill(rows, steps=2))
    dropin.unpatch(live)
    assert live.infill(rows) == live.sample(rows) == "theirs"


@pytest.fixture
def theirs():
    """The published sampler, for a tiny model."""
    pytest.importorskip("transformers", reason="the published code imports transformers")
    what = "a checkout of github.com/ZHZisZZ/dllm"
    code = module_of("UNMASK_DLLM", "dllm.core.samplers.mdlm", what, bare=("dllm", "dllm.core"))
    return lambda model: (code.MDLMSampler(model=model, tokenizer=TOKENIZER), code.MDLMSamplerConfig)


@pytest.mark.parametrize("options", [*SAMPLED, *SLOW], ids=str)
def test_greedy_tokens_are_those_of_the_published_code(theirs, options):
    for seed in range(2):
        live, config = theirs(TinyModel(seed))
        rows = [prompts(length, seed=seed + length).tolist() for length in (5, 2, 7)]
        config = config(return_dict=True, **options)
        with silent():
            before = live.sample(rows, config)
            dropin.patch(live)
            after = live.sample(rows, config)
        check(after, torch.stack(before.histories))


@pytest.mark.parametrize("block_size", [None, 4, 32])
def test_infilling_is_that_of_the_published_code(theirs, block_size):
    live, config = theirs(TinyModel(5, forbid_mask=True))
    rows = [holed(2, 3, 7), holed(1, 2, 5, 9, length=13), holed(4, 5, 6, 7, 11, length=12)]
    config = config(return_dict=True, block_size=block_size, steps=6, cfg_scale=0.5)
    with silent():
        before = live.infill(rows, config)
        dropin.patch(live)
        after = live.infill(rows, config)
    check(after, torch.stack(before.histories))
