"""What the sampler promises around the law: prompts, streams, plans that come true, errors before any network call."""

import gc
import itertools
import resource
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from toys import MASK, Toy, random_dit

from unmask import (
    Ancestral,
    Categorical,
    DenoiserSpec,
    FirstHitting,
    Fixed,
    LogitsDenoiser,
    NonFiniteLogits,
    Order,
    Sampler,
    Schedule,
)
from unmask.progress import Progress

WORDS = ["we", "[MASK]", "the", "people", "of", "a", "more", "perfect", "union"]


def word_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def wordy(name="toy", max_length=32):
    toy = Toy(len(WORDS), max_length)
    toy.tokenizer, toy.name = word_tokenizer(), name
    toy.spec = replace(toy.spec, tokenizer="words")
    return toy


# ---- Prompts ----


def test_prefix_suffix_and_infilling_keep_what_is_given():
    toy = wordy()
    sampler = Sampler(toy, reveal=Ancestral(4), max_batch=3)
    samples = sampler.sample(5, 12, seed=1, prompt="we the <mask:3> of <mask> perfect", suffix="more union")
    given = torch.tensor([0, 2, MASK, MASK, MASK, 4, MASK, 7, MASK, MASK, 6, 8])
    is_given = given != MASK
    assert (samples.tokens[:, is_given] == given[is_given]).all()
    assert (samples.tokens != MASK).all()
    assert (samples.reveal_step[:, is_given] == -1).all() and (samples.logprobs[:, is_given] == 0).all()
    assert ((samples.reveal_step[:, ~is_given] >= 0) & (samples.reveal_step[:, ~is_given] < 4)).all()
    assert (samples.logprobs[:, ~is_given] < 0).all()
    assert samples.text[0].split() == [WORDS[i] for i in samples.tokens[0]]
    assert len(set(samples.text)) == 5


def test_a_slot_that_is_taken_again_forgets():
    """Four prompts of different lengths through one slot: given positions say so, whatever stood there before."""
    prompts = [[], [2, 3, 4, 5, 6], [7], [3] * 12]
    samples = Sampler(Toy(9, 16), reveal=Ancestral(4), max_batch=1, max_resident=1).sample(4, 16, prompt=prompts)
    for sample, prompt in zip(samples, prompts, strict=True):
        given = torch.arange(16) < len(prompt)
        assert sample.tokens[given].tolist() == prompt
        assert torch.equal(sample.logprobs == 0, given) and torch.equal(sample.reveal_step == -1, given)


def test_ids_text_and_arrays_are_the_same_prompt():
    text = "we the <mask:2> of"
    ids = [0, 2, MASK, MASK, 4]
    sampler = Sampler(wordy(), reveal=FirstHitting())
    prompts = (text, ids, tuple(ids), np.array(ids, np.uint16), torch.tensor(ids))
    tokens = [sampler.sample(2, 9, seed=7, prompt=prompt).tokens for prompt in prompts]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])


def test_prompts_and_lengths_of_their_own():
    sampler = Sampler(wordy(), reveal=Ancestral(3), max_batch=4, max_resident=4)
    prompts = ["we", [2, 3], None, "of <mask> more"] * 3
    lengths = [4, 9, 5, 32] * 3
    samples = sampler.sample(12, lengths, seed=2, prompt=prompts, suffix=[8])
    assert samples.lengths.tolist() == lengths
    assert samples.tokens.shape == samples.reveal_step.shape == samples.logprobs.shape == (12, 32)
    for sample, prompt, length in zip(samples, prompts, lengths, strict=True):
        start = {"we": [0], "of <mask> more": [4, MASK, 6]}.get(prompt, prompt) if prompt != [2, 3] else [2, 3]
        for position, token in enumerate(start or []):
            assert token == MASK or sample.tokens[position] == token
        assert sample.tokens[-1] == 8 and len(sample.tokens) == length and (sample.tokens != MASK).all()
        assert (samples.tokens[sample.index, length:] == -1).all()
        assert (samples.reveal_step[sample.index, length:] == -1).all()


