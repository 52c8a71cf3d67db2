"""The peers' own objects, from checkouts whose paths are given in the environment, with random weights.

Their code runs as it is; what it imports for training alone is replaced by stand-ins, and flash-attention by torch's.
"""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from absorbing_peers import IDS, random_backbone

from benchmarks.network import Network
from benchmarks.peers import mdlm
from benchmarks.peers.checkout import TRAINING, importable, quiet
from unmask.models.dit import Shape

LENGTH = 3
SIZES = {"hidden_size": 32, "cond_dim": 8, "length": LENGTH, "n_blocks": 2, "n_heads": 2, "dropout": 0.1}


def checkout(variable, source):
    """The path in an environment variable; the test is skipped where there is none."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a checkout of {source}")
    pytest.importorskip("einops", reason="the published networks need einops")
    return Path(os.environ[variable])


def state(conditioned=False):
    """Random weights by the published names, with the published feed-forward width."""
    return random_backbone(conditioned=conditioned, mlp_factor=4).state_dict()


def diffusion(variable, source):
    """A Diffusion of MDLM's or of ReMDM's, and its averaging of weights."""
    path = checkout(variable, source)
    network = Network(Shape(IDS + 1, 32, 2, 128, cond_dim=8), 2, LENGTH)
    published = mdlm.Published(path, network, state(), "cpu")
    return published.diffusion, published.module.models.ema.ExponentialMovingAverage


def duo(variable="UNMASK_DUO"):
    path = checkout(variable, "github.com/s-sahoo/duo")
    modules = ("algo", "trainer_base", "models", "utils")
    stand_ins = (*TRAINING, "dataloader", "fsspec", "metrics", "torchvision")
    given = mdlm._flash_attn()
    given["flash_attn.layers.rotary"].apply_rotary_emb_torch = _rotate
    with quiet(), importable(path, modules, given=given, stand_ins=stand_ins):
        algo = importlib.import_module("algo")
        made = algo.MDLM(_duo_config(), SimpleNamespace(vocab_size=IDS))
    _load(made.backbone, state())
    return made.eval()


def _load(network, tensors):
    """The weights; the buffer of rotary embedding is the network's own."""
    network.load_state_dict({**tensors, "rotary_emb.inv_freq": network.rotary_emb.inv_freq})


def _rotate(x, cos, sin):
    """Rotary embedding, halves apart. x [B, L, H, D]; cos, sin [L, D / 2]."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Data(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def _duo_config():
    return SimpleNamespace(
        model=SimpleNamespace(**SIZES, scale_by_sigma=True),
        algo=SimpleNamespace(
            name="mdlm", backbone="dit", parameterization="subs", time_conditioning=False, T=0, subs_masking=False,
            causal_attention=False, ignore_bos=False, loss_type="elbo",
        ),
        noise=SimpleNamespace(type="log-linear", eps=1e-3),
        data=Data(),
        prior=SimpleNamespace(type="none"),
        loader=SimpleNamespace(eval_batch_size=5),
        sampling=SimpleNamespace(
            predictor="ancestral_cache", steps=2, noise_removal="ancestral", use_float64=True, p_nucleus=1.0,
            guid_weight=None,
            psi=SimpleNamespace(
                time_profile="linear", high_mode="pure-posterior", middle_mode="max-capped-0.1",
                low_mode="constant-0.8", high_frac=0.3, middle_frac=0.4,
            ),
        ),
        training=SimpleNamespace(ema=0, antithetic_sampling=True, sampling_eps=1e-3, class_dropout_p=0.1),
        eval=SimpleNamespace(gen_ppl_eval_model_name_or_path=None, perplexity_batch_size=1),
        optim=SimpleNamespace(lr=3e-4),
    )  # fmt: skip


def sedd(variable="UNMASK_SEDD"):
    """(module sampling, model, graph, noise)."""
    path = checkout(variable, "github.com/louaaron/Score-Entropy-Discrete-Diffusion")
    modules = ("sampling", "catsample", "graph_lib", "noise_lib", "model", "utils")
    with quiet(), importable(path, modules, given=mdlm._flash_attn()):
        sampling, graphs, noises, model = map(importlib.import_module, ("sampling", "graph_lib", "noise_lib", "model"))
    config = SimpleNamespace(
        tokens=IDS,
        model=SimpleNamespace(**SIZES, scale_by_sigma=True),
        graph=SimpleNamespace(type="absorb"),
        noise=SimpleNamespace(type="loglinear"),
    )
    made = model.SEDD(config)
    _load(made, state(conditioned=True))
    return sampling, made.eval(), graphs.get_graph(config, "cpu"), noises.get_noise(config)
