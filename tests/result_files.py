"""Small result files of every kind, for the page that is made of them: a profile of a real run, made-up timings."""

import json
import time
from copy import deepcopy
from functools import cache
from itertools import pairwise
from pathlib import Path

import unmask
from unmask.progress import Progress

STUDIES = Path(__file__).parent.parent / "benchmarks" / "results" / "scheduling"
SCHEDULE = "light:12.5% heavy:75% light:12.5%"
ENVIRONMENT = {
    "command": ["unmask", "profile", "--seed", "0"],
    "machine": {"platform": "Linux", "cpu": "An example CPU", "cores": 2, "threads": 1, "gpu": None},
    "versions": {"python": "3.11", "torch": "2.13", "cuda": None},
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05+00:00",
}


class Ticks(Progress):
    """The ticks of a run as columns."""

    def __init__(self):
        self.began = self.last = time.perf_counter()
        names = ("model", "num_sequences", "num_rows", "num_tokens", "start", "body", "head", "total")
        self.columns = {name: [] for name in names}

    def update(self, run, tick):
        now = time.perf_counter()
        total = now - self.last
        row = {
            "model": int(tick.model),
            "num_sequences": len(tick.slots),
            "num_rows": len(tick.row_slot),
            "num_tokens": int(tick.lengths.sum()),
            "start": self.last - self.began,
            "body": 0.9 * total,
            "head": 0.1 * total,
            "total": total,
        }
        for name, value in row.items():
            self.columns[name].append(value)
        self.last = now


@cache
def profile(num_samples=3, length=32, num_steps=16, max_batch=4, prompt="Fellow citizens", keep=2):
    """Of a run of the bundled pair; made once, so copy it before you change it."""
    models = {name: unmask.load(f"sotu-{name}") for name in ("heavy", "light")}
    policy = unmask.Ancestral(num_steps)
    sampler = unmask.Sampler(models, schedule=SCHEDULE, reveal=policy, max_batch=max_batch)
    ticks = Ticks()
    samples = sampler.sample(num_samples, length, seed=0, prompt=prompt, progress=ticks)
    stats = samples.stats
    seconds = {name: stats.seconds[name] for name in ("plan", "body", "head", "other")}
    total = sum(seconds.values())
    blocks = {
        name: [phases["body"] / 15] * models[name].spec.num_blocks for name, phases in stats.model_seconds.items()
    }
    steps = [
        list(models).index(name) for name, start, stop in sampler.schedule.assign(num_steps) for _ in range(start, stop)
    ]
    sizes = ("num_blocks", "hidden_size", "vocab_size", "num_parameters")
    return {
        "kind": "profile",
        "schema": 1,
        "partial": False,
        **ENVIRONMENT,
        "request": {
            "num_samples": num_samples,
            "length": length,
            "seed": 0,
            "reveal": str(policy),
            "schedule": SCHEDULE,
            "max_batch": max_batch,
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
        },
        "models": [{"name": name, **{size: getattr(one.spec, size) for size in sizes}} for name, one in models.items()],
        "phases": {**seconds, "total": total},
        "model_seconds": {name: {**phases, "blocks": blocks[name]} for name, phases in stats.model_seconds.items()},
        "ticks": ticks.columns,
        "occupancy": stats.occupancy,
        "max_batch": max_batch,
        "nfe": stats.nfe,
        "tokens_per_second": stats.num_tokens / total,
        "flops_per_second": stats.cost.total.total / total,
        "flops_share": 0.5,
        "ceiling_flops_per_second": 2 * stats.cost.total.total / total,
        "peak_bytes": stats.peak_bytes,
        "rss_peak_bytes": 500 << 20,
        "logits_bytes_avoided": num_samples * length * num_steps * 2048 * 4,
        "steps": {"num_steps": num_steps, "models": steps},
        "samples": [_kept(sample, sampler.tokenizer) for sample in samples[:keep]],
    }


def _kept(sample, tokenizer):
    texts = [tokenizer.decode(sample.tokens[:stop].tolist()) for stop in range(len(sample.tokens) + 1)]
    # An unfinished character at the end of a prefix belongs to the token that finishes it.
    whole = [text.rstrip("\ufffd") if text != sample.text else text for text in texts]
    pieces = [after[len(before) :] for before, after in pairwise(whole)]
    assert "".join(pieces) == sample.text
    columns = {key: getattr(sample, key).tolist() for key in ("logprobs", "reveal_step")}
    return {"index": sample.index, "text": sample.text, "pieces": pieces, **columns}


