"""Another commit of this repository, checked out and built in a folder that is thrown away."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT

_SOURCES = "csrc", "setup.py"
_BUILD_SECONDS = 900


class BaseError(Exception):
    """Why the other commit cannot be timed."""


@dataclass(frozen=True)
class Base:
    """`packages`: the folder in which its `unmask` lies, for the Python path of a process."""

    commit: str
    packages: Path


@contextmanager
def checked_out(revision: str, cuda: bool) -> Iterator[Base]:
    """The commit in a worktree outside this one, with its kernels built, those for CUDA if asked for; removed however
    the block ends."""
    commit = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", wrong="no commit of this repository")
    folder = Path(tempfile.mkdtemp(prefix="unmask-base-"))
    before = signal.signal(signal.SIGTERM, _end)  # a killed benchmark cleans up like an interrupted one
    try:
        tree = folder / "tree"
        _git("worktree", "add", "--detach", str(tree), commit, wrong="it cannot be checked out")
        _build(tree, commit, cuda)
        yield Base(commit, _packages(folder, tree))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, capture_output=True)
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _packages(folder: Path, tree: Path) -> Path:
    """`unmask` of the tree as an installation would map it."""
    (tree / "engine" / "kernels").symlink_to(tree / "kernels")
    packages = folder / "packages"
    packages.mkdir()
    (packages / "unmask").symlink_to(tree / "engine")
    return packages


def _build(tree: Path, commit: str, cuda: bool) -> None:
    """The compiled kernels: those of this checkout where both have the same sources."""
    same = subprocess.run(["git", "diff", "--quiet", commit, "--", *_SOURCES], cwd=ROOT, capture_output=True)
    if same.returncode == 0:
        for library in (ROOT / "kernels").glob("*.so"):
            shutil.copy2(library, tree / "kernels")
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | ({} if cuda else {"UNMASK_CUDA": "0"})
    options = {"cwd": tree, "env": environment, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, **options, timeout=_BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise BaseError(f"its kernels were not built after {_BUILD_SECONDS} s") from None
    if done.returncode:
        raise BaseError(f"its kernels cannot be built: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")


def _git(*arguments: str, wrong: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise BaseError(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise BaseError(wrong + (f": {said[-1]}" if said else ""))
    return done.stdout.strip()
