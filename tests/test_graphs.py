"""Ticks in rounded shapes and as graphs give the tokens that ticks as they are give."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_dit import make
from toys import MASK, Toy, random_dit

from unmask import (
    Ancestral,
    Blocks,
    Confidence,
    LogitsDenoiser,
    NonFiniteLogits,
    Remask,
    Sampler,
    Samples,
    graphs,
    load,
    slots,
)
from unmask import run as run_module
from unmask.graphs import Exact, Graphs, Padded
from unmask.kernels import dispatch
from unmask.kernels.add_norm.call import AddNormCall
from unmask.kernels.attention.call import AttentionCall
from unmask.models import dit
from unmask.timeline import Limits

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


class Repeated(Graphs):
    """Graphs on a CPU: a replay makes the captured call again, from the inputs that the capture saw."""

    num_captured = num_replayed = 0

    def __init__(self, device, limits):
        super().__init__(device, limits)
        self.met = []

    def bucket(self, tick):
        self.met.append(super().bucket(tick))
        return self.met[-1]

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
        def executors(denoisers, limits, wanted, impl, spans):
            made.extend(kind(denoiser.device, limits) for denoiser in denoisers)
            for one in made:
                one.window = window
            return made[-len(denoisers) :]

        monkeypatch.setattr(run_module, "executors", executors)
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
        met = [bucket for one in made for bucket in one.met]
        times = Counter(met)
        assert len(met) == samples.stats.num_ticks and len(times) < 20
        assert sum(one.num_captured for one in made) == sum(count > 1 for count in times.values())
        assert sum(one.num_replayed for one in made) == sum(max(0, count - 2) for count in times.values()) > 0


def test_a_time_conditioned_model_in_rounded_shapes(with_executor):
    _, model = make("mdlm time-conditioned")
    sampler = Sampler(model, reveal=Ancestral(6), max_batch=5)
    request = {"num_samples": 12, "length": [64, 3, 10, 64, 64, 30, 31, 5, 64, 17, 1, 2]}
    expected = sampler.sample(**request)
    with_executor(Padded)
    assert torch.equal(sampler.sample(**request).tokens, expected.tokens)


@pytest.mark.parametrize("kind", [Padded, Repeated])
def test_positions_that_are_masked_again(kind, with_executor):
    """They are masked between replays, and draws count in the keys; ticks come in windows."""
    sampler = Sampler(pair(), schedule="light:25% heavy:75%", reveal=Remask(12, eta=0.3), max_batch=6, max_resident=11)
    expected = sampler.sample(40, RAGGED, seed=5)
    with_executor(kind)
    samples = sampler.sample(40, RAGGED, seed=5)
    assert torch.equal(samples.tokens, expected.tokens) and torch.equal(samples.reveal_step, expected.reveal_step)
    assert samples.stats.cost == expected.stats.cost


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("name", ["equal lengths", "ragged"])
def test_the_kernels_of_a_gpu_in_rounded_shapes(name, conditioned, with_executor, monkeypatch):
    """A GPU's path without the GPU: Triton's kernels by offsets, on padded ticks, in fp32 with the same tokens."""
    length = {"equal lengths": 24, "ragged": [24, 3, 17, 24, 1]}[name]
    model = make("mdlm time-conditioned")[1] if conditioned else random_dit("dit", 2, vocab_size=200, length=24)
    sampler = Sampler(model, reveal=Ancestral(3), max_batch=4)
    expected = sampler.sample(5, length, seed=2)
    picked, pick = set(), dispatch.Operator.pick

    def pick_triton(self, impl, *arguments):
        picked.add(self.name)
        return pick(self, "triton", *arguments)

    monkeypatch.setattr(dispatch.Operator, "pick", pick_triton)
    for call in (AttentionCall, AddNormCall):  # on a CPU the operators would turn offsets into numbers
        monkeypatch.setattr(call, "counted", lambda self: self)
    with_executor(Padded)
    run = sampler.stream(5, length, seed=2)
    run._workspace.poison()
    samples = Samples(list(run), 2, run.stats)
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


def test_what_is_fetched_is_waited_for():
    class Event:
        done = False

        def query(self):
            return self.done

        def synchronize(self):
            self.done = True

    fetched = graphs.Fetched((torch.arange(3),))
    assert fetched.ready  # nothing is on its way on a CPU
    fetched._arrived = Event()
    assert not fetched.ready
    (tensor,) = fetched.wait()
    assert fetched.ready and tensor.tolist() == [0, 1, 2]


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


@pytest.mark.parametrize("window", [1, 64])
def test_what_was_planned_before_a_bad_prompt_is_done(window, with_executor):
    """In a stream a bad prompt is an error when its turn comes: the ten before it are handed out."""
    prompts = [[2, 3]] * 10 + [[99]]
    sampler = Sampler(random_dit("dit", 1, vocab_size=50, length=16), reveal=Ancestral(4), max_batch=2, max_resident=2)
    with_executor(Padded, window)
    run, found = sampler.stream(None, 16, prompt=iter(prompts)), []
    with pytest.raises(ValueError, match="prompt"):
        found.extend(sample.index for sample in run)
    assert sorted(found) == list(range(len(found))) and len(found) >= 8


def test_who_runs_the_ticks(monkeypatch):
    """By what a denoiser says of itself: no GPU is touched."""
    limits, gpu = Limits(2, 2, 16), torch.device("cuda")

    def made(wanted, impl=None, **denoiser):
        given = SimpleNamespace(**{"device": gpu, "capturable": True, "name": "x"} | denoiser)
        return graphs.executors([given, given], limits, wanted, impl)

    def kinds(*arguments, **denoiser):
        return {type(one) for one in made(*arguments, **denoiser)}

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", iter([(0, 1), (0, 2), (0, 3)]).__next__)
    monkeypatch.setattr(graphs, "_EventClock", object)
    assert [one._pool for one in made(None)] == [(0, 1)] * 2  # all graphs of a run share one
    assert kinds(None) == kinds(True) == {Graphs} and kinds(False) == {Padded}
    cases = ({"capturable": False}, {"impl": "reference"}, {"device": torch.device("cpu")})
    for options in cases:
        assert kinds(None, **options) == kinds(False, **options) == {Exact}
        with pytest.raises(ValueError, match="graphs must be None or False for 'x'"):
            made(True, **options)


def test_the_device_s_clock_adds_up_what_is_done(monkeypatch):
    class Event:
        """Marks a moment of a device whose clock is at `now` milliseconds, and that has come to `done`."""

        now = done = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def query(self):
            return self.at <= Event.done

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = graphs._EventClock()
    for begin, end in ((0, 2000), (3000, 3500), (4000, 9000)):
        Event.now = begin
        with clock:
            Event.now = end
    assert clock.seconds == 0
    Event.done = 4000
    assert clock.seconds == 2.5
    Event.done = 9000
    assert clock.seconds == clock.seconds == 7.5


def test_a_dit_is_captured_where_triton_serves_it(monkeypatch):
    monkeypatch.setattr(dit, "triton_status", lambda: (True, ""))
    narrow, wide_heads = random_dit("a", 1, hidden=64, heads=2), random_dit("b", 1, hidden=288, heads=2)
    assert narrow.capturable and not wide_heads.capturable
    monkeypatch.setattr(dit, "triton_status", lambda: (False, "Triton is not installed"))
    assert not narrow.capturable


def test_a_cpu_has_no_graphs():
    with pytest.raises(ValueError, match="graphs must be None or False for 'toy' on cpu, which has no CUDA graphs"):
        Sampler(Toy(9, 16), graphs=True).sample(1, 16)
    assert (Sampler(Toy(9, 16), reveal=Ancestral(2), graphs=False).sample(1, 16).tokens != MASK).all()


# ---- On a GPU ----


@needs_gpu
@pytest.mark.parametrize("policy", [Ancestral(12), Confidence(steps=12), Blocks(Confidence(threshold=0.2), 8)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REQUESTS)
def test_graphs_give_the_bits_of_eager_ticks(name, dtype, policy):
    models = {name: load(f"sotu-{name}", device="cuda", dtype=getattr(torch, dtype)) for name in ("heavy", "light")}
    options = {"schedule": "light:25% heavy:75%", "reveal": policy, "max_batch": 6, "max_resident": 11}
    eager = Sampler(models, graphs=False, **options).sample(**REQUESTS[name], seed=5)
    graphed = Sampler(models, graphs=True, **options).sample(**REQUESTS[name], seed=5)
    assert torch.equal(graphed.tokens, eager.tokens) and torch.equal(graphed.logprobs, eager.logprobs)


@needs_gpu
@pytest.mark.parametrize("policy", [Ancestral(200), Confidence(steps=200), Confidence(per_step=1, threshold=0.99)])
def test_ticks_do_not_wait_for_the_gpu(policy):
    """Once the buckets are captured, only a hand-out may wait."""
    heavy = load("sotu-heavy", device="cuda")
    run = Sampler(heavy, reveal=policy, max_batch=4).stream(4, 256)
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
    with pytest.raises(ValueError, match=r"graphs must be None or False for 'logits' on cuda.*, whose network needs"):
        Sampler(foreign, graphs=True).sample(1, 16)
