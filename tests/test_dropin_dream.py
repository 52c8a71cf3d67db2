"""Dream's `diffusion_generate`: the published tokens where it is greedy, its law where it draws, hooks, its rules."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from enumerated import confident, independent, law_after, p_value, softmax
from published import EOS, MASK, TinyModel, module_of, prompts, silent
from toys import random_dit

from unmask import dropin
from unmask.dropin import dream
from unmask.dropin.dream import diffusion_generate
from unmask.dropin.patching import SlowPathWarning

ALGORITHMS = ["maskgit_plus", "topk_margin", "entropy"]
SETTINGS = [
    {"steps": 8},
    {"steps": 5, "top_k": 4},
    {"steps": 40, "eps": 0.1},
    {"steps": 6, "top_p": 0.6},
    {"steps": 1},
]


def shifted(model):
    """A model as Dream's loop reads it: row i - 1 predicts position i."""

    def call(tokens):
        logits = model(tokens).logits
        return SimpleNamespace(logits=torch.cat([logits[:, :1], logits[:, :-1]], 1))

    return call


def truncated(logits, top_p=None, top_k=None):
    order = logits.argsort(descending=True).tolist()
    law, kept, share = logits.softmax(-1), [], 0.0
    for token in order[:top_k]:
        if kept and top_p is not None and share > top_p:
            break
        kept.append(token)
        share += float(law[token])
    return torch.full_like(logits, -1e30).index_copy(0, torch.tensor(kept), logits[kept]).softmax(-1)


@torch.no_grad()
def published(model, prompt, alg, steps, num_new=16, eps=1e-3, **truncation):
    """The greedy loop for one row: what is there after each step."""
    x, history = prompt.tolist() + [MASK] * num_new, []
    times = torch.linspace(1, eps, steps + 1)
    for step in range(steps):
        logits = shifted(model)(torch.tensor([x])).logits[0]
        masked = [place for place, token in enumerate(x) if token == MASK]
        laws = {place: truncated(logits[place], **truncation) for place in masked}
        score = {
            "maskgit_plus": lambda law: float(law.max()),
            "topk_margin": lambda law: float(law.topk(2).values.diff().abs()),
            "entropy": lambda law: float((law * (law + 1e-10).log()).sum()),
        }[alg]
        share = 1 - times[step + 1] / times[step]
        count = int(torch.tensor(float(len(masked))) * share) if step < steps - 1 else len(masked)
        for place in sorted(masked, key=lambda place: -score(laws[place]))[:count]:
            x[place] = int(laws[place].argmax())
        history.append(torch.tensor(x))
    return history


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_greedy_tokens_are_those_of_the_published_loop(alg, setting):
    for seed in range(2):
        model, prompt = TinyModel(seed), prompts(2, 5, seed=seed)
        prompt[1, 2] = MASK  # filled as well
        ours = diffusion_generate(
            model, prompt, alg=alg, max_new_tokens=16, **setting, return_dict_in_generate=True, output_history=True
        )
        for row in range(2):
            expected = published(model, prompt[row], alg, **setting)
            assert torch.equal(ours.sequences[row], expected[-1])
            assert len(ours.history) == len(expected)
            assert all(torch.equal(x[row], y) for x, y in zip(ours.history, expected, strict=True))


def score_of(alg, temperature):
    """Of a drawn token, in the law that it is drawn from."""
    if alg == "maskgit_plus":
        return lambda logits, place, token: softmax(logits[place] / temperature)[token]
    if alg == "topk_margin":
        return lambda logits, place, token: np.diff(np.sort(softmax(logits[place] / temperature))[-2:])[0]
    return lambda logits, place, token: float(
        sum(share * np.log(share + 1e-10) for share in softmax(logits[place] / temperature))
    )


