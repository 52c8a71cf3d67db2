"""Predicted seconds: made-up rates against sums by hand, the fit, the file, and what a transformer says of its work."""

import json
from collections import Counter
from itertools import product as pairs

import numpy as np
import pytest
import torch
from toys import Toy, random_dit

import unmask
from unmask import Fixed, Sampler, calibration, measure
from unmask.calibration import Calibration, DamagedCache
from unmask.denoiser import Batch
from unmask.models import dit
from unmask.models.linear import Linear
from unmask.timing import in_turns
from unmask.work import AddNorm, Attention, Draw, Load, Product, SwiGLU, Work
from unmask.workspace import Workspace

MACHINE = {"device": "abacus", "threads": "1", "torch": "3", "dtype": "float32", "operators": "fingers"}
RATES = {
    "Product": {"call": 1.0, "weight": 0.5, "output": 0.25, "gelu": 2.0, "flop": 0.125},
    "Attention": {"call": 8.0, "sequence": 1.0, "query": 0.5, "key": 0.25, "score": 2.0, "flop": 0.125},
    "AddNorm": {"call": 3.0, "element": 0.5},
    "SwiGLU": {"call": 5.0, "element": 0.25},
    "Draw": {"call": 4.0, "weight": 0.25, "logit": 0.5, "flop": 0.125},
}
KNOWN = Calibration(MACHINE, RATES, tick=1000.0)


class Working(Toy):
    """A toy that says it does one product of width 2 a block, and one norm."""

    def __init__(self, num_blocks: int):
        super().__init__(9, 16)
        self.num_blocks = num_blocks

    def work(self, load):
        body = (self.num_blocks, Product(load.num_tokens, 2, 2)), (1, AddNorm(load.num_rows, 2))
        return Work(body, Draw(load.num_rows, 2, 8))


def test_an_operation_takes_the_sum_of_its_terms():
    assert KNOWN.seconds(Product(10, 4, 3)) == 1 + 0.5 * 12 + 0.25 * 30 + 0.125 * 240
    assert KNOWN.seconds(Product(10, 4, 3, gelu=True, calls=2)) == 2 + 0.5 * 24 + 0.25 * 30 + 2 * 30 + 0.125 * 240
    one = Attention(sequences=2, queries=4, keys=10, pairs=20, heads=3, head_dim=2)
    assert KNOWN.seconds(one) == 8 + 1 * 6 + 0.5 * 24 + 0.25 * 60 + 2 * 60 + 0.125 * 4 * 20 * 6
    grouped = Attention(sequences=2, queries=4, keys=10, pairs=20, heads=3, head_dim=2, kv_heads=1)
    assert KNOWN.seconds(grouped) == KNOWN.seconds(one) - 0.25 * 40
    assert KNOWN.seconds(AddNorm(10, 4)) == 3 + 0.5 * 40
    assert KNOWN.seconds(SwiGLU(10, 4, calls=2)) == 2 * 5 + 0.25 * 40
    assert KNOWN.seconds(Draw(10, 4, 8)) == 4 + 0.25 * 32 + 0.5 * 80 + 0.125 * 640


def test_a_run_takes_the_sum_of_its_ticks():
    """Three sequences of 4 tokens, two revealed by each model, in ticks of two sequences and of one."""
    models = {"heavy": Working(3), "light": Working(1)}
    sampler = Sampler(models, schedule="light:50% heavy:50%", reveal=Fixed(2), max_batch=2, max_resident=2)
    plan = sampler.plan(3, 4, calibration=KNOWN)

    def body(num_blocks, tokens, rows):
        return num_blocks * (1 + 0.5 * 4 + 0.25 * 2 * tokens + 0.125 * 8 * tokens) + 3 + 0.5 * 2 * rows

    def head(rows):
        return 4 + 0.25 * 16 + 0.5 * 8 * rows + 0.125 * 32 * rows

    assert plan.num_ticks == 4
    assert plan.seconds.models == {
        "heavy": {"body": body(3, 8, 4) + body(3, 4, 2), "head": head(4) + head(2)},
        "light": {"body": body(1, 8, 4) + body(1, 4, 2), "head": head(4) + head(2)},
    }
    assert plan.seconds.other == 4 * 1000
    assert plan.seconds.of("head") == 2 * (head(4) + head(2))
    assert plan.seconds.total == plan.seconds.of("body") + plan.seconds.of("head") + 4000
    told = json.loads(json.dumps(plan.to_json()))["seconds"]
    assert told["total"] == plan.seconds.total and told["models"] == plan.seconds.models
    assert told["total"] == told["body"] + told["head"] + told["other"]
    assert f"predicted       {plan.seconds.total:.3g} s (heavy " in str(plan)


