"""Prompts become templates. What a sampler does with bad ones is in test_sampler.py."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from unmask import DenoiserSpec
from unmask.prompt import Templates, check_count

M = 3
WORDS = ("we", "the", "people", "[MASK]", "of", "union")
SPEC = DenoiserSpec("toy", len(WORDS), M, 1, 0, 1, 1, 32)


@pytest.fixture(scope="module")
def templates():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Templates(SPEC, tokenizer, 32)


IDS = st.lists(st.integers(0, len(WORDS) - 1), max_size=12)


@given(st.integers(1, 32), IDS, IDS)
def test_prefix_and_suffix_stand_where_they_belong(length, prompt, suffix):
    templates = Templates(SPEC, None, 32)
    middle = length - len(prompt) - len(suffix)
    expected = prompt + [M] * middle + suffix
    if middle < 0 or M not in expected:
        with pytest.raises(ValueError, match=f"{len(prompt)}|masked position"):
            templates.build(length, prompt, suffix)
        return
    template = templates.build(length, prompt, suffix)
    assert template.dtype == np.int64 and template.tolist() == expected


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("we the people", [0, 1, 2]),
        ("we <mask> of", [0, M, 4]),
        ("we<mask:3>of", [0, M, M, M, 4]),
        ("<mask:2>", [M, M]),
        ("<mask><mask> we", [M, M, 0]),
        ("we [MASK]", None),  # how a tokenizer cuts its own mask token is its own business
    ],
)
def test_gaps_in_text(templates, text, ids):
    if ids is not None:
        assert templates.ids(text).tolist() == ids
    assert templates.ids(text).dtype == np.int64


@pytest.mark.parametrize("gap", ["<mask:0>", "<mask:-1>", "<mask:x>", "<mask:>", "<mask:4", f"<mask:{10**20}>"])
def test_gaps_that_make_no_sense(templates, gap):
    with pytest.raises(ValueError, match=r"prompt must have gaps of 1 to 32 tokens, .* got " + re.escape(gap)):
        templates.ids(f"we {gap}")


def test_a_gap_has_a_limit(templates):
    assert len(templates.ids("<mask:32>")) == 32
    with pytest.raises(ValueError, match=r"suffix must have gaps of 1 to 32 tokens, .* got <mask:33>"):
        templates.ids("<mask:33>", "suffix")


def test_one_template_for_all_is_built_once(templates):
    ((template, count),) = templates.requests(1000, 8, "we", None)
    assert count == 1000 and template.tolist() == [0, *[M] * 7]
    endless = templates.requests(None, 8, "we", None)
    first, second = next(endless), next(endless)
    assert first[0] is second[0] and first[1] > 0


@pytest.mark.parametrize(
    ("prompt", "starts"),
    [
        (["we", "of"], [[0], [4]]),
        (["we", [1, 2]], [[0], [1, 2]]),
        (("we", None), [[0], []]),
        (np.array([[0, 1], [4, 5]]), [[0, 1], [4, 5]]),
        ([np.array([0]), np.array([1, 2])], [[0], [1, 2]]),
        (iter(["we", "of"]), [[0], [4]]),
    ],
)
def test_one_prompt_for_each(templates, prompt, starts):
    requests = list(templates.requests(2, 4, prompt, None))
    assert [count for _, count in requests] == [1, 1]
    for (template, _), start in zip(requests, starts, strict=True):
        assert template.tolist() == start + [M] * (4 - len(start))


def test_one_of_each_kind(templates):
    requests = list(templates.requests(3, [4, 5, 6], ["we", "the", "of"], [5]))
    assert [template.tolist() for template, _ in requests] == [
        [0, M, M, 5],
        [1, M, M, M, 5],
        [4, M, M, M, M, 5],
    ]


def test_lists_end_together_when_no_number_is_given(templates):
    prompts, suffixes = itertools.cycle([[0], [1]]), iter([[2], [4], [5]])
    requests = list(templates.requests(None, 3, prompts, suffixes))
    assert [template.tolist() for template, _ in requests] == [[0, M, 2], [1, M, 4], [0, M, 5]]


def test_prompts_are_read_one_by_one(templates):
    read = []
    requests = templates.requests(3, 4, (read.append(i) or [i] for i in range(5)), None)
    assert read == []
    for expected in range(3):
        assert next(requests)[0][0] == expected and read == list(range(expected + 1))
    assert list(requests) == [] and read == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([0, 6], ValueError),
        ([-1], ValueError),
        (np.array([2**63], np.uint64), ValueError),
        ([0.5], TypeError),
        ([True], TypeError),
        (np.zeros((1, 2, 2), int), TypeError),
        (7, TypeError),
        ([["we"]], TypeError),
        ([[0, [1]]], TypeError),
    ],
)
def test_bad_prompts(templates, prompt, error):
    with pytest.raises(error, match="prompt must"):
        list(templates.requests(1, 4, prompt, None))


def test_a_mask_id_that_is_not_the_last_or_first():
    for mask_id in range(3):
        templates = Templates(DenoiserSpec("toy", 3, mask_id, 1, 0, 1, 1, 8), None, 8)
        given = [token for token in range(3) if token != mask_id]
        assert templates.build(4, given).tolist() == [*given, mask_id, mask_id]


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (True, TypeError), (1.0, TypeError), (None, TypeError)])
def test_counts(value, error):
    check_count("num_samples", np.int32(1))
    with pytest.raises(error, match=f"num_samples must .* got {value}"):
        check_count("num_samples", value)
