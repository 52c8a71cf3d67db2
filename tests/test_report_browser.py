"""The page of `unmask report` at work, in a headless Chromium: what people see, by pointer and by keyboard."""

import os
import shutil
from copy import deepcopy

import pytest

from tests import result_files
from unmask.page.render import render
from unmask.page.results import read
from unmask.study.record import save_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium, such as Debian's package of that name", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'unmask[browser]'")

MASKED = "document.querySelectorAll('.token.masked').length"
SHOWN = """[...document.querySelectorAll('.token .ink')]
    .filter(ink => getComputedStyle(ink).visibility === 'visible').map(ink => ink.textContent).join('')"""


@pytest.fixture(scope="module")
def profile():
    return result_files.profile()


@pytest.fixture(scope="module")
def address(profile, tmp_path_factory):
    """Writes a page of the results given, by default of one of each kind; gives its address."""
    folder = tmp_path_factory.mktemp("pages")
    studies = {name: result_files.study(f"{name}.json") for name in ("search-light", "importance")}
    every = {"profile": profile, "operators": result_files.operators(), "peers": result_files.peers(), **studies}

    def make(name="every", contents=every):
        for file, content in contents.items():
            save_json(content, folder / f"{file}.json")
        page = folder / f"{name}.html"
        page.write_text(render(read([folder / f"{file}.json" for file in contents])), encoding="utf-8")
        return page.as_uri()

    return make


