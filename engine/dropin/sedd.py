"""SEDD's `get_pc_sampler`, github.com/louaaron/Score-Entropy-Discrete-Diffusion; Lou et al. 2024, arXiv 2310.16834.

On the absorbing graph a masked position is revealed as y with probability s_y (e^dsigma - 1) by "analytic" and s_y
dsigma by "euler", s_y the score. A true score is p(x0 = y | xt) / (e^sigma - 1); then both are the ancestral step,
"euler" for log-linear noise. A trained score sums to something else, which in the published sampler changes how many
positions are revealed. Here scores are normalised: reveals have the exact law of the process, and the ratios of scores
choose tokens. The denoising step in the end draws what is left. `compat="sedd"` takes the scores as they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unmask.denoiser import Denoiser
from unmask.dropin import absorbing, patching, stepwise
from unmask.dropin.absorbing import Options, Trajectory
from unmask.dropin.backbones import Network, denoiser, setting
from unmask.dropin.stepwise import Arithmetic, Stepwise

PREDICTORS = "euler", "analytic"
PUBLISHED = Arithmetic(torch.bfloat16, torch.float32, torch.float32, bias=1e-10, competes=True)
CPU = torch.device("cpu")


def fits(obj: Any) -> bool:
    """Whether `obj` is SEDD's module `sampling`."""
    return patching.has(obj, "get_pc_sampler", "get_sampling_fn")


def patch(
    obj: Any,
    *,
    seed: int | None = None,
    compat: str | None = None,
    dtype: torch.dtype | None = None,
    max_batch: int = 16,
) -> None:
    """Replace `get_pc_sampler` and `get_sampling_fn` of the live module; names imported from it before stay theirs.

    Options are those of `Options`. Raises ValueError for one out of range, and if `obj` is patched already.
    """
    options = {"seed": seed, "compat": compat, "dtype": dtype, "max_batch": max_batch}
    Options("sedd", **options)

    def get_pc_sampler(
        graph, noise, batch_dims, predictor, steps, denoise=True, eps=1e-5, device=CPU, proj_fun=unchanged
    ):
        arguments = graph, noise, batch_dims, predictor, steps, denoise, eps, device, proj_fun
        return _get_pc_sampler(*arguments, **options)

    def get_sampling_fn(config, graph, noise, batch_dims, eps, device):
        return _get_sampling_fn(config, graph, noise, batch_dims, eps, device, **options)

    patching.replace(obj, {"get_pc_sampler": get_pc_sampler, "get_sampling_fn": get_sampling_fn})


def unpatch(obj: Any) -> None:
    """Put both functions back. Raises ValueError if `obj` is not patched."""
    patching.restore(obj)


def unchanged(x: Tensor) -> Tensor:
    """No projection."""
    return x


def get_pc_sampler(
    graph: Any,
    noise: nn.Module,
    batch_dims: Sequence[int],
    predictor: str,
    steps: int,
    denoise: bool = True,
    eps: float = 1e-5,
    device: torch.device | str = CPU,
    proj_fun: Callable[[Tensor], Tensor] = unchanged,
    **options: Any,
) -> Callable[[nn.Module], Tensor]:
    """pc_sampler(model) -> samples int64 [B, L] on `device`.

    graph: the absorbing one. predictor: "euler" or "analytic". Positions that are masked after the last step are drawn
    with `denoise`, else they keep the mask id. proj_fun: called with the tokens before each step, returns them changed;
    that takes the slow path, with one warning. For given tokens alone `unmask.Sampler.sample(prompt=)` is the fast one.
    Options are those of `Options`.
    """
    options = Options("sedd", **options)
    batch, length = batch_dims
    if not getattr(graph, "absorb", False):
        raise ValueError(f"graph must be the absorbing one, got {patching.named(graph)}")
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}, got {predictor!r}")
    trajectory, most = _trajectory(noise, predictor, absorbing.linear_times(steps, eps))
    mask_id = graph.dim - 1

    @torch.no_grad()
    def pc_sampler(model: nn.Module) -> Tensor:
        model.eval()
        network = network_of(model, graph.dim, length, most)
        made, last = denoiser(network, options.dtype), "draw" if denoise else "leave"
        template = torch.full((batch, length), mask_id, device=network.device)
        if options.compat or proj_fun is not unchanged:
            run = _stepwise(made, network, None if proj_fun is unchanged else proj_fun, options)
            return run.sample(template, trajectory, options, last=last).to(device)
        return absorbing.sample(made, template, trajectory, options, last=last).to(device)

    return pc_sampler


