"""Runs that do not fit say what would; runs that end let their buffers go."""

import gc
import re
import weakref

import pytest
import torch
from toys import Toy, random_dit

from unmask import Ancestral, Sampler, cli, memory
from unmask.progress import Progress
from unmask.run import buffer_bytes
from unmask.timeline import Limits


def test_what_would_fit_is_the_most_that_fits(monkeypatch):
    """The `max_batch` of the error runs in the memory of the error, and one more does not."""
    dit = random_dit("dit", 1, length=64)
    wanted = {size: buffer_bytes([dit], Limits(size, 16 * size, 64)) for size in range(1, 13)}
    for free in (wanted[1], wanted[5], wanted[5] + 1, wanted[6] - 1, wanted[11]):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        with pytest.raises(MemoryError) as error:
            Sampler(dit, reveal=Ancestral(2), max_batch=12).sample(500, 64)
        assert f"max_batch=12 needs {wanted[12]:,} bytes" in str(error.value) and f"{free:,} bytes" in str(error.value)
        fitting = int(re.search(r"max_batch=(\d+) would fit", str(error.value))[1])
        assert wanted[fitting] <= free < wanted[fitting + 1]
    monkeypatch.setattr(memory, "available", lambda device: wanted[12])
    assert len(Sampler(dit, reveal=Ancestral(2), max_batch=12).sample(13, 64)) == 13


def test_nothing_fits(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10)
    with pytest.raises(MemoryError, match=r"max_batch=1 needs .* on cpu, .* one sequence at a time needs"):
        Sampler(random_dit("dit", 1, length=64), max_batch=1).sample(1, 64)


def test_a_system_that_does_not_tell_is_trusted(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available(torch.device("cpu")) is None
    assert len(Sampler(Toy(9, 16), reveal=Ancestral(2)).sample(2, 16)) == 2


def test_the_tightest_limit_counts(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:    60 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert memory.available(cpu) == 60 << 10
    (tmp_path / "memory.max").write_text("50000\n")
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 20000\ninactive_file 4000\n")
    assert memory.available(cpu) == 50_000 - 30_000 + 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available(cpu) == 60 << 10


def test_a_gpu_s_free_memory_counts_what_torch_keeps_for_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert memory.available(torch.device("cuda")) == 1300


ERRORS = {
    "torch, CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99"),
    "torch, GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99"),
    "numpy": MemoryError("Unable to allocate 99"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_allocator_s_error_is_explained(name):
    class Greedy(Toy):
        def logits(self, batch):
            if len(batch.lengths) > 2:
                raise ERRORS[name]
            return super().logits(batch)

    toy = Greedy(9, 16)
    with pytest.raises(MemoryError, match=r"network call of 5 sequences \(max_batch=5\).*99; max_batch=2 asks"):
        Sampler(toy, reveal=Ancestral(2), max_batch=5).sample(9, 16)
    assert len(Sampler(toy, reveal=Ancestral(2), max_batch=2).sample(9, 16)) == 9


def test_other_errors_stay_what_they_are():
    class Wrong(Toy):
        def logits(self, batch):
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        Sampler(Wrong(9, 16)).sample(1, 16)


def test_the_command_says_it_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: 10)
    monkeypatch.setattr("sys.argv", ["unmask", "sample", "-n", "1", "--length", "8"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    err = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and err[-1].startswith("unmask: error: max_batch=16 needs ")


# ---- Letting go ----


def buffers_of(run):
    """What a run has allocated, by weak references to tensors and arrays that only it holds."""
    held = [run._slots.tokens, run._slots.logprobs, run._slots.reveal_step, *run._workspace._buffers.values()]
    return [weakref.ref(one) for one in held]


def released(references):
    gc.collect()
    return all(reference() is None for reference in references)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_frees_its_buffers(error):
    class Interrupting(Progress):
        ticks = 0

        def update(self, run, tick):
            self.ticks, self.run = self.ticks + 1, run
            if self.ticks == 3:
                self.buffers = buffers_of(run)
                raise error

    view = Interrupting()
    sampler = Sampler(random_dit("dit", 1, length=32), reveal=Ancestral(6), max_batch=3)
    with pytest.raises(error):
        sampler.sample(9, 32, progress=view)
    assert len(view.buffers) > 6 and released(view.buffers)
    assert view.run.stats.num_ticks == 3 and view.run.stats.peak_bytes == sampler.plan(9, 32).peak_bytes


@pytest.mark.parametrize("taken", [0, 1, 9])
def test_a_closed_or_finished_stream_frees_its_buffers(taken):
    run = Sampler(Toy(9, 16), reveal=Ancestral(3), max_batch=2).stream(9, 16)
    buffers = buffers_of(run)
    for _ in range(taken):
        next(run)
    assert not released(buffers)
    run.close()
    assert released(buffers) and list(run) == []


def test_an_error_of_the_network_frees_the_buffers():
    class Failing(Toy):
        def logits(self, batch):
            if self.num_calls == 2:
                raise RuntimeError("broken")
            return super().logits(batch)

    run = Sampler(Failing(9, 16), reveal=Ancestral(3), max_batch=2).stream(9, 16)
    buffers = buffers_of(run)
    with pytest.raises(RuntimeError, match="broken"):
        list(run)
    assert released(buffers)
