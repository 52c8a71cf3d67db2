"""Rows of the operators' benchmark: one variant at one size, what it took and what may be said of it."""

from dataclasses import dataclass, field, replace

from benchmarks.ceilings import Ceilings
from benchmarks.timing import Timing

KIND = "operators"
WAYS = "cold", "warm", "graph"
REFERENCE = "reference"


@dataclass(frozen=True)
class Row:
    """Timings are None where it was not timed; `note` says why.

    case            its part, model and count in words; `shape`: the sizes of the call
    implementation  the variant, whatever its role: implementation, peer, part (of what the peers do) or ceiling
    timings         seconds, "cold" and "warm": with the last-level cache flushed before each run, and right after the
                    same run; "graph": replay of a CUDA graph, cache flushed
    num_bytes       that the operator must move, and its FLOPs, counted by hand
    law             what the check found, and whether it passed; None where nothing was checked
    memory          peak bytes beyond the inputs
    side            whose kernels: of this checkout, or of the base it is held against
    ratios          for each way of timing, the time of the peers and of the reference over this variant's
    """

    operator: str
    case: str
    part: str
    model: str
    unit: str
    count: int
    implementation: str
    role: str
    device: str
    dtype: str
    shape: dict[str, int]
    num_bytes: int
    flops: int
    timings: dict[str, Timing | None] = field(default_factory=lambda: dict.fromkeys(WAYS))
    law: str | None = None
    law_passed: bool | None = None
    memory: int | None = None
    note: str | None = None
    side: str = "this"
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def way(self) -> str:
        """Of the timings, the one that is compared."""
        return "graph" if self.timings.get("graph") else "cold"

    @property
    def timing(self) -> Timing | None:
        return self.timings.get(self.way)

    @property
    def seconds(self) -> float | None:
        return self.timing and self.timing.median

    @property
    def key(self) -> tuple[str, ...]:
        """What the rows of two runs are matched by."""
        return self.operator, self.case, self.implementation, self.device, self.dtype

    def noted(self, note: str) -> "Row":
        return replace(self, note="; ".join(filter(None, (self.note, note))))

    def against(self, ceilings: Ceilings) -> dict[str, float | None]:
        """The floor that the ceilings predict, bytes and FLOPs per second, and their shares, 1 being all of it."""
        floor = ceilings.floor(self.num_bytes, self.flops)
        bandwidth, rate = (count / self.seconds if self.seconds else None for count in (self.num_bytes, self.flops))
        return {
            "floor": floor,
            "floor_share": floor / self.seconds if self.seconds else None,
            "bandwidth": bandwidth,
            "bandwidth_share": bandwidth / ceilings.bandwidth if self.seconds else None,
            "rate": rate,
            "rate_share": rate / ceilings.product if self.seconds else None,
            "ceiling_bandwidth": ceilings.bandwidth,
            "ceiling_rate": ceilings.product,
        }


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows of one case and side, `ratios` filled in for the implementations."""

    def against(row: Row, way: str) -> dict[str, float]:
        others = [
            each for each in rows if each is not row and (each.role == "peer" or each.implementation == REFERENCE)
        ]
        ours, theirs = row.timings[way], {other.implementation: other.timings[way] for other in others}
        return {name: timing.median / ours.median for name, timing in theirs.items() if timing} if ours else {}

    def by_way(row: Row) -> dict[str, dict[str, float]]:
        found = {way: against(row, way) for way in WAYS} if row.role == "implementation" else {}
        return {way: each for way, each in found.items() if each}

    return [replace(row, ratios=by_way(row)) for row in rows]
