"""How fast one machine is: what the operations of a network call take, measured once, kept, added up for a plan."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from unmask.cost import Seconds
from unmask.denoiser import Denoiser
from unmask.files import replace_whole
from unmask.work import AddNorm, Attention, Draw, Load, Operation, Product, SwiGLU

_ONES = Product(1, 1, 1), Attention(1, 1, 1, 1, 1, 1), AddNorm(1, 1), SwiGLU(1, 1), Draw(1, 1, 1)  # one of each kind
FORMAT = 2  # of the file, and of what its numbers mean


@dataclass(frozen=True)
class Calibration:
    """What operations take on one machine, for one dtype.

    machine: what was measured, as words; another machine needs another calibration. rates: seconds of one unit of each
    term of an operation (see `unmask.work`), by the operation's class name: an operation takes the sum of its terms,
    each times its rate. tick: seconds that a run spends on a network call outside the network and its head.
    """

    machine: Mapping[str, str]
    rates: Mapping[str, Mapping[str, float]]
    tick: float

    @classmethod
    def fit(cls, machine: Mapping[str, str], measured: Iterable[tuple[Operation, float]], tick: float) -> "Calibration":
        """The calibration that comes closest to measured seconds of operations, in relative terms."""
        cases = defaultdict(list)
        for operation, seconds in measured:
            cases[type(operation).__name__].append((operation.terms, seconds))
        return cls(machine, {kind: _fit(found) for kind, found in cases.items()}, tick)

    def seconds(self, operation: Operation) -> float | np.ndarray:
        """Seconds of an operation; an array where its sizes are arrays."""
        rates = self.rates[type(operation).__name__]
        return sum(number * rates[term] for term, number in operation.terms.items())

    def predict(self, models: Mapping[str, Denoiser], loads: Mapping[tuple[str, Load], int]) -> Seconds | None:
        """Seconds of a run. loads: how often a model, by name, is called with a load.

        None if the operations of a model that is called are not known (`LogitsDenoiser`).
        """
        predicted = {}
        for name, model in models.items():
            counts = {load: count for (caller, load), count in loads.items() if caller == name}
            work = model.work(Load(*np.array(list(counts) or [Load.of((), ())], np.int64).T))
            if work is None and counts:
                return None
            times = np.array(list(counts.values()) or [0])
            body = sum(often * times @ self.seconds(operation) for often, operation in work.body) if work else 0.0
            predicted[name] = {"body": float(body), "head": float(times @ self.seconds(work.head)) if work else 0.0}
        return Seconds(predicted, other=self.tick * sum(loads.values()))


def _fit(cases: list[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Non-negative rates of the terms with the least squared relative error: the best fit of any subset of the terms
    that needs no negative rate. There are few terms, so all subsets are tried."""
    names = list(cases[0][0])
    seconds = np.array([taken for _, taken in cases])
    share = np.array([[terms[name] for name in names] for terms, _ in cases]) / seconds[:, None]
    scale = share.max(axis=0)
    used = [i for i in range(len(names)) if scale[i] > 0]
    best, found = np.inf, np.zeros(len(names))
    for size in range(1, len(used) + 1):
        for chosen in map(list, combinations(used, size)):
            columns = share[:, chosen] / scale[chosen]
            rates = np.linalg.lstsq(columns, np.ones(len(cases)), rcond=None)[0]
            error = np.square(columns @ rates - 1).sum()
            if rates.min() >= 0 and error < best:
                best, found = error, np.zeros(len(names))
                found[chosen] = rates / scale[chosen]
    return dict(zip(names, found.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The file that keeps them


class DamagedCache(ValueError):
    """The file of calibrations does not hold what it should."""


def cache_file() -> Path | None:
    """Where calibrations are kept: in the user's cache folder. None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "unmask" / "calibration.json"
    except RuntimeError:
        return None


def read(path: Path, machine: Mapping[str, str]) -> Calibration | None:
    """The calibration of `machine` in this file, None if it holds none. Raises `DamagedCache`."""
    return next((found for found in _entries(path) if found.machine == machine), None)


def write(path: Path, calibration: Calibration) -> None:
    """Add a calibration, in place of an earlier one of the same machine; a damaged file is replaced. Raises OSError."""
    try:
        others = [found for found in _entries(path) if found.machine != calibration.machine]
    except DamagedCache:
        others = []
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "calibrations": [asdict(one) for one in (*others, calibration)]}
    replace_whole(path, lambda file: file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def _entries(path: Path) -> list[Calibration]:
    """All calibrations of a file; none if it does not exist, cannot be read, or has another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return []
        return [_checked(entry) for entry in content["calibrations"]]
    except OSError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCache(f"{path} must hold calibrations as unmask writes them, got a damaged file") from error


def _checked(entry: Mapping) -> Calibration:
    """Raises one of the errors of `_entries` unless every number is one and none is missing."""
    known = {type(one).__name__: one.terms.keys() for one in _ONES}
    numbers = [entry["tick"], *(rate for rates in entry["rates"].values() for rate in rates.values())]
    if not all(isinstance(number, float) and 0 <= number < np.inf for number in numbers):
        raise ValueError(f"rates must be seconds, got {numbers}")
    if known != {kind: rates.keys() for kind, rates in entry["rates"].items()}:
        raise ValueError(f"rates must be those of all terms of all operations, got {entry['rates']}")
    return Calibration(dict(entry["machine"]), entry["rates"], entry["tick"])
