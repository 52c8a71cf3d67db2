"""The drop-in for Duo's `generate_samples`: its law, its endings, and what it refuses."""

from types import SimpleNamespace

import absorbing_peers as peers
import numpy as np
import pytest
import torch
from absorbing_peers import IDS, LENGTH, MASK, goodness, laws_of, log_linear, plain_signature, trajectory_law
from torch import nn

from unmask import dropin
from unmask.dropin import duo, patching

NUM = 8000
RATES = torch.linspace(1, 1e-5, 4, dtype=torch.float64).numpy()


class LogLinear(nn.Module):
    def forward(self, t):
        t = (1 - 1e-3) * t
        return -(1 - 1e-3) * torch.ones_like(t), 1 - t


class Cosine(nn.Module):
    def forward(self, t):
        t = (1 - 1e-3) * t
        return torch.zeros_like(t), 1 - torch.cos(torch.pi / 2 * (1 - t))


class MDLM(nn.Module):
    """The attributes of the published classes, and a `generate_samples` of its own that must not run."""

    def __init__(self, backbone, predictor="ancestral_cache", *, noise_removal="ancestral", p_nucleus=1.0, steps=3):
        super().__init__()
        self.backbone, self.noise = backbone, LogLinear()
        self.mask_index, self.vocab_size, self.num_tokens, self.p_nucleus = MASK, IDS + 1, LENGTH, p_nucleus
        self.parameterization, self.sampler, self.time_conditioning = "subs", predictor, False
        self.config = SimpleNamespace(
            model=peers.model_config(backbone),
            loader=SimpleNamespace(eval_batch_size=5),
            sampling=SimpleNamespace(
                predictor=predictor, steps=steps, noise_removal=noise_removal, p_nucleus=p_nucleus, use_float64=True
            ),
        )

    def forward(self, xt, sigma, labels=None, weights=None):
        assert sigma.ndim == 2 and labels is None
        logits = self.backbone(xt, sigma[:, 0] * self.time_conditioning)
        logits[:, :, self.mask_index] = -1e6
        return logits.log_softmax(-1)

    def _ancestral_update(self, x, t, labels, dt, p_x0=None, noise_removal_step=False):
        raise AssertionError

    def prior_sample(self, *batch_dims):
        return torch.full(batch_dims, self.mask_index)

    def generate_samples(self, num_samples, labels=None, num_steps=None, eps=1e-5):
        raise AssertionError

    def restore_model_and_sample(self, num_steps, eps=1e-5):
        return self.generate_samples(num_samples=5, num_steps=num_steps, eps=eps)


@pytest.fixture(scope="module")
def network():
    return peers.random_backbone()


@pytest.fixture(scope="module")
def law(network):
    return laws_of(network, log_linear)


@pytest.fixture(autouse=True)
def every_warning():
    patching.warn_once.cache_clear()


@pytest.mark.parametrize("predictor", ["ancestral", "ancestral_cache", "analytic"])
def test_law_of_the_predictors(predictor, network, law):
    drawn = duo.generate_samples(MDLM(network, predictor), NUM, seed=1, max_batch=4096)
    assert goodness(drawn, trajectory_law(law, RATES)) > 1e-4


@pytest.mark.parametrize("compat", [None, "duo"])
@pytest.mark.parametrize("noise_removal", duo.LAST)
def test_endings(noise_removal, compat, network, law):
    model = MDLM(network, noise_removal=noise_removal)
    drawn = duo.generate_samples(model, 2000, None, 2, 0.7, seed=2, max_batch=4096, compat=compat)
    rates = torch.linspace(1, 0.7, 3, dtype=torch.float64).numpy()
    # bf16 moves the laws a little.
    assert goodness(drawn, trajectory_law(law, rates, last=duo.LAST[noise_removal])) > (1e-6 if compat else 1e-4)


def test_a_time_conditioned_network_is_told_when_it_ends():
    network = peers.random_backbone(seed=4, conditioned=True)  # whose likeliest tokens depend on it
    model = MDLM(network, "ancestral", noise_removal="greedy")
    model.time_conditioning = True
    drawn = duo.generate_samples(model, 1000, None, 2, 0.1, seed=7, max_batch=4096)
    rates, law = torch.linspace(1, 0.1, 3, dtype=torch.float64).numpy(), laws_of(network, log_linear)
    assert goodness(drawn, trajectory_law(law, rates, last="argmax")) > 1e-4
    told_wrong = trajectory_law(lambda state, rate: law(state, 1.0 if rate == 0.1 else rate), rates, last="argmax")
    assert goodness(drawn, told_wrong) < 1e-4


def test_a_score_network_with_the_analytic_predictor():
    network = peers.random_backbone(conditioned=True)
    model = MDLM(network, "analytic")
    model.time_conditioning, model.parameterization = True, "score"
    drawn = duo.generate_samples(model, NUM, seed=8, max_batch=4096)
    assert goodness(drawn, trajectory_law(laws_of(network, log_linear), RATES)) > 1e-4


