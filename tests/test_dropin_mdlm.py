"""The drop-in for MDLM's `_sample`: its law, its signature, and what it refuses."""

import warnings
from types import SimpleNamespace

import absorbing_peers as peers
import pytest
import torch
from absorbing_peers import IDS, LENGTH, MASK, goodness, laws_of, log_linear, plain_signature, trajectory_law
from torch import nn

from unmask import dropin
from unmask.dropin import backbones, mdlm, patching

NUM = 8000
RATES = torch.linspace(1, 1e-5, 4, dtype=torch.float64).numpy()


class LogLinear(nn.Module):
    def forward(self, t):
        return -torch.log1p(-(1 - 1e-3) * t), (1 - 1e-3) / (1 - (1 - 1e-3) * t)


class Cosine(nn.Module):
    def forward(self, t):
        return -torch.log(1e-3 + (1 - 1e-3) * torch.cos(t * torch.pi / 2)), torch.zeros_like(t)


class Diffusion(nn.Module):
    """The attributes of the published class, and a `_sample` of its own that must not run."""

    def __init__(self, backbone, predictor="ddpm_cache", *, noise_removal=True, conditioned=False, batch=NUM, steps=3):
        super().__init__()
        self.backbone, self.noise, self.ema = backbone, LogLinear(), None
        self.mask_index, self.vocab_size = MASK, IDS + 1
        self.parameterization, self.sampler, self.time_conditioning = "subs", predictor, conditioned
        self.config = SimpleNamespace(
            model=peers.model_config(backbone),
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


@pytest.fixture(scope="module")
def network():
    return peers.random_backbone()


@pytest.fixture(autouse=True)
def every_warning():
    patching.warn_once.cache_clear()


# --- law --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", mdlm.PREDICTORS)
def test_law_of_the_predictors(predictor, network):
    drawn = mdlm._sample(Diffusion(network, predictor), seed=1, max_batch=4096)
    assert goodness(drawn, trajectory_law(laws_of(network, log_linear), RATES)) > 1e-4


def test_steps_and_eps_are_those_of_the_call(network):
    diffusion, law = Diffusion(network), laws_of(network, log_linear)
    rates = torch.linspace(1, 0.7, 3, dtype=torch.float64).numpy()
    drawn = mdlm._sample(diffusion, 2, 0.7, seed=2, max_batch=4096)
    assert goodness(drawn, trajectory_law(law, rates)) > 1e-4
    assert goodness(drawn, trajectory_law(law, RATES)) < 1e-4


def test_without_noise_removal_masks_are_left(network):
    diffusion = Diffusion(network, noise_removal=False)
    drawn = mdlm._sample(diffusion, 2, 0.7, seed=3, max_batch=4096)
    rates = torch.linspace(1, 0.7, 3, dtype=torch.float64).numpy()
    assert (drawn == MASK).any()
    assert goodness(drawn, trajectory_law(laws_of(network, log_linear), rates, last="leave")) > 1e-4


@pytest.mark.parametrize("noise", [LogLinear, Cosine])
def test_a_time_conditioned_network(noise):
    network = peers.random_backbone(conditioned=True)
    diffusion = Diffusion(network, "ddpm", conditioned=True)
    diffusion.noise = noise()
    times = torch.linspace(1, 1e-5, 4, dtype=torch.float64)
    chances = (-torch.expm1(-diffusion.noise(times)[0])).numpy()
    drawn = mdlm._sample(diffusion, seed=4, max_batch=4096)
    law = trajectory_law(laws_of(network, log_linear), chances / chances[0])
    assert goodness(drawn, law) > 1e-4
    assert noise is LogLinear or goodness(drawn, trajectory_law(laws_of(network, log_linear), RATES)) < 1e-4


def test_a_given_beginning(network):
    diffusion = Diffusion(network, batch=2000)
    diffusion._sample_prior = lambda *sizes: torch.tensor([MASK, 1, MASK]).expand(sizes)
    drawn = mdlm._sample(diffusion, seed=5, max_batch=4096)
    assert (drawn[:, 1] == 1).all()
    assert goodness(drawn, trajectory_law(laws_of(network, log_linear), RATES, begin=(MASK, 1, MASK))) > 1e-4
    diffusion._sample_prior = lambda *sizes: torch.ones(sizes, dtype=torch.int64)
    assert (mdlm._sample(diffusion) == 1).all()


# --- the object -------------------------------------------------------------------------------------------------------


def test_patched_and_back(network):
    diffusion = Diffusion(network, batch=5)
    before, signature = dict(vars(diffusion)), plain_signature(diffusion._sample)
    dropin.patch(diffusion, seed=0)
    assert plain_signature(diffusion._sample) == signature
    samples = diffusion.restore_model_and_sample(num_steps=8)
    assert (samples.dtype, samples.shape, samples.device.type) == (torch.int64, (5, LENGTH), "cpu")
    assert ((samples >= 0) & (samples < MASK)).all()
    assert torch.equal(diffusion._sample(8), samples)
    assert torch.equal(mdlm._sample(diffusion, 8, seed=0), samples)
    with pytest.raises(ValueError, match="must not be patched already"):
        mdlm.patch(diffusion)
    dropin.unpatch(diffusion)
    assert vars(diffusion) == before
    with pytest.raises(ValueError, match="must be patched"):
        mdlm.unpatch(diffusion)


def test_torch_governs_the_seed(network):
    diffusion = Diffusion(network, batch=64)
    mdlm.patch(diffusion)
    torch.manual_seed(5)
    first, second = diffusion._sample(), diffusion._sample()
    torch.manual_seed(5)
    assert torch.equal(diffusion._sample(), first) and torch.equal(diffusion._sample(), second)
    assert not torch.equal(first, second)


def test_weights_are_those_of_the_moment():
    backbone, averaged = peers.random_backbone(seed=2), peers.random_backbone(seed=3)
    diffusion = Diffusion(backbone, batch=64)
    mdlm.patch(diffusion, seed=0)
    before, kept = diffusion._sample(), [parameter.clone() for parameter in backbone.parameters()]
    num_calls = backbone.num_calls
    assert torch.equal(diffusion._sample(), before) and backbone.num_calls == num_calls  # nothing was made anew

    def load(tensors):  # as an exponential moving average is swapped in: the version counters see nothing
        for parameter, tensor in zip(backbone.parameters(), tensors, strict=True):
            parameter.data.copy_(tensor.data)

    load(averaged.parameters())
    assert torch.equal(diffusion._sample(), mdlm._sample(Diffusion(averaged, batch=64), seed=0))
    load(kept)
    assert torch.equal(diffusion._sample(), before)


def test_the_mode_of_the_network_stays(network):
    network.blocks.train()
    mdlm._sample(Diffusion(network, batch=2))
    assert network.blocks.training and not network.training
    network.eval()


# --- other networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioned", [False, True])
def test_another_network_is_served_with_one_warning(conditioned):
    foreign = peers.Foreign()
    diffusion = Diffusion(foreign, conditioned=conditioned, predictor="ddpm")
    with pytest.warns(patching.SlowPathWarning, match="a Foreign is not the published DiT: missing vocab_embed"):
        drawn = mdlm._sample(diffusion, seed=6, max_batch=4096)
    mdlm._sample(diffusion, 1, max_batch=4096)
    law = laws_of(foreign, log_linear if conditioned else lambda rate: 0.0)
    assert goodness(drawn, trajectory_law(law, RATES)) > 1e-4


def test_another_network_with_the_same_tensors_is_noticed(network):
    class Causal(peers.Backbone):
        def forward(self, tokens, sigma):
            return torch.stack([super(Causal, self).forward(row[:1], sigma[:1])[0, 0] for row in tokens.view(-1, 1)])

    other = Causal(network.state_dict())
    diffusion = Diffusion(other, batch=4)
    other.forward = lambda tokens, sigma: network(tokens.roll(1, 1), sigma)
    with pytest.warns(patching.SlowPathWarning, match="its laws differ by a total variation of 0"):
        mdlm._sample(diffusion)


def test_noise_that_our_network_does_not_know(network):
    class Short(nn.Module):
        def forward(self, t):
            return 3 * t, torch.full_like(t, 3.0)

    network = peers.random_backbone(conditioned=True)
    diffusion = Diffusion(network, "ddpm", conditioned=True)
    diffusion.noise = Short()
    with pytest.warns(patching.SlowPathWarning, match=r"its noise masks 0.950213 at time 1"):
        drawn = mdlm._sample(diffusion, seed=7, max_batch=4096)
    chances = -torch.expm1(-3 * torch.linspace(1, 1e-5, 4, dtype=torch.float64)).numpy()
    law = laws_of(network, lambda rate: -torch.log1p(torch.tensor(-rate * chances[0])).item())
    assert goodness(drawn, trajectory_law(law, chances / chances[0])) > 1e-4


def test_a_hub_network_brings_its_own_configuration(network):
    class Hub(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = network
            sizes = {"vocab_size": IDS + 1, "hidden_dim": 32, "n_blocks": 2, "n_heads": 2, "model_length": LENGTH}
            config = {"model_type": "mdlm", "time_conditioning": False, "cond_dim": 129, **sizes}
            self.config = SimpleNamespace(model_type="mdlm", to_dict=lambda: config)

        def forward(self, x, sigma):
            return self.backbone(x, sigma)

    diffusion = Diffusion(network, batch=64)
    expected = mdlm._sample(diffusion, seed=0)
    diffusion.backbone = Hub()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(mdlm._sample(diffusion, seed=0), expected)


# --- what is refused --------------------------------------------------------------------------------------------------


def broken(network, **changes):
    diffusion = Diffusion(network, batch=2)
    for name, value in changes.items():
        setattr(diffusion, name, value)
    return diffusion


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "euler"}, "predictor must be one of ddpm, ddpm_cache, analytic, got 'euler'"),
        ({"mask_index": None}, "obj must have mask_index, the id of its mask token, got a Diffusion without"),
        (
            {"parameterization": "ar"},
            "must be subs for the predictor 'ddpm_cache', compat None; got 'ar'",
        ),
        ({"parameterization": "d3pm", "sampler": "analytic"}, "parameterization must be subs or sedd .* got 'd3pm'"),
    ],
)
def test_what_is_not_served(changes, message, network):
    diffusion = broken(network, **changes)
    with pytest.raises(ValueError, match=message):
        mdlm.patch(diffusion)
    with pytest.raises(ValueError, match=message):
        mdlm._sample(diffusion)
    assert not patching.is_patched(diffusion)


