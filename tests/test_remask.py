"""Planned remasking against the published chain, enumerated over partly masked states, and against a naive replay."""

import ast
import os
from collections import defaultdict
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_exactness import SMALLEST_P, goodness, histogram, sampler_of, table
from toys import MASK, Toy, inconsistent

from unmask import Ancestral, Blocks, Remask, Sampler
from unmask.denoiser import Batch
from unmask.kernels import sample_head
from unmask.kernels.noise import policy_uniforms, reveal_times
from unmask.progress import Progress
from unmask.remask import reveal_chance, sigma_max, time_grid
from unmask.reveal import parse
from unmask.run import drawable

NUM_SAMPLES = 60_000
EMPTY = (None,) * 3

POLICIES = (
    Remask(4, "cap", eta=0.5, eps=0.15),
    Remask(3, "cap", eta=1.0),
    Remask(4, "rescale", eta=0.7, eps=0.15),
    Remask(3, "rescale"),
    Remask(4, "loop", eta=0.4, t_on=0.8, t_off=0.3, alpha_on=0.6, eps=0.15),
    Remask(4, "loop", eta=0.9, t_on=0.7, t_off=0.4, alpha_on=0.7),  # both bounds of a probability are met
)
EVERY = (*POLICIES, Remask(1), Remask(7, eta=0.0), Remask(64), Remask(40, "loop"), Remask(50, "rescale", eta=1.0))


def published_chances(policy, step):
    """The probability to reveal a masked position, and to mask a revealed one, as in `_ddpm_caching_update`."""
    n, eta = policy.steps, policy.eta
    dt = (1 - policy.eps) / n
    t = 1 - step * dt
    alpha_t, alpha_s = 1 - t, 1 - t + dt
    if policy.schedule == "loop":
        if t > policy.t_on:
            m_t, m_s = (1 - alpha * policy.alpha_on / (1 - policy.t_on) for alpha in (alpha_t, alpha_s))
        elif t <= policy.t_off:
            m_t, m_s = (m * (1 - policy.alpha_on) / policy.t_off for m in (t, t - dt))
        else:
            alpha, sigma = policy.alpha_on, eta
            return weighed((alpha - (1 - sigma) * alpha) / (1 - alpha), (1 - alpha - alpha * sigma) / (1 - alpha)), eta
        return weighed(m_t - m_s, m_s), 0.0
    bound = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
    sigma = min(eta, bound) if policy.schedule == "cap" else eta * bound
    reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    return weighed(reveal, (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t)), sigma


def weighed(reveal, stay):
    """The draw is over unnormalised weights, and a negative one never wins."""
    return 1.0 if stay <= 0 else reveal / (reveal + stay)


def advanced(states, reveal, mask, toy, places):
    """{state: probability} a step later, in which the positions of `places` are revealed and masked independently."""
    following = defaultdict(float)
    for state, weight in states.items():
        outcomes = [[(value, 1.0)] for value in state]
        for place in places:
            outcomes[place] = [(None, mask), (state[place], 1 - mask)]
            if state[place] is None:
                p = reveal * toy.conditional(state, place)
                outcomes[place] = [(None, 1 - reveal), *enumerate(p)]
        for combined in product(*outcomes):
            values, chances = zip(*combined, strict=True)
            if np.prod(chances) > 0:
                following[values] += weight * np.prod(chances)
    return following


def enumerated(policy, toy, states, places):
    """{finished state: probability} of the chain over `places`, and its mean number of steps that reveal something."""
    num_calls = 0.0
    for step in range(policy.steps + 1):
        reveal, mask = published_chances(policy, step) if step < policy.steps else (1.0, 0.0)
        for state, weight in states.items():
            num_calls += weight * (1 - (1 - reveal) ** [state[place] for place in places].count(None))
        states = advanced(states, reveal, mask, toy, places)
    return states, num_calls


def law_of(policy, toy):
    return table(enumerated(policy, toy, {EMPTY: 1.0}, range(3))[0], toy)


def check(tokens, law, toy):
    p, variation = goodness(histogram(toy.values(tokens), toy), law)
    assert p > SMALLEST_P, f"p = {p:.3g}, total variation {variation:.5f}"


def draw(sampler, seed, **options):
    run = sampler.stream(NUM_SAMPLES, 3, seed=seed, **options)
    return torch.stack([sample.tokens for sample in run]), run.stats


@pytest.fixture(scope="module")
def toy():
    return inconsistent(num_ids=3, length=3, seed=5)