@pytest.fixture(scope="module")
def browser():
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens a page, and in the end has nothing to complain of: no error, no message, no request but for the page."""
    contexts, complaints = [], []

    def open_page(url=None, clock=False, **look):
        url = url or address()
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **look}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url == url or complaints.append(request.url))
        if clock:
            page.clock.install()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def scrub(page, step):
    page.locator(".slider").evaluate(
        "(slider, step) => { slider.value = step; slider.dispatchEvent(new Event('input')) }", step
    )


def shown_after(sample, step):
    return "".join(piece for piece, at in zip(sample["pieces"], sample["reveal_step"], strict=True) if at < step)


def test_it_draws_every_kind_of_result(visit):
    page = visit()
    assert page.locator("h2").all_text_contents()[2:] == ["Beside others", "Schedules", "Importance of steps"]
    assert page.locator("h2 .partial").count() == 1
    assert page.locator(".chart svg").count() == 5
    assert page.locator(".roof path").count() == 1
    assert page.locator(".placements tbody tr").count() == 28
    assert page.locator(".workload tbody tr").count() == 6
    assert page.locator(".law.fails").count() == 1
    assert "[object" not in page.locator("main").inner_text()
    drawn = page.evaluate("[...document.querySelectorAll('svg [d], svg [transform]')].map(one => one.outerHTML).join()")
    assert "NaN" not in drawn and "undefined" not in drawn and "Infinity" not in drawn


def test_the_slider_unmasks_the_text(visit, profile):
    page, sample = visit(), profile["samples"][0]
    given = shown_after(sample, 0)
    assert given.startswith("Fellow citizens")
    assert page.evaluate(SHOWN) == given
    assert page.evaluate(MASKED) == sum(at >= 0 for at in sample["reveal_step"])
    for step in (5, 11, 3):
        scrub(page, step)
        assert page.evaluate(SHOWN) == shown_after(sample, step)
        assert page.locator(".where").inner_text().startswith(f"step {step} of 16 · ")
        assert page.locator(".fresh").count() == sum(at == step - 1 for at in sample["reveal_step"])
    scrub(page, 16)
    assert page.evaluate(SHOWN) == sample["text"]
    assert page.evaluate(MASKED) == 0
    page.get_by_label("Sample").and_(page.locator("select")).first.select_option("1")
    assert page.evaluate(SHOWN) == profile["samples"][1]["text"]


def test_nothing_moves_while_it_unmasks(visit):
    page = visit()
    boxes = "JSON.stringify([...document.querySelectorAll('.token')].map(one => one.getBoundingClientRect()))"
    before = page.evaluate(boxes)
    scrub(page, 16)
    assert page.evaluate(boxes) == before


def test_the_keyboard_goes_through_steps(visit, profile):
    page, sample = visit(), profile["samples"][0]
    page.get_by_label("Steps done").focus()
    for keys, step in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Shift+ArrowRight", 11), ("End", 16)]:
        page.keyboard.press(keys)
        assert page.evaluate(SHOWN) == shown_after(sample, step)
    page.keyboard.press("Home")
    assert page.evaluate(SHOWN) == shown_after(sample, 0)


def test_it_plays_to_the_end_and_can_be_paused(visit, profile):
    page, sample = visit(clock=True), profile["samples"][0]
    page.get_by_label("Steps done").focus()
    page.keyboard.press(" ")
    page.clock.run_for(6000)
    page.get_by_role("button", name="Pause").click()
    half = page.evaluate(SHOWN)
    assert len(shown_after(sample, 0)) < len(half) < len(sample["text"])
    page.clock.run_for(6000)
    assert page.evaluate(SHOWN) == half
    page.get_by_label("Speed").select_option("4")
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(3000)
    assert page.evaluate(SHOWN) == sample["text"]
    page.get_by_role("button", name="Play").wait_for()


def test_a_token_tells_its_step_model_and_probability(visit, profile):
    page, sample = visit(), profile["samples"][0]
    last = len(sample["pieces"]) - 1
    step = sample["reveal_step"][last]
    model = profile["models"][profile["steps"]["models"][step]]["name"]
    about = page.locator(".about")
    page.locator(".token").first.focus()
    assert about.inner_text().endswith("position 0 · given")
    page.keyboard.press("End")
    assert about.inner_text() == f"masked position {last} · planned for step {step + 1} · {model}"
    page.keyboard.press("Enter")
    assert page.evaluate(SHOWN) == shown_after(sample, step + 1)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    logprob = f"{sample['logprobs'][last]:.2f}".replace("-", "−")
    assert f" position {last} · step {step + 1} · {model} · log-probability {logprob} (" in about.inner_text()
    page.locator(".token").first.hover()
    assert about.inner_text().endswith("position 0 · given")


def test_tokens_are_coloured_by_model_or_by_log_probability(visit, profile):
    page, sample = visit(reduced_motion="reduce"), profile["samples"][0]
    scrub(page, 16)
    backgrounds = """[...document.querySelectorAll('.token:not(.given) .bar')]
        .map(one => getComputedStyle(one).backgroundColor)"""
    by_model = page.evaluate(backgrounds)
    assert len(set(by_model)) == len({profile["steps"]["models"][at] for at in sample["reveal_step"] if at >= 0}) == 2
    page.get_by_label("log-probability").check()
    assert len(set(page.evaluate(backgrounds))) > len(by_model) / 2


def test_the_dark_has_its_own_colours(visit):
    colours = "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
    light, dark = (visit(color_scheme=scheme).evaluate(colours) for scheme in ("light", "dark"))
    brightness = [[sum(map(int, one.strip("rgb()").split(","))) for one in pair] for pair in (light, dark)]
    assert brightness[0][0] > 700 > 150 > brightness[0][1]
    assert brightness[1][0] < 150 < 600 < brightness[1][1]


@pytest.mark.parametrize("width", [360, 800])
def test_a_phone_does_not_scroll_sideways(visit, width):
    page = visit(viewport={"width": width, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("summary").evaluate_all("all => all.forEach(one => one.click())")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_charts_are_read_by_arrow_keys(visit):
    page = visit()
    for chart in page.locator(".chart").all():
        chart.focus()
        page.keyboard.press("ArrowRight")
        first = chart.locator(".tip").inner_text()
        page.keyboard.press("End")
        assert first and chart.locator(".tip").inner_text() != first
        page.keyboard.press("Escape")
        assert chart.locator(".tip").inner_text() == ""


def test_everything_that_acts_has_a_name_and_is_reached_by_tab(visit):
    page = visit()
    unnamed = """[...document.querySelectorAll('button, input, select, [tabindex="0"]')]
        .filter(one => !one.ariaLabel && !one.labels?.length && !one.textContent.trim()).map(one => one.outerHTML)"""
    assert page.evaluate(unnamed) == []
    focus = """(one => [one, one.nextElementSibling, ...one.querySelectorAll('*')].filter(Boolean)
        .some(each => getComputedStyle(each).outlineStyle !== 'none'))(document.activeElement)"""
    seen = set()
    page.keyboard.press("Tab")
    while not page.evaluate("document.activeElement === document.body"):
        seen.add(page.evaluate("document.activeElement.className || document.activeElement.tagName"))
        assert page.evaluate(focus), page.evaluate("document.activeElement.outerHTML")
        page.keyboard.press("Tab")
    assert {"slider", "play", "chart", "scroll", "SELECT", "SUMMARY"} <= seen


def test_who_wants_little_motion_gets_none(visit):
    page = visit(reduced_motion="reduce")
    assert page.locator(".token .bar").first.evaluate("bar => getComputedStyle(bar).transitionDuration") == "0s"


def test_texts_that_look_like_markup_are_shown_as_text(visit, address, profile):
    hostile = result_files.hostile(profile)
    page = visit(address("hostile", {"hostile": hostile}))
    scrub(page, 16)
    assert page.evaluate(SHOWN) == hostile["samples"][0]["text"]
    assert page.evaluate("window.broken") is None
    assert page.locator("main img, main script").count() == 0


def test_results_with_little_in_them_are_drawn_too(visit, address, profile):
    bare = deepcopy(profile)
    bare |= {"samples": [], "occupancy": None, "flops_share": None, "peak_bytes": None, "logits_bytes_avoided": None}
    bare["ticks"] = {name: [] for name in bare["ticks"]}
    empty = {**result_files.operators(), "rows": [], "ceilings": []}
    nobody = {**result_files.peers(), "rows": []}
    page = visit(address("bare", {"bare": bare, "empty": empty, "nobody": nobody}))
    text = page.locator("main").inner_text()
    for said in ("No text", "This run made no network call.", "No operator was timed.", "No run was timed."):
        assert said in text