@pytest.mark.parametrize("alg_temp", [None, 0.3])
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_tokens_that_are_drawn_have_the_published_law(alg, alg_temp):
    model, temperature = TinyModel(4, vocab_size=4, hidden=8, mask_id=3, forbid_mask=True), 0.7
    counts = [1, 2]  # of three masked positions, by a grid of 1, 0.55, 0.1
    score = score_of(alg, temperature)
    law = law_after(
        (0, 3, 3, 3),
        [
            confident(shifted(model), 3, 4, count, lambda logits: softmax(logits / temperature), score, alg_temp)
            for count in counts
        ],
    )
    ours = diffusion_generate(
        model,
        torch.zeros(2000, 1, dtype=torch.int64),
        alg=alg,
        alg_temp=alg_temp,
        temperature=temperature,
        steps=2,
        eps=0.1,
        max_new_tokens=3,
        seed=2,
    )
    assert p_value(ours, law) > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_origin_reveals_independently_on_the_published_grid(temperature):
    model = TinyModel(4, vocab_size=4, hidden=8, mask_id=3, forbid_mask=True)
    greedy = lambda logits: np.eye(4)[logits.argmax(-1)]  # noqa: E731
    steps = [independent(shifted(model), 3, share, softmax if temperature else greedy) for share in (0.45, 1.0)]
    prompt, options = torch.zeros(2000, 1, dtype=torch.int64), {"steps": 2, "eps": 0.1, "max_new_tokens": 3, "seed": 3}
    options |= {"return_dict_in_generate": True, "output_history": True, "temperature": temperature}
    ours = diffusion_generate(model, prompt, **options)
    assert p_value(ours.sequences, law_after((0, 3, 3, 3), steps)) > 1e-3
    assert abs((ours.history[0] == 3).sum() / 6000 - 0.55) < 0.02


def test_the_mask_id_takes_part_where_the_published_code_lets_it():
    model = TinyModel(4, vocab_size=4, hidden=8, mask_id=3)
    law = {(0, 3, 3, 3): 1.0}
    score = score_of("maskgit_plus", 1.0)
    shares = 1 - np.float32([0.55 / 1, 0.1 / 0.55])

    def step(state, last):
        count = sum(token == 3 for token in state)
        count = count if last else int(count * shares[0])
        return confident(shifted(model), 3, 4, count, softmax, score)(state)

    law = law_after((0, 3, 3, 3), [lambda state: step(state, False), lambda state: step(state, True)])
    prompt = torch.zeros(2000, 1, dtype=torch.int64)
    options = {"alg": "maskgit_plus", "temperature": 1.0, "steps": 2, "eps": 0.1, "max_new_tokens": 3, "seed": 4}
    assert sum(chance for outcome, chance in law.items() if 3 in outcome) > 0.05
    assert p_value(diffusion_generate(model, prompt, **options), law) > 1e-3


def test_padding_is_not_seen_wherever_it_stands():
    model, prompt = TinyModel(1), prompts(3, 6)
    attention = torch.ones_like(prompt)
    attention[1, :2] = attention[2, 4:] = 0
    options = {"alg": "entropy", "steps": 4, "max_new_tokens": 8}
    ours = diffusion_generate(model, prompt, attention_mask=attention, **options)
    assert torch.equal(ours[:, :6], prompt)
    for row in range(3):
        kept = attention[row].bool()
        alone = diffusion_generate(model, prompt[row][kept][None], **options)
        assert torch.equal(ours[row, 6:], alone[0, int(kept.sum()) :])
    prompt[0, 0] = EOS  # which is the padding id as well
    with pytest.warns(UserWarning, match="inputs hold pad_token_id and there is no attention_mask") as told:
        diffusion_generate(model, prompt, **options)
    assert [one.filename for one in told] == [__file__]


