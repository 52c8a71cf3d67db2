"""Remasking of unlikely tokens: the law against the published chain, enumerated over partly masked states with the
probabilities of their tokens; what samples must not depend on; which network calls are left out."""

import ast
import os
from collections import defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_exactness import SMALLEST_P, goodness, histogram, table
from test_graphs import Repeated, with_executor  # noqa: F401, a fixture
from toys import MASK, Toy, inconsistent, random_dit

from unmask import Batch, Blocks, Caching, Categorical, LogitsDenoiser, RemaskConfidence, Sampler
from unmask.graphs import Padded
from unmask.progress import Progress
from unmask.reveal import parse

NUM_SAMPLES, LENGTH = 40_000, 3
EMPTY = (None,) * LENGTH

# ---- The law ----


def published(policy, step):
    """Chance to reveal a masked position, and sigma_max, as in `_ddpm_caching_update`; after the grid all is drawn."""
    if step == policy.steps:
        return 1.0, 0.0
    dt = (1 - policy.eps) / policy.steps
    t = 1 - step * dt
    alpha_t, alpha_s = 1 - t, 1 - t + dt
    return (alpha_s - alpha_t) / (1 - alpha_t), min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0


def softmax_of_doubt(state, drawn):
    """eta of each drawn position: softmax over minus the probabilities of their tokens."""
    weight = {i: np.exp(-state[i][1]) for i in drawn}
    return {i: one / sum(weight.values()) for i, one in weight.items()}


def evenly(state, drawn):
    return {i: 1 / len(drawn) for i in drawn}


def law(policy, toy, template=EMPTY, top_k=None, share=softmax_of_doubt):
    """Over finished sequences. A state has (value, its probability) at each revealed position, None at a masked one."""
    inner, size = getattr(policy, "policy", policy), getattr(policy, "length", LENGTH)
    masked = [i for i in range(LENGTH) if template[i] is None]
    states = {tuple(None if value is None else (value, None) for value in template): 1.0}
    for start in range(0, len(masked), size):
        for step in range(inner.steps + 1):
            states = advanced(states, toy, masked[start : start + size], *published(inner, step), top_k, share)
    finished = defaultdict(float)
    for state, weight in states.items():
        finished[tuple(value for value, _ in state)] += weight
    return table(finished, toy)


def advanced(states, toy, places, reveal, bound, top_k, share):
    following = defaultdict(float)
    for state, weight in states.items():
        seen = tuple(None if one is None else one[0] for one in state)
        eta = share(state, [i for i in places if state[i] is not None])
        outcomes = [[(one, 1.0)] for one in state]
        for i in places:
            if state[i] is None:
                p = np.array(toy.conditional(seen, i))
                if top_k is not None:
                    p[np.argsort(-p)[top_k:]] = 0
                    p /= p.sum()
                outcomes[i] = [(None, 1 - reveal), *(((v, p[v]), reveal * p[v]) for v in range(toy.num_ids) if p[v])]
            else:
                outcomes[i] = [(None, eta[i] * bound), (state[i], 1 - eta[i] * bound)]
        for way in product(*outcomes):
            if chance := np.prod([chance for _, chance in way]):
                following[tuple(one for one, _ in way)] += weight * chance
    return following


@pytest.fixture(scope="module")
def toy():
    return inconsistent(num_ids=2, length=LENGTH, seed=1)


def draw(toy, policy, seed=1, choose=None, **options):
    run = Sampler(toy, reveal=policy, choose=choose, max_batch=4096).stream(NUM_SAMPLES, LENGTH, seed=seed, **options)
    return torch.stack([sample.tokens for sample in run])


def check(tokens, expected, toy):
    p, variation = goodness(histogram(toy.values(tokens), toy), expected)
    assert p > SMALLEST_P, f"p = {p:.3g}, total variation {variation:.5f}"


@pytest.mark.parametrize(
    "policy",
    [RemaskConfidence(3), RemaskConfidence(4, eps=0.2), RemaskConfidence(1), Blocks(RemaskConfidence(3), 2)],
    ids=str,
)
def test_law(policy, toy):
    check(draw(toy, policy), law(policy, toy), toy)


def test_law_with_more_ids():
    toy = inconsistent(num_ids=3, length=LENGTH, seed=3)
    check(draw(toy, RemaskConfidence(2, eps=0.3)), law(RemaskConfidence(2, eps=0.3), toy), toy)


def test_the_law_tells_policies_apart(toy):
    """Otherwise the tests above could not: what is masked again depends on the probabilities of tokens, and blocks
    have a softmax of their own."""
    policies = RemaskConfidence(3), RemaskConfidence(4, eps=0.2), Blocks(RemaskConfidence(3), 2)
    laws = [law(policy, toy) for policy in policies] + [law(policies[0], toy, share=evenly)]
    apart = [abs(a - b).sum() / 2 for k, a in enumerate(laws) for b in laws[:k]]
    assert min(apart) > 0.005, apart