def test_many_ticks_at_once_take_what_they_take_one_by_one():
    models = {"heavy": random_dit("heavy", 3, length=64), "light": random_dit("light", 1, length=64)}
    seen = []
    reading = Sampler(models, schedule="light:50% heavy:50%", reveal=unmask.Ancestral(8), max_batch=3)
    for tick in reading._timeline(reading._requests(7, [5, 64, 9, 30, 30, 64, 1], None, None), 64, 0, 7):
        load = Load.of(tick.lengths.tolist(), tick.row_counts.tolist())
        seen.append((list(models)[tick.model], load))
    predicted = KNOWN.predict(models, Counter(seen))
    for name, model in models.items():
        works = [model.work(load) for caller, load in seen if caller == name]
        bodies = sum(times * KNOWN.seconds(each) for work in works for times, each in work.body)
        assert predicted.models[name]["body"] == pytest.approx(bodies)
        assert predicted.models[name]["head"] == pytest.approx(sum(KNOWN.seconds(work.head) for work in works))


def test_without_calibration_or_known_work_there_are_no_seconds():
    plan = Sampler(Working(1), reveal=Fixed(2)).plan(2, 4)
    assert plan.seconds is None and plan.to_json()["seconds"] is None and "predicted" not in str(plan)
    assert Sampler(Toy(9, 16), reveal=Fixed(2)).plan(2, 4, calibration=KNOWN).seconds is None


def test_the_fit_finds_the_rates_behind_exact_measurements():
    operations = [
        Product(rows, *size, gelu) for rows, size, gelu in pairs((1, 7, 50), ((4, 9), (30, 2)), (True, False))
    ]
    operations += [AddNorm(rows, width) for rows in (1, 20) for width in (3, 8)]
    measured = [(operation, KNOWN.seconds(operation)) for operation in operations]
    found = Calibration.fit(MACHINE, measured, 2.0)
    assert found.tick == 2.0 and found.machine == MACHINE
    for kind in ("Product", "AddNorm"):
        assert found.rates[kind] == pytest.approx(RATES[kind])


def test_the_fit_needs_no_negative_rate():
    """Falling seconds: the slope that fits best is negative, so there is none, and the constant balances the rest."""
    found = Calibration.fit(MACHINE, [(AddNorm(1, 1), 4.0), (AddNorm(2, 1), 2.0)], 0.0).rates["AddNorm"]
    # The least of (x/4 - 1)² + (x/2 - 1)²
    assert found == {"call": pytest.approx(2.4), "element": 0.0}