def get_sampling_fn(
    config: Any,
    graph: Any,
    noise: nn.Module,
    batch_dims: Sequence[int],
    eps: float,
    device: torch.device | str,
    **options: Any,
) -> Callable[[nn.Module], Tensor]:
    """`get_pc_sampler` with predictor, steps and noise_removal of config.sampling."""
    sampling = config.sampling
    arguments = graph, noise, batch_dims, sampling.predictor, sampling.steps, sampling.noise_removal, eps, device
    return get_pc_sampler(*arguments, **options)


_get_pc_sampler, _get_sampling_fn = get_pc_sampler, get_sampling_fn


@torch.no_grad()
def _trajectory(noise: nn.Module, predictor: str, times: Tensor) -> tuple[Trajectory, float]:
    """Also the mask chance at time 1."""
    sigma, rate = (value.double().cpu() for value in noise(times))
    chances = -torch.expm1(-sigma)
    trajectory = Trajectory.ancestral((chances / chances[0]).numpy())
    if predictor == "euler":
        reveal = (rate / torch.expm1(sigma))[:-1] * -times.diff()
        if not torch.allclose(reveal, torch.from_numpy(trajectory.reveal), rtol=1e-6):
            raise ValueError(
                "noise must be log-linear for the predictor 'euler', whose steps are ancestral there alone, "
                f"got {patching.named(noise)}; 'analytic' serves any"
            )
    return trajectory, float(chances[0])


def network_of(model: nn.Module, vocab_size: int, length: int, most: float) -> Network:
    """most: the mask chance at time 1."""
    inner = getattr(model, "module", model)  # of DistributedDataParallel
    config = getattr(inner, "config", None)
    sizes = {size: setting(config, f"model.{size}") for size in ("hidden_size", "n_blocks", "n_heads")}
    longest = max(length, setting(config, "model.length", 0))

    def logits(tokens: Tensor, sigma: Tensor) -> Tensor:
        """Without the factor of the absorbing graph: log p(x0 | xt) + log(V - 1) for a score that is true."""
        return model(tokens, sigma) + torch.expm1(sigma).log()[:, None, None] + math.log(vocab_size - 1)

    return Network(
        backbone=inner,
        config={
            "tokens": vocab_size - 1,
            "graph": {"type": "absorb"},
            "noise": {"type": "loglinear"},  # as far as the network sees: its sigma follows from the mask rate
            "model": {**sizes, "length": longest},
        },
        vocab_size=vocab_size,
        mask_id=vocab_size - 1,
        length=longest,
        time_conditioned=True,
        most=most,
        logits=logits,
    )


def _stepwise(made: Denoiser, network: Network, hook: Callable[[Tensor], Tensor] | None, options: Options) -> Stepwise:
    arithmetic = PUBLISHED if options.compat else Arithmetic()
    law = stepwise.probabilities(network.mask_id, arithmetic)
    if options.compat:
        if not setting(getattr(network.backbone, "config", None), "model.scale_by_sigma", True):
            raise ValueError("compat='sedd' needs a model whose config.model.scale_by_sigma is set, got one without")
        law = _scores(network.mask_id)

    def checked(tokens: Tensor) -> Tensor:
        projected = hook(tokens)
        return absorbing.check_tokens("proj_fun", projected, tuple(tokens.shape), network.vocab_size).to(tokens.device)

    if hook is not None:
        patching.warn_once("proj_fun may change any token: steps are taken one by one, for the whole batch")
    return Stepwise(made, law, arithmetic, scores=options.compat is not None, hook=hook and checked)


def _scores(mask_id: int) -> stepwise.Law:
    """The published scores times e^sigma - 1, which do not sum to one."""

    def law(logits: Tensor) -> Tensor:
        scores = (logits.to(PUBLISHED.log_probs) - math.log(logits.shape[1] - 1)).exp()
        scores[:, mask_id] = 0
        return scores

    return law
