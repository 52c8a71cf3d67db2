"""The CUDA sample_head, its source compiled for the CPU, where every GPU thread is a fiber; and on a GPU.

The emulator is tests/cuda_emulator: it starts the threads of all CTAs in any order, lets copies land as early or as
late as the hardware may, fills shared memory with NaN, and holds stores back until their fence.
"""

import ctypes
import importlib.util
import math
import re
import shutil
import subprocess
import sysconfig
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from test_sample_head import bitmap, keys, normal, race_gap

from unmask.kernels import sample_head
from unmask.kernels.logits import Logits
from unmask.kernels.sample_head import cuda, reference
from unmask.kernels.sample_head.call import EXTRAS, HeadCall

ROOT = Path(__file__).parent.parent
HAS_GPU, LACK = cuda.status()
ORDERS, LANDINGS = ("rising", "falling", "random"), ("late", "early", "random")
HOPPER, AMPERE = 232_448, 166_912  # bytes of shared memory for one CTA


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The extension _cuda, its GPU emulated, and the emulator's knobs."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: the emulator is C++")
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed: the emulated extension is bound with it")
    import pybind11

    path = tmp_path_factory.mktemp("emulator") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = [ROOT / "tests/cuda_emulator", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    names = "csrc/cuda/sample_head.cu", "csrc/bind_cuda.cpp", "tests/cuda_emulator/emulator.cpp"
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-DUNMASK_EMULATOR"]
    includes, sources = [f"-I{folder}" for folder in folders], [ROOT / name for name in names]
    subprocess.run(["g++", *flags, *includes, "-x", "c++", *sources, "-o", path], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(path))


class Emulated:
    """Runs calls on the emulator; the options say what the hardware does."""

    device = "cpu"

    def __init__(self, module, knobs):
        self.module, self.knobs = module, knobs

    def __call__(self, call, order="rising", landing="late", seed=0, ctas=3, shared_bytes=HOPPER):
        self.knobs.emulator_configure(ORDERS.index(order), LANDINGS.index(landing), seed, 4, shared_bytes)
        state, before = torch.zeros(self.module.STATE_BYTES, dtype=torch.uint8), self.knobs.emulator_launches()
        with Poisoned():
            sample = cuda.launch(call, state, ctas=ctas)
        assert self.knobs.emulator_launches() == before + 1
        assert not state.any(), "the state must be zero again"
        return sample


class Gpu:
    """The real one; how it schedules is its own affair."""

    device = "cuda"

    def __call__(self, call, order=None, landing=None, seed=None, ctas=3, shared_bytes=None):
        given = {field.name: getattr(call, field.name) for field in fields(call)}
        there = HeadCall(**{name: self.move(value) for name, value in given.items()})
        state = torch.zeros(cuda._cuda.STATE_BYTES, dtype=torch.uint8, device="cuda")
        with Poisoned():
            sample = cuda.launch(there, state, stream=torch.cuda.current_stream().cuda_stream, ctas=ctas)
        if call.out is not None:
            call.out[0].copy_(there.out[0])
        assert not state.any(), "the state must be zero again"
        return type(sample)(*(None if x is None else x.cpu() for x in sample))

    def move(self, value):
        if isinstance(value, tuple):
            return tuple(map(self.move, value))
        return value.cuda() if isinstance(value, torch.Tensor) else value


class Poisoned:
    """New memory holds NaN and the largest integers."""

    def __enter__(self):
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error):
        torch.use_deterministic_algorithms(self.before)


@pytest.fixture(params=["emulator", *(["gpu"] if HAS_GPU else [])])
def run(request, monkeypatch):
    if request.param == "gpu":
        return Gpu()
    module, knobs = request.getfixturevalue("emulator")
    monkeypatch.setattr(cuda, "_cuda", module)
    return Emulated(module, knobs)


