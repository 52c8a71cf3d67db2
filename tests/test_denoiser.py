"""The seam: packed batches, the wrapper for foreign models, agreement of models, the workspace."""

import pytest
import torch
from tokenizers import Tokenizer, models

from unmask.denoiser import Batch, DenoiserSpec, LogitsDenoiser, check_compatible, fingerprint, spans
from unmask.work import Flops
from unmask.workspace import Workspace

VOCAB = 11


def make_spec(**changes):
    fields = {"family": "toy", "vocab_size": VOCAB, "mask_id": 10, "hidden_size": 8, "num_blocks": 1, "num_heads": 2}
    return DenoiserSpec(**(fields | {"intermediate_size": 8, "max_length": 32} | changes))


def make_batch(lengths=(3, 3, 5, 2), rows=(0, 2, 3, 7, 10, 12), row_counts=(2, 1, 2, 1)):
    tokens = torch.arange(sum(lengths)) % VOCAB
    return Batch(tokens, lengths, torch.tensor(rows), row_counts, torch.linspace(0.1, 1, len(lengths)))


def toy_logits(tokens, mask_rate=None):
    """Logits that tell the whole sequence, the position and the mask rate apart."""
    length = tokens.shape[1]
    position = torch.arange(length, dtype=torch.float32)[None, :, None]
    whole = (tokens.float() * torch.arange(1, length + 1)).sum(1)[:, None, None]
    rate = 0 if mask_rate is None else mask_rate[:, None, None]
    return whole + 100 * position + 1000 * rate + torch.arange(VOCAB) / VOCAB


def expected_rows(batch, shift=False, conditioned=False):
    rows, start, ends = [], 0, 0
    for i, (length, count) in enumerate(zip(batch.lengths, batch.row_counts, strict=True)):
        rate = batch.mask_rate[i : i + 1] if conditioned else None
        logits = toy_logits(batch.tokens[start : start + length][None], rate)[0]
        for row in batch.rows[ends : ends + count].tolist():
            position = row - start
            rows.append(logits[max(position - 1, 0) if shift else position])
        start, ends = start + length, ends + count
    return torch.stack(rows)


def test_runs_join_equal_neighbours_only():
    found = spans((4, 4, 4, 2, 4), (1, 1, 2, 2, 2))
    assert [tuple(span) for span in found] == [
        (slice(0, 2), slice(0, 2), slice(0, 8)),
        (slice(2, 3), slice(2, 4), slice(8, 12)),
        (slice(3, 4), slice(4, 6), slice(12, 14)),
        (slice(4, 5), slice(6, 8), slice(14, 18)),
    ]
    assert [span.num_sequences for span in found] == [2, 1, 1, 1]


def test_shifted_rows_stay_inside_their_sequence():
    assert make_batch().shifted_rows().tolist() == [0, 1, 3, 6, 9, 11]


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("max_bytes", [1, 2 * 3 * VOCAB * 4, 1 << 20])
def test_logits_denoiser_in_chunks(shift, conditioned, max_bytes):
    sizes = []

    def model(tokens, *mask_rate):
        sizes.append(tokens.shape)
        return toy_logits(tokens, *mask_rate)

    spec = make_spec(shift=shift, time_conditioned=conditioned)
    denoiser = LogitsDenoiser(model, spec, max_bytes=max_bytes)
    batch, workspace = make_batch(), Workspace([denoiser.buffers(13, 6, 4)])
    pieces = list(denoiser.chunks(batch, workspace))
    assert [row for rows, _ in pieces for row in range(rows.start, rows.stop)] == list(range(6))
    expected = expected_rows(batch, shift, conditioned)
    torch.testing.assert_close(torch.cat([piece for _, piece in pieces]), expected)
    assert all(n == 1 or 4 * n * length * VOCAB <= max_bytes for n, length in sizes)
    assert len(sizes) == (4 if max_bytes == 1 else 3)
    assert torch.equal(denoiser.hidden(batch, workspace), torch.cat([piece for _, piece in pieces]))


