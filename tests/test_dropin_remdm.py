"""The drop-in for ReMDM's `_sample`: its samplers' laws, the nucleus, and what it refuses."""

from itertools import pairwise, product

import absorbing_peers as peers
import numpy as np
import pytest
import torch
from absorbing_peers import LENGTH, MASK, goodness, laws_of, log_linear, plain_signature, trajectory_law

from unmask import dropin
from unmask.dropin import mdlm, patching, remdm

STEPS, EPS = 4, 0.05
TIMES = np.linspace(1, EPS, STEPS + 1)
LOOP = {"eta": 0.1, "t_on": 0.6, "t_off": 0.3, "alpha_on": 0.8}


class Diffusion(peers.Diffusion):
    """The attributes of the published class."""

    def __init__(self, backbone, sampler="mdlm", predictor="ddpm_cache", nucleus_p=1.0, **numbers):
        super().__init__(backbone, predictor, steps=STEPS)
        numbers = {"eta": 0, "t_on": 0, "t_off": 0, "alpha_on": 0, **numbers}
        vars(self.config.sampling).update(sampler=sampler, nucleus_p=nucleus_p, dfm=False, **numbers)

    def _dfm_caching_update(self, x, t, p_x0=None):
        raise AssertionError


@pytest.fixture(scope="module")
def network():
    return peers.random_backbone()


@pytest.fixture(scope="module")
def law(network):
    return laws_of(network, log_linear)


@pytest.fixture(autouse=True)
def every_warning():
    patching.warn_once.cache_clear()


def published(sampler, eta=0.0, t_on=0.0, t_off=0.0, alpha_on=0.0):
    """reveal, remask [N] of the published steps, alpha(t) = 1 - t."""
    reveal, remask = [], []
    for t, s in pairwise(TIMES):
        a, b = 1 - t, 1 - s  # alpha_t, alpha_s
        if sampler == "remdm-loop" and t > t_on:
            a, b = ((1 - time) * alpha_on / (1 - t_on) for time in (t, s))
        elif sampler == "remdm-loop" and t <= t_off:
            a, b = (1 - time * (1 - alpha_on) / t_off for time in (t, s))
        elif sampler == "remdm-loop":
            a = b = alpha_on
        top = min(1.0, (1 - b) / a) if a > 0 else 1.0
        sigma = {
            "mdlm": 0.0,
            "forward-backward": (b - a) / a if a > 0 else 1.0,
            "remdm-cap": min(eta, top),
            "remdm-rescale": eta * top,
            "remdm-loop": eta if a == b else 0.0,
        }[sampler]
        reveal.append(min(1.0, (b - (1 - sigma) * a) / (1 - a)))  # beyond 1 the mask id has no weight left
        remask.append(sigma)
    return np.array(reveal), np.array(remask)


def expected(law, sampler, last="draw", **numbers):
    reveal, remask = published(sampler, **numbers)
    return trajectory_law(law, TIMES, reveal=reveal, remask=remask, last=last)


CASES = [("mdlm", {}), ("remdm-cap", {"eta": 0.2}), ("remdm-rescale", {"eta": 0.3}), ("remdm-loop", LOOP)]


@pytest.mark.parametrize(("sampler", "numbers"), CASES)
def test_law_of_the_samplers(sampler, numbers, network, law):
    drawn = remdm._sample(Diffusion(network, sampler, **numbers), None, EPS, seed=1, max_batch=4096)
    assert goodness(drawn, expected(law, sampler, **numbers)) > 1e-4
    if sampler in ("remdm-cap", "remdm-rescale"):
        assert goodness(drawn, expected(law, "mdlm")) < 1e-4


@pytest.mark.parametrize(("sampler", "numbers"), CASES)
def test_the_published_steps(sampler, numbers, network, law):
    drawn = remdm._sample(Diffusion(network, sampler, **numbers), None, EPS, seed=2, max_batch=4096, compat="remdm")
    assert goodness(drawn, expected(law, sampler, "argmax", **numbers)) > 1e-6


def test_forward_backward(network, law):
    with pytest.warns(patching.SlowPathWarning, match="'forward-backward' is not planned ahead"):
        drawn = remdm._sample(Diffusion(network, "forward-backward"), None, EPS, seed=3, max_batch=4096)
    assert goodness(drawn, expected(law, "forward-backward")) > 1e-4