def surrounded(tensor):
    """The same rows, in the middle of a larger tensor of NaN."""
    rows, columns = tensor.shape
    around = torch.full((rows + 2, -(-columns // 8) * 8 + 16), math.nan, dtype=tensor.dtype)
    around[1:-1, 8 : 8 + columns] = tensor
    return around[1:-1, 8 : 8 + columns]


def full_call(num_rows, vocab_size, dim, dtype=torch.bfloat16, **options):
    """A call with everything in it: forbidden ids of NaN weights, rows of every temperature, gathering, scattering."""
    hidden = surrounded(normal(num_rows + 3, dim, dtype=dtype))
    weight = surrounded(normal(vocab_size, dim, seed=1, scale=2 / math.sqrt(dim), dtype=dtype))
    offset, allowed = normal(vocab_size, seed=2), torch.rand(num_rows, vocab_size, generator=generator(3)) < 0.9
    if vocab_size > 9:
        offset[vocab_size // 3], offset[-1] = -math.inf, -math.inf
        weight[-1] = math.nan
        weight[vocab_size // 2], allowed[:, vocab_size // 2] = math.nan, False
    allowed[:, 0] = True
    temperature = torch.tensor([1.0, 0.7, 0.0, 2.5]).repeat(num_rows)[:num_rows].clone()
    positions = torch.randperm(2 * num_rows, generator=generator(4))[:num_rows]
    given = {
        "hidden": hidden,
        "weight": weight,
        "offset": offset,
        "keys": keys(num_rows, sequence=5, draw=2),
        "seed": 2**63 + 11,
        "temperature": temperature,
        "allow": bitmap(allowed),
        "rows": torch.randint(0, num_rows + 3, (num_rows,), generator=generator(5)),
        "want": EXTRAS,
        "out": (torch.full((2 * num_rows,), -7), positions),
    }
    return HeadCall(**(given | options))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def tempered(call):
    """The logits of a call as the reference computes them, and the temperatures."""
    temperature = torch.as_tensor(call.temperature, dtype=torch.float32).expand(call.num_rows)
    divisor = torch.where(temperature > 0, temperature, 1)
    logits = Logits(call.hidden, call.weight, call.offset, divisor, call.rows).compute(slice(None), call.dtype)
    if call.allow is not None:
        reference._disallow(logits, call.allow)
    return logits, temperature


def check_against_reference(run, call, **schedule):
    theirs_call = replace(call, out=None if call.out is None else (call.out[0].clone(), call.out[1]))
    ours, theirs = run(call, **schedule), reference.sample_head(theirs_call)
    logits, temperature = tempered(call)
    logits = torch.nn.functional.pad(logits, (0, 128), value=-math.inf)  # there is a second block, and a second id
    greedy_gap = -logits.topk(2).values.diff()[:, 0]
    gaps = torch.where(temperature > 0, race_gap(logits, call.keys, call.seed), greedy_gap)
    differ = ours.tokens != theirs.tokens
    print(f"\n{int(differ.sum())} of {len(differ)} tokens differ, {int((gaps < 1e-5).sum())} rows are near ties")
    assert (gaps[differ] < 1e-5).all()
    for name in ("lse", *call.want):
        got, expected = getattr(ours, name), getattr(theirs, name)
        same = ~differ if name == "logprob" else torch.ones_like(differ)
        close = torch.isclose(got[same], expected[same], rtol=2e-6, atol=4e-6)
        assert close.all(), f"{name}: {got[same][~close]}, expected {expected[same][~close]}"
    if call.out is not None and not differ.any():
        assert torch.equal(call.out[0], theirs_call.out[0])
    return ours


# --- against the reference ------------------------------------------------------------------------------------------

SHAPES = [(1, 300, 40), (5, 129, 64), (8, 1000, 72), (17, 1337, 200), (64, 700, 136), (128, 517, 72), (200, 515, 65)]


@pytest.mark.parametrize("num_rows, vocab_size, dim", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_at_once_as_the_reference(run, num_rows, vocab_size, dim, dtype):
    check_against_reference(run, full_call(num_rows, vocab_size, dim, dtype), order="random", landing="random")


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 256, 9000])
def test_vocabularies(run, vocab_size):
    """9000 ids make 71 blocks in three spans."""
    check_against_reference(run, full_call(3, vocab_size, 16))


@pytest.mark.parametrize("want", [(), ("logprob",), ("argmax",), ("margin", "lse"), ("entropy",)])
def test_only_what_is_wanted(run, want):
    weight, bare = normal(600, 24, seed=1).bfloat16(), {"offset": None, "allow": None, "rows": None, "out": None}
    plain = full_call(9, 600, 24, want=want, weight=weight, temperature=0.8, **bare)
    plain = replace(plain, hidden=plain.hidden[:9])
    everything = run(replace(plain, want=EXTRAS))
    found = check_against_reference(run, plain)
    for name in {"tokens", "lse"} | set(want):
        assert torch.equal(getattr(found, name), getattr(everything, name))
    assert all(getattr(found, name) is None for name in set(EXTRAS) - {"lse", *want})


def test_many_rows_agree_on_tokens(run):
    call = full_call(256, 2000, 24, temperature=1.0, want=())
    sample = check_against_reference(run, call, ctas=5)
    assert len(set((sample.tokens // 128).tolist())) == 16  # every block wins somewhere


# --- bit for bit ----------------------------------------------------------------------------------------------------


def bits(sample):
    return torch.stack([x.double().nan_to_num(-1) for x in sample if x is not None])


@pytest.mark.parametrize("num_rows, vocab_size, dim", [(5, 9000, 136), (150, 400, 200)])
def test_neither_grid_nor_schedule_nor_stages_change_a_bit(run, num_rows, vocab_size, dim):
    call = full_call(num_rows, vocab_size, dim, out=None)
    plain = bits(run(call, ctas=1))
    schedules = [(order, landing) for order in ORDERS for landing in LANDINGS]
    for seed, (order, landing) in enumerate(schedules):
        for ctas, shared_bytes in ((2, HOPPER), (7, AMPERE)):
            found = run(call, order=order, landing=landing, seed=seed, ctas=ctas, shared_bytes=shared_bytes)
            assert torch.equal(bits(found), plain), f"{order} order, {landing} landing, {ctas} CTAs"


def test_a_row_does_not_depend_on_its_company(run):
    """The pieces take every shape that the kernel is compiled for."""
    call = full_call(200, 600, 72, out=None)
    everything = bits(run(call))

    def piece(rows):
        return bits(
            run(
                replace(
                    call,
                    keys=call.keys[rows],
                    temperature=call.temperature[rows],
                    allow=call.allow[rows],
                    rows=call.rows[rows],
                )
            )
        )

    shuffled = torch.randperm(200, generator=generator(0))
    assert torch.equal(piece(shuffled), everything[:, shuffled])
    for sizes in ((1, 8, 9, 32, 33, 64, 53), (100, 100), (129, 71)):
        pieces = [piece(rows) for rows in torch.arange(200).split(list(sizes))]
        assert torch.equal(torch.cat(pieces, dim=1), everything)


# --- ends -----------------------------------------------------------------------------------------------------------


def given_logits(logits, **options):
    """A call whose logits are these, exactly: small integers, or not finite."""
    num_rows = len(logits)
    hidden = torch.eye(num_rows, -(-num_rows // 8) * 8).bfloat16()
    weight = torch.zeros(logits.shape[1], hidden.shape[1], dtype=torch.bfloat16)
    weight[:, :num_rows] = logits.T
    return HeadCall(hidden, weight, None, keys(num_rows), seed=1, **options)


def test_greedy_takes_the_lowest_of_equals(run):
    logits = torch.randint(-9, 5, (5, 1000), generator=generator(0)).float()
    logits[0, [7, 9, 800]] = 9
    logits[1, [999, 256, 255]] = 9
    logits[2] = 0
    logits[3, :], logits[3, 0] = -3, -4
    logits[4], logits[4, 640:] = -0.0, 0.0
    for order in ORDERS:
        sample = run(given_logits(logits, temperature=0, want=EXTRAS), order=order, ctas=8)
        assert sample.tokens.tolist() == sample.argmax.tolist() == [7, 255, 0, 1, 0]
        assert sample.margin.tolist() == [0] * 5
        torch.testing.assert_close(sample.lse, logits.logsumexp(1))


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_bad_rows_are_marked_and_write_nothing(run, temperature):
    """A non-finite number in a row's own hidden vector spoils that row alone."""
    call = full_call(6, 700, 24, temperature=temperature, rows=None, out=(torch.full((6,), -7), torch.arange(6)))
    call.hidden[1, 3], call.hidden[4, 7] = math.nan, math.inf
    call.allow[2] = 0
    call.allow[3] = 0
    call.allow[3, 5] = 1  # a single id
    sample = run(call)
    good = torch.tensor([True, False, False, True, False, True])
    assert torch.equal(sample.tokens >= 0, good) and torch.equal(sample.lse.isfinite(), good)
    assert sample.tokens[~good].tolist() == [-1, -1, -1] and sample.lse[2] == -math.inf
    assert torch.equal(call.out[0], torch.where(good, sample.tokens, -7))
    assert sample.tokens[3] == 160 and sample.max_prob[3] == sample.margin[3] == 1 and sample.entropy[3].abs() < 1e-6
    assert torch.stack([sample.logprob, sample.max_prob, sample.margin, sample.entropy])[:, ~good].isnan().all()
    alone = run(replace(call, hidden=call.hidden.nan_to_num(0, 0, 0), out=None))
    assert torch.equal(bits(alone)[:, good], bits(sample)[:, good])


def test_one_bad_weight_spoils_every_row_that_may_draw_it(run):
    call = full_call(4, 700, 24, allow=None, out=None)
    call.weight[131, 20] = math.nan
    call.weight[350] = 0  # full_call's own NaN
    assert run(call).tokens.tolist() == [-1] * 4
    call.offset[131] = -math.inf
    check_against_reference(run, call)


def test_logits_of_every_size(run):
    """Blocks without a single id to draw, logits far apart and far below zero."""
    logits = torch.full((3, 600), -math.inf)
    logits[0, [3, 517]] = torch.tensor([-5.0, -6.0])
    logits[1] = -20_096
    logits[1, 300] = -19_968
    logits[2, ::7], logits[2, 0] = -128, 20
    weightless = given_logits(logits.nan_to_num(neginf=0), want=EXTRAS, allow=bitmap(logits.isfinite()))
    check_against_reference(run, weightless)


def test_state_is_kept_by_stream_and_fresh_in_a_capture(run, monkeypatch):
    monkeypatch.setattr(cuda, "_states", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device = torch.device(run.device)
    first, second = cuda._state(device, 1), cuda._state(device, 2)
    assert cuda._state(device, 1) is first and second is not first and not first.any()
    assert first.data_ptr() % 16 == 0 and first.numel() == cuda._cuda.STATE_BYTES
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda._state(device, 1) is not first


@pytest.mark.skipif(not HAS_GPU, reason=LACK)
def test_graphs_replay_the_draw():
    moved = {field.name: Gpu().move(getattr(full_call(40, 5000, 256), field.name)) for field in fields(HeadCall)}
    call = HeadCall(**moved)
    expected = bits(cuda.sample_head(call)).cpu()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample = cuda.sample_head(call)
    for _ in range(3):
        for output in sample:
            output.zero_()
        graph.replay()
        assert torch.equal(bits(sample).cpu(), expected)


# --- requests that it refuses ---------------------------------------------------------------------------------------

BAD = [
    ({"weight": None, "hidden": normal(3, 96).bfloat16()}, "needs weight"),
    ({"hidden": normal(3, 24)}, "needs hidden in bfloat16 or float16, got float32"),
    ({"weight": normal(90, 24).half()}, "one dtype, got bfloat16 and float16"),
    ({"weight": normal(90, 25).bfloat16()[:, :24]}, r"every row contiguous and on 16 bytes, got strides \(25"),
    ({"hidden": normal(24, 3).bfloat16().T}, "hidden with every row contiguous"),
    ({"weight": normal(90, 32).bfloat16()[:, 3:27]}, "weight with every row contiguous and on 16 bytes"),
    ({"top_k": 3}, "no top_k"),
    ({"top_p": 0.3}, "no top_p"),
    ({"keys": keys(257)}, "up to 256 rows, got 257"),
    ({"weight": torch.zeros(1, 8).bfloat16().expand(2**21 + 1, 8), "hidden": normal(3, 8).bfloat16()}, "2097152 ids"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_what_it_refuses(run, change, message):
    call = full_call(3, 90, 24)
    assert cuda.unserved(call, 256) is None
    assert re.search(message, cuda.unserved(replace(call, **change), 256))


def test_cpu_tensors_are_refused_everywhere():
    assert "needs CUDA tensors, got cpu" in cuda.refuses(full_call(3, 90, 24))
    assert isinstance(LACK, str) and LACK


@pytest.mark.parametrize("shared_bytes, rows", [(HOPPER, 256), (AMPERE, 256), (101_376, 32), (49_152, 0)])
def test_rows_that_a_device_has_memory_for(run, shared_bytes, rows):
    if run.device != "cpu":
        assert run.module.max_rows(0) >= 32
        return
    run.knobs.emulator_configure(0, 0, 0, 4, shared_bytes)
    assert run.module.max_rows(0) == rows
    if 0 < rows < 256:
        check_against_reference(run, full_call(rows, 300, 40), shared_bytes=shared_bytes)
        with pytest.raises(RuntimeError, match="too little shared memory"):
            run(full_call(rows + 1, 300, 40), shared_bytes=shared_bytes)


def test_the_border_checks_for_itself(run, monkeypatch):
    given = {}
    monkeypatch.setattr(cuda, "_cuda", Recorder(cuda._cuda, given))
    call = full_call(3, 90, 24)
    cuda.launch(call, torch.zeros(cuda._cuda.STATE_BYTES, dtype=torch.uint8))
    bad = [
        ({"type": "float32"}, "type must be bfloat16 or float16, got float32"),
        ({"rows": 0}, "rows must be in"),
        ({"rows": 257}, "rows must be in"),
        ({"vocab": 2**21 + 1}, "vocab must be in"),
        ({"dim": 0}, "dim must be in"),
        ({"hidden": (given["hidden"][0] + 2, 40)}, "hidden must have an address that is a multiple of 16"),
        ({"weight": (given["weight"][0], 41)}, "weight must have a row stride that is a multiple of 8"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"keys": 0}, "keys, tokens and lse must have an address"),
        ({"positions": 0}, "out must come with positions"),
        ({"size": given["size"] - 1}, f"workspace must be on 16 bytes and hold {given['size']}"),
        ({"state": 8}, "state must be on 16 bytes"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            cuda._cuda.module.sample_head(**(given | change))


class Recorder:
    """_cuda that notes the arguments of a launch instead of making it."""

    def __init__(self, module, given):
        self.module, self.given = module, given
        self.STATE_BYTES, self.workspace_bytes = module.STATE_BYTES, module.workspace_bytes

    def sample_head(self, **arguments):
        self.given.update(arguments)


@pytest.mark.skipif(not HAS_GPU, reason=LACK)
def test_the_operator_picks_it_on_a_gpu():
    call = full_call(20, 5000, 256)
    options = {"keys": call.keys.cuda(), "seed": 3, "want": EXTRAS}
    found = sample_head(call.hidden[:20].cuda(), call.weight[:2000].cuda(), impl="cuda", **options)
    expected = sample_head(call.hidden[:20].cuda(), call.weight[:2000].cuda(), impl="reference", **options)
    assert (found.tokens == expected.tokens).float().mean() > 0.9
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-4, atol=1e-4)