class TestFile:
    def test_round_trip_beside_others(self, tmp_path):
        path = tmp_path / "new" / "calibration.json"
        other = Calibration({**MACHINE, "threads": "2"}, RATES, 1.0)
        for one in (KNOWN, other, Calibration(MACHINE, RATES, 7.0)):
            calibration.write(path, one)
        assert calibration.read(path, MACHINE).tick == 7.0 and calibration.read(path, other.machine) == other
        assert len(json.loads(path.read_text())["calibrations"]) == 2

    @pytest.mark.parametrize("key", MACHINE)
    def test_another_machine_is_not_served(self, tmp_path, key):
        calibration.write(tmp_path / "c.json", KNOWN)
        assert calibration.read(tmp_path / "c.json", {**MACHINE, key: "other"}) is None

    def test_another_format_is_not_read(self, tmp_path, monkeypatch):
        calibration.write(tmp_path / "c.json", KNOWN)
        monkeypatch.setattr(calibration, "FORMAT", calibration.FORMAT + 1)
        assert calibration.read(tmp_path / "c.json", MACHINE) is None

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: "",
            lambda text: text[: len(text) // 2],
            lambda text: "[]",
            lambda text: text.replace("1000.0", '"fast"'),
            lambda text: text.replace("1000.0", "-1.0"),
            lambda text: text.replace('"Draw"', '"Drow"'),
            lambda text: text.replace('"rates"', '"rate"'),
        ],
    )
    def test_damage_is_seen_and_mended(self, tmp_path, damage):
        path = tmp_path / "c.json"
        calibration.write(path, KNOWN)
        path.write_text(damage(path.read_text()))
        with pytest.raises(DamagedCache, match=r"c\.json must hold"):
            calibration.read(path, MACHINE)
        calibration.write(path, KNOWN)
        assert calibration.read(path, MACHINE) == KNOWN

    def test_it_lies_in_the_cache_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert calibration.cache_file() == tmp_path / "unmask" / "calibration.json"
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert calibration.cache_file() == tmp_path / ".cache" / "unmask" / "calibration.json"


