"""`unmask report`: what it makes of result files, and what it refuses. The page at work: test_report_browser.py."""

import base64
import errno
import hashlib
import json
import sys
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests import result_files
from unmask import cli
from unmask.page import profile as profile_view
from unmask.page.render import SCRIPTS, _asset
from unmask.page.results import READERS, read


@pytest.fixture
def files(tmp_path):
    """Writes result files, by name; gives their paths."""

    def write(**contents):
        paths = [tmp_path / f"{name}.json" for name in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return paths

    return write


@pytest.fixture
def report(monkeypatch, capsys):
    """Runs `unmask report ARGUMENTS` and gives (exit status, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["unmask", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return call


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of style and script elements."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.raw = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.raw.append((tag, ""))

    def handle_data(self, data):
        if self.cdata_elem:
            self.raw[-1] = (self.raw[-1][0], self.raw[-1][1] + data)


def every_kind():
    return {
        "profile": result_files.profile(),
        "operators": result_files.operators(),
        "peers": result_files.peers(),
        "search": result_files.study("search-light.json"),
        "importance": result_files.study("importance.json"),
    }


def changed(content, path, value):
    """`content` with the value at `path` replaced, or removed where it is `...`."""
    copied = deepcopy(content)
    *parents, last = path
    parent = copied
    for key in parents:
        parent = parent[key]
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    return copied


def test_every_kind_is_read_in_the_order_given(files):
    contents = every_kind()
    assert set(contents) == set(READERS)
    sections = read(files(**contents))
    assert [section["kind"] for section in sections] == list(contents)
    assert [section["file"] for section in sections] == [f"{name}.json" for name in contents]
    assert [section["partial"] for section in sections] == [False, True, False, False, False]
    assert sections[0]["samples"][0]["pieces"] == contents["profile"]["samples"][0]["pieces"]
    assert len(sections[3]["rows"]) == len(contents["search"]["rows"])


def test_the_command_writes_one_small_page(files, report, tmp_path):
    out = tmp_path / "page.html"
    status, told, _ = report(*files(**every_kind()), "-o", out)
    assert status == 0
    assert told.startswith(f"{out}: 5 result files, ")
    assert 50_000 < out.stat().st_size < 300_000


def test_the_page_is_self_contained_and_only_its_own_code_may_act(files, report, tmp_path):
    out = tmp_path / "page.html"
    report(*files(**every_kind()), "-o", out)
    found = Elements(out.read_text())
    policy = next(one["content"] for tag, one in found.tags if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    (_, style), (_, data), (_, script) = found.raw
    for text in (style, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert len(json.loads(data)) == 5
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not attributes.keys() & {"src", "href", "style"} and not any(one.startswith("on") for one in attributes)
    for word in ("http://", "https://", "url(", "@import", "innerHTML", "eval("):
        assert word not in (style + script).replace("http://www.w3.org/2000/svg", "")


def test_texts_of_a_file_never_become_markup(files, report, tmp_path):
    out = tmp_path / "page.html"
    hostile = result_files.hostile(result_files.profile())
    report(*files(run=hostile), "-o", out)
    found = Elements(out.read_text())
    assert [tag for tag, _ in found.raw] == ["style", "script", "script"]
    (section,) = json.loads(found.raw[1][1])
    assert "".join(section["samples"][0]["pieces"]) == hostile["samples"][0]["text"]
    assert section["about"]["machine"]["cpu"] == hostile["machine"]["cpu"]


def test_scripts_of_the_page_are_the_files_beside_it():
    folder = result_files.STUDIES.parents[2] / "engine" / "page" / "assets"
    assert sorted(SCRIPTS) == sorted(path.stem for path in folder.glob("*.js"))
    for name in SCRIPTS:
        assert "</script" not in _asset(f"{name}.js")


def test_many_ticks_are_merged(files):
    content = result_files.profile()
    count = 3 * profile_view.MOST_TICKS + 5
    columns = {
        "model": [0] * (count - 4) + [1] * 4,
        "num_sequences": [2, 4] * (count // 2) + [4] * (count % 2),
        "num_rows": [1] * count,
        "start": [0.01 * i for i in range(count)],
        "total": [0.01] * count,
    }
    (section,) = read(files(run=changed(content, ["ticks"], columns)))
    ticks = section["ticks"]
    assert (ticks["count"], ticks["merged"]) == (count, 4)
    assert len(ticks["model"]) == len(ticks["end"]) == -(-(count - 4) // 4) + 1
    assert ticks["num_sequences"][:3] == [3, 3, 3]
    assert ticks["end"][-1] == pytest.approx(0.01 * count)
    assert ticks["start"] == sorted(ticks["start"])


def test_a_model_without_a_tokenizer_has_no_text(files):
    content = changed(result_files.profile(), ["samples", 0, "text"], None)
    (section,) = read(files(run=content))
    assert section["samples"][0] == {"index": 0, "pieces": None}


MALFORMED = [
    ("profile", ["ticks", "model"], ..., "ticks.model is missing"),
    ("profile", ["ticks", "num_rows"], [1, 2], "ticks.num_rows must be a list of 14 integers, got [1, 2]"),
    ("profile", ["ticks", "model", 2], 7, "ticks.model[2] must be from 0 to 1, got 7"),
    ("profile", ["ticks", "total", 1], -1.0, "ticks.total[1] must be from 0 on, got -1.0"),
    ("profile", ["steps", "models"], [0], "steps.models must be a list of 16 integers, got [0]"),
    ("profile", ["phases", "plan"], "fast", 'phases.plan must be a number from 0 on, got "fast"'),
    ("profile", ["phases", "total"], ..., "phases.total is missing"),
    (
        "profile",
        ["samples", 1, "text"],
        "Other",
        "samples[1].pieces must be pieces that concatenate to the text, got [",
    ),
    ("profile", ["samples", 0, "reveal_step", 5], 16, "samples[0].reveal_step[5] must be from -1 to 15, got 16"),
    ("profile", ["models", 0, "num_blocks"], True, "models[0].num_blocks must be a whole number from 0 on, got true"),
    ("profile", ["models"], [], "models must be a list of at least 1, got []"),
    ("profile", ["max_batch"], 0, "max_batch must be a whole number from 1 on, got 0"),
    ("profile", ["schema"], 2, "schema must be 1, got 2"),
    ("profile", ["partial"], "yes", 'partial must be true or false, got "yes"'),
    ("profile", ["command"], "unmask", 'command must be a list, got "unmask"'),
    ("operators", ["rows", 3, "timings", "cold"], {"median": 1}, "rows[3].timings.cold.p20 is missing"),
    ("operators", ["rows", 0, "role"], "hero", "rows[0].role must be one of implementation, peer, part, ceiling"),
    ("operators", ["ceilings"], None, "ceilings must be a list, got null"),
    ("peers", ["rows", 1, "seconds", "runs"], 3, "rows[1].seconds.runs must be a list, got 3"),
    ("peers", ["skipped", 0, "reason"], ..., "skipped[0].reason is missing"),
    ("search", ["rows", 2, "models"], ["heavy"], "rows[2].models must be a list of 8 out of heavy, light"),
    ("search", ["rows", 1, "measure", "low"], "x", 'rows[1].measure.low must be a number, got "x"'),
    ("importance", ["bins", 0, "kl", "light"], ..., "bins[0].kl.light is missing"),
]


@pytest.mark.parametrize(("kind", "path", "value", "message"), MALFORMED)
def test_a_malformed_file_is_named_with_its_field(kind, path, value, message, files):
    (file,) = files(RUN=changed(every_kind()[kind], path, value))
    with pytest.raises(ValueError) as error:
        read([file])
    said = str(error.value).removeprefix(str(file))
    assert said.startswith(f": {message}") and "\n" not in said and len(said) < 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "soup"}', 'kind must be operators, peers, profile, search or importance, got "soup"'),
        ('{"kind": ["profile"]}', "kind must be operators, peers, profile, search or importance, got ["),
        ("{}", "kind is missing; it must be operators, peers, profile, search or importance"),
        ("[1]", "the file must be an object, got [1]"),
        ("no", "must be JSON, got Expecting value: line 1 column 1 (char 0)"),
        ('{"a": NaN}', "must be JSON, got a number that is NaN"),
        ("[" * 10**5, "must be JSON, got maximum recursion depth exceeded"),
    ],
)
def test_what_is_no_result_file_is_refused(content, message, files):
    (file,) = files(RUN=content)
    with pytest.raises(ValueError) as error:
        read([file])
    assert str(error.value).startswith(f"{file}: {message}")


def test_errors_leave_the_page_that_stood_there(files, report, tmp_path):
    (good,) = files(good=result_files.peers())
    (bad,) = files(bad="{}")
    out = tmp_path / "page.html"
    out.write_text("as it was")
    before = sorted(tmp_path.iterdir())
    for arguments, message in [
        ([good, bad, "-o", out], f"{bad}: kind is missing"),
        (
            [good, tmp_path / "none.json", "-o", out],
            f"{tmp_path / 'none.json'}: could not be read: No such file or directory",
        ),
        (["-o", out], "report needs result files, got none"),
        ([good, "-o", tmp_path / "none" / "page.html"], "out must lie in a folder that exists, got "),
        ([good, "-o", tmp_path], "out must be a file, got the folder "),
        ([good, "-o", good], "out must not be one of the result files, got "),
    ]:
        status, told, error = report(*arguments)
        assert (status, told) == (2, "")
        assert error.startswith(f"unmask: error: {message}") and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert out.read_text() == "as it was"


def test_a_full_disk_leaves_the_page_that_stood_there(files, report, tmp_path, monkeypatch):
    (run,) = files(run=result_files.peers())
    out = tmp_path / "page.html"
    out.write_text("as it was")
    before = sorted(tmp_path.iterdir())

    def write_half(path, text, encoding):
        path.write_bytes(text[: len(text) // 2].encode(encoding))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    status, _, error = report(run, "-o", out)
    assert (status, error) == (2, f"unmask: error: out {str(out)!r} could not be written: No space left on device\n")
    assert sorted(tmp_path.iterdir()) == before
    assert out.read_text() == "as it was"