@pytest.mark.parametrize("with_tokenizer", [0, 1])
def test_any_model_may_bring_the_tokenizer(with_tokenizer):
    pair = [wordy("a"), wordy("b")]
    pair[1 - with_tokenizer].tokenizer = None
    pair[1 - with_tokenizer].spec = replace(pair[1 - with_tokenizer].spec, tokenizer=None)
    sampler = Sampler({toy.name: toy for toy in pair}, schedule="a:50% b:50%", reveal=Ancestral(2))
    samples = sampler.sample(2, 6, prompt="we the")
    assert [text.split()[:2] for text in samples.text] == [["we", "the"]] * 2


def test_default_length_is_the_shortest_maximum():
    sampler = Sampler({"a": Toy(5, 20), "b": Toy(5, 14)}, schedule="a:50% b:50%", reveal=Ancestral(2))
    assert sampler.sample(1).tokens.shape == (1, 14)


# ---- Streaming ----


def test_streamed_samples_are_those_of_sample():
    sampler = Sampler(Toy(9, 16), reveal=Ancestral(6), max_batch=3, max_resident=7)
    whole = sampler.sample(50, 16, seed=3)
    run = sampler.stream(50, 16, seed=3)
    streamed = {sample.index: sample for sample in run}
    assert sorted(streamed) == list(range(50))
    for sample in whole:
        for name in ("tokens", "logprobs", "reveal_step"):
            assert torch.equal(getattr(sample, name), getattr(streamed[sample.index], name))
    assert run.stats.events == whole.stats.events and run.stats.num_samples == 50


def test_streaming_reads_prompts_as_it_needs_them():
    read = 0

    def prompts():
        nonlocal read
        for number in itertools.count():
            read += 1
            yield [2, 3, number % 7 + 2]

    sampler = Sampler(Toy(9, 16), reveal=Ancestral(5), max_batch=4, max_resident=10)
    run = sampler.stream(None, 16, prompt=prompts())
    assert read == 0
    for num_out, sample in enumerate(itertools.islice(run, 100), 1):
        assert sample.tokens[2] == sample.index % 7 + 2
        assert read <= num_out + 10 + 4 + 1  # those resident, those of a tick handed out one by one, the next in line
    calls = run.stats.num_ticks
    run.close()
    assert run.stats.num_ticks == calls and list(run) == []


def test_streaming_one_prompt_for_ever():
    run = Sampler(Toy(9, 8), reveal=Ancestral(2), max_batch=4).stream(prompt=[2], length=8, seed=5)
    indices = [sample.index for sample in itertools.islice(run, 500)]
    assert len(set(indices)) == 500 and max(indices) < 500 + 2 * 64


def test_a_stream_ends_with_its_prompts():
    run = Sampler(Toy(9, 8), reveal=Ancestral(2)).stream(prompt=iter([[2], [3], [4]]), length=8)
    assert sorted(int(sample.tokens[0]) for sample in run) == [2, 3, 4]


def test_memory_does_not_grow_with_the_number_of_samples():
    """Python's own bytes after 1,500 and 6,000 prompts, of which its free lists keep some tens of thousands; those of
    the process after 10,000 and 30,000 samples."""
    sampler = Sampler(Toy(9, 16), reveal=Ancestral(3), max_batch=64, max_resident=128)
    assert sampler.plan(1, 16).peak_bytes < sampler.plan(128, 16).peak_bytes == sampler.plan(5000, 16).peak_bytes

    run, held = sampler.stream(None, 16, prompt=([2] for _ in itertools.count())), []
    next(run)
    tracemalloc.start()
    for num_samples in (1500, 4500):
        for _ in itertools.islice(run, num_samples):
            pass
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert run.stats.peak_bytes == sampler.plan(5000, 16).peak_bytes
    assert held[1] < held[0] + 4500 * 33, f"{held[1] - held[0]:,} bytes more"
    resident = []
    for num_samples in (10_000, 30_000):
        for _ in sampler.stream(num_samples, 16):
            pass
        resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    assert resident[1] < resident[0] + (4 << 20), f"{resident[1] - resident[0]:,} bytes more"


# ---- Plans come true ----