# ---- The law ----


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_law(policy, toy):
    """Tokens have the law of the chain, and no step costs a network call unless it reveals something."""
    law, num_calls = enumerated(policy, toy, {EMPTY: 1.0}, range(3))
    before = toy.num_events
    tokens, stats = draw(sampler_of(toy, policy), seed=1)
    check(tokens, table(law, toy), toy)
    assert stats.cost.num_events == toy.num_events - before
    assert stats.cost.num_events / NUM_SAMPLES == pytest.approx(num_calls, abs=0.02)


def test_those_laws_differ(toy):
    laws = [law_of(policy, toy) for policy in (Remask(4, eta=0.0), *POLICIES)]
    distances = [np.abs(one - other).sum() / 2 for one, other in combinations(laws, 2)]
    assert min(distances) > 0.005


def test_given_positions_stay(toy):
    tokens, _ = draw(sampler_of(toy, POLICIES[0]), seed=2, prompt=[MASK, int(toy.ids[2]), MASK])
    law, _ = enumerated(POLICIES[0], toy, {(None, 2, None): 1.0}, (0, 2))
    check(tokens, table(law, toy), toy)


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[4]], ids=str)
def test_blocks(policy, toy):
    """Position 2 waits, masked, until the chain of positions 0 and 1 has ended; what these hold then stays."""
    first, _ = enumerated(policy, toy, {EMPTY: 1.0}, (0, 1))
    law, _ = enumerated(policy, toy, first, (2,))
    tokens, _ = draw(sampler_of(toy, Blocks(policy, 2)), seed=3)
    check(tokens, table(law, toy), toy)
    assert goodness(histogram(toy.values(tokens), toy), law_of(policy, toy))[0] < 1e-12


def test_chances_are_the_published_ones():
    for policy in EVERY:
        ours = policy.chances
        assert ours.shape == (2, policy.steps + 1) and ours[:, -1].tolist() == [1, 0]
        theirs = [published_chances(policy, step) for step in range(policy.steps)]
        np.testing.assert_allclose(ours[:, :-1].T, theirs, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-5, 0.2])
@pytest.mark.parametrize("schedule", ["cap", "rescale"])
def test_remasking_keeps_the_share_revealed(schedule, eps):
    """alpha(t) = 1 - t after every step, whatever eta: what sigma_max and reveal_chance are made for."""
    for eta in (0.0, 0.3, 1.0):
        policy, share = Remask(20, schedule, eta=eta, eps=eps), 0.0
        for k, (reveal, mask) in enumerate(policy.chances.T[:-1]):
            share = share * (1 - mask) + (1 - share) * reveal
            assert share == pytest.approx(1 - time_grid(20, eps)[k + 1], abs=1e-12)


