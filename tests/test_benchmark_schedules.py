"""What the benchmark of schedules makes of seconds that are known."""

import json

import pytest
from test_calibration import KNOWN

import unmask
from benchmarks import schedules
from benchmarks.schedules import Row


@pytest.fixture
def slowing(monkeypatch):
    """A machine that becomes slower from run to run, and runs the heavy model in 8 and the light one in 4 seconds."""
    asked, seconds = [], {"heavy": 8.0, "heavy:50% light:50%": 6.0, "light": 4.0}

    def clock(run):
        schedule = str(run.func.__self__.schedule)
        asked.append(schedule)
        return seconds[schedule.replace(":100%", "")] * (1 + (len(asked) - 1) // 3)

    monkeypatch.setattr(schedules, "host_clock", clock)
    monkeypatch.setattr(unmask, "calibrate", lambda device, dtype, again: KNOWN)
    return asked


def test_savings_are_those_of_each_round(slowing, tmp_path, capsys):
    out = tmp_path / "found.json"
    small = "-n", "2", "--length", "8", "--reveal", "ancestral:4", "--rounds", "3", "--threads", "1"
    names = [part for name in ("heavy", "heavy:50% light:50%", "light") for part in ("--schedule", name)]
    assert schedules.main([*small, *names, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    heavy, half, light = found["rows"]
    assert heavy["seconds"] == [8, 16, 24] and light["saved"] == [0.5] * 3 and half["saved"] == [0.25] * 3
    assert heavy["saved_flops"] == 0 and heavy["realised"] is None
    assert light["realised"] == pytest.approx(0.5 / light["saved_flops"])
    # Four of twelve blocks, the head and the last block at the revealed rows only.
    assert 0.6 < light["saved_flops"] < light["saved_block_flops"] < 0.72
    assert half["predicted_seconds"] > light["predicted_seconds"] > 0
    assert found["models"].keys() == {"heavy", "light"} and found["command"][:3] == [
        "python",
        "-m",
        "benchmarks.schedules",
    ]
    shown = capsys.readouterr().err
    assert "heavy:50% light:50%" in shown and "50.0%–50.0%" in shown
    assert slowing[:3] != slowing[3:6] and sorted(slowing[:3]) == sorted(slowing[3:6])


def test_what_is_realised_is_the_median():
    row = Row("light", [1.0, 1.0, 1.0], [0.2, 0.3, 0.9], 0.6, 0.65, 1.0)
    assert row.realised == pytest.approx(0.5) and row.to_json()["realised"] == row.realised


def test_one_round_has_no_spread(capsys):
    with pytest.raises(SystemExit):
        schedules.main(["--rounds", "1"])
    assert "--rounds must be at least 2, for a spread, got 1" in capsys.readouterr().err


def test_the_help_names_the_schedules(capsys):
    with pytest.raises(SystemExit) as left:
        schedules.main(["--help"])
    assert left.value.code == 0 and "light:12.5% heavy:75% light:12.5%" in " ".join(capsys.readouterr().out.split())