def test_given_positions_stay_and_share_in_nothing(toy):
    given = [int(toy.ids[1]), MASK, MASK]
    tokens = draw(toy, RemaskConfidence(3), prompt=given)
    assert (tokens[:, 0] == given[0]).all()
    check(tokens, law(RemaskConfidence(3), toy, (1, None, None)), toy)


def test_probabilities_are_those_of_the_law_that_is_drawn_from():
    toy = inconsistent(num_ids=3, length=LENGTH, seed=3)
    policy = RemaskConfidence(2, eps=0.3)
    check(draw(toy, policy, choose=Categorical(top_k=2)), law(policy, toy, top_k=2), toy)


def test_published_code():
    """The weights that the published step draws by, from states with tokens of known probability."""
    path = os.environ.get("UNMASK_REMDM")
    if path is None:
        pytest.skip("UNMASK_REMDM does not name a copy of kuleshov-group/remdm")
    wanted, tree = "_ddpm_caching_update", ast.parse((Path(path) / "diffusion.py").read_text())
    function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == wanted)
    seen = []

    def categorical(weights):
        seen.append(weights.double() / weights.double().clamp(min=0).sum(-1, keepdim=True))
        return torch.tensor([[0, 0, 2, 0]])

    names = {"torch": torch, "_sample_categorical": categorical}
    exec(compile(ast.Module([function], []), path, "exec"), names)
    config = SimpleNamespace(
        sampling=SimpleNamespace(nucleus_p=1, sampler="remdm-conf"), noise=SimpleNamespace(type="loglinear")
    )
    log_p = torch.tensor([[[0.25, 0.75, 0.0], *[[1.0, 0.0, 0.0]] * 3]]).log()
    model = SimpleNamespace(
        config=config, mask_index=2, time_conditioning=True, noise=lambda t: (t, t), forward=lambda x, sigma: log_p
    )
    policy = RemaskConfidence(6)
    for step in range(1, 6):
        reveal, bound = published(policy, step)
        conf = torch.tensor([[-torch.inf, -0.9, -0.2, -torch.inf]])
        x, t = torch.tensor([[2, 0, 0, 2]]), torch.full((1, 1), 1 - step * (1 - policy.eps) / policy.steps)
        *_, conf = names[wanted](model, x, t, (1 - policy.eps) / policy.steps, conf=conf)
        first, sure, doubted, _ = seen.pop()[0].clamp(0, 1)
        eta = softmax_of_doubt({1: (0, 0.9), 2: (0, 0.2)}, [1, 2])
        assert first.tolist() == pytest.approx([0.25 * reveal, 0.75 * reveal, 1 - reveal], abs=1e-5)
        assert sure.tolist() == pytest.approx([1 - eta[1] * bound, 0, eta[1] * bound], abs=1e-5)
        assert doubted.tolist() == pytest.approx([1 - eta[2] * bound, 0, eta[2] * bound], abs=1e-5)
        assert conf[0].tolist() == pytest.approx([-0.25, -0.9, -np.inf, -1.0])
        assert policy.chances[:, step].tolist() == pytest.approx([reveal, bound])


# ---- What samples must not depend on ----

POLICIES = {"plain": RemaskConfidence(12), "blocks": Blocks(RemaskConfidence(5, eps=0.1), 7)}
LENGTHS, CHOOSE = [17, 32, 5, 9, 32, 21], Categorical(0.7)


