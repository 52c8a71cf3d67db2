"""Costs: counted calls against calls that are made, and the saving of a schedule."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from toys import MASK, Toy, random_dit

from unmask import Ancestral, FirstHitting, Sampler
from unmask.cost import Meter
from unmask.work import Flops

LENGTH = 16


class Priced(Toy):
    """A toy whose prices are told apart, and which counts the calls that it really gets."""

    def __init__(self, price):
        super().__init__(9, LENGTH)
        self.price, self.seen = price, Counter()

    def flops(self, length, num_rows):
        return Flops(blocks=self.price * length, attention=self.price * length * num_rows, head=100 * num_rows)

    def logits(self, batch):
        self.seen.update(zip(batch.lengths, batch.row_counts, strict=True))
        return super().logits(batch)


def test_calls_are_counted_as_they_are_made():
    models = {"heavy": Priced(6), "light": Priced(2)}
    sampler = Sampler(models, schedule="light:25% heavy:75%", reveal=Ancestral(8), max_batch=3)
    lengths = [4, 16, 9, 16, 5, 12]
    samples = sampler.sample(6, lengths, seed=1, prompt=[2, MASK, 3])
    cost = samples.stats.cost
    assert cost.calls == {
        (name, *shape): count for name, model in models.items() for shape, count in model.seen.items()
    }
    for name, model in models.items():
        blocks = sum(model.price * length * count for (length, _), count in model.seen.items())
        attention = sum(model.price * length * rows * count for (length, rows), count in model.seen.items())
        head = sum(100 * rows * count for (_, rows), count in model.seen.items())
        assert cost.flops[name] == Flops(blocks, attention, head)
        assert cost.events_of(name) == model.num_events == model.seen.total()
    assert cost.total == cost.flops["heavy"] + cost.flops["light"]
    assert cost.num_events == models["heavy"].num_events + models["light"].num_events


def test_the_saving_compares_with_the_costliest_model_alone():
    """Light costs a third of heavy's blocks and attention and takes every call: two thirds saved without the head."""
    models = {"heavy": Priced(6), "light": Priced(2)}
    cost = Sampler(models, schedule="light", reveal=FirstHitting()).sample(2, 16).stats.cost
    assert cost.num_events == 32 and cost.one_model == cost.total + Flops(32 * 4 * 16, 32 * 4 * 16, 0)
    assert cost.saving.without_head == pytest.approx(2 / 3)
    assert cost.saving.with_head == pytest.approx(1 - (2 * 32 + 100) / (6 * 32 + 100))
    heavy = Sampler(models, schedule="heavy", reveal=FirstHitting()).plan(2, 16).cost
    assert heavy.saving.with_head == heavy.saving.without_head == 0 and heavy.one_model == heavy.total


def test_nothing_done_costs_nothing():
    cost = Meter({"a": Priced(1)}).cost
    assert cost.total == Flops(0, 0, 0) and cost.num_events == 0
    assert cost.saving.with_head == cost.saving.without_head == 0.0


def test_stats_stand_still_and_can_be_pickled():
    run = Sampler(Priced(1), reveal=Ancestral(4), max_batch=2).stream(8, 16)
    next(run)
    stats = run.stats
    before = stats.events
    list(run)
    assert stats.events == before < run.stats.events
    assert pickle.loads(pickle.dumps(stats)).cost == stats.cost


def test_a_sandwich_of_transformers_saves_what_its_events_save():
    """Heavy with 6 blocks, light with 2, at the ends: the plan's saving from the events of each, by hand."""
    models = {"heavy": random_dit("heavy", 6, length=64), "light": random_dit("light", 2, length=64)}
    plan = Sampler(models, schedule="light:25% heavy:50% light:25%", reveal=Ancestral(40)).plan(8, 64, seed=3)

    def body(name, num_rows):
        flops = models[name].flops(64, num_rows)
        return flops.blocks + flops.attention

    calls = plan.cost.calls.items()
    done = sum(count * body(name, num_rows) for (name, _, num_rows), count in calls)
    alone = sum(count * body("heavy", num_rows) for (_, _, num_rows), count in calls)
    assert sum(count * num_rows for (_, _, num_rows), count in calls) == 8 * 64 == plan.num_tokens
    assert plan.cost.saving.without_head == pytest.approx(1 - done / alone)
    assert 0.2 < plan.cost.saving.without_head < 0.5
    assert plan.cost.saving.with_head < plan.cost.saving.without_head


def test_a_plan_in_words_and_in_json():
    models = {"heavy": Priced(6), "light": Priced(2)}
    sampler = Sampler(models, schedule="light:25% heavy:75%", reveal=Ancestral(8), max_batch=3)
    plan = sampler.plan(np.int64(5), 16, seed=np.uint64(1))
    told = json.loads(json.dumps(plan.to_json()))
    assert told["num_samples"] == 5 and told["num_tokens"] == 80 and told["events"] == plan.events
    assert told["reveal"] == "ancestral:8" and told["schedule"] == "light:25% heavy:75%"
    assert told["events_per_sequence"] == plan.events / 5 == pytest.approx(sum(told["nfe"].values()))
    assert told["flops"].pop("total") == plan.cost.total.total == sum(told["flops"].values())
    assert told["saved"]["with_head"] == plan.cost.saving.with_head and told["peak_bytes"] == plan.peak_bytes
    for words in ("5 sequences, 80 tokens", "ancestral:8", "light:25% heavy:75%", f"ticks           {plan.num_ticks}"):
        assert words in str(plan)
