"""Two runs held against each other: verdicts, bands, rows of one run only, files that are malformed."""

import io
import json
import re

import pytest
from measured import CEILINGS, row
from rich.console import Console

from benchmarks import compare
from benchmarks.compare import Match, compared, show
from benchmarks.operator_report import OperatorReport
from benchmarks.timing import Timing

MACHINE = {"machine": {"cpu": "A", "threads": 1}, "versions": {"torch": "2.13"}}


def match(first, second):
    return Match(row("cpu"), "cold", Timing(*first, 9), Timing(*second, 9))


@pytest.mark.parametrize(
    ("first", "second", "verdict"),  # median, p20, p80
    [
        ((100, 99, 101), (100.9, 100.5, 101.5), "SAME"),  # less than 1 % apart
        ((100, 99, 101), (104, 103, 105), "SLOW"),
        ((100, 99, 101), (96, 95, 97), "FAST"),
        ((100, 92, 108), (106, 105, 107), "SAME"),  # inside the noise of the first
        ((106, 105, 107), (100, 92, 108), "SAME"),  # or of the second
        ((100, 99, 101), (104, 100, 105), "AMBG"),  # further apart than the band, and yet they meet
        ((100, 99, 101), (96, 95.5, 100), "AMBG"),
        ((100, 80, 120), (100, 99, 101), "AMBG"),  # too noisy to be called the same
        ((100, 80, 120), (200, 160, 240), "SLOW"),
    ],
)
def test_verdicts(first, second, verdict):
    assert match(first, second).verdict == verdict


def test_the_band_is_the_larger_noise_and_no_less_than_a_hundredth():
    assert match((100, 97, 103), (50, 45, 51)).band == pytest.approx(0.06)
    assert match((100, 100, 100), (50, 50, 50)).band == 0.01


def saved(path, rows, **environment):
    OperatorReport([], MACHINE | environment, False, rows=[(each, CEILINGS) for each in rows]).save(path)
    return str(path)


def test_rows_are_matched_and_the_rest_is_listed(tmp_path, capsys):
    first = [row("cpu", times={"cold": 1.0, "graph": 5.0}), row("cpu", count=8, times={"cold": 2.0})]
    second = [row("cpu", times={"cold": 2.0}), row("triton", times={"cold": 1.0}), row("cpu", count=8)]
    files = [saved(tmp_path / "a.json", first), saved(tmp_path / "b.json", second)]
    assert compare.main(files) == 0
    out = capsys.readouterr().out
    assert "a → b" in out and "+100.0%" in out and "0 FAST, 1 SLOW, 0 SAME, 0 AMBG" in out
    assert "only timed in a: sample_head whole bundled R=8 cpu cpu float32" in out
    assert "only timed in b: sample_head whole bundled R=2 triton cpu float32" in out
    assert "measured in different places" not in out
    assert compare.main([*files, "--fail-on-slow"]) == 1
    assert compare.main([*files[::-1], "--fail-on-slow"]) == 0


def test_graphs_are_compared_where_both_have_them():
    both = compared([row("A", times={"cold": 1, "graph": 3})], [row("A", times={"cold": 5, "graph": 3.3})])
    assert [(each.way, each.ratio) for each in both.matches] == [("graph", pytest.approx(1.1))]


def test_the_base_of_a_run_is_no_row_of_it(tmp_path):
    ours = row("cpu", times={"cold": 1.0})
    file = saved(tmp_path / "a.json", [row("cpu", times={"cold": 9.0}, side="base"), ours])
    assert compare.main([file, saved(tmp_path / "b.json", [ours]), "--fail-on-slow"]) == 0


def test_different_machines_are_said_in_one_line(tmp_path, capsys):
    rows = [row("cpu", times={"cold": 1.0})]
    other = {"machine": {"cpu": "B", "threads": 1}, "versions": {"torch": "2.12"}}
    compare.main([saved(tmp_path / "a.json", rows), saved(tmp_path / "b.json", rows, **other)])
    assert "measured in different places: cpu A and B; torch 2.13 and 2.12\n" in capsys.readouterr().out


def refused(files, sentence, capsys):
    """With a status that is not that of a row that is slow."""
    assert compare.main([*files, "--fail-on-slow"]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_nothing_in_common_is_an_error(tmp_path, capsys):
    files = [saved(tmp_path / f"{name}.json", [row(name, times={"cold": 1.0})]) for name in ("A", "B")]
    refused(files, "have no timed row in common", capsys)


def damaged(content, *place, value):
    *way, last = place
    for key in way:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("kind",), "peers", r"b\.json: kind must be 'operators', got 'peers'"),
        (("kind",), None, r"b\.json: kind must be 'operators', got none"),
        (("schema",), 2, r"b\.json: schema must be 1, got 2"),
        (("machine",), 5, r"b\.json: machine must be an object, got 5"),
        (("rows",), {}, r"b\.json: rows must be a list, got \{\}"),
        (("rows", 0), 5, r"b\.json: rows\[0\]: must be an object, got int"),
        (("rows", 0, "case"), None, r"b\.json: rows\[0\]: case must be a string, got none"),
        (("rows", 0, "timings", "warm"), 3, r"rows\[0\]\.timings: warm must be an object or null, got 3"),
        (("rows", 0, "timings", "cold", "p20"), 0, r"rows\[0\]\.timings\.cold: p20 must be a positive number, got 0"),
        (("rows", 0, "timings", "cold", "median"), "1", r"timings\.cold: median must be a positive number, got '1'"),
    ],
)
def test_malformed_files_name_themselves_and_the_field(place, value, sentence, tmp_path, capsys):
    good = saved(tmp_path / "a.json", [row("cpu", times={"cold": 1.0})])
    content = json.loads((tmp_path / "a.json").read_text())
    damaged(content, *place, value=value)
    (tmp_path / "b.json").write_text(json.dumps(content))
    refused([good, str(tmp_path / "b.json")], sentence, capsys)


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "half.json").write_text('{"kind": ')
    refused([str(tmp_path / "half.json")] * 2, r"half\.json: not JSON: ", capsys)
    refused([str(tmp_path / "absent.json")] * 2, r"absent\.json: No such file", capsys)


def test_the_table_fits(tmp_path):
    console = Console(file=io.StringIO(), width=120)
    show(compared([row("cpu", times={"cold": 1})], [row("cpu", times={"cold": 1})]), ("before", "after"), console)
    assert "SAME" in console.file.getvalue() and max(map(len, console.file.getvalue().splitlines())) <= 120