def test_another_noise(network, law):
    model = MDLM(network)
    model.noise = Cosine()
    chances = 1 - model.noise(torch.linspace(1, 1e-5, 4, dtype=torch.float64))[1].numpy()
    drawn = duo.generate_samples(model, NUM, seed=3, max_batch=4096)
    assert goodness(drawn, trajectory_law(law, chances / chances[0])) > 1e-4
    assert goodness(drawn, trajectory_law(law, RATES)) < 1e-4


def nucleus_of(law, top_p):
    """Holtzman et al. 2020: the fewest of the likeliest that hold `top_p`."""

    def kept(state, rate):
        p = law(state, rate)
        order = np.argsort(-p, axis=1)
        before = np.take_along_axis(p, order, 1).cumsum(1) - np.take_along_axis(p, order, 1)
        cut = np.zeros_like(p, bool)
        np.put_along_axis(cut, order, before > top_p, 1)
        q = np.where(cut, 0, p)
        return q / q.sum(1, keepdims=True)

    return kept


@pytest.mark.parametrize("compat", [None, "duo"])
def test_a_nucleus(compat, network, law):
    model = MDLM(network, p_nucleus=0.6)
    drawn = duo.generate_samples(model, NUM, seed=4, max_batch=4096, compat=compat)
    assert goodness(drawn, trajectory_law(nucleus_of(law, 0.6), RATES)) > (1e-6 if compat else 1e-4)
    model.sampler = "analytic"  # which knows none
    drawn = duo.generate_samples(model, NUM, seed=4, max_batch=4096)
    assert goodness(drawn, trajectory_law(law, RATES)) > 1e-4


@pytest.mark.parametrize("compat", [None, "duo"])
def test_psi(compat, network, law):
    """The published step: kappa of the posterior, 1 - kappa of x0 drawn whole and noised to the step's end."""
    model, kappas = MDLM(network, "psi"), np.array([1.0, 0.6, 0.3, 1.0])
    times = np.array([1.0, 0.7, 0.7, 0.2])  # a constant stretch, as its time profiles have
    model._get_sampling_time_profile = lambda eps, num_steps: torch.tensor(times)
    model._get_kappas = lambda timesteps: torch.tensor(kappas)
    alpha, after = 1 - (1 - 1e-3) * times[:-1], 1 - (1 - 1e-3) * times[1:]
    reveal = kappas[:3] * (after - alpha) / (1 - alpha) + (1 - kappas[:3]) * after
    remask = (1 - kappas[:3]) * (1 - after)
    options = {"seed": 6, "max_batch": 4096, "compat": compat}
    if compat is None:
        with pytest.warns(patching.SlowPathWarning, match="'psi' is not planned ahead"):
            drawn = duo.generate_samples(model, NUM, None, 3, **options)
    else:
        drawn = duo.generate_samples(model, NUM, None, 3, **options)
    expected = trajectory_law(law, times, reveal=reveal, remask=remask)
    assert goodness(drawn, expected) > (1e-6 if compat else 1e-4)


def test_another_network():
    foreign = peers.Foreign()
    with pytest.warns(patching.SlowPathWarning, match="a Foreign is not the published DiT"):
        drawn = duo.generate_samples(MDLM(foreign), NUM, seed=5, max_batch=4096)
    assert goodness(drawn, trajectory_law(laws_of(foreign, lambda rate: 0.0), RATES)) > 1e-4


def test_patched_and_back(network):
    model = MDLM(network)
    before, signature = dict(vars(model)), plain_signature(model.generate_samples)
    dropin.patch(model, seed=0)
    assert plain_signature(model.generate_samples) == signature
    samples = model.restore_model_and_sample(num_steps=8)
    assert (samples.dtype, samples.shape, samples.device.type) == (torch.int64, (5, LENGTH), "cpu")
    assert ((samples >= 0) & (samples < MASK)).all()
    assert torch.equal(duo.generate_samples(model, 5, num_steps=8, seed=0), samples)
    with pytest.raises(ValueError, match=r"labels must be None: .* got Tensor"):
        model.generate_samples(5, torch.zeros(5))
    dropin.unpatch(model)
    assert vars(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ddpm"}, "predictor must be one of ancestral, ancestral_cache, analytic, psi, got 'ddpm'"),
        ({"mask_index": None}, "obj must be a model of the absorbing process, which has mask_index, got a MDLM"),
        ({"parameterization": "mean"}, "parameterization must be subs for .*'ancestral_cache', .*got 'mean'"),
        ({"parameterization": "mean", "sampler": "analytic"}, "parameterization must be subs or score .*got 'mean'"),
    ],
)
def test_what_is_not_served(changes, message, network):
    model = MDLM(network)
    for name, value in changes.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=message):
        dropin.patch(model)
    assert not patching.is_patched(model)


def test_arguments_are_told(network):
    with pytest.raises(ValueError, match="noise_removal must be one of ancestral, greedy, none, got True"):
        duo.generate_samples(MDLM(network, noise_removal=True), 2)
    model = MDLM(network)
    model.prior_sample = lambda *sizes: torch.zeros(3)
    with pytest.raises(ValueError, match=r"prior_sample must return token ids \[2, 3\], got torch.float32 \[3\]"):
        duo.generate_samples(model, 2)
