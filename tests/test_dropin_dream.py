"""Dream's `diffusion_generate`: the published tokens where it is greedy, its law where it draws, hooks, its rules."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from enumerated import confident, independent, law_after, p_value, softmax
from published import EOS, MASK, TinyModel, module_of, prompts, silent

from unmask import dropin
from unmask.dropin import dream
from unmask.dropin.dream import diffusion_generate
from unmask.dropin.plain import SlowPathWarning

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
@torch.no_grad()
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
