"""Ticks in rounded shapes and as graphs give the tokens that ticks as they are give."""

import numpy as np
import pytest
import torch
from test_dit import make
from toys import MASK, Toy, random_dit

from unmask import Ancestral, LogitsDenoiser, NonFiniteLogits, Sampler, graphs, load, slots
from unmask import run as run_module
from unmask.graphs import Graphs, Padded
from unmask.kernels import dispatch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


class Repeated(Graphs):
    """Graphs on a CPU: a replay makes the captured call again, from the inputs that the capture saw."""

    num_captured = num_replayed = 0

    def _capture(self, call):
        self.num_captured += 1

        def replay():
            self.num_replayed += 1
            call()

        return replay


@pytest.fixture
def with_executor(monkeypatch):
    """with_executor(kind, window) -> the executors of that kind that runs then use, in the order they are made."""
    made = []

    def use(kind, window=graphs.WINDOW):
        def executor(denoiser, limits, wanted):
            made.append(kind(denoiser.device, limits))
            made[-1].window = window
            return made[-1]

        monkeypatch.setattr(run_module, "executor", executor)
        return made

    return use


def pair(length=48):
    return {"heavy": random_dit("heavy", 3, length=length), "light": random_dit("light", 1, length=length, seed=1)}


RAGGED = np.random.default_rng(0).integers(1, 49, 40).tolist()
REQUESTS = {
    "equal lengths": {"num_samples": 40, "length": 48},
    "ragged": {"num_samples": 40, "length": RAGGED},
    "prompts": {"num_samples": 3, "length": [48, 20, 48], "prompt": [[1, 2, 3], [4], []]},
}


@pytest.mark.parametrize("kind", [Padded, Repeated])
@pytest.mark.parametrize("name", REQUESTS)
def test_rounded_shapes_give_the_same_samples(name, kind, with_executor):
    sampler = Sampler(pair(), schedule="light:25% heavy:75%", reveal=Ancestral(12), max_batch=6, max_resident=11)
    expected = sampler.sample(**REQUESTS[name], seed=5)
    made = with_executor(kind)
    samples = sampler.sample(**REQUESTS[name], seed=5)
    assert torch.equal(samples.tokens, expected.tokens) and torch.equal(samples.reveal_step, expected.reveal_step)
    torch.testing.assert_close(samples.logprobs, expected.logprobs, atol=1e-4, rtol=0)
    assert samples.stats.cost == expected.stats.cost and samples.stats.num_ticks == expected.stats.num_ticks
    if kind is Repeated:
        captured, replayed = (sum(getattr(one, name) for one in made) for name in ("num_captured", "num_replayed"))
        assert captured + replayed == samples.stats.num_ticks and captured < replayed and captured < 20


def test_a_time_conditioned_model_in_rounded_shapes(with_executor):
    _, model = make("mdlm time-conditioned")
    sampler = Sampler(model, reveal=Ancestral(6), max_batch=5)
    request = {"num_samples": 12, "length": [64, 3, 10, 64, 64, 30, 31, 5, 64, 17, 1, 2]}
    expected = sampler.sample(**request)
    with_executor(Padded)
    assert torch.equal(sampler.sample(**request).tokens, expected.tokens)


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("name", ["equal lengths", "ragged"])
def test_the_kernels_of_a_gpu_in_rounded_shapes(name, with_executor, monkeypatch):
    """A GPU's path without the GPU: Triton's kernels by offsets, on padded ticks, in fp32 with the same tokens."""
    length = {"equal lengths": 24, "ragged": [24, 3, 17, 24, 1]}[name]
    sampler = Sampler(random_dit("dit", 2, vocab_size=200, length=24), reveal=Ancestral(3), max_batch=4)
    expected = sampler.sample(5, length, seed=2)
    picked, pick = set(), dispatch.Operator.pick

    def pick_triton(self, impl, *arguments):
        picked.add(self.name)
        return pick(self, "triton", *arguments)

    monkeypatch.setattr(dispatch.Operator, "pick", pick_triton)
    with_executor(Padded)
    samples = sampler.sample(5, length, seed=2)
    assert picked == {"attention", "add_norm", "sample_head"}
    assert torch.equal(samples.tokens, expected.tokens)
    torch.testing.assert_close(samples.logprobs, expected.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 7, 1000])