class TestCalibrate:
    @pytest.fixture
    def calibrate(self, monkeypatch, tmp_path):
        """Runs `calibrate` with measurements that only count themselves; gives (calibration, sentences)."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        self.num_measured = 0

        def measured(device, dtype, tell):
            self.num_measured += 1
            return Calibration(measure.describe(device, dtype), RATES, float(self.num_measured))

        monkeypatch.setattr(measure, "measure", measured)

        def run(*arguments, **options):
            told = []
            return measure.calibrate(*arguments, **options, tell=told.append), told

        return run

    def test_measures_once_for_each_dtype(self, calibrate):
        first, told = calibrate("cpu", torch.float32)
        assert len(told) == 1 and "in float32" in told[0]
        assert calibrate("cpu", torch.float32) == (first, [])
        assert calibrate("cpu", torch.bfloat16)[0].tick == 2.0
        assert calibrate("cpu", torch.float32, again=True)[0].tick == 3.0
        assert calibrate("cpu", torch.float32)[0].tick == 3.0

    def test_other_threads_are_another_machine(self, calibrate, monkeypatch):
        calibrate()
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
        assert calibrate()[0].tick == 2.0

    def test_a_damaged_file_is_replaced_with_one_sentence(self, calibrate):
        calibrate()
        calibration.cache_file().write_text("{")
        found, told = calibrate()
        assert found.tick == 2.0 and [sentence for sentence in told if "damaged" in sentence] == told[:1]
        assert calibrate() == (found, [])

    @pytest.mark.parametrize("lost", [("Product", "gelu"), ("Draw", "flop")])
    def test_a_file_without_a_term_is_damaged(self, calibrate, lost):
        calibrate()
        path = calibration.cache_file()
        content = json.loads(path.read_text())
        del content["calibrations"][0]["rates"][lost[0]][lost[1]]
        path.write_text(json.dumps(content))
        _, told = calibrate()
        assert "damaged" in told[0]

    def test_a_gpu_is_not_calibrated(self):
        with pytest.raises(ValueError, match="device must be cpu, got cuda"):
            measure.calibrate("cuda")

    def test_a_user_without_a_home_measures_each_time(self, calibrate, monkeypatch):
        def homeless(path):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr("pathlib.Path.expanduser", homeless)
        assert [calibrate()[0].tick for _ in range(2)] == [1.0, 2.0]

    def test_a_folder_that_cannot_be_written_is_no_error(self, calibrate, tmp_path):
        (tmp_path / "unmask").write_text("a file where the folder should be")
        found, told = calibrate()
        assert found.tick == 1.0 and "could not be kept" in told[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_that_a_run_does_is_measured(dtype, monkeypatch):
    monkeypatch.setattr(measure, "PRODUCTS", [Product(3, 8, 8), Product(5, 8, 16, gelu=True)])
    monkeypatch.setattr(measure, "ATTENTIONS", [Attention(2, 6, 6, 18, 2, 4), Attention(2, 2, 6, 6, 2, 4, 1)])
    monkeypatch.setattr(measure, "NORMS", [AddNorm(3, 8)])
    monkeypatch.setattr(measure, "GATES", [SwiGLU(3, 8)])
    monkeypatch.setattr(measure, "DRAWS", [Draw(3, 8, 16)])
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    found = measure.measure(torch.device("cpu"), dtype)
    assert found.machine["dtype"] in str(dtype) and found.tick > 0
    assert found.rates.keys() == RATES.keys()
    assert all(rates.keys() == RATES[kind].keys() for kind, rates in found.rates.items())
    assert all(sum(rates.values()) > 0 and min(rates.values()) >= 0 for rates in found.rates.values())


def test_runs_take_turns_until_their_share_of_time_is_spent(monkeypatch):
    now, calls = [0.0], []

    def spend(name, seconds):
        calls.append(name)
        now[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    runs = {"long": lambda: spend("long", 2.0), "short": lambda: spend("short", 0.5)}
    taken = in_turns(runs, seconds=4.0, min_rounds=1, max_rounds=6)
    assert taken == {"short": [0.5] * 4, "long": [2.0]}
    assert calls == ["long", "short", "short", "long", "short", "short", "short"]


class TestWorkOfATransformer:
    LENGTHS, COUNTS = (9, 4, 9), (2, 1, 3)

    def test_it_is_what_a_call_does(self, monkeypatch):
        """Every product, norm and attention of a call, recorded where it happens, the MLP in pieces of 8 rows."""
        model, done = random_dit("it", 3, length=16), Counter()
        product, norm, attend = Linear._product, dit.add_norm, dit.attention

        def record_product(self, x, out, gelu):
            done[Product(len(x), *self.weight.t().shape, gelu)] += 1
            return product(self, x, out, gelu)

        def record_norm(residual, *arguments, **options):
            done[AddNorm(*residual.shape)] += 1
            return norm(residual, *arguments, **options)

        def record_attention(query, key, value, *, lengths, row_counts=None, **options):
            num_pairs = np.dot(lengths, row_counts or lengths)
            done[Attention(len(lengths), len(query), len(key), int(num_pairs), *query.shape[1:])] += 1
            return attend(query, key, value, lengths=lengths, row_counts=row_counts, **options)

        monkeypatch.setattr(Linear, "_product", record_product)
        monkeypatch.setattr(dit, "add_norm", record_norm)
        monkeypatch.setattr(dit, "attention", record_attention)
        monkeypatch.setattr(dit, "ROWS", 8)
        rows = torch.tensor([0, 4, 10, 13, 14, 21])
        batch = Batch(torch.zeros(22, dtype=torch.int64), self.LENGTHS, rows, self.COUNTS, torch.ones(3))
        model.hidden(batch, Workspace([model.buffers(22, 6, 3)]))

        said = Counter()
        for times, operation in model.work(Load.of(self.LENGTHS, self.COUNTS)).body:
            pieces = getattr(operation, "calls", 1)
            if pieces == 1:
                said[operation] += times
            else:  # of 22 rows: 8, 8 and 6
                assert (operation.rows, pieces) == (22, 3)
                for size in (8, 8, 6):
                    said[Product(size, operation.inner, operation.outer, operation.gelu)] += times
        assert said == done

    def test_a_batch_has_the_flops_of_its_sequences(self):
        model = random_dit("it", 3, length=16)
        work = model.work(Load.of(self.LENGTHS, self.COUNTS))
        alone = [model.flops(*shape) for shape in zip(self.LENGTHS, self.COUNTS, strict=True)]
        assert work.flops == alone[0] + alone[1] + alone[2]
        assert work.head == Draw(6, 64, 512)
