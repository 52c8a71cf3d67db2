"""The page itself: template, style, scripts and data in one file."""

import base64
import hashlib
import json
from importlib.resources import files
from string import Template

STYLES = ("trajectory", "charts", "page")  # the page last: it says what is different on a phone and on paper
SCRIPTS = (
    "dom",
    "words",
    "scale",
    "chart",
    "player",
    "trajectory",
    "timeline",
    "profile",
    "roofline",
    "operators",
    "peers",
    "search",
    "importance",
    "main",
)
DIGITS = 6  # of the numbers on the page


def render(sections: list[dict]) -> str:
    """HTML of what `unmask.page.results.read` gives. Nothing but the style and the scripts of this package can act in
    it: its policy names them by their hash, and forbids every request."""
    style = "".join(_asset(f"{name}.css") for name in STYLES)
    script = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{script}}})();\n'
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'"
    return Template(_asset("page.html")).substitute(policy=policy, style=style, script=script, data=_data(sections))


def _asset(name: str) -> str:
    return files("unmask.page").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(sections: list[dict]) -> str:
    """JSON in ASCII without a "<": no text of a sample can end the element that it stands in."""
    return json.dumps(_rounded(sections), separators=(",", ":")).replace("<", "\\u003c")


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return value
