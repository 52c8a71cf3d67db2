"""The tables of the pages are those of the committed results."""

import pytest

from benchmarks import tables
from benchmarks.markdown import markdown

PAGE = """# A page

<!-- table one -->

| old |
| --- |

<!-- end -->

Between, `<!-- end -->` means nothing.

<!-- table two -->

<!-- end -->
"""


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_pages_say_what_the_results_say(page):
    """`make tables` writes them."""
    text = page.read_text(encoding="utf-8")
    assert tables.renewed(text, tables.PAGES[page]) == text


def test_tables_stand_between_their_marks():
    one, two = markdown(["a", ""], [["1", "2"]]), markdown(["b"], [])
    found = tables.renewed(PAGE, {"one": lambda: one, "two": lambda: two})
    assert one == "| a |  |\n| --- | --- |\n| 1 | 2 |" and "| old |" not in found
    assert f"<!-- table one -->\n\n{one}\n\n<!-- end -->\n\nBetween" in found
    assert found.endswith(f"<!-- table two -->\n\n{two}\n\n<!-- end -->\n")
    assert tables.renewed(found, {"one": lambda: one, "two": lambda: two}) == found


@pytest.mark.parametrize("names", [("one",), ("one", "two", "three"), ("one", "third")])
def test_every_table_has_its_mark(names):
    with pytest.raises(ValueError, match="tables of the page must be"):
        tables.renewed(PAGE, dict.fromkeys(names, lambda: ""))


def test_the_command_tells_and_writes_what_differs(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", {page: {"one": lambda: "1", "two": lambda: "2"}})
    assert tables.main(["--check"]) == 1 and page.read_text() == PAGE
    assert tables.main([]) == 0 and "| old |" not in page.read_text()
    assert capsys.readouterr().out == "page.md: differs from the results\npage.md: written\n"
    assert tables.main(["--check"]) == 0 and not capsys.readouterr().out