def confident(law, last):
    """The law of remdm-conf: the chance to be masked again is shared out by softmax(-p), p of the token when drawn."""
    states = {((MASK,) * LENGTH, (np.inf,) * LENGTH): 1.0}
    for t, s in pairwise(TIMES):
        reveal, top = (t - s) / t, min(1.0, s / (1 - t)) if t < 1 else 1.0
        after = {}
        for (tokens, drawn), probability in states.items():
            weights = np.exp([-p for p in drawn])
            shares = top * weights / max(weights.sum(), 1e-300)
            choices = []
            for position, token in enumerate(tokens):
                if token == MASK:
                    p = law(tokens, t)[position]
                    choices.append([((i, p[i]), reveal * p[i]) for i in range(MASK)] + [((MASK, np.inf), 1 - reveal)])
                else:
                    choices.append(
                        [((token, drawn[position]), 1 - shares[position]), ((MASK, np.inf), shares[position])]
                    )
            for combination in product(*choices):
                chance = probability * np.prod([chance for _, chance in combination])
                new = tuple(token for (token, _), _ in combination), tuple(p for (_, p), _ in combination)
                after[new] = after.get(new, 0.0) + chance
        states = after
    result = np.zeros((MASK + 1,) * LENGTH)
    for (tokens, _), probability in states.items():
        ended = trajectory_law(law, [EPS], begin=tokens, last=last)
        result += probability * ended
    return result


@pytest.mark.parametrize("compat", [None, "remdm"])
@pytest.mark.parametrize("noise_removal", [True, False])
def test_confident_remasking(noise_removal, compat, network, law):
    diffusion = Diffusion(network, "remdm-conf")
    diffusion.config.sampling.noise_removal = noise_removal
    drawn = remdm._sample(diffusion, None, EPS, seed=7, max_batch=4096, compat=compat)
    last = "leave" if not noise_removal else "argmax" if compat else "draw"
    assert goodness(drawn, confident(law, last)) > (1e-6 if compat else 1e-4)
    assert goodness(drawn, expected(law, "remdm-rescale", last, eta=1 / LENGTH)) < 1e-6  # equal shares


def test_without_noise_removal_masks_are_left(network, law):
    diffusion = Diffusion(network, "remdm-cap", eta=0.2)
    diffusion.config.sampling.noise_removal = False
    drawn = remdm._sample(diffusion, None, EPS, seed=4, max_batch=4096)
    assert goodness(drawn, expected(law, "remdm-cap", "leave", eta=0.2)) > 1e-4


def truncated(law, top_p, crossing):
    def kept(state, rate):
        p = law(state, rate)
        result = np.zeros_like(p)
        for row, out in zip(p, result, strict=True):
            mass = 0.0
            for rank, token in enumerate(np.argsort(-row)):
                if rank and (mass if crossing else mass + row[token]) > top_p:
                    break
                out[token], mass = row[token], mass + row[token]
        return result / result.sum(1, keepdims=True)

    return kept


@pytest.mark.parametrize("compat", [None, "remdm"])
def test_a_nucleus(compat, network, law):
    diffusion = Diffusion(network, "remdm-cap", nucleus_p=0.85, eta=0.2)
    diffusion.config.sampling.noise_removal = False
    drawn = remdm._sample(diffusion, None, EPS, seed=5, max_batch=4096, compat=compat)
    ours = expected(truncated(law, 0.85, crossing=True), "remdm-cap", "leave", eta=0.2)
    theirs = expected(truncated(law, 0.85, crossing=False), "remdm-cap", "leave", eta=0.2)
    assert goodness(drawn, theirs if compat else ours) > 1e-6
    assert goodness(drawn, ours if compat else theirs) < 1e-6


@pytest.mark.parametrize("predictor", ["ddpm", "analytic"])
def test_other_predictors_know_neither_sampler_nor_nucleus(predictor, network):
    diffusion = Diffusion(network, "remdm-cap", predictor, nucleus_p=0.6, eta=0.2)
    diffusion.config.loader.eval_batch_size = 64
    assert torch.equal(remdm._sample(diffusion, seed=6), mdlm._sample(diffusion, seed=6))


def test_patched_and_back(network):
    diffusion = Diffusion(network, "remdm-loop", **LOOP)
    diffusion.config.loader.eval_batch_size = 5
    before, signature = dict(vars(diffusion)), plain_signature(diffusion._sample)
    dropin.patch(diffusion, seed=0)
    assert plain_signature(diffusion._sample) == signature
    samples = diffusion.restore_model_and_sample(num_steps=8)
    assert (samples.dtype, samples.shape) == (torch.int64, (5, LENGTH)) and (samples < MASK).all()
    assert torch.equal(remdm._sample(diffusion, 8, seed=0), samples)
    dropin.unpatch(diffusion)
    assert vars(diffusion) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "remdm-max"}, r"config\.sampling\.sampler must be one of mdlm, remdm-cap, .* got 'remdm-max'"),
        ({"dfm": True}, r"config\.sampling\.dfm must be False: its corrector steps are not served"),
        ({"sampler": "remdm-loop", "eta": 0.1}, "t_on must lie between 0 and 1, got 0"),
        ({"sampler": "remdm-cap", "eta": 1.5}, r"eta must lie from 0 to 1, got 1\.5"),
    ],
)
def test_what_is_not_served(changes, message, network):
    diffusion = Diffusion(network)
    vars(diffusion.config.sampling).update(changes)
    with pytest.raises(ValueError, match=message):
        remdm._sample(diffusion)
