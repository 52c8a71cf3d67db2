"""The drop-in for SEDD's `get_pc_sampler`: its law, projections, and what it refuses."""

import math
from types import ModuleType, SimpleNamespace

import absorbing_peers as peers
import pytest
import torch
from absorbing_peers import IDS, LENGTH, MASK, goodness, laws_of, log_linear, plain_signature, trajectory_law
from torch import nn

from unmask import dropin
from unmask.dropin import patching, sedd

NUM = 8000
GRAPH = SimpleNamespace(absorb=True, dim=IDS + 1)
RATES = torch.linspace(1, 1e-5, 4, dtype=torch.float64).numpy()


class LogLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.tensor(0.0))

    def forward(self, t):
        return -torch.log1p(-(1 - 1e-3) * t), (1 - 1e-3) / (1 - (1 - 1e-3) * t)


class Geometric(nn.Module):
    def forward(self, t):
        sigma = 1e-3 ** (1 - t) * 4**t
        return sigma, sigma * math.log(4 / 1e-3)


class SEDD(nn.Module):
    """The published network's forward around any backbone: log scores, 0 at the token that stands there."""

    def __init__(self, backbone):
        super().__init__()
        names = dict(backbone.named_children())
        for name, child in names.items():
            self.add_module(name, child)
        self.inner = [backbone]  # in a list: its tensors are this module's own
        self.config = SimpleNamespace(model=peers.model_config(backbone))
        if not names:
            self.scale = backbone.scale

    def forward(self, tokens, sigma):
        logits = self.inner[0](tokens, sigma) - sigma.expm1().log()[:, None, None] - math.log(IDS)
        return logits.scatter(-1, tokens[..., None], 0.0)


@pytest.fixture(scope="module")
def model():
    return SEDD(peers.random_backbone(conditioned=True)).eval()


@pytest.fixture(scope="module")
def law(model):
    return laws_of(model.inner[0], log_linear)


@pytest.fixture(autouse=True)
def every_warning():
    patching.warn_once.cache_clear()


def sampled(model, predictor="analytic", steps=3, noise=None, seed=1, **options):
    options = {"max_batch": 4096, "batch_dims": (NUM, LENGTH), **options}
    return sedd.get_pc_sampler(GRAPH, noise or LogLinear(), options.pop("batch_dims"), predictor, steps, seed=seed,
                               **options)(model)  # fmt: skip


# --- law --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", sedd.PREDICTORS)
def test_law_of_the_predictors(predictor, model, law):
    assert goodness(sampled(model, predictor), trajectory_law(law, RATES)) > 1e-4


def test_without_denoising_masks_are_left(model, law):
    rates = torch.linspace(1, 0.7, 3, dtype=torch.float64).numpy()
    drawn = sampled(model, "euler", 2, eps=0.7, denoise=False)
    assert (drawn == MASK).any() and goodness(drawn, trajectory_law(law, rates, last="leave")) > 1e-4


def test_other_noise(model):
    drawn = sampled(model, noise=Geometric(), batch_dims=(2000, LENGTH))
    chances = (-torch.expm1(-Geometric()(torch.linspace(1, 1e-5, 4, dtype=torch.float64))[0])).numpy()
    law = laws_of(model.inner[0], lambda rate: -math.log1p(-rate * chances[0]))
    assert goodness(drawn, trajectory_law(law, chances / chances[0])) > 1e-4
    with pytest.raises(ValueError, match=r"noise must be log-linear for the predictor 'euler', .*got a Geometric"):
        sedd.get_pc_sampler(GRAPH, Geometric(), (2, LENGTH), "euler", 3)


test_other_noise = pytest.mark.filterwarnings("ignore:a SEDD is not the published DiT")(test_other_noise)


def test_another_network(law):
    foreign = SEDD(peers.Foreign())
    with pytest.warns(patching.SlowPathWarning, match="a SEDD is not the published DiT"):
        drawn = sampled(foreign)
    assert goodness(drawn, trajectory_law(laws_of(foreign.inner[0], log_linear), RATES)) > 1e-4


# --- projections ------------------------------------------------------------------------------------------------------


def test_a_projection_is_honoured_with_one_warning(model, law):
    calls = []

    def proj_fun(x):
        calls.append(x.shape)
        x[:, 1] = 1
        return x

    with pytest.warns(patching.SlowPathWarning, match="proj_fun may change any token"):
        drawn = sampled(model, proj_fun=proj_fun)
    sampled(model, proj_fun=proj_fun)
    assert len(calls) == 8 and (drawn[:, 1] == 1).all()
    assert goodness(drawn, trajectory_law(law, RATES, begin=(MASK, 1, MASK))) > 1e-4


@pytest.mark.filterwarnings("ignore:proj_fun")
def test_a_projection_may_mask_again(model, law):
    def proj_fun(x):
        x[:, 0] = MASK
        return x

    drawn = sampled(model, steps=1, eps=0.0, denoise=False, proj_fun=proj_fun)
    assert goodness(drawn, trajectory_law(law, [1.0, 0.0], last="leave")) > 1e-4
    left = sampled(model, steps=2, eps=0.5, denoise=False, proj_fun=proj_fun) == MASK
    assert left.float().mean(0).tolist() == pytest.approx([2 / 3, 1 / 2, 1 / 2], abs=0.03)