def operators():
    """Timings of two operators on two devices, one of which failed its law check."""
    rows = []
    for operator, intensity in (("sample_head", 40.0), ("attention", 90.0), ("add_norm", 0.0)):
        for at, (implementation, role) in enumerate(
            [
                ("reference", "implementation"),
                ("cpu", "implementation"),
                ("triton", "implementation"),
                ("torch chain", "peer"),
            ]
        ):
            for size in (1, 16, 256):
                num_bytes, share = 2e6 * (size + 20), 0.2 + 0.2 * at
                flops = intensity * num_bytes * size / 64
                median = max(flops / (2e11 * share), num_bytes / (4e10 * share))
                timing = {"median": median, "p20": 0.95 * median, "p80": 1.1 * median}
                fails = (operator, implementation, size) == ("attention", "triton", 1)
                rows.append(
                    {
                        "operator": operator,
                        "case": f"mdlm-small {size} x 768",
                        "implementation": implementation,
                        "role": role,
                        "device": "cpu",
                        "dtype": "float32",
                        "shape": {"rows": size},
                        "num_bytes": num_bytes,
                        "flops": flops,
                        "timings": {
                            "cold": timing,
                            "warm": {key: 0.8 * one for key, one in timing.items()},
                            "graph": None,
                        },
                        "law": "chi-squared of 20,000 draws",
                        "law_passed": None if operator == "add_norm" else not fails,
                        "bandwidth": num_bytes / median,
                        "bandwidth_share": num_bytes / median / 4e10,
                        "rate": flops / median,
                        "rate_share": flops / median / 2e11,
                        "note": None,
                    }
                )
    ceiling = {
        "device": "cpu",
        "dtype": "float32",
        "bandwidth": 4e10,
        "product": 2e11,
        "by": "copy and product",
        "num_bytes": 1e9,
    }
    return {"kind": "operators", "schema": 1, "partial": True, **ENVIRONMENT, "rows": rows, "ceilings": [ceiling]}


def peers():
    """Two workloads, three samplers each, one peer left out."""
    rows = []
    for workload, batch, length in (("one text", 1, 1024), ("a batch", 8, 256)):
        for peer, role, slower in (
            ("unmask", "ours", 1.0),
            ("ddpm_cache", "peer", 5.2),
            ("compiled loop", "peer", 3.1),
        ):
            median = 2.0 * slower
            runs = [0.96 * median, median, 1.05 * median]
            rate = batch * length / median
            rows.append(
                {
                    "workload": workload,
                    "peer": peer,
                    "role": role,
                    "device": "cpu",
                    "dtype": "float32",
                    "batch": batch,
                    "length": length,
                    "num_steps": 256,
                    "seconds": {
                        "mean": median,
                        "std": 0.04 * median,
                        "median": median,
                        "p20": runs[0],
                        "p80": runs[2],
                        "runs": runs,
                    },
                    "tokens_per_second": rate,
                    "tokens_per_second_std": 0.04 * rate,
                    "ratio": None if role == "ours" else slower,
                    "ratio_low": None if role == "ours" else 0.95 * slower,
                    "ratio_high": None if role == "ours" else 1.06 * slower,
                    "nfe": 160.0,
                    "logits_bytes": 0,
                    "law": None,
                    "note": None,
                }
            )
    skipped = [{"peer": "LLaDA", "workload": "a batch", "reason": "no checkout was given"}]
    return {"kind": "peers", "schema": 1, "partial": False, **ENVIRONMENT, "rows": rows, "skipped": skipped}


def study(name):
    """A study of the bundled models, as it lies in the repository."""
    return json.loads((STUDIES / name).read_text())


def hostile(profile):
    """The same profile with texts and names that would act if any were read as markup."""
    evil = "</script><script>window.broken=1</script><img src=x onerror=window.broken=1>&amp;\"'\u2028"
    copied = deepcopy(profile)
    sample = copied["samples"][0]
    sample["pieces"][3] = evil
    sample["text"] = "".join(sample["pieces"])
    copied["command"] = ["unmask", evil]
    copied["machine"]["cpu"] = evil
    copied["request"]["schedule"] = evil
    return copied
