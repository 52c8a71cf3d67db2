"""Training: the corpus and its split, the loss and the bound, the baselines, and runs that survive a kill."""

import collections
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import unmask
from unmask.training import baselines, bound, corpus
from unmask.training.config import TrainConfig
from unmask.training.model import ModelShape, TrainableDenoiser
from unmask.training.trainer import Trainer

WORDS = ("the", "of", "union", "state", "congress", "people", "government", "war", "peace", "nation", "year", "law")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for number in range(12):
        (folder / f"speech-{number}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(300)))
    return folder


@pytest.fixture
def config(texts):
    return TrainConfig(
        data=str(texts), vocab_size=280, blocks=2, hidden_dim=32, length=32, steps=24, batch_size=4, dtype="float32"
    )


class TestCorpus:
    def test_split_keeps_documents_whole_and_does_not_move_them(self, texts):
        documents = corpus.read_documents(texts)
        train, heldout = corpus.split(documents, 0.3)
        assert sorted(d.name for d in train + heldout) == sorted(d.name for d in documents)
        assert train and heldout
        fewer_train, fewer_heldout = corpus.split(documents[::2], 0.3)
        assert {d.name for d in fewer_train} <= {d.name for d in train}
        assert {d.name for d in fewer_heldout} <= {d.name for d in heldout}

    def test_tokenizer_round_trips_any_text_and_reserves_both_ends(self, texts):
        tokenizer = corpus.train_tokenizer(corpus.read_documents(texts), 280)
        text = "the Union — naïve 日本 \n\n x"
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.get_vocab_size() == 280
        assert (tokenizer.token_to_id(corpus.END_OF_TEXT), tokenizer.token_to_id(corpus.MASK)) == (0, 279)

    def test_stream_ends_each_document(self, texts):
        documents = corpus.read_documents(texts)
        stream = corpus.Stream.encode(documents, corpus.train_tokenizer(documents, 280))
        assert (stream.ids == 0).sum() == len(documents)
        assert stream.num_bytes == sum(len(d.text.encode()) for d in documents)
        assert (stream.windows(10)[1] == stream.crops(np.array([10]), 10)[0]).all()

    def test_special_tokens_spelled_out_are_text(self, texts):
        documents = corpus.read_documents(texts)
        tokenizer = corpus.train_tokenizer(documents, 280)
        stream = corpus.Stream.encode([corpus.Document("a", "war <mask> and <|endoftext|> peace")], tokenizer)
        assert 279 not in stream.ids and (stream.ids == 0).sum() == 1
        assert tokenizer.decode(stream.ids[:-1].tolist()) == "war <mask> and <|endoftext|> peace"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [("a.txt", b"", "empty"), ("a.txt", b"\xff\xfe", "UTF-8"), ("a.md", b"text", "none below it")],
    )
    def test_bad_files_are_named(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            corpus.read_documents(tmp_path)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            corpus.read_documents(tmp_path / "nowhere")

    def test_vocabulary_larger_than_the_text_can_fill(self, texts):
        with pytest.raises(ValueError, match="vocab_size must be reachable"):
            corpus.train_tokenizer(corpus.read_documents(texts)[:1], 4000)


class TestBound:
    def test_uniform_law_costs_log_v(self):
        windows = np.random.default_rng(0).integers(0, 9, (64, 16))

        def uniform(tokens, rows):
            return torch.zeros(len(rows), 9)

        found = bound.heldout_bound(uniform, windows, 9, tokens_per_byte=0.5, draws=2)
        assert found.nats_per_token == pytest.approx(math.log(9), rel=1e-6)
        assert found.bits_per_byte == pytest.approx(math.log2(9) * 0.5, rel=1e-6)

    def test_training_loss_and_bound_have_the_same_mean(self):
        """A law whose loss grows with the number of masked tokens, so that a wrong weight of either shows."""
        clean = np.zeros((4096, 12), np.int64)

        def estimate(mask):
            rng, values = np.random.default_rng(1), []
            for _ in range(20):
                batch = mask(clean, 3, rng)
                sequence = batch.rows // 12
                share = torch.bincount(sequence, minlength=len(clean))[sequence] / 12
                logits = torch.stack([-share, torch.zeros_like(share), torch.zeros_like(share)], 1)
                values.append(bound.bound_nats(logits, batch).mean().item())
            return np.mean(values), np.std(values) / math.sqrt(len(values))

        by_time, by_count = estimate(bound.mask_by_time), estimate(bound.mask_by_count)
        exact = np.mean([math.log(1 + 2 * math.exp(n / 12)) for n in range(1, 13)])
        assert abs(by_count[0] - exact) < 5 * by_count[1] + 1e-4
        assert abs(by_time[0] - exact) < 5 * by_time[1] + 1e-3

    def test_masked_rows_point_at_what_stood_there(self):
        clean = np.arange(40).reshape(4, 10)
        batch = bound.mask_by_count(clean, 99, np.random.default_rng(0))
        assert (batch.tokens.flatten()[batch.rows] == 99).all()
        assert (batch.targets == batch.rows).all()
        assert (batch.tokens == 99).sum() == len(batch.rows)


class TestBaselines:
    train = np.random.default_rng(3).choice(5, 400, p=[0.4, 0.3, 0.2, 0.05, 0.05])
    heldout = np.random.default_rng(4).integers(0, 6, 60)

    def test_unigram(self):
        counts = collections.Counter(self.train.tolist())
        expected = -np.mean([math.log((counts[i] + 1) / (400 + 6)) for i in self.heldout.tolist()])
        assert baselines.unigram_nats(self.train, self.heldout, 6) == pytest.approx(expected)

    def test_trigram_equals_a_slow_one(self):
        ids, size, discount = self.train.tolist(), 6, baselines.DISCOUNT
        tri = collections.Counter(zip(ids, ids[1:], ids[2:], strict=False))
        bi = collections.Counter(gram[1:] for gram in tri)
        uni = collections.Counter(gram[1:] for gram in bi)

        def interpolate(counts, gram, lower):
            context = {g: c for g, c in counts.items() if g[:-1] == gram[:-1]}
            if not context:
                return lower
            total = sum(context.values())
            return (max(counts[gram] - discount, 0) + discount * len(context) * lower) / total

        def law(gram):
            return interpolate(tri, gram, interpolate(bi, gram[1:], interpolate(uni, gram[2:], 1 / size)))

        assert sum(law((0, 1, i)) for i in range(size)) == pytest.approx(1)
        grams = zip(*(self.heldout.tolist()[i:] for i in range(3)), strict=False)
        expected = -np.mean([math.log(law(gram)) for gram in grams])
        assert baselines.trigram_nats(self.train, self.heldout, size) == pytest.approx(expected)
        found = baselines.Trigram.fit(self.train, size).nats(self.heldout[:40].reshape(10, 4))
        for text, nats in zip(self.heldout[:40].reshape(10, 4).tolist(), found, strict=True):
            first = interpolate(uni, (text[0],), 1 / size)
            second = interpolate(bi, (text[0], text[1]), interpolate(uni, (text[1],), 1 / size))
            laws = first, second, law(tuple(text[:3])), law(tuple(text[1:]))
            assert nats == pytest.approx(-np.log(laws))

    def test_trigram_needs_a_trigram(self):
        with pytest.raises(ValueError, match="train must hold at least 3 tokens, got 2"):
            baselines.Trigram.fit(np.array([1, 2]), 6)

    @pytest.mark.parametrize("length", [1, 2, 4])
    def test_trigram_is_a_law_of_whole_texts(self, length):
        every = np.array(list(itertools.product(range(6), repeat=length)))
        nats = baselines.Trigram.fit(self.train, 6).nats(every)
        assert np.exp(-nats.sum(1)).sum() == pytest.approx(1)


class TestTrainer:
    def test_learns_and_writes_a_checkpoint_that_loads_to_the_same_law(self, config, tmp_path):
        losses = []
        trainer = Trainer(replace(config, steps=40), tmp_path / "run")
        metrics = trainer.run(lambda report: losses.append(report.loss), heldout_every=20)
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
        assert metrics["heldout"]["bits_per_byte"] > 0 and metrics == json.loads(
            (tmp_path / "run" / "metrics.json").read_text()
        )
        denoiser = unmask.load(tmp_path / "run")
        assert (denoiser.name, denoiser.spec.num_blocks, denoiser.spec.mask_id) == ("run", 2, 279)

        net = TrainableDenoiser(trainer.shape)
        with torch.no_grad():
            for parameter, average in zip(net.parameters(), trainer.average, strict=True):
                # The checkpoint holds matrices in bf16.
                parameter.copy_(average.bfloat16() if average.ndim > 1 else average)
        tokens = torch.randint(0, 280, (3, 32), generator=torch.Generator().manual_seed(0))
        rows = torch.tensor([0, 5, 31, 32, 95])
        expected = net(tokens, rows).log_softmax(1)
        got = bound.law_of(denoiser, 3, 32)(tokens, rows).log_softmax(1)
        assert torch.allclose(got[:, :279], expected[:, :279], atol=1e-4)
        assert got[:, 279].isneginf().all()

    def test_killed_run_goes_on_with_the_same_losses(self, config, tmp_path):
        straight = []
        Trainer(config, tmp_path / "straight").run(lambda report: straight.append(report.loss), state_every=5)
        process = _train_in_a_process(config, tmp_path / "killed")
        _wait_for_state(process, tmp_path / "killed")
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = {}
        trainer = Trainer(config, tmp_path / "killed")
        assert 0 < trainer.step < config.steps
        trainer.run(lambda report: resumed.update({report.step: report.loss}), state_every=5)
        assert list(resumed.values()) == straight[len(straight) - len(resumed) :]
        steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))

    def test_run_stopped_before_its_first_state_starts_its_log_anew(self, config, tmp_path):
        class Stopped(Exception):
            pass

        def stop(report):
            if report.step == 12:
                raise Stopped

        with pytest.raises(Stopped):
            Trainer(config, tmp_path / "run").run(stop)
        Trainer(config, tmp_path / "run").run(lambda report: None)
        steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert steps == [10, 20, 24]

    def test_nothing_is_written_before_the_options_are_known_to_be_sound(self, config, tmp_path):
        for change in ({"hidden_dim": 30, "heads": 4}, {"length": 10**6}, {"tokenizer": str(tmp_path / "missing")}):
            with pytest.raises(ValueError, match=r"hidden_dim must|length must be below|missing: not a tokenizer"):
                Trainer(replace(config, **change), tmp_path / "run")
            assert not (tmp_path / "run").exists()
        assert Trainer(replace(config, vocab_size=270), tmp_path / "run").shape.vocab_size == 270

    def test_damaged_state_is_named(self, config, tmp_path):
        Trainer(config, tmp_path / "run")
        (tmp_path / "run" / "state.pt").write_bytes(b"PK cut")
        with pytest.raises(ValueError, match=r"state\.pt must be the state of a run, got a damaged file"):
            Trainer(config, tmp_path / "run")

    @pytest.mark.parametrize("content", ["{", '{"colour": 1}', '{"steps": 0}'])
    def test_damaged_options_are_named(self, config, tmp_path, content):
        Trainer(config, tmp_path / "run")
        (tmp_path / "run" / "train.json").write_text(content)
        with pytest.raises(ValueError, match=r"train\.json must hold the options of a run, got a damaged file"):
            Trainer(config, tmp_path / "run")

    def test_tokenizer_without_the_special_tokens(self, config, tmp_path):
        Tokenizer(WordLevel({"war": 0}, "war")).save(str(tmp_path / "words.json"))
        with pytest.raises(ValueError, match=r"tokenizer must have the token <\|endoftext\|>"):
            Trainer(replace(config, tokenizer=str(tmp_path / "words.json")), tmp_path / "run")

    def test_log_line_cut_by_a_kill_is_dropped(self, config, tmp_path):
        folder = tmp_path / "run"
        Trainer(replace(config, steps=10), folder).run(lambda report: None, state_every=5)
        with (folder / "log.jsonl").open("a") as file:
            file.write('{"step": 11, "lo')
        Trainer(config, folder)
        assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [10]

    def test_other_options_than_those_of_the_run_are_refused(self, config, tmp_path):
        Trainer(config, tmp_path / "run")
        with pytest.raises(ValueError, match=r"blocks must be 2 to resume .* got 3"):
            Trainer(replace(config, blocks=3), tmp_path / "run")
        Trainer(replace(config, steps=99), tmp_path / "run")

    def test_shared_tokenizer(self, config, tmp_path):
        Trainer(config, tmp_path / "heavy")
        light = Trainer(replace(config, tokenizer=str(tmp_path / "heavy" / "tokenizer.json")), tmp_path / "light")
        assert light.shape.vocab_size == 280

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": 0}, "steps must be at least 1, got 0"),
            ({"seed": -1}, "seed must be from 0 to below 2"),
            ({"hidden_dim": -1}, "hidden_dim must be at least 1, got -1"),
            ({"dtype": "float16"}, "dtype must be .* got 'float16'"),
            ({"learning_rate": 0.0}, "learning_rate must be between 0 and 1, got 0.0"),
            ({"decay_share": 1.5}, "decay_share must be from 0 to 1, got 1.5"),
            ({"ema_decay": 1.0}, "ema_decay must be from 0 to below 1, got 1.0"),
        ],
    )
    def test_bad_options(self, config, change, message):
        with pytest.raises(ValueError, match=message):
            replace(config, **change)

    def test_heads_must_divide_the_width(self):
        with pytest.raises(ValueError, match="hidden_dim must be n_heads times an even head size, got 30 for 4"):
            ModelShape(10, 9, 30, 1, 4, 8)


def _train_in_a_process(config, folder):
    code = (
        "import sys, json, time, torch; torch.set_num_threads(1)\n"
        "from unmask.training.config import TrainConfig; from unmask.training.trainer import Trainer\n"
        "trainer = Trainer(TrainConfig(**json.loads(sys.argv[1])), sys.argv[2])\n"
        "trainer.run(lambda report: time.sleep(0.1), state_every=5)\n"
    )
    arguments = [sys.executable, "-c", code, json.dumps(vars(config)), str(folder)]
    return subprocess.Popen(arguments, env=os.environ)


def _wait_for_state(process, folder):
    deadline = time.monotonic() + 120
    while not (folder / "state.pt").exists():
        assert process.poll() is None, "training ended before it was killed"
        assert time.monotonic() < deadline, "no state after two minutes"
        time.sleep(0.02)