@pytest.mark.parametrize(
    "options",
    [*({"alg": alg, "temperature": 0.7, "top_p": 0.9, "top_k": 3} for alg in ALGORITHMS), {"temperature": 1.0}],
    ids=lambda options: options.get("alg", "origin"),
)
def test_hooks_are_honoured_on_the_slow_path(options):
    model, prompt, calls = TinyModel(6), prompts(2, 4), []

    def tokens_hook(step, x, logits):
        calls.append((step, None if logits is None else tuple(logits.shape)))
        return x.index_fill(1, torch.tensor([5]), 9)  # a constraint

    def logits_hook(step, x, logits):
        return logits.index_fill(2, torch.tensor([4, MASK]), -torch.inf)

    hooks = {"generation_tokens_hook_func": tokens_hook, "generation_logits_hook_func": logits_hook}
    with pytest.warns(SlowPathWarning, match="generation_tokens_hook_func needs the logits of every step") as told:
        ours = diffusion_generate(model, prompt, steps=3, max_new_tokens=5, **options, **hooks, seed=1)
    assert [one.filename for one in told] == [__file__]
    assert calls == [(None, None), *((step, (2, 9, 23)) for step in range(3))]
    assert (ours[:, 5] == 9).all() and not torch.isin(ours[:, 4:], torch.tensor([4, MASK])).any()
    with pytest.warns(SlowPathWarning):
        again = diffusion_generate(model, prompt, steps=3, max_new_tokens=5, **options, **hooks, seed=1)
    assert torch.equal(ours, again)


def test_the_slow_path_gives_the_same_greedy_tokens():
    model, prompt = TinyModel(6), prompts(3, 4)
    for alg in ALGORITHMS:
        options = {"alg": alg, "steps": 5, "max_new_tokens": 12, "top_p": 0.8}
        options |= {"return_dict_in_generate": True, "output_history": True}
        fast = diffusion_generate(model, prompt, **options)
        with pytest.warns(SlowPathWarning, match="generation_logits_hook_func"):
            slow = diffusion_generate(
                model, prompt, **options, generation_logits_hook_func=lambda step, x, logits: logits
            )
        assert torch.equal(torch.stack(fast.history), torch.stack(slow.history))
    with pytest.warns(SlowPathWarning, match="top_p is taken before top_k here"):
        both = diffusion_generate(model, prompt[:1], alg="entropy", steps=5, max_new_tokens=12, top_p=0.8, top_k=3)
    assert torch.equal(both[0], published(model, prompt[0], "entropy", 5, 12, top_p=0.8, top_k=3)[-1])


IDS, LOGITS = "tokens_hook_func must return token ids of shape [2, 9]", "logits_hook_func must return logits of shape "


@pytest.mark.parametrize(
    ("hook", "result", "words"),
    [
        ("tokens", lambda x: x[:, 1:], f"{IDS}, got torch.int64 [2, 8]"),
        ("tokens", lambda x: None, f"{IDS}, got NoneType"),
        ("logits", lambda x: x[..., 0], f"{LOGITS}[2, 9, 23], got torch.float32 [2, 9]"),
        ("logits", lambda x: x.argmax(-1), f"{LOGITS}[2, 9, 23], got torch.int64 [2, 9]"),
    ],
)
def test_a_hook_with_a_wrong_shape_is_told(hook, result, words):
    hooks = {
        "tokens": {"generation_tokens_hook_func": lambda step, x, logits: result(x)},
        "logits": {"generation_logits_hook_func": lambda step, x, logits: result(logits)},
    }[hook]
    with pytest.warns(SlowPathWarning), pytest.raises(ValueError, match=re.escape("generation_" + words)):
        diffusion_generate(TinyModel(), prompts(2, 4), steps=2, max_new_tokens=5, **hooks)