RUNS = {
    "one model": ({}, {"num_samples": 30, "length": 16}),
    "first-hitting": ({"reveal": FirstHitting()}, {"num_samples": 20, "length": 16, "prompt": [2, MASK, 3]}),
    "two models": ({"schedule": "b:2 a:6 b:2", "reveal": Ancestral(10)}, {"num_samples": 30, "length": 16}),
    "ragged": (
        {"schedule": "b:25% a:75%", "reveal": Fixed(7), "max_resident": 5},
        {"num_samples": 9, "length": [4, 16, 9] * 3, "prompt": [[2], [3, 4, 5], None] * 3},
    ),
    "left to right": ({"reveal": Order("left-to-right")}, {"num_samples": 3, "length": 12, "suffix": [2, 2]}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_tells_what_the_run_does(name):
    options, arguments = RUNS[name]
    toys = {"a": Toy(9, 16), "b": Toy(9, 16)} if "schedule" in options else {"a": Toy(9, 16)}
    toys["a"].spec = replace(toys["a"].spec, num_parameters=100)
    sampler = Sampler(toys, **{"reveal": Ancestral(10), "max_batch": 4, **options})
    plan = sampler.plan(**arguments, seed=8)
    assert all(toy.num_calls == 0 for toy in toys.values())
    samples = sampler.sample(**arguments, seed=8)
    stats = samples.stats
    assert plan.events == stats.events == sum(toy.num_events for toy in toys.values())
    assert plan.num_ticks == stats.num_ticks == sum(toy.num_calls for toy in toys.values())
    assert plan.occupancy == stats.occupancy == pytest.approx(plan.events / plan.num_ticks / 4)
    assert plan.nfe == stats.nfe
    for model, toy in toys.items():
        assert plan.nfe[model] == toy.num_events / arguments["num_samples"]
    assert plan.cost.flops == stats.cost.flops and plan.cost.saving == stats.cost.saving
    assert plan.peak_bytes == stats.peak_bytes
    assert plan.num_tokens == (samples.reveal_step >= 0).sum()
    assert plan.num_samples == stats.num_samples == len(samples)
    assert min(stats.seconds.values()) >= 0 and stats.seconds["body"] > 0
    assert stats.model_seconds.keys() == stats.cost.flops.keys()
    for phase in ("body", "head"):
        assert sum(phases[phase] for phases in stats.model_seconds.values()) == pytest.approx(stats.seconds[phase])
    steps = [set(sample.reveal_step.tolist()) - {-1} for sample in samples]
    assert plan.events == sum(map(len, steps))


def test_peak_bytes_are_the_run_s_buffers():
    """Every tensor and table of a run that is not the network's own."""
    dit = random_dit("dit", 1, length=64)
    sampler = Sampler(dit, reveal=Ancestral(4), max_batch=4, max_resident=6)
    run = sampler.stream(2, 64)
    held = [run._slots.tokens, run._slots.logprobs, run._slots.reveal_step, *run._workspace._buffers.values()]
    tables = [table for table in vars(run.timeline).values() if isinstance(table, np.ndarray)]
    assert run.stats.peak_bytes == sum(part.nbytes for part in (*held, *tables))
    assert sampler.plan(2, 64).peak_bytes == run.stats.peak_bytes


def test_memory_has_no_term_vocabulary_times_length():
    """512 rows in one tick over 50,000 ids: 100 MB of logits, of which no operator ever holds more than a chunk."""
    sampler = Sampler(
        random_dit("dit", 2, vocab_size=50_000, hidden=8, mlp=16, length=64), reveal=Fixed(1), impl="reference"
    )
    sampler.sample(8, 64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        sampler.sample(8, 64)
    largest = max(profiler.events(), key=lambda event: event.cpu_memory_usage)
    assert 1 << 20 < largest.cpu_memory_usage < 8 << 20, f"{largest.name}: {largest.cpu_memory_usage:,} bytes"
    assert sampler.plan(8, 64).peak_bytes < 1 << 20


def test_one_sample_needs_room_for_one():
    """Neither slots nor batch places are kept for sequences that will never come."""
    dit = random_dit("dit", 2, vocab_size=50, hidden=8, mlp=16, length=64)
    alone = Sampler(dit, max_batch=1, max_resident=1).plan(1, 64)
    assert Sampler(dit, max_batch=16).plan(1, 64).peak_bytes == alone.peak_bytes


def test_a_large_vocabulary_runs():
    samples = Sampler(Toy(50_000, 24), reveal=Ancestral(6), max_batch=4).sample(6, 24, seed=1)
    assert samples.tokens.max() > 25_000 and (samples.tokens != MASK).all()


# ---- Foreign models ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_denoiser_end_to_end(dtype):
    """Logits in any dtype, called a few sequences at a time, give what the same logits in rows give."""
    spec = DenoiserSpec("foreign", 9, MASK, 1, 0, 1, 1, 16, num_parameters=10)
    weights = torch.randn(16, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = []

    def logits(tokens):
        seen.append(len(tokens))
        return weights[: tokens.shape[1]] * (1 + (tokens != MASK).sum(1) % 3)[:, None, None]

    class InRows(Toy):
        def logits(self, batch):
            state = batch.tokens.view(-1, 16)
            scale = (1 + (state != MASK).sum(1) % 3).repeat_interleave(torch.tensor(batch.row_counts))
            return weights[batch.rows % 16].float() * scale[:, None]

    foreign = LogitsDenoiser(logits, spec, max_bytes=3 * 16 * 9 * 4)
    samples = Sampler(foreign, reveal=Ancestral(5), max_batch=8).sample(20, 16, seed=2)
    assert max(seen) == 3
    expected = Sampler(InRows(9, 16), reveal=Ancestral(5), max_batch=8).sample(20, 16, seed=2)
    same = (samples.tokens == expected.tokens).float().mean()
    assert same == 1 if dtype is torch.float32 else same > 0.9
    if dtype is torch.float32:
        torch.testing.assert_close(samples.logprobs, expected.logprobs)
    assert samples.logprobs.dtype == torch.float32 and samples.stats.events == sum(seen)


def test_a_mask_rate_reaches_a_time_conditioned_model():
    spec = DenoiserSpec("foreign", 5, MASK, 1, 0, 1, 1, 8, time_conditioned=True)
    told = []

    def logits(tokens, mask_rate):
        told.append((float(mask_rate[0]), float((tokens == MASK).float().mean())))
        return torch.zeros(*tokens.shape, 5)

    Sampler(LogitsDenoiser(logits, spec), reveal=Order("right-to-left"), max_batch=1).sample(2, 8)
    assert len(told) == 16 and all(rate == masked for rate, masked in told)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_name_sequence_and_position(bad):
    class Broken(Toy):
        armed = True

        def logits(self, batch):
            scores = super().logits(batch)
            if self.armed and self.num_calls == 3:
                self.at = int(batch.rows[-1]) % 12
                scores[-1, 3] = bad
            return scores

    toy = Broken(9, 12)
    sampler = Sampler(toy, reveal=FirstHitting(), max_batch=2, max_resident=2)
    with pytest.raises(NonFiniteLogits) as error:
        sampler.sample(2, 12, seed=4)
    assert f"sequence 1, position {toy.at} " in str(error.value)
    toy.armed = False
    assert (sampler.sample(2, 12, seed=4).tokens != MASK).all()


# ---- Bad input ----

two = {"a": Toy(9, 16), "b": Toy(9, 16)}
other_tokenizer = wordy("b")
other_tokenizer.spec = replace(other_tokenizer.spec, tokenizer="letters")
BAD_SAMPLERS = {
    "no model": (({},), {}, ValueError, "at least one denoiser"),
    "no schedule": ((two,), {}, ValueError, "schedule must say which of the models a, b"),
    "unknown model": ((two,), {"schedule": "a:1 c:2"}, ValueError, "'a', 'b'.*got 'c'"),
    "unknown bare model": ((two,), {"schedule": "heavy"}, ValueError, "'a', 'b'.*got 'heavy'"),
    "unknown in object": ((two,), {"schedule": Schedule.single("c")}, ValueError, "got 'c'"),
    "shares": ((two,), {"schedule": "a:50% b:40%"}, ValueError, "sum to 100%, got 90%"),
    "mixed": ((two,), {"schedule": "a:50 b:50%"}, ValueError, "all in steps or all in percent"),
    "vocabulary": (({"a": Toy(9, 16), "b": Toy(10, 16)},), {}, ValueError, "vocab_size, got 9 for 'a' and 10 for 'b'"),
    "mask id": (({"a": Toy(9, 16), "b": Toy(9, 16, mask_id=3)},), {}, ValueError, "mask_id, got 1 for 'a' and 3"),
    "tokenizer": (({"a": wordy(), "b": other_tokenizer},), {}, ValueError, "tokenizer, got 'words' .* 'letters'"),
    "max_batch 0": ((Toy(9, 16),), {"max_batch": 0}, ValueError, "max_batch must be at least 1, got 0"),
    "max_batch -3": ((Toy(9, 16),), {"max_batch": -3}, ValueError, "max_batch must be at least 1, got -3"),
    "max_batch 1.5": ((Toy(9, 16),), {"max_batch": 1.5}, TypeError, "max_batch must be a whole number, got 1.5"),
    "max_resident 0": ((Toy(9, 16),), {"max_resident": 0}, ValueError, "max_resident must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD_SAMPLERS)
def test_bad_samplers(name):
    arguments, options, error, message = BAD_SAMPLERS[name]
    with pytest.raises(error, match=message):
        Sampler(*arguments, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ancestral(0), ValueError, "steps.*got 0"),
        (lambda: Fixed(-1), ValueError, "steps.*got -1"),
        (lambda: Categorical(-0.1), ValueError, "temperature must be 0 or a positive normal fp32 number, got -0.1"),
        (lambda: Categorical(1e-300), ValueError, "temperature must be .* got 1e-300"),
        (lambda: Categorical(float("nan")), ValueError, "temperature .* got nan"),
        (lambda: Categorical(True), TypeError, "temperature must be a number, got True"),
        (lambda: Categorical("1"), TypeError, "temperature must be a number, got '1'"),
        (lambda: Categorical(top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (lambda: Categorical(top_p=1.5), ValueError, "top_p must satisfy 0 < top_p <= 1, got 1.5"),
    ],
)
def test_bad_policies(make, error, message):
    with pytest.raises(error, match=message):
        make()


# name -> (options of the sampler, arguments of sample, error, message)
BAD_REQUESTS = {
    "num_samples 0": ({}, {"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
    "num_samples -1": ({}, {"num_samples": -1}, ValueError, "num_samples must be at least 1, got -1"),
    "num_samples 2.0": ({}, {"num_samples": 2.0}, TypeError, "num_samples must be a whole number, got 2.0"),
    "num_samples True": ({}, {"num_samples": True}, TypeError, "num_samples must be a whole number, got True"),
    "num_samples None": ({}, {"num_samples": None}, TypeError, "num_samples must be a whole number, got None"),
    "length 0": ({}, {"length": 0}, ValueError, "length must be from 1 to .* 16, got 0"),
    "length -4": ({}, {"length": -4}, ValueError, "length must be from 1 to .* 16, got -4"),
    "length 17": ({}, {"length": 17}, ValueError, "length must be from 1 to .* 16, got 17"),
    "length 8.0": ({}, {"length": 8.0}, TypeError, "length must be a whole number of tokens, got 8.0"),
    "length text": ({}, {"length": "8"}, TypeError, "length must be a whole number of tokens, got '8'"),
    "length huge": ({}, {"num_samples": 2, "length": [8, 10**15]}, ValueError, "max_length 16, got 1000000000000000"),
    "lengths: 3 of 2": ({}, {"num_samples": 2, "length": [8, 8, 8]}, ValueError, "length must be one value or 2.*3"),
    "lengths: none": ({}, {"num_samples": 2, "length": []}, TypeError, r"length must be .* list of them, got \[\]"),
    "seed -1": ({}, {"seed": -1}, ValueError, r"seed must satisfy 0 <= seed < 2\*\*64, got -1"),
    "seed 2**64": ({}, {"seed": 2**64}, ValueError, "seed must .* got 18446744073709551616"),
    "seed 1.5": ({}, {"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    "seed True": ({}, {"seed": True}, TypeError, "seed must be an integer, got True"),
    "long prompt": ({}, {"prompt": [2] * 9}, ValueError, "must fit length 8, got 9 and 0 tokens; use length 10"),
    "long both": ({}, {"prompt": [2] * 5, "suffix": [2] * 4}, ValueError, "fit length 8, got 5 and 4 tokens"),
    "nothing masked": ({}, {"prompt": [2] * 8}, ValueError, "leave a masked position.*got 8 given tokens of 8"),
    "id too large": ({}, {"prompt": [2, 3, 9]}, ValueError, "prompt must hold ids from 0 to 8, got 9 at position 2"),
    "id negative": ({}, {"suffix": [-1]}, ValueError, "suffix must hold ids from 0 to 8, got -1 at position 0"),
    "floats": ({}, {"prompt": np.array([2.0, 3.0])}, TypeError, "prompt must be text or one row of integer token ids"),
    "a number": ({}, {"prompt": 5}, TypeError, "prompt must be text or one row of integer token ids, got 5"),
    "no tokenizer": (
        {},
        {"prompt": "we the"},
        ValueError,
        "prompt must be token ids .* no tokenizer, got text 'we the'",
    ),
    "third prompt": (
        {},
        {"num_samples": 3, "prompt": [[2], [3], [2, 30]]},
        ValueError,
        "sample 2: prompt must hold ids from 0 to 8, got 30",
    ),
    "few prompts": ({}, {"num_samples": 3, "prompt": [[2], [3]]}, ValueError, "prompt must be one value or 3.* got 2"),
    "few from iterator": ({}, {"num_samples": 3, "prompt": iter([[2]])}, ValueError, "must give 3 of each, got 1"),
    "steps": (
        {"schedule": "a:3 b:3"},
        {},
        ValueError,
        "schedule.* cover the trajectory of 4 steps, got 6 steps.*use shares",
    ),
    "steps of the third": (
        {"schedule": "a:3 b:4", "reveal": FirstHitting()},
        {"num_samples": 3, "prompt": [[2], [3], [2, 3]]},
        ValueError,
        "cover the trajectory of 6 steps, got 7 steps",
    ),
    "order of the third": (
        {"schedule": "a", "reveal": Order((7, 6, 5, 4, 3, 2))},
        {"num_samples": 3, "prompt": [[2, 2], [3, 4, 5], [2]]},
        ValueError,
        r"order.* must name every masked position, got one that lacks \[1\]",
    ),
    "implementation": ({"impl": "fastest"}, {}, ValueError, "impl of sample_head must be .* got 'fastest'"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_fail_before_any_network_call(name):
    options, arguments, error, message = BAD_REQUESTS[name]
    toys = {"a": Toy(9, 16), "b": Toy(9, 16)} if "schedule" in options else {"a": Toy(9, 16)}
    sampler = Sampler(toys, **{"reveal": Ancestral(4), **options})

    class Watched(Progress):
        entered = False

        def __enter__(self):
            self.entered = True
            return self

    view = Watched()
    with pytest.raises(error, match=message):
        sampler.sample(**{"length": 8, **arguments}, progress=view)
    assert all(toy.num_calls == 0 for toy in toys.values())
    assert not view.entered, "nothing is shown of a run that does not happen"
    if not {"impl", "choose"} & set(options):
        arguments = {**arguments, "prompt": iter([[2]])} if name == "few from iterator" else arguments
        with pytest.raises(error, match=message):
            sampler.plan(**{"length": 8, **arguments})
    if not {"impl", "choose", "schedule"} & set(options):  # the sampler is as good as before
        assert sampler.sample(2, 8, seed=1).tokens.shape == (2, 8)


@pytest.mark.parametrize("name", [name for name in BAD_REQUESTS if name != "num_samples None"])
def test_bad_streams_fail_before_any_network_call(name):
    """A stream's first prompt is looked at before the first network call."""
    options, arguments, error, message = BAD_REQUESTS[name]
    toys = {"a": Toy(9, 16), "b": Toy(9, 16)} if "schedule" in options else {"a": Toy(9, 16)}
    sampler = Sampler(toys, **{"reveal": Ancestral(4), **options})
    arguments = {**arguments, "prompt": iter([[2]])} if name == "few from iterator" else arguments
    with pytest.raises(error, match=message):
        list(sampler.stream(**{"num_samples": 1, "length": 8, **arguments}))
    assert all(toy.num_calls == 0 for toy in toys.values())


def test_a_text_that_does_not_fit_is_not_built():
    sampler = Sampler(wordy(), reveal=Ancestral(4))
    with pytest.raises(ValueError, match=r"prompt must have gaps of 1 to 32 tokens, .* got <mask:999999999>"):
        sampler.sample(prompt="we <mask:999999999>")


def test_a_tokenizer_wider_than_the_model_is_noticed():
    toy = wordy()
    toy.spec = replace(toy.spec, vocab_size=6)
    with pytest.raises(ValueError, match="prompt must hold ids from 0 to 5, got 7 at position 1"):
        Sampler(toy).sample(1, 8, prompt="we perfect")


# ---- Interruptions ----


class Interrupting(Progress):
    def __init__(self, after, error):
        self.left, self.error, self.exited = after, error, False

    def update(self, run, tick):
        self.left -= 1
        if self.left == 0:
            raise self.error

    def __exit__(self, *error):
        self.exited = error[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("screen gone")])
def test_an_interrupted_run_leaves_the_sampler_usable(error):
    sampler = Sampler(Toy(9, 16), reveal=Ancestral(6), max_batch=3, max_resident=5)
    whole = sampler.sample(20, 16, seed=3)
    view = Interrupting(7, error)
    with pytest.raises(type(error)):
        sampler.sample(20, 16, seed=3, progress=view)
    assert view.exited is type(error)
    assert torch.equal(sampler.sample(20, 16, seed=3).tokens, whole.tokens)


def test_an_interrupt_inside_the_network_leaves_the_sampler_usable():
    class Sleepy(Toy):
        awake = True

        def logits(self, batch):
            if self.awake and self.num_calls == 5:
                raise KeyboardInterrupt
            return super().logits(batch)

    toy = Sleepy(9, 16)
    sampler = Sampler(toy, reveal=Ancestral(6), max_batch=3)
    run = sampler.stream(20, 16, seed=3)
    with pytest.raises(KeyboardInterrupt):
        list(run)
    assert run.stats.num_ticks == 4 and run.stats.events == 12  # the tick that failed does not count
    run.stats.to_json()
    toy.awake = False
    expected = Sampler(Toy(9, 16), reveal=Ancestral(6), max_batch=3).sample(20, 16, seed=3)
    assert torch.equal(sampler.sample(20, 16, seed=3).tokens, expected.tokens)


def test_runs_may_take_turns():
    """Two runs of one sampler, a sample at a time, do not see each other."""
    sampler = Sampler(Toy(9, 16), reveal=Ancestral(6), max_batch=3)
    one, other = sampler.stream(9, 16, seed=1), sampler.stream(9, 16, seed=2)
    mixed = list(zip(one, other, strict=True))
    for seed, samples in zip((1, 2), zip(*mixed, strict=True), strict=True):
        for sample in samples:
            assert torch.equal(sample.tokens, sampler.sample(9, 16, seed=seed)[sample.index].tokens)


def test_stats_are_a_snapshot():
    run = Sampler(Toy(9, 16), reveal=Ancestral(6), max_batch=3, max_resident=3).stream(9, 16)
    assert run.stats.nfe == {"toy": 0.0} and run.stats.to_json()["events"] == 0
    next(run)
    early = run.stats
    events = early.events
    list(run)
    assert early.events == events < run.stats.events


def test_slots_show_the_text_as_it_unmasks():
    """`tokens_of` in a callback: given tokens stand, mask ids vanish one event at a time."""
    toy, seen = Toy(9, 12), []

    class Watching(Progress):
        def start(self, num_samples, num_masked, models):
            seen.append((num_samples, num_masked, models))

        def update(self, run, tick):
            tokens = run.tokens_of(int(tick.slots[0]), int(tick.lengths[0]))
            seen.append((tokens[:2].tolist(), int((tokens == MASK).sum())))

    Sampler(toy, reveal=FirstHitting(), max_batch=1).sample(1, 12, prompt=[2, 3], progress=Watching())
    assert seen == [(1, 10, ["toy"]), *[([2, 3], 9 - k) for k in range(10)]]
