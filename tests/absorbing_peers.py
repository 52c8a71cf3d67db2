"""What the tests of the absorbing peers share: small objects with the published names, and the published steps' law.

The objects have nothing of a peer but the attributes that a drop-in reads. The law is written out from the equations of
the absorbing process in fp64: each state's probability, step by step.
"""

import inspect
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import published_forward
import torch
from scipy import stats
from torch import nn

IDS, LENGTH, MASK = 3, 3, 3  # real ids 0 … 2, then the mask id
HEADS, NUM = 2, 8000  # NUM samples in a test of a law


class Backbone(nn.Module):
    """The published network by its tensor names, the equations of `published_forward`. It counts its calls."""

    def __init__(self, state, conditioned=False):
        super().__init__()
        for name, tensor in state.items():
            module, (*path, last) = self, name.split(".")
            for part in path:
                module = module._modules.setdefault(part, nn.Module())
            if last == "inv_freq":
                module.register_buffer(last, tensor)
            else:
                module.register_parameter(last, nn.Parameter(tensor))
        self.conditioned, self.num_calls = conditioned, 0

    def forward(self, tokens, sigma):
        self.num_calls += 1
        state, sigma = self.state_dict(), sigma * self.conditioned
        inputs, place = torch.cat([tokens, sigma[:, None].double()], 1).unique(dim=0, return_inverse=True)
        rows = [published_forward.forward(state, row[:-1].long(), HEADS, row[-1].item())[1] for row in inputs]
        return torch.stack(rows)[place]


def random_backbone(seed=1, conditioned=False, sharpness=3.0, num_ids=IDS, hidden=32, mlp_factor=2):
    """With this seed what is said of a position depends on the others: laws of different trajectories are far apart."""
    state = published_forward.random_state(num_ids + 1, hidden, 2, mlp_factor * hidden, HEADS, cond_dim=8, seed=seed)
    state["output_layer.linear.weight"] *= sharpness
    return Backbone(state, conditioned).eval()


class Foreign(nn.Module):
    """Another network: p(x_i | x) from a hash of the whole sequence."""

    def __init__(self, num_ids=IDS):
        super().__init__()
        self.scale, self.num_ids = nn.Parameter(torch.tensor(1.5)), num_ids

    def forward(self, tokens, sigma):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        code = ((tokens + 1) * (2 * places + 3) ** 2).sum(1)[:, None] + 7 * places + 3 * sigma[:, None]
        return torch.sin(code[..., None] * 0.37 + torch.arange(self.num_ids + 1) * 1.7) * self.scale


def model_config(backbone, length=LENGTH):
    """The part `model` of the published configuration."""
    hidden = 32 if isinstance(backbone, Foreign) else backbone.vocab_embed.embedding.shape[1]
    blocks = 2 if isinstance(backbone, Foreign) else len(list(backbone.blocks.children()))
    sizes = {"hidden_size": hidden, "cond_dim": 8, "n_blocks": blocks, "n_heads": HEADS, "length": length}
    return SimpleNamespace(**sizes, scale_by_sigma=True, dropout=0.1)


class LogLinear(nn.Module):
    def forward(self, t):
        return -torch.log1p(-(1 - 1e-3) * t), (1 - 1e-3) / (1 - (1 - 1e-3) * t)


class Cosine(nn.Module):
    def forward(self, t):
        return -torch.log(1e-3 + (1 - 1e-3) * torch.cos(t * torch.pi / 2)), torch.zeros_like(t)


class Diffusion(nn.Module):
    """The attributes of MDLM's class, and a `_sample` of its own that must not run."""

    def __init__(self, backbone, predictor="ddpm_cache", *, noise_removal=True, conditioned=False, batch=NUM, steps=3):
        super().__init__()
        self.backbone, self.noise, self.ema = backbone, LogLinear(), None
        self.mask_index, self.vocab_size = MASK, IDS + 1
        self.parameterization, self.sampler, self.time_conditioning = "subs", predictor, conditioned
        self.config = SimpleNamespace(
            model=model_config(backbone),
            noise=SimpleNamespace(type="loglinear"),
            loader=SimpleNamespace(eval_batch_size=batch),
            sampling=SimpleNamespace(predictor=predictor, steps=steps, noise_removal=noise_removal),
        )

    def forward(self, x, sigma):
        sigma = sigma.squeeze(-1) if self.time_conditioning else torch.zeros(len(x))
        logits = self.backbone(x, sigma)
        logits[:, :, self.mask_index] = -1e6
        logits = logits.log_softmax(-1)
        logits[x != self.mask_index] = -1e6
        logits[x != self.mask_index, x[x != self.mask_index]] = 0
        return logits

    def _ddpm_update(self, x, t, dt):
        raise AssertionError

    _ddpm_caching_update = _analytic_update = _ddpm_update

    def _sample_prior(self, *batch_dims):
        return torch.full(batch_dims, self.mask_index)

    def _sample(self, num_steps=None, eps=1e-5):
        raise AssertionError

    def restore_model_and_sample(self, num_steps, eps=1e-5):
        return self._sample(num_steps=num_steps, eps=eps)