def test_arguments_are_told(network):
    diffusion = broken(network)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        mdlm._sample(diffusion, 0)
    with pytest.raises(ValueError, match=r"eps must satisfy 0 <= eps < 1, got 1\.5"):
        mdlm._sample(diffusion, 3, 1.5)
    with pytest.raises(ValueError, match="compat must be None or 'mdlm', got 'sedd'"):
        mdlm.patch(diffusion, compat="sedd")
    with pytest.raises(ValueError, match=r"dtype must be None, torch.float32 or torch.bfloat16, got torch.float16"):
        mdlm.patch(diffusion, dtype=torch.float16)
    with pytest.raises(ValueError, match="seed must satisfy"):
        mdlm.patch(diffusion, seed=-1)
    diffusion.config.noise.type = "cosine"
    with pytest.raises(ValueError, match=r"noise.type must be loglinear for the predictor 'ddpm_cache', got 'cosine'"):
        mdlm._sample(diffusion)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (torch.full((2, LENGTH + 1), MASK), rf"must return token ids \[2, {LENGTH}\], got torch.int64 \[2, 4\]"),
        (torch.ones(2, LENGTH), r"got torch.float32 \[2, 3\]"),
        (None, "got NoneType"),
        (torch.full((2, LENGTH), 9), "must return ids from 0 to 3, got 9 to 9"),
    ],
)
def test_a_hook_of_the_wrong_shape(returned, got, network):
    diffusion = broken(network)
    diffusion._sample_prior = lambda *sizes: returned
    with pytest.raises(ValueError, match=f"_sample_prior {got}|_sample_prior must return token ids .*{got}"):
        mdlm._sample(diffusion)


def test_a_fingerprint_is_of_every_weight(network):
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = backbones._fingerprint(state)
    for tensor in state.values():
        kept = tensor.flatten()[0].clone()
        tensor.view(-1)[0] += 1
        assert backbones._fingerprint(state) != before
        tensor.view(-1)[0] = kept
    assert backbones._fingerprint(state) == before
