"""Another commit's kernels: checked out beside this one, timed in a process of their own, gone afterwards."""

import os
import shutil
import signal
import subprocess
from contextlib import nullcontext

import pytest
import torch
from measured import CEILINGS
from test_structure import ROOT

from benchmarks import base, run
from benchmarks.base import BaseError, checked_out
from benchmarks.cases import Point
from benchmarks.results import read_rows
from benchmarks.shapes import Shape
from benchmarks.trial import Settings, Timer
from benchmarks.worker import Worker

CPU = torch.device("cpu")
POINT = Point("add_norm", "plain", "small", Shape(24, 700, 2, 2, 16), 3)
with_git = pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="no git checkout")


def git(folder, *arguments):
    identity = {f"GIT_{who}_{what}": "a" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(["git", *arguments], cwd=folder, env=os.environ | identity, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Of the installed package alone, committed once: the reference of add_norm writes ones, and so is quick to see."""
    tree = tmp_path / "repository"
    for folder in ("engine", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tree / ".gitignore").write_text("*.so\n")
    spoilt = tree / "kernels" / "add_norm" / "reference.py"
    spoilt.write_text(spoilt.read_text() + "\n\ndef add_norm(call):\n    call.out.fill_(1)\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "spoil"], ["tag", "spoilt"]):
        git(tree, *arguments)
    for library in (ROOT / "kernels").glob("*.so"):
        shutil.copy2(library, tree / "kernels")
    monkeypatch.setattr(base, "ROOT", tree)
    monkeypatch.setattr(base, "_SOURCES", ("kernels/checks.py",))
    return tree


def worktrees(tree):
    return [line for line in git(tree, "worktree", "list", "--porcelain").splitlines() if line.startswith("worktree")]


@with_git
def test_a_worker_runs_the_kernels_of_its_folder(repository):
    settings = Settings(seconds=0.001, impl=frozenset({"reference", "cpu"}))
    with checked_out("spoilt", cuda=False) as found:
        assert found.commit == git(repository, "rev-parse", "HEAD").strip() and len(worktrees(repository)) == 2
        with Worker(found.packages, CPU, settings) as other, Worker(None, CPU, settings) as ours:
            assert other.open(POINT, torch.float32).rows.keys() == ours.open(POINT, torch.float32).rows.keys()
            laws = {side: worker.rows["cpu"].law_passed for side, worker in (("base", other), ("this", ours))}
            assert laws["this"] in (True, None) and laws["base"] in (False, None)  # None: no compiler here
            seconds, notes = ours.measure(0.5)
            assert seconds["reference"]["cold"] and notes == {}
    assert len(worktrees(repository)) == 1 and not found.packages.parent.exists()


@with_git
@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_worktree_goes_however_the_block_ends(ending, repository):
    with pytest.raises(ending), checked_out("spoilt", cuda=False) as found:
        raise ending
    assert len(worktrees(repository)) == 1 and not found.packages.parent.exists()


@with_git
def test_a_killed_benchmark_leaves_no_worktree(repository):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), checked_out("spoilt", cuda=False) as found:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert not found.packages.parent.exists() and signal.getsignal(signal.SIGTERM) is before


@with_git
def test_what_is_no_commit_or_cannot_be_built_is_said(repository, monkeypatch):
    with pytest.raises(BaseError, match="no commit of this repository"), checked_out("nowhere", cuda=False):
        pass
    monkeypatch.setattr(base, "_SOURCES", ("kernels/add_norm/reference.py",))
    (repository / "kernels" / "add_norm" / "reference.py").write_text("")
    with pytest.raises(BaseError, match=r"its kernels cannot be built: .*setup\.py"), checked_out("spoilt", cuda=False):
        pass
    assert len(worktrees(repository)) == 1


def test_a_process_that_ends_says_why(tmp_path):
    (tmp_path / "unmask").mkdir()
    (tmp_path / "unmask" / "__init__.py").write_text("raise ImportError('too old')")
    with pytest.raises(BaseError, match="its process ended: ImportError: too old"), Worker(tmp_path, CPU, Settings()):
        pass
    (tmp_path / "unmask" / "__init__.py").write_text("")  # what it lacks is not looked for in this checkout
    with pytest.raises(BaseError, match=r"No module named 'unmask\.kernels'"), Worker(tmp_path, CPU, Settings()):
        pass
    empty = tmp_path / "empty"
    empty.mkdir()
    with (
        pytest.raises(BaseError, match=r"No module named 'unmask'|found another unmask"),
        Worker(empty, CPU, Settings()),
    ):
        pass


class FakeWorker:
    """Takes turns with others, without a process."""

    log = []  # noqa: RUF012

    def __init__(self, packages, device, settings):
        self.name, self.trial, self.settings = packages or "this", None, settings

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.log.append(f"end {self.name}")

    def open(self, point, dtype):
        self.rows = Timer(CPU, self.settings).open(point, dtype).rows
        return self

    def measure(self, share):
        self.log.append(f"{self.name} {share}")
        slow = 2.0 if self.name == "this" else 1.0
        return {"reference": {"cold": [slow, slow], "warm": [slow]}}, {}


def test_sides_take_turns_and_are_compared(tmp_path, monkeypatch, capsys):
    class Found:
        commit, packages = "abc", "base"

    monkeypatch.setattr(run, "measure", lambda *arguments: CEILINGS)
    monkeypatch.setattr(run, "Worker", FakeWorker)
    monkeypatch.setattr(run, "checked_out", lambda revision, cuda: nullcontext(Found))
    monkeypatch.setattr(FakeWorker, "log", [])
    size = ["--shape", "24,700,2,16", "--rows", "3", "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    asked = ["--operator", "add_norm", "--case", "plain", "--impl", "reference", "--base", "v1", "--out", str(tmp_path)]
    assert run.main([*size, *asked]) == 0
    assert FakeWorker.log == ["base 0.5", "this 0.5"] * 2 + ["end this", "end base"]
    result, rows = read_rows(tmp_path / "operators.json")
    assert result["base"] == "abc"
    assert [(each.side, each.seconds, each.timings["cold"].rounds) for each in rows] == [("base", 1, 4), ("this", 2, 4)]
    assert "v1 → this" in (told := capsys.readouterr().err) and "0 FAST, 1 SLOW" in told
