"""Losses against plain torch, prefixes against their law, and students that come nearer to their teacher."""

import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import unmask
from unmask.training import bound
from unmask.training.config import TrainConfig
from unmask.training.corpus import Stream, read_documents, split
from unmask.training.loss import CHUNK_ROWS, Teaching, head_loss
from unmask.training.teacher import random_prefixes
from unmask.training.trainer import Trainer

WORDS = ("the", "of", "union", "state", "congress", "people", "government", "war", "peace", "nation", "year", "law")
VOCAB, MASK = 23, 22


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A chain of words, each of which has two followers, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for number in range(12):
        words = [0]
        for _ in range(300):
            words.append((words[-1] * 5 + draw.choice((1, 4))) % len(WORDS))
        (folder / f"speech-{number}.txt").write_text(" ".join(WORDS[word] for word in words))
    return folder


@pytest.fixture(scope="module")
def teacher(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    Trainer(replace(tiny(texts), blocks=2, steps=120), folder).run(lambda report: None)
    return folder


def tiny(texts):
    return TrainConfig(
        data=str(texts),
        vocab_size=280,
        blocks=1,
        hidden_dim=32,
        heads=2,
        length=32,
        steps=40,
        batch_size=4,
        heldout_share=0.3,
        dtype="float32",
    )


def inputs(num_rows, taught=True):
    generator = torch.Generator().manual_seed(num_rows)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    head = normal(num_rows, 8), normal(VOCAB, 8), normal(VOCAB)
    for tensor in head:
        tensor.requires_grad_()
    targets = torch.randint(0, MASK, (num_rows,), generator=generator)
    scale, share = torch.rand(2, num_rows, generator=generator)
    share[: num_rows // 3] = torch.tensor([0.0, 1.0]).repeat(num_rows)[: num_rows // 3]
    teaching = Teaching(normal(num_rows, 5), normal(VOCAB, 5), normal(VOCAB), share)
    return head, targets, scale, teaching if taught else None


def by_hand(head, targets, scale, teaching):
    hidden, weight, bias = head

    def log_law(rows, weight, bias):
        return torch.cat([(rows @ weight.T + bias)[:, :MASK].log_softmax(1), torch.zeros(len(rows), 1)], 1)

    log_p = log_law(hidden, weight, bias)
    loss = -log_p[torch.arange(len(targets)), targets]
    if teaching is not None:
        log_q = log_law(teaching.hidden, teaching.weight, teaching.bias)
        kl = (log_q.exp() * (log_q - log_p))[:, :MASK].sum(1)
        loss = (1 - teaching.share) * loss + teaching.share * kl
    return scale @ loss


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("num_rows", [1, CHUNK_ROWS, 2 * CHUNK_ROWS + 7])
def test_loss_and_slopes_are_those_of_plain_torch(num_rows, taught):
    head, targets, scale, teaching = inputs(num_rows, taught)
    found = []
    for loss in (
        by_hand(head, targets, scale, teaching),
        3 * head_loss(*head, MASK, targets, scale, teaching) / 3,
    ):
        found.append((loss, *torch.autograd.grad(loss, head)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_loss_in_bf16_is_near_that_in_fp32():
    head, targets, scale, teaching = inputs(600)
    wide = head_loss(*head, MASK, targets, scale, teaching)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = head_loss(*head, MASK, targets, scale, teaching)
    assert narrow.dtype is torch.float32 and narrow.item() != wide.item()
    assert narrow.item() == pytest.approx(wide.item(), rel=0.01)
    for one, other in zip(torch.autograd.grad(narrow, head), torch.autograd.grad(wide, head), strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999


def test_a_student_with_the_teachers_law_has_nothing_to_learn():
    (hidden, weight, bias), targets, scale, _ = inputs(50)
    teaching = Teaching(hidden.detach(), weight.detach(), bias.detach(), torch.ones(50))
    loss = head_loss(hidden, weight, bias, MASK, targets, scale, teaching)
    assert abs(loss.item()) < 1e-4
    assert all(slope.abs().max() < 1e-5 for slope in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_random_prefixes_come_with_their_probability_and_length():
    """20,000 windows of 6: how often each length of prefix is taken, by chi-square, at three times."""
    num, length, strength = 20_000, 6, 2.0
    clean, others = np.zeros((num, length), np.int64), np.ones((num, length), np.int64)
    for time in (0.1, 0.6, 1.0):
        rng = np.random.default_rng(0)
        spliced, replaced = random_prefixes(clean, others, np.full(num, time), strength, rng)
        lengths = spliced.sum(1)
        assert (np.diff(spliced, axis=1) <= 0).all()  # ones, then zeros
        assert ((lengths > 0) == replaced).all()
        chance = math.exp(-strength * (1 - time))
        expected = num * np.array([1 - chance, *[chance / (length - 1)] * (length - 1), 0.0])
        counts = np.bincount(lengths, minlength=length + 1)
        assert counts[expected == 0].sum() == 0
        some = expected > 0
        chi2 = ((counts - expected)[some] ** 2 / expected[some]).sum()
        assert chi2 < 20.5  # p = 0.001 with 5 degrees of freedom


def test_a_taught_student_is_nearer_to_the_teacher(texts, teacher, tmp_path):
    config = replace(tiny(texts), tokenizer=str(teacher / "tokenizer.json"), steps=120)
    Trainer(config, tmp_path / "alone").run(lambda report: None)
    heldout = split(read_documents(texts), 0.3)[1]
    windows = Stream.encode(heldout, unmask.load(teacher).tokenizer).windows(32)
    alone = bound.heldout_divergence(unmask.load(teacher), unmask.load(tmp_path / "alone"), windows, draws=8)
    for change in ({"teacher_share": 1.0}, {"random_prefix": 5.0}):
        folder = tmp_path / next(iter(change))
        metrics = Trainer(replace(config, teacher=str(teacher), **change), folder).run(lambda report: None)
        assert metrics["heldout_kl"]["teacher"] == str(teacher)
        found, error = (metrics["heldout_kl"][key] for key in ("nats_per_token", "standard_error"))
        assert found < alone[0] - 4 * error


def test_heldout_divergence_is_that_of_the_laws_written_out(texts, teacher, tmp_path):
    config = replace(tiny(texts), tokenizer=str(teacher / "tokenizer.json"), steps=1)
    Trainer(config, tmp_path / "other").run(lambda report: None)
    models = [unmask.load(source) for source in (teacher, tmp_path / "other")]
    windows = np.random.default_rng(0).integers(0, 270, (3, 32))
    found, error = bound.heldout_divergence(*models, windows, draws=2)
    rng, totals = np.random.default_rng(0), np.zeros((2, 3))
    for draw in range(2):
        batch = bound.mask_by_count(windows, 279, rng)
        log_p, log_q = (bound.law_of(model, 3, 32)(batch.tokens, batch.rows).log_softmax(1) for model in models)
        kl = (log_p.exp() * (log_p - log_q))[:, :279].sum(1) * batch.weights
        totals[draw] = [kl[batch.rows // 32 == window].sum() / 32 for window in range(3)]
    assert found == pytest.approx(totals.mean(), rel=1e-4)
    assert error == pytest.approx(totals.mean(0).std(ddof=1) / math.sqrt(3), rel=1e-3)


def test_a_taught_run_goes_on_with_the_same_losses(texts, teacher, tmp_path):
    config = replace(tiny(texts), teacher=str(teacher), random_prefix=5.0, steps=10)
    straight, resumed = [], []
    Trainer(config, tmp_path / "straight").run(lambda report: straight.append(report.loss))
    Trainer(replace(config, steps=4), tmp_path / "run").run(lambda report: None)
    Trainer(config, tmp_path / "run").run(lambda report: resumed.append(report.loss))
    # The learning rate looks ahead to the end of the run, so only the first of these steps has the same weights' loss.
    assert len(resumed) == 6 and straight[4] == pytest.approx(resumed[0], rel=0.05)


def test_a_teacher_that_is_replaced_does_not_go_on(texts, teacher, tmp_path):
    copied = tmp_path / "teacher"
    shutil.copytree(teacher, copied)
    config = replace(tiny(texts), teacher=str(copied), steps=2)
    Trainer(config, tmp_path / "run").run(lambda report: None)
    Trainer(replace(config, teacher=None), tmp_path / "other").run(lambda report: None)
    Trainer(replace(config, steps=3), tmp_path / "run")
    shutil.copy(tmp_path / "other" / "model.safetensors", copied / "model.safetensors")
    shutil.copy(tmp_path / "other" / "config.json", copied / "config.json")
    with pytest.raises(ValueError, match=r"teacher must be the checkpoint that the run in .* began with"):
        Trainer(replace(config, steps=3), tmp_path / "run")


def test_students_and_teachers_must_speak_of_the_same_ids(texts, teacher, tmp_path):
    config = replace(tiny(texts), teacher=str(teacher))
    assert Trainer(config, tmp_path / "student").shape.vocab_size == 280  # the teacher's tokenizer
    with pytest.raises(ValueError, match=r"teacher must have vocab_size 2\d\d, as the student, got 280"):
        Trainer(Trainer(replace(config, teacher=None, vocab_size=270), tmp_path / "other").config, tmp_path / "other")
        other = str(tmp_path / "other" / "tokenizer.json")
        Trainer(replace(config, tokenizer=other), tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
    with pytest.raises(ValueError, match="teacher must take windows of 64 tokens, got one of at most 32"):
        Trainer(replace(config, length=64), tmp_path / "long")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_share": 0.0, "teacher": "sotu-heavy"}, "teacher_share must be above 0 and up to 1, got 0.0"),
        ({"teacher_share": 0.5}, "teacher_share needs teacher, got 0.5 and none"),
        ({"random_prefix": 5.0}, "random_prefix needs teacher, .* got none"),
        ({"random_prefix": -1.0, "teacher": "sotu-heavy"}, "random_prefix must be above 0, got -1.0"),
        ({"early_exit": 1}, "early_exit needs init, .* 1 blocks, got none"),
        ({"early_exit": 0, "init": "sotu-heavy"}, "early_exit must be at least 1, got 0"),
    ],
)
def test_bad_options(texts, change, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny(texts), **change)