@pytest.mark.filterwarnings("ignore:proj_fun")
@pytest.mark.parametrize(
    ("projected", "message"),
    [
        (lambda x: x[:, 1:], r"proj_fun must return token ids \[4, 3\], got torch.int64 \[4, 2\]"),
        (lambda x: None, r"proj_fun must return token ids \[4, 3\], got NoneType"),
        (lambda x: x.float(), r"got torch.float32 \[4, 3\]"),
        (lambda x: x + 1, "proj_fun must return ids from 0 to 3, got 4 to 4"),
    ],
)
def test_a_projection_of_the_wrong_shape(projected, message, model):
    with pytest.raises(ValueError, match=message):
        sampled(model, proj_fun=projected, batch_dims=(4, LENGTH))


# --- published arithmetic ---------------------------------------------------------------------------------------------


def test_scores_as_they_are(model):
    """Scores that sum to 1.4 times what they should reveal more, as published, and only with compat."""
    network = model.inner[0]
    bias, eps = network.output_layer.linear.bias, 0.7

    def chances():
        with torch.no_grad():
            logits = network(torch.tensor([(MASK,) * LENGTH]), torch.tensor([log_linear(1.0)]))[0, 0, :IDS]
        return (1 - eps) * logits.double().exp() / IDS

    before = bias.detach().clone()
    try:
        bias.data += (1.4 * (1 - eps) / chances().sum()).log()
        expected = NUM * LENGTH * torch.tensor([*chances(), 1 - chances().sum()])
        options = {"predictor": "analytic", "steps": 1, "eps": eps, "denoise": False}
        fast, compat = sampled(model, **options), sampled(model, compat="sedd", **options)
    finally:
        bias.data.copy_(before)
    counts = torch.bincount(compat.flatten(), minlength=IDS + 1)
    assert ((counts - expected) ** 2 / expected).sum() < 30
    assert (fast == MASK).float().mean() == pytest.approx(0.7, abs=0.01)


def test_the_published_steps_of_a_true_score(model, law):
    rates = torch.linspace(1, 0.7, 3, dtype=torch.float64).numpy()
    true = SEDD(model.inner[0])

    def forward(tokens, sigma):
        logits = model.inner[0](tokens, sigma)
        logits[..., MASK] = -1e6
        logits = logits.log_softmax(-1) - sigma.expm1().log()[:, None, None]
        return logits.scatter(-1, tokens[..., None], 0.0)

    true.forward = forward
    with pytest.warns(patching.SlowPathWarning, match="DiT"):
        true.output_layer = nn.Identity()
        drawn = sampled(true, "euler", 2, eps=0.7, compat="sedd")
    assert goodness(drawn, trajectory_law(law, rates)) > 1e-6


# --- the module -------------------------------------------------------------------------------------------------------


def sampling_module():
    module = ModuleType("sampling")
    exec(
        "def get_pc_sampler(graph, noise, batch_dims, predictor, steps, denoise=True, eps=1e-5, device='cpu',\n"
        "                   proj_fun=None): raise AssertionError\n"
        "def get_sampling_fn(config, graph, noise, batch_dims, eps, device):\n"
        "    return get_pc_sampler(graph, noise, batch_dims, config.sampling.predictor, config.sampling.steps)\n",
        vars(module),
    )
    return module


def test_patched_and_back(model):
    module = sampling_module()
    before = dict(vars(module))
    names = [name for name, *_ in plain_signature(module.get_pc_sampler)]
    dropin.patch(module, seed=0)
    assert [name for name, *_ in plain_signature(module.get_pc_sampler)] == names
    config = SimpleNamespace(sampling=SimpleNamespace(predictor="euler", steps=4, noise_removal=True))
    samples = module.get_sampling_fn(config, GRAPH, LogLinear(), (5, LENGTH), 1e-5, torch.device("cpu"))(model)
    assert (samples.dtype, samples.shape, samples.device.type) == (torch.int64, (5, LENGTH), "cpu")
    assert ((samples >= 0) & (samples < MASK)).all()
    assert torch.equal(module.get_pc_sampler(GRAPH, LogLinear(), (5, LENGTH), "analytic", 4)(model), samples)
    dropin.unpatch(module)
    assert vars(module) == before


def test_torch_governs_the_seed(model):
    run = sedd.get_pc_sampler(GRAPH, LogLinear(), (64, LENGTH), "euler", 3)
    torch.manual_seed(5)
    first, second = run(model), run(model)
    torch.manual_seed(5)
    assert torch.equal(run(model), first) and not torch.equal(first, second)


def test_what_is_not_served(model):
    arguments = LogLinear(), (2, LENGTH), "euler", 3
    with pytest.raises(ValueError, match="predictor must be one of euler, analytic, got 'none'"):
        sedd.get_pc_sampler(GRAPH, LogLinear(), (2, LENGTH), "none", 3)
    with pytest.raises(ValueError, match="graph must be the absorbing one, got a SimpleNamespace"):
        sedd.get_pc_sampler(SimpleNamespace(absorb=False, dim=4), *arguments)
    with pytest.raises(ValueError, match="compat must be None or 'sedd', got 'mdlm'"):
        sedd.get_pc_sampler(GRAPH, *arguments, compat="mdlm")
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        sedd.get_pc_sampler(GRAPH, LogLinear(), (2, LENGTH), "euler", 0)
    model.config.model.scale_by_sigma = False
    with pytest.raises(ValueError, match=r"compat='sedd' needs a model whose config\.model\.scale_by_sigma is set"):
        sampled(model, compat="sedd", batch_dims=(2, LENGTH))
    model.config.model.scale_by_sigma = True
