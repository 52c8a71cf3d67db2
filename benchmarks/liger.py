"""Results as CSV in the columns that Liger-Kernel's benchmarks_visualizer.py reads."""

import csv
import io
import json
from datetime import datetime
from pathlib import Path

from benchmarks import results
from benchmarks.operator_report import OperatorReport
from benchmarks.rows import Row

COLUMNS = (
    *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit"),
    *("x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80"),
    *("extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version"),
)
_COUNTED = "num_rows", "num_sequences"
_LABELS = {"R": "rows", "B": "sequences"}


def write(path: Path, report: OperatorReport) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for row, _ in report.rows:
        table.writerows(_lines(row, report.environment))
    results.write_text(path, text.getvalue())


def _lines(row: Row, environment: dict) -> list[dict]:
    """One for each way of timing, which is the mode, and one for memory, whose mode must be "full"."""
    # The visualiser draws one plot for each name and configuration, with the rows or sequences as x.
    sizes = {name: size for name, size in row.shape.items() if name not in _COUNTED}
    common = {
        "kernel_name": f"{row.operator}-{row.part}-{row.model}-{row.dtype}",
        "kernel_provider": row.implementation if row.side == "this" else f"{row.implementation} ({row.side})",
        "x_name": row.unit,
        "x_label": _LABELS[row.unit],
        "x_value": row.count,
        "extra_benchmark_config_str": json.dumps(sizes | {"dtype": row.dtype}),
        "gpu_name": environment["machine"]["gpu"] or environment["machine"]["cpu"],
        "timestamp": datetime.fromisoformat(environment["date"]).strftime("%Y-%m-%d %H:%M:%S"),
        "liger_version": environment["versions"]["unmask"],
    }
    speed = common | {"metric_name": "speed", "metric_unit": "ms"}
    found = [
        speed
        | {"kernel_operation_mode": way}
        | _values(*(1e3 * each for each in (timing.median, timing.p20, timing.p80)))
        for way, timing in row.timings.items()
        if timing
    ]
    if row.memory is not None:
        memory = common | {"metric_name": "memory", "metric_unit": "MB", "kernel_operation_mode": "full"}
        found.append(memory | _values(*[row.memory / 2**20] * 3))
    return found


def _values(median: float, p20: float, p80: float) -> dict[str, float]:
    return {"y_value_50": median, "y_value_20": p20, "y_value_80": p80}
