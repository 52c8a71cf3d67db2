"""Types of command-line options that the benchmarks share."""

import argparse
from collections.abc import Callable, Iterable


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Some of the known names, separated by commas."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"must be names out of {','.join(known)}, got {text!r}")
        return found

    return parse


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    return sorted({count(part) for part in text.split(",")})
