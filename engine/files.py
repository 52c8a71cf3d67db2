"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def check_file(name: str, path: Path) -> None:
    """Raise OSError unless the argument `name` is a path at which a file can be written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name} must lie in a folder that exists, got {str(path)!r}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{name} must be a file in a folder that can be written, got {str(path)!r}")


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, and only then rename it over `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _settle(temporary, 0o666)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(made: Path, folder: Path, *, last: str) -> None:
    """Move the finished files of the folder `made` to `folder`, after they have reached the disk.

    A new folder appears complete or not at all. In one that exists each file is replaced whole, `last` after the
    others.
    """
    for file in made.iterdir():
        _settle(file, 0o666)
    _settle(made, 0o777)
    if folder.exists():
        for file in sorted(made.iterdir(), key=lambda file: file.name == last):
            os.replace(file, folder / file.name)
        _sync(folder)
    else:
        os.rename(made, folder)
    _sync(folder.parent)


def _settle(path: Path, mode: int) -> None:
    """Give `path` the permissions of any new file, and wait until it is on the disk."""
    path.chmod(mode & ~_umask())
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
