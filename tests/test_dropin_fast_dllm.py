"""Fast-dLLM's `generate`: the published tokens where it is greedy, and what it counts."""

from types import ModuleType

import pytest
import torch
from published import MASK, TinyModel, prompts
from test_llama import make

from unmask import Blocks, Caching, Categorical, Confidence, Sampler, dropin
from unmask.dropin import fast_dllm

SETTINGS = [  # steps, gen_length, block_length, threshold
    (16, 16, 16, None),
    (6, 16, 8, None),
    (40, 16, 8, None),
    (16, 16, 8, 0.5),
    (16, 16, 4, 0.2),
    (16, 16, 16, 1.1),
]


@torch.no_grad()
def published(model, prompt, steps, gen_length, block_length, threshold):
    """The greedy loop for one row, and how often it calls the network."""
    x, calls = prompt.tolist() + [MASK] * gen_length, 0
    steps = steps * block_length // gen_length
    for end in range(len(prompt) + block_length, len(x) + 1, block_length):
        step = 0
        while MASK in x[:end]:
            law = model(torch.tensor([x])).logits[0].double().softmax(-1)
            ranked = sorted((place for place in range(end) if x[place] == MASK), key=lambda place: -law[place].max())
            if threshold is None:
                kept = ranked[: block_length // steps + (step < block_length % steps)]
            else:
                kept = ranked[:1] + [place for place in ranked[1:] if law[place].max() >= threshold]
            for place in kept:
                x[place] = int(law[place].argmax())
            calls, step = calls + 1, step + 1
    return x, calls


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_and_calls_are_those_of_the_published_loop(setting):
    *shape, threshold = setting
    for seed in range(3):
        model, prompt = TinyModel(seed, forbid_mask=True), prompts(2, 5, seed=seed)
        ours, calls = fast_dllm.generate(model, prompt, *shape, mask_id=MASK, threshold=threshold)
        rows = [published(model, row, *setting) for row in prompt]
        assert ours.tolist() == [tokens for tokens, _ in rows] and calls == max(most for _, most in rows)


def test_caches_are_those_of_the_sampler():
    _, model = make("llada")
    model.head.weight.mul_(4)
    prompt = prompts(2, 5)
    for kind, function in (
        ("prefix", fast_dllm.generate_with_prefix_cache),
        ("dual", fast_dllm.generate_with_dual_cache),
    ):
        ours, calls = function(model, prompt, 8, 16, 8, mask_id=model.spec.mask_id)
        policy = Blocks(Confidence(steps=4, untempered=True), 8)
        sampler = Sampler(model, reveal=policy, choose=Categorical(0.0), caching=Caching(kind))
        expected = sampler.sample(2, 21, prompt=prompt.numpy())
        assert torch.equal(ours, expected.tokens) and calls == 8


def test_a_model_without_keys_to_keep_is_told():
    with pytest.raises(ValueError, match="caching must be None with 'TinyModel', which cannot keep keys and values"):
        fast_dllm.generate_with_dual_cache(TinyModel(), prompts(1, 4), 8, 8, 8, mask_id=MASK)
    prompt = prompts(1, 4)
    prompt[0, 1] = MASK
    with pytest.raises(ValueError, match="prompt must hold no mask ids, got 22 in it; "):
        fast_dllm.generate(TinyModel(), prompt, 8, 8, 8, mask_id=MASK)


def test_a_module_is_patched_and_put_back():
    module = ModuleType("generate")
    names = ("generate", "generate_with_prefix_cache", "generate_with_dual_cache")
    for name in (*names, "add_gumbel_noise", "get_num_transfer_tokens"):
        setattr(module, name, lambda *given, **options: "theirs")
    dropin.patch(module)
    tokens, calls = module.generate(TinyModel(forbid_mask=True), prompts(1, 3), 4, 8, 4, mask_id=MASK)
    assert tokens.shape == (1, 11) and calls == 4
    dropin.unpatch(module)
    assert all(getattr(module, name)() == "theirs" for name in names)