def test_the_parts_of_an_adaptive_schedule():
    """With no remasking of masked positions, as ReMDM-conf has it, they are revealed as in ancestral sampling."""
    grid = time_grid(10)
    assert grid[0] == 1 and grid[-1] == pytest.approx(1e-5)
    np.testing.assert_allclose(reveal_chance(grid, 0.0), 1 - grid[1:] / grid[:-1], atol=1e-12)
    bound = sigma_max(grid)
    assert bound[:5].tolist() == [1] * 5 and bound[6:].max() < 1
    np.testing.assert_allclose(bound[6:], grid[7:] / (1 - grid[6:-1]))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_chances_of_the_published_code(policy):
    """Its own `_ddpm_caching_update`, whose weights are looked at where it draws."""
    path = os.environ.get("UNMASK_REMDM")
    if path is None:
        pytest.skip("UNMASK_REMDM does not name a copy of kuleshov-group/remdm")
    tree = ast.parse((Path(path) / "diffusion.py").read_text())
    wanted = "_ddpm_caching_update"
    function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == wanted)
    seen = []

    def categorical(weights):
        seen.append(weights.double() / weights.double().clamp(min=0).sum(-1, keepdim=True))
        return weights.argmax(-1)

    names = {"torch": torch, "_sample_categorical": categorical}
    exec(compile(ast.Module([function], []), path, "exec"), names)
    keys = ("eta", "t_on", "t_off", "alpha_on")
    settings = {key: getattr(policy, key) for key in keys} | {"nucleus_p": 1, "sampler": f"remdm-{policy.schedule}"}
    config = SimpleNamespace(sampling=SimpleNamespace(**settings), noise=SimpleNamespace(type="loglinear"))
    log_p = torch.tensor([[[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]]).log()
    model = SimpleNamespace(
        config=config, mask_index=2, time_conditioning=False, noise=lambda t: (t, t), forward=lambda x, sigma: log_p
    )
    grid = torch.linspace(1, policy.eps, policy.steps + 1)
    for step, (reveal, mask) in enumerate(policy.chances.T[:-1].tolist()):
        x, t = torch.tensor([[2, 0]]), grid[step] * torch.ones(1, 1)
        names[wanted](model, x, t, (1 - policy.eps) / policy.steps)
        masked, revealed = seen.pop()[0].clamp(0, 1)
        assert masked.tolist() == pytest.approx([0.25 * reveal, 0.75 * reveal, 1 - reveal], abs=1e-5)
        if mask or policy.schedule != "loop":  # without remasking revealed positions are copied, not drawn
            assert revealed.tolist() == pytest.approx([1 - mask, 0, mask], abs=1e-5)


# ---- The plan ----


def planned(policy, sequence, positions, seed=0):
    """The plan that a run with this seed has for these sequences."""
    sequence, positions = torch.as_tensor(sequence), torch.as_tensor(positions)

    def uniform(row, column, count):
        return policy_uniforms(seed, sequence[row], positions[column], count).numpy()

    return policy.plan(reveal_times(seed, sequence[:, None], positions).numpy(), positions.numpy(), uniform)


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_contract(policy):
    """Every position: revealed first from the start, then masked and revealed in turn, and revealed in the end."""
    plan = planned(policy, range(6), range(20))
    fields = {name: getattr(plan, name).dtype for name in ("step", "draw", "masked", "mask_rate")}
    assert fields == {"step": np.int32, "draw": np.int32, "masked": np.int32, "mask_rate": np.float64}
    assert plan.step.min() >= 0 and plan.step.max() < policy.num_steps(20) == policy.steps + 1
    assert np.array_equal(plan.mask_rate, time_grid(policy.steps, policy.eps)[plan.step])
    order = np.lexsort((plan.step, plan.column, plan.row))
    place = (plan.row * 20 + plan.column)[order]
    assert np.array_equal(np.unique(place), np.arange(120))
    step, draw, masked = (values[order] for values in (plan.step, plan.draw, plan.masked))
    same = place[1:] == place[:-1]
    assert np.array_equal(draw[1:], np.where(same, draw[:-1] + 1, 0)) and draw[0] == 0
    assert (masked[1:] > step[:-1])[same].all() and (masked < step)[draw > 0].all()


@pytest.mark.parametrize(
    "policy", [Remask(64, eta=0.2), Remask(64, "loop", eta=0.1), Remask(300, "loop", eta=1)], ids=str
)
def test_stays_are_those_of_the_chain(policy):
    """Each step's share of masked positions that are revealed, and of revealed ones that are masked, over many."""
    plan = planned(policy, range(40), range(1000))
    reveals = np.bincount(plan.step, minlength=policy.steps + 1)
    masks = np.bincount(plan.masked[plan.draw > 0], minlength=policy.steps + 1)
    revealed = np.append(0, (reveals - masks).cumsum()[:-1])  # when the step begins
    assert reveals.sum() - masks.sum() == 40_000
    reveal, mask = policy.chances
    for seen, among, chance in ((reveals, 40_000 - revealed, reveal), (masks, revealed, mask)):
        deviation = np.sqrt(among * chance * (1 - chance))
        assert (np.abs(seen - among * chance) <= 4.5 * deviation + 1e-6).all()


def test_a_sequence_does_not_depend_on_its_neighbours():
    policy = Remask(50, "rescale", eta=0.3)
    whole, part = (planned(policy, sequence, range(16), seed=5) for sequence in (range(9), (6, 7)))
    chosen = (whole.row >= 6) & (whole.row < 8)

    def entries(plan, chosen, first):
        return set(
            zip(plan.row[chosen] - first, plan.column[chosen], plan.step[chosen], plan.draw[chosen], strict=True)
        )

    assert entries(whole, chosen, 6) == entries(part, slice(None), 0)


def test_no_random_number_serves_twice():
    """Over blocks too: a number is asked for once, by sequence, position and count."""
    asked = []

    def uniform(row, column, count):
        asked.extend(zip(row.tolist(), column.tolist(), [count] * len(row), strict=True))
        return np.random.default_rng(count).random(len(row))

    Blocks(Remask(20, eta=0.5), 3).plan(np.full((4, 8), 0.5), np.arange(8), uniform)
    assert len(asked) == len(set(asked)) > 100 and {column for _, column, _ in asked} == set(range(8))
    assert min(count for _, _, count in asked) == 1


def test_without_remasking_it_is_ancestral():
    """eta = 0: the same steps from the same times as `Ancestral` on this grid."""
    policy = Remask(30, eta=0.0, eps=0.1)
    plan = planned(policy, range(20), range(50))
    times = reveal_times(0, torch.arange(20)[:, None], torch.arange(50)).numpy()
    ancestral = Ancestral(30, time_grid(30, 0.1)).plan(times, np.arange(50))
    assert not plan.draw.any() and policy.num_steps(50) == Ancestral(30, time_grid(30, 0.1)).num_steps(50)
    assert np.array_equal(plan.step[np.lexsort((plan.column, plan.row))], ancestral.step.ravel())


# ---- The run ----


class Told(Toy):
    """Hears the mask rate too, so that a wrong one shows in the output."""

    def logits(self, batch):
        told = batch.mask_rate.repeat_interleave(torch.tensor(batch.row_counts))
        return super().logits(batch) + torch.sin(told[:, None] * 50 + torch.arange(self.spec.vocab_size))


def replay(plan, sequence, template, toy, seed):
    """One sequence of a plan by itself, step by step: (tokens, log-probabilities, reveal steps, network calls)."""
    tokens, num_calls = torch.tensor(template), 0
    logprobs, steps = torch.zeros(len(template)), torch.full((len(template),), -1)
    position = np.flatnonzero(np.array(template) == MASK)[plan.column]
    mine = plan.row == sequence
    for step in range(plan.step.max() + 1):
        now, following = np.flatnonzero(mine & (plan.step == step)), tokens.clone()
        if len(now):
            now, num_calls = now[np.argsort(position[now])], num_calls + 1
            rows, told = torch.from_numpy(position[now]), torch.tensor(plan.mask_rate[now[:1]]).float()
            assert (tokens[rows] == MASK).all()
            logits = toy.logits(Batch(tokens, (len(tokens),), rows, (len(rows),), told))
            keys = torch.stack((torch.full_like(rows, sequence), rows, torch.from_numpy(plan.draw[now]).long()), 1)
            drawn = sample_head(logits, None, drawable(toy), keys=keys, seed=seed, want=("logprob",))
            following[rows], logprobs[rows], steps[rows] = drawn.tokens, drawn.logprob, step
        following[position[mine & (plan.draw > 0) & (plan.masked == step)]] = MASK
        tokens = following
    return tokens, logprobs, steps, num_calls


@pytest.mark.parametrize(
    "policy",
    [Remask(12, eta=0.3), Remask(9, "loop", eta=0.5, alpha_on=0.6), Blocks(Remask(5, "rescale", eta=0.6, eps=0.3), 4)],
    ids=str,
)
@pytest.mark.parametrize(("max_batch", "max_resident"), [(1, 1), (5, 7), (64, None)])
def test_runs_are_replays(policy, max_batch, max_resident):
    """Tokens, log-probabilities and steps of the last reveal, whatever shares the ticks."""
    template, seed = [MASK, 3, *[MASK] * 8, 4, MASK], 2**63 + 1
    plan = planned(policy, range(15), [0, *range(2, 10), 11], seed)
    assert plan.draw.max() > 1
    toy = Told(9, 12)
    sampler = Sampler(toy, reveal=policy, max_batch=max_batch, max_resident=max_resident)
    samples = sampler.sample(15, 12, seed=seed, prompt=template)
    num_calls = 0
    for index, sample in enumerate(samples):
        tokens, logprobs, steps, calls = replay(plan, index, template, Told(9, 12), seed)
        assert sample.tokens.tolist() == tokens.tolist() and sample.reveal_step.tolist() == steps.tolist()
        assert torch.equal(sample.logprobs, logprobs)
        num_calls += calls
    known = sampler.plan(15, 12, seed=seed, prompt=template)
    assert known.events == samples.stats.cost.num_events == num_calls == toy.num_events
    assert known.num_ticks == samples.stats.num_ticks == toy.num_calls
    assert known.cost == samples.stats.cost and known.peak_bytes == samples.stats.peak_bytes


def test_models_of_a_schedule_take_their_steps():
    """The last step counts: 8 steps and the one that draws what is left."""
    twins = {"a": Told(9, 24), "b": Told(9, 24)}
    both = Sampler(twins, schedule="a:4 b:4 a:1", reveal=Remask(8, eta=0.4, eps=0.2), max_batch=4).sample(
        10, 24, seed=5
    )
    alone = Sampler(Told(9, 24), reveal=Remask(8, eta=0.4, eps=0.2), max_batch=4).sample(10, 24, seed=5)
    assert torch.equal(both.tokens, alone.tokens) and torch.equal(both.logprobs, alone.logprobs)
    assert twins["b"].num_events and twins["a"].num_events > 10
    with pytest.raises(ValueError, match="must cover the trajectory of 9 steps"):
        Sampler(twins, schedule="a:4 b:4", reveal=Remask(8)).plan(1, 24)


def test_a_ragged_run_goes_on_while_tables_grow():
    """Sequences with more reveals than any before come late, and slots change hands."""
    lengths = [3, 24, 5, 24, 24, 2, 17, 24]
    sampler = Sampler(Told(9, 24), reveal=Remask(60, "loop", eta=0.5, alpha_on=0.6), max_batch=2, max_resident=3)
    samples = sampler.sample(8, lengths, seed=1)
    wide = Sampler(Told(9, 24), reveal=sampler.reveal, max_batch=16).sample(8, lengths, seed=1)
    assert torch.equal(samples.tokens, wide.tokens) and torch.equal(samples.reveal_step, wide.reveal_step)
    plan = sampler.plan(8, lengths, seed=1)
    assert plan.cost == samples.stats.cost and plan.peak_bytes == samples.stats.peak_bytes
    assert not (samples.tokens == MASK).any()


class Counted(Progress):
    revealed = 0

    def update(self, run, tick):
        self.revealed += tick.num_revealed


def test_progress_ends_where_it_should():
    """Positions that are masked again are taken back."""
    seen = Counted()
    Sampler(Told(9, 24), reveal=Remask(30, eta=0.5), max_batch=4).sample(6, 24, seed=2, progress=seen)
    assert seen.revealed == 6 * 24


# ---- Arguments ----


def test_published_settings():
    assert [Remask(8, schedule).eta for schedule in ("cap", "rescale", "loop")] == [0.008, 0.015, 0.02]
    loop = Remask(8, "loop")
    assert (loop.t_on, loop.t_off, loop.alpha_on, loop.eps) == (0.55, 0.05, 0.9, 1e-5)
    assert Remask(8).t_on is None


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_text_round_trip(policy):
    for one in (policy, Blocks(policy, 7)):
        assert parse(str(one)) == one and hash(parse(str(one))) == hash(one)


def test_spellings():
    assert str(Remask(8)) == "remask:8:cap" and parse("remask:8") == Remask(8)
    assert parse("remask:8:loop:eta=0.1,t_on=0.6") == Remask(8, "loop", eta=0.1, t_on=0.6)
    assert parse("blocks:4:remask:8:rescale") == Blocks(Remask(8, "rescale"), 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remask", r"got 'remask'$"),
        ("remask:8:bold", r'schedule must be "cap", "rescale", "loop", got \'bold\''),
        ("remask:8:cap:eta", r"got 'remask:8:cap:eta'"),
        ("remask:8:cap:steps=3", r"got 'remask:8:cap:steps=3'$"),
        ("remask:0:cap", r"steps must lie between"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert '"remask:STEPS:cap|rescale|loop|conf"' in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eta": 1.5}, ValueError, r"eta must lie from 0 to 1, got 1.5"),
        ({"eta": float("nan")}, ValueError, r"eta must lie from 0 to 1, got nan"),
        ({"eta": "much"}, TypeError, r"eta must be a number from 0 to 1, got 'much'"),
        ({"eps": 0.0}, ValueError, r"eps must lie between 0 and 1, got 0.0"),
        ({"t_on": 0.5}, ValueError, r't_on must be None unless schedule is "loop", got 0.5 with "cap"'),
        ({"schedule": "loop", "t_on": 1.0}, ValueError, r"t_on must lie between 0 and 1, got 1.0"),
        ({"schedule": "loop", "t_on": 0.2, "t_off": 0.3}, ValueError, r"t_off must not exceed t_on, got 0.3 and 0.2"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        Remask(8, **options)


def test_a_plan_needs_its_numbers():
    with pytest.raises(ValueError, match=r"uniform must give random numbers .* 'remask:8:cap', got None"):
        Remask(8).plan(np.full((1, 2), 0.5), np.arange(2))
