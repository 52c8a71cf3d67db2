"""Candidates of a step: which rows they are, whichever shape they get, and which of them keep their token."""

import math
from dataclasses import replace

import pytest
import torch
from test_graphs import Repeated, with_executor  # noqa: F401, a fixture
from toys import random_dit

from unmask import Blocks, Categorical, Confidence, NonFiniteLogits, Sampler
from unmask import run as run_module
from unmask.candidates import Candidates, Packed
from unmask.graphs import Padded
from unmask.kernels import Offsets, sample_head

MASK = 9
SEQUENCES = [[MASK, 1, MASK, MASK], [2, 3], [MASK], [4, MASK, MASK, 5, MASK, MASK, 6]]
ENDS = torch.tensor([3, 2, 1, 7])
ROWS = [0, 2, 6, 8, 9, 11, 12]  # of all masked but the fourth place, behind its window


def packed(unused=0):
    tokens = torch.tensor([one for sequence in SEQUENCES for one in sequence] + [MASK] * unused)
    starts = torch.tensor([0, *map(len, SEQUENCES)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packed.of(tokens, starts, MASK)


def found(places=None, longest=0, unused=0):
    batch = packed(unused)
    return Candidates.of(batch, batch.masked & batch.before(ENDS), places, longest)


def used(candidates):
    return candidates.owner < candidates.num_sequences


def test_a_packed_batch_tells_of_its_sequences():
    batch = packed(unused=3)
    assert batch.per_sequence(batch.masked).tolist() == [3, 0, 1, 4]
    assert batch.first_masked().tolist() == [0, 0, 0, 1]
    assert batch.owner.tolist() == [0] * 4 + [1] * 2 + [2] + [3] * 7 + [4] * 3 and not batch.masked[-3:].any()
    assert batch.spread(torch.tensor([5, 6, 7, 8]))[:7].tolist() == [5, 5, 5, 5, 6, 6, 7]


@pytest.mark.parametrize(("places", "unused"), [(None, 0), (7, 0), (16, 0), (16, 5)])
def test_rows_are_the_masked_positions_before_the_ends(places, unused):
    one = found(places, 4, unused)
    here = used(one)
    assert one.rows[here].tolist() == ROWS and one.num.tolist() == [2, 0, 1, 4]
    assert one.position[here].tolist() == [0, 2, 0, 1, 2, 4, 5] and one.owner[here].tolist() == [0, 0, 2, 3, 3, 3, 3]
    assert one.rank[here].tolist() == [0, 1, 0, 0, 1, 2, 3]
    assert not one.rows[~here].any() and (one.rank < 4).all()
    if places is None:
        assert one.row_counts == (2, 0, 1, 4)
    else:
        assert one.row_counts.starts.tolist() == [0, 2, 2, 3, 7] and len(one.rows) == places


def test_more_candidates_than_there_is_room_for_are_none():
    """What is left of a sequence does not push away the rows of the next."""
    one = found(places=8, longest=2)
    assert one.rows[used(one)].tolist() == [0, 2, 6, 8, 9] and one.num.tolist() == [2, 0, 1, 2]
    assert one.row_counts.starts.tolist() == [0, 2, 2, 3, 5]


def chosen(candidates, marked):
    assert not marked[~used(candidates)].any()
    return candidates.rows[marked].tolist()


@pytest.mark.parametrize("places", [None, 12])
def test_rules_choose_by_rank(places):
    """Of the last sequence, rows 8, 9, 11 and 12, in the order of their scores: 9, 12 and 11 (equal), 8."""
    one = found(places, 4)
    scores, entropies = (torch.full((len(one.rows),), value) for value in (math.inf, 0.0))
    scores[used(one)] = torch.tensor([0.3, 0.2, -math.inf, 0.1, 0.9, 0.5, 0.5])
    entropies[used(one)] = torch.tensor([0.3, 0.4, 0.5, 1.0, 0.25, 0.5, 0.75])
    assert chosen(one, one.best(scores, torch.tensor([1, 5, 1, 2]))) == [0, 6, 9, 11]
    assert chosen(one, one.best(scores, torch.tensor([0, 0, 0, 3]))) == [9, 11, 12]
    assert chosen(one, one.above(scores, 0.5, 1)) == [0, 6, 9, 11, 12]
    assert chosen(one, one.above(scores, 2.0, 2)) == [0, 2, 6, 9, 11]
    assert chosen(one, one.bounded(scores, entropies, 0.0)) == [0, 6, 9]
    assert chosen(one, one.bounded(scores, entropies, 0.25)) == [0, 6, 9, 11]
    assert chosen(one, one.bounded(scores, entropies, 0.75)) == [0, 2, 6, 9, 11, 12]
    assert chosen(one, one.bounded(scores, entropies, 1.5)) == ROWS


# ---- What the host does not know of ----

LENGTHS = [30, 32, 11, 32, 21]


def network(lawless=lambda first, position: torch.zeros_like(position, dtype=torch.bool)):
    """A transformer some of whose rows are NaN; first: the token that a row's sequence begins with."""
    model = random_dit("a", 2, vocab_size=60, hidden=32, length=32)
    hidden = model.hidden

    def watched(batch, workspace):
        assert (batch.tokens >= 0).all(), "also what is unused must be an id"
        lengths = batch.lengths
        starts = lengths.starts if isinstance(lengths, Offsets) else torch.tensor([0, *lengths]).cumsum(0).int()
        owner = torch.bucketize(batch.rows.int(), starts[1:], right=True)
        bad = lawless(batch.tokens[starts[owner]], batch.row_positions)
        return hidden(batch, workspace).masked_fill(bad[:, None], math.nan)

    model.hidden = watched
    return model


def unchecked(*arguments, **options):
    """As a GPU, whose rows nobody waits to look at."""
    return sample_head(*arguments, **{**options, "check": False})


POLICIES = [
    Confidence(steps=4),
    Confidence("random", steps=9),
    Blocks(Confidence(steps=3), 7),
    Blocks(Confidence("margin", threshold=0.05), 7),
    Blocks(Confidence("entropy", entropy_bound=2.0), 7),
    Blocks(Confidence(threshold=0.05), 7, stop_id=4),
]


@pytest.mark.parametrize("draw_mask", [False, True])
@pytest.mark.parametrize("kind", [Padded, Repeated])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_rows_without_a_law_are_named_where_nobody_looks(policy, kind, draw_mask, with_executor, monkeypatch):  # noqa: F811
    """They stay masked, more of them than the host knows of, and harm nobody else."""
    monkeypatch.setattr(run_module, "sample_head", unchecked)
    with_executor(kind, 4)
    model = network(lambda first, position: (first == 7) & (position > 3))
    prompts, choose = [[5], [5, 3], [7], [5], [7, 2, 2]], Categorical(draw_mask=draw_mask)
    for max_batch in (2, 8):
        sampler = Sampler(model, reveal=policy, choose=choose, max_batch=max_batch)
        with pytest.raises(NonFiniteLogits, match=r"sequence (2|4), position 4: a logit was NaN"):
            sampler.sample(5, LENGTHS, prompt=prompts)
        good = sampler.sample(5, LENGTHS, prompt=[[5], [5, 3], [6], [5], [6, 2, 2]], seed=1)
        assert draw_mask or (good.tokens != 59).all()


@pytest.mark.parametrize(
    "policy",
    [
        Blocks(Confidence(threshold=0.9), 7),
        Blocks(Confidence("entropy", entropy_bound=0.1), 6),
        Blocks(Confidence(steps=4), 7),
        Blocks(Confidence(steps=4, eps=0.1), 7),
        Confidence("random", steps=5),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Padded, Repeated])
def test_drawn_masks_in_rounded_shapes(policy, kind, with_executor):  # noqa: F811
    """A block may be under way when the steps of a later, smaller one have come."""
    model = network()
    model.head = replace(model.head, bias=10.0 * (torch.arange(60) == 59))
    sampler = Sampler(model, reveal=policy, choose=Categorical(4.0, draw_mask=True), max_batch=4)
    expected = sampler.sample(5, 24, prompt=[5])
    assert (expected.tokens == 59).any()
    with_executor(kind, 4)
    samples = sampler.sample(5, 24, prompt=[5])
    assert torch.equal(samples.tokens, expected.tokens) and torch.equal(samples.reveal_step, expected.reveal_step)
