"""LLaDA's `generate`: the published tokens where it is greedy, its law where it draws, its rules in words."""

import math
from types import ModuleType, SimpleNamespace

import pytest
import torch
from enumerated import anywhere, confident, law_after, p_value, softmax
from published import MASK, VOCAB, TinyModel, module_of, prompts, silent
from test_llama import make
from toys import random_dit

from unmask import dropin
from unmask.canvas import Canvas
from unmask.dropin import llada
from unmask.dropin.patching import SlowPathWarning
from unmask.dropin.plain import whole_logits

SETTINGS = [  # steps, gen_length, block_length, cfg_scale
    (16, 16, 16, 0.0),
    (8, 16, 8, 0.0),
    (9, 24, 8, 0.0),
    (16, 16, 4, 1.5),
    (6, 12, 6, 0.5),
    (40, 16, 8, 0.0),
]


@torch.no_grad()
def published(model, prompt, steps, gen_length, block_length, cfg_scale=0.0, never=(), doubted=(), mask_id=MASK):
    """The greedy loop, one row and one position at a time."""
    rows = []
    for row in prompt.tolist():
        x, given = row + [mask_id] * gen_length, len(row)
        steps_left = steps * block_length // gen_length
        for end in range(given + block_length, len(x) + 1, block_length):
            for step in range(steps_left):
                count = block_length // steps_left + (step < block_length % steps_left)
                logits = model(torch.tensor([x])).logits[0].clone()
                if cfg_scale:
                    blind = model(torch.tensor([[mask_id] * given + x[given:]])).logits[0]
                    logits = blind + (cfg_scale + 1) * (logits - blind)
                logits[:, list(never)] = -math.inf
                drawn = logits.argmax(-1).tolist()
                logits[:, list(doubted)] = -math.inf
                law = logits.softmax(-1)
                masked = [place for place in range(end) if x[place] == mask_id]
                masked.sort(key=lambda place: -law[place, drawn[place]])
                for place in masked[:count]:
                    x[place] = drawn[place]
        rows.append(x)
    return torch.tensor(rows)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_are_those_of_the_published_loop(setting, seed):
    steps, gen_length, block_length, cfg_scale = setting
    model, prompt = TinyModel(seed), prompts(2, 5, seed=seed)
    ours = llada.generate(model, prompt, None, steps, gen_length, block_length, 0.0, cfg_scale, mask_id=MASK)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, published(model, prompt, *setting))


def trunk():
    _, model = make("llada")
    model.head.weight.mul_(4)
    return model


@pytest.mark.parametrize("denoiser", [random_dit("dit", 2, vocab_size=VOCAB, length=32), trunk()], ids=["dit", "llama"])
def test_a_denoiser_is_taken_as_it_is(denoiser):
    mask_id = denoiser.spec.mask_id

    def model(tokens):
        canvas = Canvas(tokens, torch.ones_like(tokens, dtype=torch.bool), mask_id)
        return SimpleNamespace(logits=whole_logits(denoiser, canvas))

    prompt = prompts(2, 5)
    for steps, cfg_scale in ((16, 0.0), (8, 1.2)):
        ours = llada.generate(denoiser, prompt, None, steps, 16, 8, 0.0, cfg_scale, mask_id=mask_id)
        assert torch.equal(ours, published(model, prompt, steps, 16, 8, cfg_scale, mask_id=mask_id))
        assert len(ours[:, 5:].unique()) > 4


def test_padding_on_the_left_is_not_seen():
    model, prompt = TinyModel(1), prompts(3, 6)
    attention = torch.ones_like(prompt)
    attention[1, :2] = attention[2, :5] = 0
    options = {"steps": 8, "gen_length": 8, "block_length": 4, "cfg_scale": 0.5, "mask_id": MASK}
    ours = llada.generate(model, prompt, attention, **options)
    assert torch.equal(ours[:, :6], prompt)
    for row, padding in enumerate((0, 2, 5)):
        alone = llada.generate(model, prompt[row : row + 1, padding:], **options)
        assert torch.equal(ours[row, padding:], alone[0])
    attention[0, 3] = 0
    with pytest.raises(ValueError, match=r"attention_mask must be zeros on the left of a row only.* in row 0"):
        llada.generate(model, prompt, attention, **options)


def test_suppressed_and_doubted_ids(monkeypatch):
    monkeypatch.setattr(llada, "EOS", 7)
    monkeypatch.setattr(llada, "EOT", 11)
    model, prompt = TinyModel(2), prompts(4, 5)
    model.head.bias.data[[7, 11]] += 3
    plain = published(model, prompt, 8, 16, 8)
    assert (plain == 7).any() and (plain == 11).any()
    shape = {"steps": 8, "gen_length": 16, "block_length": 8, "mask_id": MASK}
    for ours, theirs in (
        ({"logits_eos_inf": True}, {"never": [7]}),
        ({"confidence_eos_eot_inf": True}, {"doubted": [7, 11]}),
        ({"logits_eos_inf": True, "confidence_eos_eot_inf": True}, {"never": [7], "doubted": [7, 11]}),
    ):
        expected = published(model, prompt, 8, 16, 8, **theirs)
        assert torch.equal(llada.generate(model, prompt, **shape, **ours), expected) and not torch.equal(
            expected, plain
        )