class Told(Toy):
    """Hears the mask rate too, so that a wrong one shows in the output."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.told = set()

    def logits(self, batch):
        told = batch.mask_rate.repeat_interleave(torch.tensor(batch.row_counts))
        self.told.update(batch.mask_rate.tolist())
        return super().logits(batch) + torch.sin(told[:, None] * 50 + torch.arange(self.spec.vocab_size))


def sample(model, policy, max_batch=3, seed=0, **options):
    sampler = Sampler(model, reveal=policy, choose=CHOOSE, max_batch=max_batch, **options)
    return sampler.sample(len(LENGTHS), LENGTHS, prompt=[5, 9], seed=seed)


def same(one, other):
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.reveal_step, other.reveal_step)


@pytest.mark.parametrize("name", POLICIES)
def test_samples_do_not_depend_on_their_company(name):
    toy = Told(40, 32)
    alone = sample(toy, POLICIES[name], 1)
    assert same(alone, sample(toy, POLICIES[name], 4)) and same(alone, sample(toy, POLICIES[name], 16, max_resident=2))
    assert not torch.equal(alone.tokens, sample(toy, POLICIES[name], 4, seed=1).tokens)
    assert (alone.tokens != MASK).all() and (alone.reveal_step[:, :2] == -1).all()


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", [Padded, Repeated])
@pytest.mark.parametrize("lengths", [LENGTHS, [32] * 6], ids=["ragged", "equal"])
def test_rounded_shapes_give_the_same_samples(name, kind, lengths, guidance, with_executor):  # noqa: F811
    """As a GPU runs them: rows counted on the device, and places that nobody uses."""
    dit = random_dit("a", 2, vocab_size=60, hidden=32, length=32)
    options = {"reveal": POLICIES[name], "choose": CHOOSE, "guidance": guidance, "max_batch": 4}
    expected = Sampler(dit, **options).sample(6, lengths, prompt=[5, 9])
    with_executor(kind, 4)
    found = Sampler(dit, **options).sample(6, lengths, prompt=[5, 9])
    assert same(expected, found) and torch.allclose(expected.logprobs, found.logprobs, atol=1e-5)


def test_other_models_give_the_same_samples():
    """One that only returns logits, and two that take turns."""
    toy = Toy(40, 32)

    def logits(tokens):
        num, length = tokens.shape
        batch = Batch(tokens.reshape(-1), (length,) * num, torch.arange(num * length), (length,) * num, torch.ones(num))
        return toy.logits(batch).view(num, length, -1)

    alone = sample(toy, POLICIES["plain"])
    assert same(alone, sample(LogitsDenoiser(logits, toy.spec, max_bytes=1), POLICIES["plain"]))
    both = sample({"a": toy, "b": Toy(40, 32)}, POLICIES["plain"], schedule="a:30% b:70%")
    assert same(alone, both) and min(both.stats.nfe.values()) > 0


# ---- What a run does ----


def test_a_step_that_reveals_nothing_costs_no_call():
    toy, steps = Toy(40, 8), 200
    samples = Sampler(toy, reveal=RemaskConfidence(steps), max_batch=4).sample(4, 8)
    assert toy.num_events == samples.stats.events < 4 * 60 and toy.num_calls == samples.stats.num_ticks < 120
    rows = sum(rows * count for (_, _, rows), count in samples.stats.cost.calls.items())
    assert rows > 4 * 8 and samples.stats.num_tokens == 4 * 8  # some are drawn more than once
    assert samples.reveal_step.max() <= steps


def test_the_time_of_the_grid_is_told():
    plain = Told(40, 32)
    sample(plain, POLICIES["plain"])
    assert plain.told <= set(np.float32(POLICIES["plain"].grid).tolist()) and len(plain.told) > 6
    blocks = Told(40, 32)
    Sampler(blocks, reveal=POLICIES["blocks"]).sample(20, 9, prompt=[5, 9, 4])
    assert blocks.told == set(np.float32(POLICIES["blocks"].policy.grid).tolist())  # one block of six
    Sampler(blocks, reveal=POLICIES["blocks"]).sample(50, 14)
    shares = [(grid * 7 + later) / 14 for grid in POLICIES["blocks"].policy.grid for later in (0, 7)]
    rest = blocks.told - set(np.float32(POLICIES["blocks"].policy.grid).tolist())
    assert max(min(abs(one - share) for share in shares) for one in rest) < 1e-6 and len(rest) > 6


class Counted(Progress):
    revealed = shown = 0

    def update(self, run, tick):
        self.revealed += tick.num_revealed
        tokens = run.tokens_of(0, 24)
        for slot, position in zip(tick.row_slot.tolist(), tick.row_position.tolist(), strict=True):
            assert slot or tokens[position] != 59
            self.shown += not slot
        for slot, position in zip(tick.masked_slot.tolist(), tick.masked_position.tolist(), strict=True):
            assert slot or tokens[position] == 59


@pytest.mark.parametrize("kind", [None, Padded])
def test_progress_is_told_what_is_revealed_and_masked_again(kind, with_executor):  # noqa: F811
    if kind is not None:
        with_executor(kind, 1)
    seen = Counted()
    dit = random_dit("a", 1, vocab_size=60, hidden=32, length=24)
    Sampler(dit, reveal=RemaskConfidence(30), max_batch=4).sample(6, 24, seed=2, progress=seen)
    assert seen.revealed == 6 * 24 and seen.shown > 24


# ---- Arguments ----


@pytest.mark.parametrize("policy", [RemaskConfidence(8), RemaskConfidence(8, eps=0.25)], ids=str)
def test_text_round_trip(policy):
    assert parse(str(policy)) == policy and parse(str(Blocks(policy, 7))) == Blocks(policy, 7)
    assert str(RemaskConfidence(8)) == "remask:8:conf"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remask:0:conf", "steps must lie between"),
        ("remask:8:conf:eta=0.5", "got 'remask:8:conf:eta=0.5'$"),
        ("remask:8:conf:eps=2", "eps must lie between 0 and 1, got 2"),
        ("blocks:4:stop:3:remask:8:conf", "stop_id must be None for the remasking policy 'remask:8:conf', got 3"),
    ],
)
def test_bad_spellings_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_what_is_not_there_is_an_error():
    dit, policy = random_dit("a", 1, length=16), RemaskConfidence(4)
    with pytest.raises(ValueError, match=r"reveal must fix how many positions .* got remask:4:conf"):
        Sampler(dit, reveal=policy).plan(1, 16)
    Sampler(dit, reveal=policy).check(1, 16)
    with pytest.raises(ValueError, match=r"length must .* got 17"):
        Sampler(dit, reveal=policy).check(1, 17)
    with pytest.raises(ValueError, match="caching must be None with a policy that masks again, blocks:8:remask:4:conf"):
        Sampler(dit, reveal=Blocks(policy, 8), caching=Caching())
