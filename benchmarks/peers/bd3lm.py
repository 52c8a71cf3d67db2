"""The first-hitting sampler of BD3-LM, github.com/kuleshov-group/bd3lms, imported from a checkout and run as it is.

Its sampler (diffusion.py, `_semi_ar_sampler`) and network (models/dit.py) are the checkout's own lines, set to MDLM
with one block as long as the text. What they import for training alone is replaced by stand-ins, and progress bars are
left out. It takes one sequence at a time.
"""

import importlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.peers.checkout import Checkout, importable, quiet
from benchmarks.peers.run import Run
from benchmarks.workloads import Job, opening

CHECKOUT = Checkout(
    "bd3lms", "a checkout of github.com/kuleshov-group/bd3lms", ("diffusion.py", "models/dit.py"), ("einops",)
)
_MODULES = ("dataloader", "diffusion", "metrics", "models", "noise_schedule", "utils")


def prepare(job: Job, checkout: Path) -> Run:
    with quiet(), importable(checkout, _MODULES):
        module = importlib.import_module("diffusion")
        mask_id = job.network.mask_id
        # It writes the first token itself. Told that this is the mask, it leaves the position to its sampler.
        tokenizer = SimpleNamespace(vocab_size=mask_id, bos_token_id=mask_id)
        diffusion = module.Diffusion(_config(job), tokenizer)
    module.tqdm = lambda steps: steps
    backbone = diffusion.backbone
    backbone.load_state_dict({**job.tensors, "rotary_emb.inv_freq": backbone.rotary_emb.inv_freq})
    backbone.to(job.device)
    diffusion.eval()
    begin = opening(job)
    diffusion._sample_prior = lambda *sizes: begin.clone()
    narrow = job.dtype is torch.bfloat16 and job.device.type == "cpu"

    def generate() -> Tensor:
        with quiet(), torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext():
            tokens, _ = diffusion._semi_ar_sampler(1, num_steps=job.size.length, num_strides=1, seqlen=job.size.length)
        if tokens is None:
            raise RuntimeError("it rejected its own sample, whose last 256 tokens have less than 4 nats of entropy")
        return tokens

    return Run(generate, backbone, num_sequences=1, num_reveals=job.size.num_reveals)


def _config(job: Job) -> SimpleNamespace:
    """What it reads of the published configuration, for inference with the weights as they are."""
    shape, length = job.network.shape, job.size.length
    return SimpleNamespace(
        mode="sample_eval",
        block_size=length,
        model=SimpleNamespace(
            hidden_size=shape.hidden_size,
            cond_dim=shape.cond_dim,
            length=length,
            n_blocks=shape.num_blocks,
            n_heads=job.network.num_heads,
            dropout=0.1,
            attn_backend="sdpa",
            tie_word_embeddings=False,
        ),
        algo=SimpleNamespace(
            name="mdlm",
            backbone="dit",
            parameterization="subs",
            sampler="semi_ar",
            T=0,
            time_conditioning=False,
            cross_attn=False,
            ignore_bos=False,
            mdlm_loss_scale=False,
            var_min=False,
        ),
        noise=SimpleNamespace(type="loglinear"),
        loader=SimpleNamespace(eval_batch_size=1),
        sampling=SimpleNamespace(first_hitting=True, kv_cache=False, nucleus_p=1.0, var_length=False),
        training=SimpleNamespace(ema=0, antithetic_sampling=True, sampling_eps=1e-3),
        eval=SimpleNamespace(gen_ppl_eval_model_name_or_path=None, perplexity_batch_size=1),
    )