# A vocabulary of three ids and the mask id, which competes with them.
TINY = {"steps": 2, "gen_length": 4, "block_length": 4, "mask_id": 3}


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_that_are_drawn_have_the_published_law(remasking, temperature):
    model = TinyModel(4, vocab_size=4, hidden=8, mask_id=3)
    tempered = lambda logits: softmax(logits / temperature)  # noqa: E731
    if remasking == "random":
        steps = [anywhere(model, 3, 5, 2, tempered)] * 2
    else:
        score = lambda logits, place, token: softmax(logits)[place, token]  # noqa: E731
        steps = [confident(model, 3, 5, 2, tempered, score)] * 2
    prompt = torch.zeros(3000, 1, dtype=torch.int64)
    ours = llada.generate(model, prompt, temperature=temperature, remasking=remasking, **TINY, seed=1)
    law = law_after((0, 3, 3, 3, 3), steps)
    assert sum(chance for outcome, chance in law.items() if 3 in outcome) > 0.05
    assert p_value(ours, law) > 1e-3


def test_mask_ids_in_a_prompt_are_filled_on_the_slow_path():
    model, prompt = TinyModel(3), prompts(2, 6)
    prompt[:, 2] = MASK
    with pytest.warns(SlowPathWarning, match="mask ids in the prompt; the slow path") as told:
        ours = llada.generate(model, prompt, steps=4, gen_length=8, block_length=4, mask_id=MASK)
    assert torch.equal(ours, published(model, prompt, 4, 8, 4))
    assert [one.filename for one in told] == [__file__]


def test_torch_governs_the_seed():
    model, prompt = TinyModel(5), prompts(2, 3)
    options = {"steps": 4, "gen_length": 8, "block_length": 8, "temperature": 1.0, "mask_id": MASK}
    torch.manual_seed(1)
    first, second = (llada.generate(model, prompt, **options) for _ in range(2))
    torch.manual_seed(1)
    again = llada.generate(model, prompt, **options)
    assert torch.equal(first, again) and not torch.equal(first, second)
    given = (llada.generate(model, prompt, **options, seed=7) for _ in range(2))
    assert torch.equal(*given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_length": 5}, "gen_length must be a multiple of block_length = 5, got 8"),
        ({"steps": 5}, "steps must be a multiple of the 2 blocks of 4 tokens, got 5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"gen_length": 0}, "gen_length must be at least 1, got 0"),
        ({"remasking": "entropy"}, "remasking must be one of low_confidence, random, got 'entropy'"),
        ({"mask_id": 99}, "mask_id must be .*, got 99"),
        ({"logits_eos_inf": True}, "must have a model with the ids 126081 and 126348 of LLaDA, got one with 23 ids"),
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask must have the shape of the prompt, \[2, 3\], got"),
        ({"temperature": -1.0}, "temperature must"),
        ({"cfg_scale": -1.0}, "guidance must"),
        (
            {"prompt": torch.zeros(3)},
            r"prompt must be a tensor of token ids \[batch, length\], got torch.float32 \[3\]",
        ),
    ],
)
def test_bad_input_is_told(options, words):
    given = {"prompt": prompts(2, 3), "steps": 8, "gen_length": 8, "block_length": 4, "mask_id": MASK}
    with pytest.raises(ValueError, match=words):
        llada.generate(TinyModel(), **(given | options))
    with pytest.raises(TypeError, match=r"model must be a torch module, .* got int"):
        llada.generate(3, **given)


def test_a_module_is_patched_and_put_back():
    module = ModuleType("generate")
    theirs = module.generate = lambda *given, **options: "theirs"
    module.add_gumbel_noise = module.get_num_transfer_tokens = theirs
    dropin.patch(module)
    options = {"steps": 4, "gen_length": 8, "block_length": 4, "mask_id": MASK}
    assert torch.equal(
        module.generate(TinyModel(), prompts(1, 3), **options), llada.generate(TinyModel(), prompts(1, 3), **options)
    )
    dropin.unpatch(module)
    assert module.generate is theirs


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_are_those_of_the_published_code(setting):
    theirs = module_of("UNMASK_LLADA", "generate", "a checkout of github.com/ML-GSAI/LLaDA")
    steps, gen_length, block_length, cfg_scale = setting
    for seed in range(3):
        model, prompt = TinyModel(seed), prompts(3, 5, seed=seed)
        attention = torch.ones_like(prompt)
        attention[1, :2] = 0
        given = (model, prompt, attention, steps, gen_length, block_length, 0.0, cfg_scale)
        with silent():
            expected = theirs.generate(*given, mask_id=MASK)
        assert torch.equal(llada.generate(*given, mask_id=MASK), expected)
