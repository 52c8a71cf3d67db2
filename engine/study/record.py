"""The folder of a search: its settings, and a file for each finished schedule, so that a killed search goes on."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from unmask.files import replace_whole
from unmask.study.identity import first_difference
from unmask.study.replay import Texts
from unmask.study.scorer import Scores

FORMAT = 2
SETTINGS, SCHEDULES = "settings.json", "schedules"


@dataclass(frozen=True, eq=False)
class Finished:
    """A schedule's texts, and what the scorer said of them; None without one, or before."""

    texts: Texts
    scores: Scores | None


class Record:
    """What a folder knows of a search.

    settings: everything that decides the texts of a schedule, for JSON. A folder of other settings is an error; a
    settings file that cannot be read is written anew. scorer: what tells the scorer from others, for JSON, None without
    one; of what another one scored, the texts are taken and the scores are missing. reveal_step: int32 [num_samples,
    length], as every schedule has it. num_ids: token ids lie below. tell hears of files that are damaged or of another
    search; they count as missing.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        scorer: dict | None,
        reveal_step: np.ndarray,
        num_ids: int,
        tell: Callable[[str], object],
    ) -> None:
        self.folder, self.reveal_step, self.num_ids, self.tell = folder, reveal_step, num_ids, tell
        self._scorer = json.dumps(scorer, sort_keys=True)
        self.settings = json.loads(json.dumps({"format": FORMAT, **settings}))
        (folder / SCHEDULES).mkdir(parents=True, exist_ok=True)
        known = self._known_settings()
        if known is None:
            save_json(self.settings, folder / SETTINGS)
        else:
            # The numbers of `identity` may differ in their last digits; the file's own count from here.
            self.settings = known
        self._digest = _sha256(json.dumps(self.settings, sort_keys=True).encode())

    def _known_settings(self) -> dict | None:
        path = self.folder / SETTINGS
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            known = None
        if not isinstance(known, dict):
            self.tell(f"{path} is damaged; it is written anew")
            return None
        found = first_difference(known, self.settings)
        if found:
            name, old, new = found
            raise ValueError(
                f"out must be a new folder or that of the same search, got {str(self.folder)!r}, "
                f"where {name} is {old!r}, not {new!r}"
            )
        return known

    def file(self, schedule: str) -> Path:
        """Of a schedule, by its text; the digits keep names apart that are spelled alike."""
        words = re.sub(r"[^A-Za-z0-9.]+", "-", schedule).strip("-.")[:80]
        return self.folder / SCHEDULES / f"{words}-{_sha256(schedule.encode())[:8]}.safetensors"

    def save(self, schedule: str, finished: Finished) -> None:
        """Appears whole or not at all."""
        texts, scores = finished.texts, finished.scores
        arrays = {"tokens": texts.tokens, "logprobs": texts.logprobs, "reveal_step": self.reveal_step}
        if scores is not None:
            arrays |= {"nats": scores.nats, "num_tokens": scores.num_tokens, "num_cut": scores.num_cut}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        seconds = json.dumps(texts.seconds)
        about = {"schedule": schedule, "settings": self._digest, "scorer": self._scorer, "seconds": seconds}
        content = save(arrays, {**about, "checksum": _checksum(about, arrays)})
        replace_whole(self.file(schedule), lambda file: file.write_bytes(content))

    def load(self, schedule: str) -> Finished | None:
        """None where there is no such file, or not a good one."""
        path = self.file(schedule)
        try:
            return self._read(path, schedule)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.tell(f"{path.name} cannot be used ({reason}); {schedule!r} is sampled again")
            return None

    def _read(self, path: Path, schedule: str) -> Finished:
        with safe_open(path, framework="np") as file:
            about, arrays = dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.pop("checksum", None) != _checksum(about, arrays):
            raise ValueError("its checksum is wrong")
        if about["schedule"] != schedule:
            raise ValueError(f"it is of schedule {about['schedule']!r}")
        if about["settings"] != self._digest:
            raise ValueError("it is of other settings")
        finished = self._checked(arrays, json.loads(about["seconds"]), scored=about["scorer"] != "null")
        return finished if about["scorer"] == self._scorer else replace(finished, scores=None)

    def _checked(self, arrays: dict[str, np.ndarray], seconds: float | None, scored: bool) -> Finished:
        shape = self.reveal_step.shape
        columns = ("nats", np.float64), ("num_tokens", np.int64), ("num_cut", np.int64)
        expected = {"tokens": (shape, np.int32), "logprobs": (shape, np.float32), "reveal_step": (shape, np.int32)}
        if scored:
            expected |= {name: (shape[:1], dtype) for name, dtype in columns}
        found = {name: (array.shape, array.dtype.type) for name, array in arrays.items()}
        if found != expected:
            raise ValueError("its arrays have other names, shapes or dtypes")
        if not np.array_equal(arrays["reveal_step"], self.reveal_step):
            raise ValueError("its reveal steps are not those of the seed")
        tokens = arrays["tokens"]
        if tokens.min() < 0 or tokens.max() >= self.num_ids:
            raise ValueError("its token ids are outside the vocabulary")
        scores = Scores(*(arrays[name] for name, _ in columns)) if "nats" in arrays else None
        return Finished(Texts(tokens, arrays["logprobs"], seconds), scores)


def save_json(content: dict, path: Path) -> None:
    """Indented, whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    replace_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _checksum(about: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    parts = [json.dumps(about, sort_keys=True).encode()]
    for name in sorted(arrays):
        array = arrays[name]
        parts += [f"{name} {array.dtype} {array.shape}".encode(), array.tobytes()]
    return _sha256(b"\0".join(parts))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
