"""The drop-ins beside the peers' own code, on small random networks: one law, one type of result, one network.

UNMASK_MDLM, UNMASK_REMDM, UNMASK_DUO and UNMASK_SEDD name the checkouts; a test whose checkout is not there is skipped.
"""

import inspect
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import published_peers as peers
import pytest
import torch
from absorbing_peers import plain_signature, same_law

from benchmarks.peers.checkout import quiet
from unmask import dropin
from unmask.dropin import patching, sedd

NUM = 3000
MDLM = "UNMASK_MDLM", "github.com/kuleshov-group/mdlm"
REMDM = "UNMASK_REMDM", "github.com/kuleshov-group/remdm"


@contextmanager
def ours(obj, **options):
    """The object patched inside; a network that is not recognised is an error."""
    before = dict(vars(obj))
    dropin.patch(obj, max_batch=1024, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", patching.SlowPathWarning)
        yield
    dropin.unpatch(obj)
    assert vars(obj) == before


@pytest.fixture(autouse=True)
def every_warning():
    patching.warn_once.cache_clear()


def check(obj, name, call, eps, **options):
    """One signature, type and law; without `eps`, whose mask ids end in another way, and with compat, in the same."""
    torch.manual_seed(0)
    with quiet():
        theirs = call(eps)
    signature = plain_signature(getattr(obj, name))
    with ours(obj, **options):
        assert [name for name, *_ in plain_signature(getattr(obj, name))] == [name for name, *_ in signature]
        drawn = call(eps)
    assert (drawn.dtype, drawn.shape, drawn.device) == (theirs.dtype, theirs.shape, theirs.device)
    assert same_law(drawn, theirs) > 1e-4


@pytest.mark.parametrize("predictor", ["ddpm", "ddpm_cache", "analytic"])
def test_mdlm(predictor):
    diffusion, _ = peers.diffusion(*MDLM)
    diffusion.sampler, diffusion.config.loader.eval_batch_size = predictor, NUM

    def call(eps):
        return diffusion.restore_model_and_sample(2, eps)

    check(diffusion, "_sample", call, 1e-5)
    check(diffusion, "_sample", call, 0.6, compat="mdlm")
    diffusion.config.sampling.noise_removal = False
    check(diffusion, "_sample", call, 0.6)


def test_mdlm_with_averaged_weights():
    diffusion, averaging = peers.diffusion(*MDLM)
    diffusion.config.loader.eval_batch_size = NUM
    diffusion.ema = averaging(diffusion.backbone.parameters(), decay=0.9)
    with torch.no_grad():
        diffusion.backbone.output_layer.linear.bias += torch.tensor([4.0, 0, 0, 0])
    with ours(diffusion, seed=0):
        at_hand, averaged = diffusion._sample(2), diffusion.restore_model_and_sample(2)
        assert torch.equal(diffusion._sample(2), at_hand)
    assert (at_hand == 0).float().mean() > (averaged == 0).float().mean() + 0.2
    with quiet():
        assert same_law(averaged, diffusion.restore_model_and_sample(2)) > 1e-4


def test_remdm_with_confidence():
    diffusion, _ = peers.diffusion(*REMDM)
    diffusion.config.loader.eval_batch_size = NUM
    vars(diffusion.config.sampling).update(sampler="remdm-conf", nucleus_p=1.0, dfm=False)
    forward = diffusion.forward
    diffusion.forward = lambda x, sigma: forward(x, sigma).bfloat16()  # as on a GPU: its confidences take nothing else
    check(diffusion, "_sample", lambda eps: diffusion._sample(5, eps), 0.3, compat="remdm")


LOOP = {"eta": 0.1, "t_on": 0.7, "t_off": 0.3, "alpha_on": 0.8}


@pytest.mark.parametrize(
    ("sampler", "numbers"),
    [("mdlm", {}), ("remdm-cap", {"eta": 0.2}), ("remdm-rescale", {"eta": 0.4}), ("remdm-loop", LOOP)],
)
def test_remdm(sampler, numbers):
    diffusion, _ = peers.diffusion(*REMDM)
    diffusion.config.loader.eval_batch_size = NUM
    numbers = {"eta": 0, "t_on": 0, "t_off": 0, "alpha_on": 0, **numbers}
    vars(diffusion.config.sampling).update(sampler=sampler, nucleus_p=1.0, dfm=False, **numbers)

    def call(eps):
        return diffusion.restore_model_and_sample(5, eps)

    check(diffusion, "_sample", call, 1e-5)
    diffusion.config.sampling.nucleus_p = 0.8
    check(diffusion, "_sample", call, 0.3, compat="remdm")


@pytest.mark.parametrize(
    ("predictor", "noise_removal", "p_nucleus"),
    [
        ("ancestral", "ancestral", 1.0),
        ("ancestral", "none", 0.8),
        ("ancestral_cache", "ancestral", 0.8),
        ("ancestral_cache", "greedy", 1.0),
        ("analytic", "none", 1.0),
        ("analytic", "ancestral", 0.8),
    ],
)
def test_duo(predictor, noise_removal, p_nucleus):
    model = peers.duo()
    model.sampler, model.p_nucleus = predictor, p_nucleus
    vars(model.config.sampling).update(predictor=predictor, noise_removal=noise_removal, p_nucleus=p_nucleus)
    check(model, "generate_samples", lambda eps: model.generate_samples(NUM, None, 2, eps), 0.5)


@pytest.mark.filterwarnings("ignore:the predictor 'psi'")
def test_duo_psi():
    model = peers.duo()
    model.sampler = model.config.sampling.predictor = "psi"

    def call(eps):
        return model.generate_samples(NUM, None, 6, eps)

    check(model, "generate_samples", call, 0.3, compat="duo")


@pytest.mark.parametrize("predictor", ["euler", "analytic"])
def test_sedd(predictor):
    """A random network's scores sum to anything: theirs have the published law with compat alone."""
    sampling, model, graph, noise = peers.sedd()

    def call(denoise, eps):
        config = SimpleNamespace(sampling=SimpleNamespace(predictor=predictor, steps=3, noise_removal=denoise))
        return sampling.get_sampling_fn(config, graph, noise, (NUM, peers.LENGTH), eps, torch.device("cpu"))(model)

    check(sampling, "get_pc_sampler", lambda eps: call(True, eps), 0.5, compat="sedd")
    check(sampling, "get_sampling_fn", lambda eps: call(False, eps), 0.5, compat="sedd")
    signature = inspect.signature(sampling.get_pc_sampler)
    assert list(inspect.signature(sedd.get_pc_sampler).parameters)[:-1] == list(signature.parameters)