def laws_of(backbone, sigma_of_rate, num_ids=IDS):
    """(tokens, mask rate) -> probabilities float64 [L, ids] of what the backbone says."""
    known = {}

    def law(state, rate):
        if (state, rate) not in known:
            with torch.no_grad():
                logits = backbone(torch.tensor([state]), torch.tensor([sigma_of_rate(rate)]))[0, :, :num_ids]
            known[state, rate] = logits.double().softmax(-1).numpy()
        return known[state, rate]

    return law


def log_linear(rate):
    return -math.log1p(-(1 - 1e-3) * rate)


def trajectory_law(law, rates, *, reveal=None, remask=None, last="draw", begin=None, num_ids=IDS, length=LENGTH):
    """Probability [ids + 1] * L of each final state, the last id for masked.

    rates [N + 1]: the mask rate told in each step and after the last. reveal, remask [N]: chances in each step, by
    default those of the ancestral process. last: "draw", "argmax" or "leave", what becomes of positions still masked.
    """
    rates = np.asarray(rates, float)
    reveal = 1 - rates[1:] / rates[:-1] if reveal is None else reveal
    remask = np.zeros(len(reveal)) if remask is None else remask
    states = {(num_ids,) * length if begin is None else begin: 1.0}
    for step, chance in enumerate(reveal):
        states = _after(states, law, rates[step], chance, remask[step], num_ids)
    if last == "draw":
        states = _after(states, law, rates[-1], 1.0, 0.0, num_ids)
    result = np.zeros((num_ids + 1,) * length)
    for state, probability in states.items():
        if last == "argmax" and num_ids in state:
            best = law(state, rates[-1]).argmax(-1)
            state = tuple(int(best[i]) if token == num_ids else token for i, token in enumerate(state))
        result[state] += probability
    return result


def _after(states, law, rate, reveal, remask, num_ids):
    after = {}
    for state, probability in states.items():
        choices = []
        for position, token in enumerate(state):
            if token == num_ids:
                drawn = reveal * law(state, rate)[position]
                choices.append([*enumerate(drawn), (num_ids, 1 - reveal)])
            else:
                choices.append([(token, 1 - remask), (num_ids, remask)])
        for combination in product(*choices):
            chance = probability * math.prod(chance for _, chance in combination)
            if chance > 0:
                new = tuple(token for token, _ in combination)
                after[new] = after.get(new, 0.0) + chance
    return after


def plain_signature(function):
    """Names, kinds and defaults of the parameters, without annotations."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def goodness(tokens, law):
    """p of a χ² test of tokens [S, L] against a law; rare outcomes are merged, an impossible one gives 0."""
    places = np.ravel_multi_index(tuple(tokens.T.numpy()), law.shape)
    counts, law = np.bincount(places, minlength=law.size), law.ravel()
    if counts[law == 0].any():
        return 0.0
    order = np.argsort(law)[(law == 0).sum() :]
    expected, observed = len(tokens) * law[order], counts[order]
    rare = max(1, int(np.searchsorted(expected, 5)))
    expected = np.append(expected[:rare].sum(), expected[rare:])
    observed = np.append(observed[:rare].sum(), observed[rare:])
    return float(stats.chisquare(observed, expected * len(tokens) / expected.sum()).pvalue)


def same_law(tokens, others, num_ids=IDS + 1):
    """p of a χ² test that two sets of samples [S, L] have one law; rare outcomes are merged."""
    shape = (num_ids,) * tokens.shape[1]
    places = (np.ravel_multi_index(tuple(some.T.numpy()), shape) for some in (tokens, others))
    counts = np.stack([np.bincount(some, minlength=np.prod(shape)) for some in places])
    rare = counts.sum(0) < 10
    table = np.column_stack([counts[:, ~rare], counts[:, rare].sum(1)])
    return float(stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue)
