"""Which ids may a position draw? Lists of ids for single positions of a request."""

from collections.abc import Mapping, Sequence

import numpy as np

from unmask.arguments import checked_ids, short

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
        checked_ids("suppress", suppress, vocab_size)
        checked_ids("begin_suppress", begin_suppress, vocab_size)
        if len(self._suppressed) == vocab_size:
            raise ValueError(f"suppress must leave an id that is not suppressed, got all {vocab_size} of them")
        self.one_for_each = isinstance(allow, Sequence)
        if not (self.one_for_each or isinstance(allow, Mapping | None)):
            raise TypeError(f"allow must be a mapping from positions to ids or a list of them, got {short(allow)}")
        for one in allow if self.one_for_each else ():
            if not isinstance(one, Mapping | None):
                raise TypeError(f"allow must be a list of mappings from positions to ids, got {short(one)} in it")
        self._allow = [dict(one or {}) for one in allow] if self.one_for_each else [dict(allow or {})]
        self._numbers: dict[frozenset[int], int] = {}
        self._at_first: dict[frozenset[int], int] = {}  # a list's number where it stands first and ids are suppressed
        self._everything = frozenset(range(vocab_size)) if self._at_begin else frozenset()
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
        """Number a mapping's lists, and make sets of them."""
        for position, ids in allowed.items():
            if isinstance(position, bool) or not isinstance(position, int | np.integer) or position < 0:
                raise ValueError(f"allow must have positions from 0, got {position!r}")
            allowed[position] = frozenset(checked_ids(f"allow[{position}]", ids, self.vocab_size))
            self._number(allowed[position], f"allow[{position}]")
        if self._at_begin:
            for ids in {self._everything, *allowed.values()} - self._at_first.keys():
                if ids - self._at_begin - self._suppressed or ids is self._everything:
                    self._at_first[ids] = self._number(ids - self._at_begin, "begin_suppress")

    def _number(self, ids: frozenset[int], name: str) -> int:
        if not ids - self._suppressed:
            raise ValueError(f"{name} must leave an id that is not suppressed, got {short(sorted(ids))}")
        return self._numbers.setdefault(ids, len(self._numbers) + 1)

    def of(self, index: int, masked: np.ndarray, length: int) -> np.ndarray:
        """int32 [length]: the list of each position of sample `index`, whose `masked` positions ascend."""
        allowed = self._allow[index if self.one_for_each else 0]
        beyond = [position for position in allowed if position >= length]
        if beyond:
            raise ValueError(f"allow must have positions below the length {length}, got {beyond[0]}")
        lists = np.zeros(length, np.int32)
        for position, ids in allowed.items():
            lists[position] = self._numbers[ids]
        if self._at_begin and len(masked):
            first = int(masked[0])
            ids = allowed.get(first, self._everything)
            if ids not in self._at_first:
                raise ValueError(f"allow[{first}] must leave an id that begin_suppress does not name, got none")
            lists[first] = self._at_first[ids]
        return lists

    @property
    def bits(self) -> np.ndarray:
        """int32 [lists, ceil(V / 32)]: the lists as `sample_head` reads them."""
        allowed = np.ones((len(self._numbers) + 1, -(-self.vocab_size // 32) * 32), bool)
        allowed[1:] = False
        for ids, number in self._numbers.items():
            allowed[number, list(ids)] = True
        return np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