def test_windows_of_any_size(window, with_executor, monkeypatch):
    """Slots are taken again within a window: admissions and hand-outs keep their place among the ticks."""
    sampler = Sampler(random_dit("dit", 1, length=24), reveal=Ancestral(4), max_batch=3, max_resident=4)
    expected = sampler.sample(30, 24, seed=1)
    with_executor(Padded, window)
    samples = sampler.sample(30, 24, seed=1)
    assert torch.equal(samples.tokens, expected.tokens) and torch.equal(samples.reveal_step, expected.reveal_step)
    assert torch.equal(samples.logprobs, expected.logprobs)


def test_samples_that_are_still_on_their_way(monkeypatch):
    """A device that is late by some ticks: samples come in the same order, and whole."""

    class Late(graphs.Fetched):
        asked = 0

        @property
        def ready(self):
            self.asked += 1
            return self.asked > 3

    sampler = Sampler(Toy(9, 16), reveal=Ancestral(5), max_batch=2, max_resident=3)
    expected = list(sampler.stream(12, 16, seed=1))
    monkeypatch.setattr(slots, "Fetched", Late)
    late = list(sampler.stream(12, 16, seed=1))
    assert [one.index for one in late] == [one.index for one in expected]
    for one, other in zip(late, expected, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.reveal_step, other.reveal_step)


def test_a_row_without_a_law_is_an_error_at_the_hand_out(monkeypatch):
    """A head that does not look at its rows leaves the position masked."""

    class Broken(Toy):
        def logits(self, batch):
            scores = super().logits(batch)
            if self.num_calls == 3:
                self.at = int(batch.rows[0]) % 12
                scores[0] = torch.nan
            return scores

    def unchecked(*arguments, check, **options):
        return original(*arguments, check=False, **options)

    original = run_module.sample_head
    monkeypatch.setattr(run_module, "sample_head", unchecked)
    toy = Broken(9, 12)
    with pytest.raises(NonFiniteLogits) as error:
        Sampler(toy, reveal=Ancestral(8), max_batch=1, max_resident=1).sample(2, 12)
    assert f"sequence 0, position {toy.at}:" in str(error.value)


def test_a_cpu_has_no_graphs():
    with pytest.raises(ValueError, match="graphs must be None or False on cpu, which has no CUDA graphs; got True"):
        Sampler(Toy(9, 16), graphs=True).sample(1, 16)
    assert (Sampler(Toy(9, 16), reveal=Ancestral(2), graphs=False).sample(1, 16).tokens != MASK).all()


# ---- On a GPU ----


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REQUESTS)
def test_graphs_give_the_bits_of_eager_ticks(name, dtype):
    models = {name: load(f"sotu-{name}", device="cuda", dtype=getattr(torch, dtype)) for name in ("heavy", "light")}
    options = {"schedule": "light:25% heavy:75%", "reveal": Ancestral(12), "max_batch": 6, "max_resident": 11}
    eager = Sampler(models, graphs=False, **options).sample(**REQUESTS[name], seed=5)
    graphed = Sampler(models, graphs=True, **options).sample(**REQUESTS[name], seed=5)
    assert torch.equal(graphed.tokens, eager.tokens) and torch.equal(graphed.logprobs, eager.logprobs)


@needs_gpu
def test_ticks_do_not_wait_for_the_gpu():
    """Once the buckets are captured, only a hand-out may wait."""
    heavy = load("sotu-heavy", device="cuda")
    run = Sampler(heavy, reveal=Ancestral(200), max_batch=4).stream(4, 256)
    seen = []

    def watch(run, tick):
        seen.append(tick)
        torch.cuda.set_sync_debug_mode("error" if 100 < len(seen) < 150 else "default")

    run._on_tick = watch
    try:
        list(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) > 150


@needs_gpu
def test_a_foreign_model_runs_as_it_is():
    spec = Toy(9, 16).spec
    foreign = LogitsDenoiser(lambda tokens: torch.zeros(*tokens.shape, 9, device="cuda"), spec, device="cuda")
    assert (Sampler(foreign, reveal=Ancestral(4)).sample(5, 16).tokens != MASK).all()
    with pytest.raises(ValueError, match="graphs must be None or False for 'logits'"):
        Sampler(foreign, graphs=True).sample(1, 16)