def test_logits_denoiser_skips_sequences_without_rows():
    called = []
    denoiser = LogitsDenoiser(lambda tokens: called.append(1) or toy_logits(tokens), make_spec())
    batch = make_batch(lengths=(3, 5), rows=(4, 7), row_counts=(0, 2))
    torch.testing.assert_close(denoiser.hidden(batch, Workspace([])), expected_rows(batch))
    assert len(called) == 1
    nothing = Batch(torch.zeros(3, dtype=torch.int64), (3,), torch.zeros(0, dtype=torch.int64), (0,), torch.ones(1))
    assert denoiser.hidden(nothing, Workspace([])).shape == (0, VOCAB)


def test_logits_of_the_wrong_shape_are_an_error():
    denoiser = LogitsDenoiser(lambda tokens: toy_logits(tokens)[:, 1:], make_spec(), name="mine")
    with pytest.raises(ValueError, match=r"'mine' must be \[2, 3, 11\], got \[2, 2, 11\]"):
        denoiser.hidden(make_batch(), Workspace([]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (3, 3, 5)}, "same sequences, got 3, 4"),
        ({"lengths": (3, 3, 5, 3)}, r"tokens must be int64 \[14\], got torch.int64 \[13\]"),
        ({"row_counts": (1, 1, 1, 1)}, r"rows must be int64 \[4\]"),
        ({"rows": torch.arange(6, dtype=torch.int32)}, "rows must be int64.*int32"),
    ],
)
def test_batches_that_do_not_add_up(changes, message):
    batch = make_batch()
    fields = {name: getattr(batch, name) for name in ("tokens", "lengths", "rows", "row_counts", "mask_rate")}
    with pytest.raises(ValueError, match=message):
        Batch(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_id": 11}, r"mask_id must be in \[0, vocab_size = 11\), got 11"),
        ({"hidden_size": 9}, "hidden_size must be a multiple of num_heads = 2, got 9"),
        ({"max_length": 0}, "max_length must be positive, got 0"),
    ],
)
def test_specs_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        make_spec(**changes)


def test_models_of_one_run_must_agree_on_tokens_and_device():
    def model(device="cpu", **changes):
        return LogitsDenoiser(None, make_spec(**changes), device=device)

    heavy, light = model(tokenizer="sha256:a"), model()
    check_compatible({"heavy": heavy, "light": light})  # a model without a tokenizer agrees
    for field, value in (("vocab_size", 12), ("mask_id", 9), ("tokenizer", "sha256:b"), ("device", "meta")):
        with pytest.raises(ValueError, match=rf"share {field}, got .* for 'heavy' and .* for 'other'"):
            check_compatible({"heavy": heavy, "light": light, "other": model(**{field: value})})


def test_a_wrapped_model_has_the_fingerprint_of_its_tokenizer():
    tokenizers = [Tokenizer(models.WordLevel({word: 0}, word)) for word in "ab"]
    wrapped = [LogitsDenoiser(None, make_spec(), tokenizer=tokenizer) for tokenizer in tokenizers]
    assert wrapped[0].spec.tokenizer == fingerprint(tokenizers[0])
    with pytest.raises(ValueError, match="share tokenizer"):
        check_compatible(dict(zip("ab", wrapped, strict=True)))


def test_flops():
    flops = (Flops(1, 2, 3) + Flops(10, 20, 30) * 2) * 2
    assert flops == Flops(42, 84, 126)
    assert flops.total == 252


def test_workspace_shares_the_largest_request():
    workspace = Workspace([{"a": (10, torch.float32)}, {"a": (6, torch.float32), "b": (3, torch.int64)}])
    assert workspace.nbytes == 10 * 4 + 3 * 8
    first, second = workspace.view("a", 2, 3), workspace.view("a", 10)
    assert first.shape == (2, 3) and first.is_contiguous() and first.data_ptr() == second.data_ptr()
    workspace.poison()
    assert second.isnan().all()


def test_workspace_errors():
    workspace = Workspace([{"a": (10, torch.float32)}])
    with pytest.raises(KeyError, match="'z' is not in this workspace"):
        workspace.view("z", 1)
    with pytest.raises(ValueError, match=r"holds 10 elements, got a request for 12 as \[3, 4\]"):
        workspace.view("a", 3, 4)
    with pytest.raises(ValueError, match=r"one dtype, got torch.float32 and torch.bfloat16"):
        Workspace([{"a": (1, torch.float32)}, {"a": (1, torch.bfloat16)}])
