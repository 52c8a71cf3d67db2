"""Which ids may a position draw? Lists of ids for single positions of a request."""

from collections.abc import Mapping, Sequence

import numpy as np

Allow = Mapping[int, Sequence[int]]


class Constraints:
    """The lists of a run, numbered; list 0 allows every id.

    allow: ids that a position may draw, by position in the sample; one mapping for all samples, or one for each.
    begin_suppress: ids that the first masked position must not draw. suppress: ids that none may, the mask id among
    them unless it can be drawn; they are not on any list here, but no list may be left without another id.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        suppress: Sequence[int] = (),
        begin_suppress: Sequence[int] = (),
        allow: Allow | Sequence[Allow | None] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self._suppressed, self._at_begin = frozenset(suppress), frozenset(begin_suppress)
        self._check_ids("suppress", suppress)
        self._check_ids("begin_suppress", begin_suppress)
        self.one_for_each = allow is not None and not isinstance(allow, Mapping)
        self._allow = [dict(one or {}) for one in allow] if self.one_for_each else [dict(allow or {})]
        self._numbers: dict[frozenset[int], int] = {}
        for allowed in self._allow:
            self._number_lists(allowed)

    def __bool__(self) -> bool:
        """Whether any position is told anything."""
        return bool(self._at_begin or any(self._allow))

    def check_count(self, num_samples: int) -> None:
        """Raise ValueError unless there is a mapping for each of so many samples, or one for all."""
        if self.one_for_each and len(self._allow) != num_samples:
            raise ValueError(f"allow must be one mapping or {num_samples} of them, got {len(self._allow)}")

    def _number_lists(self, allowed: dict[int, Sequence[int]]) -> None:
        for position, ids in allowed.items():
            if isinstance(position, bool) or not isinstance(position, int | np.integer) or position < 0:
                raise ValueError(f"allow must have positions from 0, got {position!r}")
            self._check_ids(f"allow[{position}]", ids)
            self._number(frozenset(map(int, ids)), f"allow[{position}]")
        if self._at_begin:
            everything = frozenset(range(self.vocab_size))
            for ids in (everything, *(frozenset(map(int, ids)) for ids in allowed.values())):
                if ids - self._at_begin - self._suppressed or ids is everything:
                    self._number(ids - self._at_begin, "begin_suppress")

    def _number(self, ids: frozenset[int], name: str) -> None:
        if not ids - self._suppressed:
            raise ValueError(f"{name} must leave an id that is not suppressed, got {sorted(ids)}")
        self._numbers.setdefault(ids, len(self._numbers) + 1)

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        for one in ids:
            if isinstance(one, bool) or not isinstance(one, int | np.integer) or not 0 <= one < self.vocab_size:
                raise ValueError(f"{name} must hold ids from 0 to {self.vocab_size - 1}, got {one!r}")

    def of(self, index: int, masked: np.ndarray, length: int) -> np.ndarray:
        """int32 [length]: the list of each position of sample `index`, whose `masked` positions ascend."""
        allowed = self._allow[index if self.one_for_each else 0]
        beyond = [position for position in allowed if position >= length]
        if beyond:
            raise ValueError(f"allow must have positions below the length {length}, got {beyond[0]}")
        lists = np.zeros(length, np.int32)
        for position, ids in allowed.items():
            lists[position] = self._numbers[frozenset(map(int, ids))]
        if self._at_begin and len(masked):
            first = int(masked[0])
            ids = frozenset(map(int, allowed.get(first, range(self.vocab_size)))) - self._at_begin
            if ids not in self._numbers:
                raise ValueError(f"allow[{first}] must leave an id that begin_suppress does not name, got none")
            lists[first] = self._numbers[ids]
        return lists

    @property
    def bits(self) -> np.ndarray:
        """int32 [lists, ceil(V / 32)]: the lists as `sample_head` reads them."""
        allowed = np.ones((len(self._numbers) + 1, -(-self.vocab_size // 32) * 32), bool)
        allowed[1:] = False
        for ids, number in self._numbers.items():
            allowed[number, list(ids)] = True
        return np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
