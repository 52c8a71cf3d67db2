"""What one command measured, as JSON and on the terminal; what its rows are, each benchmark says."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.ceilings import Ceilings
from benchmarks.results import write

SCHEMA = 1


@dataclass
class Report(ABC):
    """Rows with the ceilings they are held against (`row.against`); `partial` until all that was asked for is there."""

    kind: ClassVar[str]
    command: list[str]
    environment: dict
    partial: bool = True
    ceilings: list[Ceilings] = field(default_factory=list)
    rows: list[tuple[Any, Ceilings]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {
            "kind": self.kind,
            "schema": SCHEMA,
            "partial": self.partial,
            "command": self.command,
            **self.environment,
            "failures": self.failures,
            "ceilings": [asdict(one) for one in self.ceilings],
            "rows": [asdict(row) | row.against(ceilings) for row, ceilings in self.rows],
        }

    def save(self, path: Path | None) -> None:
        """Written whole or not at all."""
        if path is not None:
            write(path, self.as_dict())

    def show(self, console: Console) -> None:
        for ceilings in self.ceilings:
            console.print(
                f"ceilings, {ceilings.device} {ceilings.dtype}: {ceilings.bandwidth / 1e9:,.1f} GB/s "
                f"({ceilings.by} of {ceilings.num_bytes / 1e6:,.1f} MB), {ceilings.product / 1e9:,.0f} GFLOP/s",
                highlight=False,
            )
        for table in self.tables(console.width):
            console.print(table)
        for failure in self.failures:
            console.print(f"[red]{escape(failure)}[/red]")
        if self.partial:
            console.print("[yellow]partial: not everything asked for was measured[/yellow]")

    @abstractmethod
    def tables(self, width: int) -> list[Table]:
        """Of the rows, for a terminal of this width."""