def test_lengths_configurations_and_outputs():
    model, prompt = TinyModel(2), prompts(2, 4)
    config = SimpleNamespace(steps=3, alg="entropy", max_length=20, temperature=None, mask_token_id=None)
    assert diffusion_generate(model, prompt, config).shape == (2, 24)  # a default counts new tokens
    assert diffusion_generate(model, prompt, config, max_length=20).shape == (2, 20)
    assert diffusion_generate(model, prompt, config, max_new_tokens=2, max_length=9).shape == (2, 6)
    several = diffusion_generate(model, prompt, config, max_new_tokens=4, num_return_sequences=3)
    assert torch.equal(several, several[::3].repeat_interleave(3, 0)) and several.shape == (6, 8)
    output = diffusion_generate(model, prompt, config, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(output.sequences, several[::3]) and output["history"] is None
    origin = {"steps": 6, "max_new_tokens": 8, "seed": 5, "return_dict_in_generate": True, "output_history": True}
    output = diffusion_generate(model, prompt, **origin)
    masked = [(x == MASK).sum() for x in output.history]
    assert masked == sorted(masked, reverse=True) and masked[-1] == 0 and len(masked) == 6
    assert all(torch.equal(x[x != MASK], output.sequences[x != MASK]) for x in output.history)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"alg": "confidence"}, ValueError, "alg must be one of origin, maskgit_plus, topk_margin, entropy, got 'conf"),
        ({"max_length": 3}, ValueError, "max_length must be more than the 3 tokens of inputs, got 3; or give max_new"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"eps": 1.0}, ValueError, "eps must satisfy 0 < eps < 1, got 1.0"),
        ({"mask_token_id": 99}, ValueError, "mask_id must be .*, got 99"),
        ({"inputs": None}, ValueError, r"inputs must be a tensor of token ids \[batch, length\], got NoneType"),
        ({"stepz": 3}, TypeError, "diffusion_generate knows no argument 'stepz'; it knows temperature, top_p, "),
        ({"temperature": -1.0}, ValueError, "temperature must"),
        ({"top_p": 1.5}, ValueError, "top_p must"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1, got 0"),
    ],
)
def test_bad_input_is_told(options, error, words):
    with pytest.raises(error, match=words):
        diffusion_generate(TinyModel(), **({"inputs": prompts(2, 3), "steps": 2} | options))


def test_a_model_whose_rows_cannot_be_shifted_is_told():
    with pytest.raises(ValueError, match="model must let row i - 1 predict position i, got 'dit', where row i does"):
        diffusion_generate(random_dit("dit", 1), prompts(1, 3), steps=1)


def test_a_live_model_is_patched_and_put_back():
    class Live(TinyModel):
        def diffusion_generate(self, inputs=None, generation_config=None, **kwargs):
            return "theirs"

    model, prompt = Live(3), prompts(2, 4)
    dropin.patch(model)
    ours = model.diffusion_generate(prompt, alg="entropy", steps=4, max_new_tokens=6)
    assert torch.equal(ours, diffusion_generate(TinyModel(3), prompt, alg="entropy", steps=4, max_new_tokens=6))
    dropin.unpatch(model)
    assert model.diffusion_generate(prompt) == "theirs" and not dream.fits(TinyModel())


@pytest.fixture
def theirs():
    """The published loop on a tiny model. Its configuration was written for a transformers that checks less."""
    pytest.importorskip("transformers", reason="the published code builds on transformers")
    with silent():
        code = module_of("UNMASK_DREAM", "generation_utils", "the folder with Dream's generation_utils.py")

    class Config(code.DreamGenerationConfig):
        def validate(self, *given, **options):
            pass

    class Live(TinyModel, code.DreamGenerationMixin):
        def config_of(self, **options):
            special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), -1)
            return Config(mask_token_id=MASK, max_new_tokens=16, **special, **options)

    return Live


@pytest.mark.parametrize("setting", [*SETTINGS, {"steps": 4, "top_p": 0.7, "top_k": 5}], ids=str)
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_greedy_tokens_are_those_of_the_published_code(theirs, alg, setting):
    for seed in range(2):
        prompt = prompts(2, 5, seed=seed)
        attention = torch.ones_like(prompt)
        attention[1, :2] = seed
        for model, rows in ((theirs(seed, forbid_mask=True), slice(0, 2)), (theirs(seed), slice(1, 2))):
            config = model.config_of(alg=alg, return_dict_in_generate=True, output_history=True, **setting)
            given = prompt[rows], config
            with silent():
                expected = model.diffusion_generate(*given, attention_mask=attention[rows])
                dropin.patch(model)
                ours = model.diffusion_generate(*given, attention_mask=attention[rows])
            assert type(ours) is type(expected)
            assert torch.equal(torch.stack(ours.history), torch.stack(expected.history))
            assert torch.equal(ours.sequences, expected.sequences)
