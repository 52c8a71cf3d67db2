"""Who may have a speed: the checks' teeth."""

import math

import pytest
import torch

from benchmarks import verify
from benchmarks.cases import SEED
from benchmarks.cases.inputs import head_weight
from benchmarks.cases.sample_head import head_case
from benchmarks.peers import HEAD_PEERS, flash_sampling_style
from unmask import kernels
from unmask.kernels import dispatch

CPU = torch.device("cpu")


def right(hidden, weight, keys):
    return kernels.sample_head(hidden, weight, keys=keys, seed=SEED, impl=None).tokens


def warm(hidden, weight, keys):
    return kernels.sample_head(hidden, weight, keys=keys, seed=SEED, temperature=1.1).tokens


def reseeded(hidden, weight, keys):
    return kernels.sample_head(hidden, weight, keys=keys, seed=SEED + 1).tokens


def unwritten(hidden, weight, keys):
    return torch.full((len(hidden),), -1)


def case_of(part, num_rows=1, vocab_size=700):
    return head_case(part, head_weight(24, vocab_size, torch.float32, CPU), num_rows)


def law(draw, part="whole", num_draws=20_000, vocab_size=700):
    return verify.check_law(draw, case_of(part, vocab_size=vocab_size), num_draws)


@pytest.mark.parametrize("part", ["whole", "sampling"])
def test_the_law_check_passes_the_right_sampler_and_refuses_others(part):
    assert law(right, part).passed
    assert not law(warm, part).passed
    assert not law(unwritten, part).passed
    assert not law(lambda hidden, weight, keys: right(hidden, weight, keys).clamp(min=40), part).passed


@pytest.mark.parametrize("part", ["whole", "sampling"])
def test_tokens_must_be_those_of_the_reference(part):
    case = case_of(part, 40)
    tokens = right(case.hidden, case.weight, case.keys)
    assert verify.check_tokens(case, tokens).passed
    assert not verify.check_tokens(case, reseeded(case.hidden, case.weight, case.keys)).passed
    other = tokens.clone()
    other[-1] = (other[-1] + 1) % 700
    assert "row 39" in verify.check_tokens(case, other).detail


@pytest.mark.parametrize("apart", [1, 300])
def test_a_near_tie_is_forgiven(apart):
    """Two ids, of one block or of two, whose scores are equal but for rounding."""
    case = case_of("sampling")
    ids = [5, 5 + apart]
    case.hidden.fill_(-math.inf)
    if apart == 1:
        gumbel = kernels.noise.token_gumbel(SEED, case.keys, torch.tensor([ids]))
    else:
        gumbel = kernels.noise.block_gumbel(SEED, case.keys, 3)[:, [0, 2]]
    case.hidden[0, ids] = -gumbel[0]
    assert all(verify.check_tokens(case, torch.tensor([token])).passed for token in ids)
    case.hidden[0, ids[0]] += 1e-3
    assert [verify.check_tokens(case, torch.tensor([token])).passed for token in ids] == [True, False]


def test_a_law_is_drawn_once_for_all_sizes():
    draws = []

    def counted(hidden, weight, keys):
        draws.append(len(hidden))
        return right(hidden, weight, keys)

    first, second = (verify.check_law(counted, case_of("whole", num_rows), 3000) for num_rows in (2, 5))
    assert first == second and draws == [3000]


def test_agreement_is_held_to_what_each_output_may_differ():
    right, allowed = {"a": torch.ones(4), "b": torch.ones(4)}, {"a": 1e-5, "b": 1e-2}.get
    near = verify.check_agreement({"a": right["a"] + 1e-6, "b": right["b"] + 1e-3}, right, allowed)
    assert near == verify.Verdict(True, "b 1.0e-03 off, 1e-02 allowed")
    far = verify.check_agreement({"a": right["a"] + 1e-3, "b": right["b"]}, right, allowed)
    assert far == verify.Verdict(False, "a 1.0e-03 off, 1e-05 allowed")
    assert not verify.check_agreement({"a": right["a"], "b": torch.tensor([1, 1, 1, math.nan])}, right, allowed).passed


def test_chi_square_agrees_with_scipy():
    from scipy import stats

    observed, expected = torch.tensor([12.0, 31, 57, 2, 1]), torch.tensor([15.0, 30, 52, 3, 3])
    p = stats.chisquare([12, 31, 57, 3], [15, 30, 52, 6]).pvalue
    assert verify.chi_square(observed, expected) == pytest.approx(p, rel=1e-6)


def test_peers_draw_the_law():
    torch.manual_seed(1)
    for peer in HEAD_PEERS[:3]:
        for part in peer.parts:
            assert law(lambda hidden, weight, keys, peer=peer: peer.draw(hidden, weight), part).passed, peer.name


@pytest.mark.skipif(not dispatch.triton_status()[0], reason=dispatch.triton_status()[1])
def test_the_fused_peer_draws_the_law():
    for temperature in (1.0, 1.3):
        verdict = law(
            lambda hidden, weight, keys, by=temperature: flash_sampling_style(hidden / by, weight),
            num_draws=4_000,
            vocab_size=200,
        )
        assert verdict.passed == (temperature == 1), verdict.detail
