"""The drop-in for MDLM's `_sample`: its law, its signature, and what it refuses."""

import warnings
from types import SimpleNamespace

import absorbing_peers as peers
import pytest
import torch
from absorbing_peers import (
    IDS,
    LENGTH,
    MASK,
    Cosine,
    Diffusion,
    LogLinear,
    goodness,
    laws_of,
    log_linear,
    plain_signature,
    trajectory_law,
)
from torch import nn

from unmask import dropin
from unmask.dropin import backbones, mdlm, patching
from unmask.dropin.stepwise import Arithmetic, probabilities

RATES = torch.linspace(1, 1e-5, 4, dtype=torch.float64).numpy()


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


def test_a_score_network_with_the_analytic_predictor():
    """Parameterization sedd: its scores are log p(x0 | xt) up to a constant."""
    network = peers.random_backbone(conditioned=True)
    diffusion = Diffusion(network, "analytic", conditioned=True)
    diffusion.parameterization = "sedd"
    drawn = mdlm._sample(diffusion, seed=10, max_batch=4096)
    assert goodness(drawn, trajectory_law(laws_of(network, log_linear), RATES)) > 1e-4


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


@pytest.mark.filterwarnings("ignore:a Foreign is not")
def test_dropout_takes_no_part():
    foreign = peers.Foreign()
    foreign.dropout = nn.Dropout(0.99)
    forward = foreign.forward
    foreign.forward = lambda tokens, sigma: foreign.dropout(forward(tokens, sigma))
    drawn = [mdlm._sample(Diffusion(foreign.train(mode), batch=64), seed=0) for mode in (True, False)]
    assert torch.equal(*drawn)


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


def test_what_changes_after_patching_is_looked_at(network):
    diffusion = broken(network)
    mdlm.patch(diffusion)
    diffusion.sampler = "euler"
    with pytest.raises(ValueError, match="predictor must be one of ddpm, ddpm_cache, analytic, got 'euler'"):
        diffusion._sample()


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
    others = [torch.zeros(0), torch.tensor([True]), torch.tensor(3), torch.ones(2, 3, dtype=torch.bfloat16).T]
    assert len(backbones._fingerprint(dict(enumerate(others)))) == 3 and backbones._fingerprint({}) == ()


# --- published arithmetic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("predictor", "last"), [("ddpm", "argmax"), ("ddpm_cache", "argmax"), ("analytic", "draw")])
def test_the_published_steps(predictor, last, network):
    """With few steps and likely tokens its arithmetic makes no difference that a χ² test sees, its ending does."""
    diffusion = Diffusion(network, predictor)
    rates = torch.linspace(1, 0.7, 3, dtype=torch.float64).numpy()
    law = {last: trajectory_law(laws_of(network, log_linear), rates, last=last) for last in ("argmax", "draw")}
    drawn = mdlm._sample(diffusion, 2, 0.7, seed=8, max_batch=4096, compat="mdlm")
    assert goodness(drawn, law[last]) > 1e-6
    assert goodness(drawn, law["draw" if last == "argmax" else "argmax"]) < 1e-6
    diffusion.config.sampling.noise_removal = False
    drawn = mdlm._sample(diffusion, 2, 0.7, seed=9, max_batch=4096, compat="mdlm")
    assert goodness(drawn, trajectory_law(laws_of(network, log_linear), rates, last="leave")) > 1e-6


def test_log_probabilities_are_rounded_as_published(network):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 4
    narrow = probabilities(7, mdlm.PUBLISHED)(logits.clone())
    exact = probabilities(7, Arithmetic())(logits.clone())
    assert narrow.dtype is torch.bfloat16 and exact.dtype is torch.float64
    assert (narrow[:, 7] == 0).all() and (exact[:, 7] == 0).all()
    assert exact.sum(1).tolist() == pytest.approx([1] * 4, abs=1e-12)
    error = (narrow.double() / exact - 1)[exact > 0]
    assert 0.01 < error.abs().max() < 0.1  # log p between 8 and 16 is rounded to sixteenths


def test_rare_tokens_are_rarer_with_published_noise():
    """A token that weighs r against the mask id should win r / (1 + r) of the races. With all 2^24 fp32 uniforms for
    the token, and as many for the mask id, it wins less often; with this library's noise it does not."""
    uniforms = torch.arange(2**24, dtype=torch.float32) / 2**24
    exponential = mdlm.PUBLISHED.exponential(uniforms).sort().values
    assert exponential[0].item() == pytest.approx(6e-8, rel=0.01)
    largest = torch.tensor(1 - 2**-53, dtype=torch.float64)
    assert Arithmetic().exponential(largest).item() == pytest.approx(2**-53)

    def published(r):  # the token wins if r / its exponential exceeds 1 / the mask's
        lost = torch.searchsorted(exponential, (exponential / r).contiguous(), right=True)
        return (1 - lost.double() / 2**24).mean().item() / (r / (1 + r))

    def ours(r):  # the smallest of 2^32 exponentials, which alone can win; those of the mask id are continuous
        k = torch.arange(int(64 * r * 2**32) + 64, dtype=torch.float64)
        token = -torch.log1p(-(k + 0.5) / 2**32)
        return (-token / r).exp().sum().item() / 2**32 / (r / (1 + r))

    for r, expected in ((1e-5, 0.997), (1e-6, 0.970), (3e-7, 0.903), (1e-7, 0.730), (3e-8, 0.314), (1e-8, 0.015)):
        assert published(r) == pytest.approx(expected, abs=0.01), r
        assert ours(r) == pytest.approx(1, abs=2e-3), r
