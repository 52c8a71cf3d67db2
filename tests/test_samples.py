"""Saving: what is read back is what was sampled, and a file is whole or it is not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models
from toys import MASK, Toy

from unmask import Ancestral, Sampler, Samples
from unmask.samples import check_path

SUFFIXES = (".jsonl", ".parquet")
SEED = 2**64 - 1
PIECES = ("a", "[MASK]", "é", "\n", '"', "\u2028", "日本", "<b>", "")


def sampled(num_samples=6, seed=SEED, ragged=True, with_text=True) -> Samples:
    toy = Toy(len(PIECES), 12)
    if with_text:
        toy.tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token=""))
    length = [4 + i % 9 for i in range(num_samples)] if ragged else 12
    return Sampler(toy, reveal=Ancestral(3), max_batch=2).sample(num_samples, length, seed=seed, prompt=[2, 6])


def rows_of(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_round_trip(tmp_path, suffix, ragged, with_text):
    samples, path = sampled(ragged=ragged, with_text=with_text), tmp_path / f"samples{suffix}"
    samples.save(path)
    rows = rows_of(path)
    assert [row["index"] for row in rows] == list(range(6))
    for row, sample in zip(rows, samples, strict=True):
        assert list(row) == ["seed", "index", "tokens", "text", "logprobs", "reveal_step"]
        assert row["seed"] == SEED and row["text"] == sample.text and (row["text"] is not None) == with_text
        assert row["tokens"] == sample.tokens.tolist() and row["reveal_step"] == sample.reveal_step.tolist()
        assert np.array_equal(np.float32(row["logprobs"]), sample.logprobs.numpy())
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_replaced_and_readable_by_others(tmp_path, suffix):
    path = tmp_path / f"samples{suffix}"
    path.write_text("old")
    old_mask = os.umask(0o022)
    try:
        sampled(3).save(str(path))
    finally:
        os.umask(old_mask)
    assert len(rows_of(path)) == 3 and path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("seed", [3, np.int64(3), np.uint64(SEED), torch.tensor(3)])
def test_any_whole_number_is_a_seed(tmp_path, seed):
    samples = sampled(2, seed=seed)
    samples.save(tmp_path / "samples.jsonl")
    assert rows_of(tmp_path / "samples.jsonl")[0]["seed"] == int(seed)
    assert torch.equal(samples.tokens, sampled(2, seed=int(seed)).tokens)


def test_a_folder_of_the_moment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sampled(2).save("samples.jsonl")
    assert os.listdir(tmp_path) == ["samples.jsonl"]


# ---- Whole or not at all ----


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_in_the_middle(monkeypatch, suffix):
    """The disk is full after the third row, or when the table is half written, or at the final flush."""
    if suffix == ".jsonl":
        dumps, calls = json.dumps, []

        def dumps_or_fail(*arguments, **options):
            calls.append(arguments)
            return dumps(*arguments, **options) if len(calls) < 4 else full_disk()

        monkeypatch.setattr("unmask.samples.json.dumps", dumps_or_fail)
    else:

        def write_half(table, path):
            Path(path).write_bytes(b"PAR1 and then nothing")
            full_disk()

        monkeypatch.setattr("unmask.samples.pq.write_table", write_half)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("old", [None, "what stood here before"])
@pytest.mark.parametrize("where", ["writing", "flushing", "renaming"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, suffix, old, where):
    samples, path = sampled(), tmp_path / f"samples{suffix}"
    if old is not None:
        path.write_text(old)
    if where == "writing":
        fail_in_the_middle(monkeypatch, suffix)
    else:
        monkeypatch.setattr(*{"flushing": (os, "fsync"), "renaming": (Path, "replace")}[where], full_disk)
    with pytest.raises(OSError, match="No space left"):
        samples.save(path)
    assert os.listdir(tmp_path) == ([] if old is None else [path.name])
    assert old is None or path.read_text() == old


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_kill_leaves_the_old_file(tmp_path, suffix):
    """kill -9 of a process that has written half of the new file."""
    path, half = tmp_path / f"samples{suffix}", tmp_path / "half"
    script = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_samples import sampled
from unmask import samples as module
samples = sampled(4)
samples.save({str(path)!r})

def stop(*arguments, **options):
    if {suffix == ".parquet"}:
        Path(arguments[1]).write_bytes(b"PAR1 and then nothing")
    elif not stop.calls:
        stop.calls.append(1)
        return "x" * 1_000_000
    Path({str(half)!r}).touch()
    time.sleep(60)

stop.calls = []
module.json.dumps = module.pq.write_table = stop
sampled(6).save({str(path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 240
        while not half.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(rows_of(path)) == 4
    left = [name for name in os.listdir(tmp_path) if name not in (path.name, "half")]
    assert len(left) == 1 and left[0].startswith(f".{path.name}.") and left[0].endswith(".part")
    sampled(6).save(path)  # what the dead process left is in nobody's way
    assert len(rows_of(path)) == 6


# ---- Bad paths ----


@pytest.mark.parametrize("name", ["samples.txt", "samples", "samples.json", ".jsonl"])
def test_a_bad_suffix_names_the_good_ones(tmp_path, name):
    for call in (sampled(1).save, check_path):
        with pytest.raises(ValueError, match=r"path must end in .jsonl or .parquet, got '.*" + name):
            call(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path):
    for folder in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError, match=f"folder that exists, got '{folder}/samples.jsonl'"):
            sampled(1).save(folder / "samples.jsonl")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_in_the_way_is_an_error(tmp_path, suffix):
    (tmp_path / f"samples{suffix}").mkdir()
    with pytest.raises(OSError):
        sampled(1).save(tmp_path / f"samples{suffix}")
    assert os.listdir(tmp_path) == [f"samples{suffix}"]


# ---- In memory ----


def test_samples_are_in_order_and_padded():
    samples = sampled(11)
    assert [sample.index for sample in samples] == list(range(11)) and len(samples) == 11
    assert samples.lengths.tolist() == [4 + i % 9 for i in range(11)]
    behind = torch.arange(12) >= samples.lengths[:, None]
    assert (samples.tokens[behind] == -1).all() and (samples.tokens[~behind] >= 0).all()
    assert (samples.reveal_step[behind] == -1).all() and (samples.logprobs[behind] == 0).all()
    assert samples.tokens.dtype == torch.int64 and samples.reveal_step.dtype == torch.int32
    assert samples.logprobs.dtype == torch.float32 and (samples.tokens != MASK).all()
    assert samples.text == [sample.text for sample in samples] and sampled(2, with_text=False).text is None
    assert [sample.index for sample in samples[2:4]] == [2, 3] and samples[-1].index == 10


def test_the_json_object_is_json():
    samples = sampled(3)
    loaded = json.loads(json.dumps(samples.to_json()))
    assert loaded["seed"] == SEED and loaded["texts"] == samples.text
    assert loaded["tokens"] == [sample.tokens.tolist() for sample in samples]
    assert loaded["reveal_step"] == [sample.reveal_step.tolist() for sample in samples]
    assert loaded["stats"]["events"] == samples.stats.events and loaded["stats"]["nfe"] == samples.stats.nfe
    assert loaded["stats"]["flops_total"]["total"] == samples.stats.cost.total.total


def test_samples_do_not_change_each_other():
    samples = sampled(4, ragged=False)
    before = samples.tokens.clone()
    samples[1].tokens.zero_()
    assert torch.equal(samples.tokens[[0, 2, 3]], before[[0, 2, 3]])
