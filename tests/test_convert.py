"""`unmask convert`: what is written loads as a masked denoiser, and is the same network."""

import json
import os
import sys

import gpt2_reference
import pytest
import torch
from folders import write_folder
from llama_reference import random_state
from safetensors.torch import load_file
from test_layouts_llama import (
    GPT2,
    GROUPED,
    LLADA,
    PLAIN,
    SIZES,
    TOKENS,
    VOCAB,
    assert_computes,
    forward,
    llada_names,
    logits_of,
    make_tokenizer,
    state_of,
    wrapped_names,
)

from unmask import checkpoints, cli, convert
from unmask.models import gpt2
from unmask.pickles import CheckpointError

LLAMA = SIZES | {"model_type": "llama", "torch_dtype": "float32"}


@pytest.fixture
def causal(tmp_path):
    return write_folder(tmp_path / "causal", LLAMA, state_of(), num_shards=2)


def test_a_causal_checkpoint_with_one_of_its_ids_as_mask(causal, tmp_path):
    made = convert.convert(causal, tmp_path / "made", mask_id=33)
    denoiser = checkpoints.load(tmp_path / "made")
    assert_computes(denoiser, forward(state_of()), shift=True)
    assert denoiser.spec.mask_id == made["mask_id"] == 33
    assert made["num_parameters"] == denoiser.spec.num_parameters and made["vocab_size"] == VOCAB
    assert made["files"] == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("tied", [True, False])
def test_an_added_mask_is_the_mean_of_the_others(tmp_path, tied):
    state = state_of(GROUPED._replace(tied=tied))
    source = write_folder(tmp_path / "causal", LLAMA | {"tie_word_embeddings": tied}, state)
    make_tokenizer(size=VOCAB).save(str(source / "tokenizer.json"))
    made = convert.convert(source, tmp_path / "made", add_mask=True)
    denoiser = checkpoints.load(tmp_path / "made")
    assert (
        (denoiser.spec.mask_id, denoiser.spec.vocab_size) == (VOCAB, VOCAB + 1) == (made["mask_id"], made["vocab_size"])
    )
    assert denoiser.tokenizer.token_to_id("<mask>") == VOCAB
    assert denoiser.spec.num_parameters == made["num_parameters"]
    for grown, name in (
        (denoiser.layers.embedding, "model.embed_tokens.weight"),
        (denoiser.head.weight, "lm_head.weight"),
    ):
        old = state.get(name, state["model.embed_tokens.weight"])
        assert torch.equal(grown[:VOCAB], old)
        torch.testing.assert_close(grown[VOCAB], old.mean(0))
    logits = forward(state)
    wanted = torch.cat([logits[:1], logits[:-1]])
    torch.testing.assert_close(logits_of(denoiser)[:, :VOCAB], wanted, atol=1e-4, rtol=0)


def test_a_tokenizer_smaller_than_the_model_gets_no_mask_token(causal, tmp_path):
    """It would get another id than the model's."""
    make_tokenizer().save(str(causal / "tokenizer.json"))
    convert.convert(causal, tmp_path / "made", add_mask=True)
    denoiser = checkpoints.load(tmp_path / "made")
    assert denoiser.spec.mask_id == VOCAB and denoiser.tokenizer.get_vocab_size() == 20


def test_gpt2(tmp_path):
    state = random_state(gpt2.tensor_shapes(gpt2.Shape(VOCAB, 48, 2, 192, 32)))
    config = {key: value for key, value in GPT2.items() if key != "mask_token_id"}
    stored = state | {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32), "lm_head.weight": torch.zeros(VOCAB, 48)}
    source = write_folder(tmp_path / "causal", config, stored)
    convert.convert(source, tmp_path / "made", mask_id=9)
    assert load_file(tmp_path / "made" / "model.safetensors").keys() == state.keys()
    assert_computes(checkpoints.load(tmp_path / "made"), gpt2_reference.forward(state, TOKENS, 4)[1], shift=True)


def test_dtypes(causal, tmp_path):
    """Matrices change, vectors stay."""
    convert.convert(causal, tmp_path / "narrow", mask_id=9, dtype="bfloat16")
    stored = load_file(tmp_path / "narrow" / "model.safetensors")
    for name, tensor in state_of().items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16) if tensor.ndim > 1 else tensor)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert.convert(tmp_path / "narrow", tmp_path / "wide", dtype=torch.float32)
    rounded = {
        name: tensor.to(torch.bfloat16).float() if tensor.ndim > 1 else tensor for name, tensor in state_of().items()
    }
    assert_computes(checkpoints.load(tmp_path / "wide"), forward(rounded), shift=True)


def test_published_layouts_keep_their_names_and_meaning(tmp_path):
    state = state_of(PLAIN)
    source = write_folder(tmp_path / "llada", LLADA, llada_names(state), num_shards=2)
    made = convert.convert(source, tmp_path / "made", dtype="float32")
    assert load_file(tmp_path / "made" / "model.safetensors").keys() == llada_names(state).keys()
    assert_computes(checkpoints.load(tmp_path / "made"), forward(state, (4, 4)), shift=False)
    assert (made["family"], made["shift"], made["mask_id"]) == ("llada", False, 9)
    convert.convert(source, tmp_path / "masked otherwise", mask_id=11)
    assert checkpoints.load(tmp_path / "masked otherwise").spec.mask_id == 11
    wrapped = wrapped_names(state_of(), "model.")
    source = write_folder(tmp_path / "wrapped", LLAMA | {"mask_token_id": 9, "shift": False}, wrapped)
    convert.convert(source, tmp_path / "unwrapped")
    assert_computes(checkpoints.load(tmp_path / "unwrapped"), forward(state_of()), shift=False)


def test_bundled_models(tmp_path):
    convert.convert("sotu-exit", tmp_path / "whole", dtype="float32")
    one, other = checkpoints.load(tmp_path / "whole"), checkpoints.load("sotu-exit")
    assert torch.equal(one.head.weight, other.head.weight) and one.spec == other.spec


def test_shards(causal, tmp_path):
    made = convert.convert(causal, tmp_path / "made", mask_id=9, max_bytes=30_000)
    shards = [file for file in made["files"] if file.endswith(".safetensors")]
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "made" / file).values()) for file in shards]
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= 30_000
    assert_computes(checkpoints.load(tmp_path / "made"), forward(state_of()), shift=True)


def test_a_conversion_that_fails_leaves_no_trace(causal, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("unmask.shards.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.convert(causal, tmp_path / "made", mask_id=9)
    assert os.listdir(tmp_path) == ["causal"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"causal has no mask id: name one of its ids \(--mask-id\) or add one \(--add-mask\)"),
        ({"mask_id": 5, "add_mask": True}, "mask_id must be None where a mask id is added, got 5"),
        ({"mask_id": VOCAB}, r"mask_id must be in \[0, vocab_size = 101\), got 101"),
        ({"mask_id": 5, "dtype": "float16"}, "dtype must be"),
        ({"mask_id": 5, "dtype": "auto"}, "dtype must be one of float32, bfloat16, got 'auto'"),
    ],
)
def test_errors(causal, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert.convert(causal, tmp_path / "made", **options)
    assert os.listdir(tmp_path) == ["causal"]


def test_a_mask_is_added_to_causal_checkpoints_without_one_only(tmp_path):
    llada = write_folder(tmp_path / "llada", LLADA, llada_names(state_of(PLAIN)))
    with pytest.raises(ValueError, match="has the mask id 9"):
        convert.convert(llada, tmp_path / "made", add_mask=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        convert.convert(tmp_path / "nowhere", tmp_path / "made")


def test_the_folder_must_be_new_or_empty(causal, tmp_path):
    (tmp_path / "made").mkdir()
    convert.convert(causal, tmp_path / "made", mask_id=9)
    with pytest.raises(ValueError, match="out must be a new or empty folder, got"):
        convert.convert(causal, tmp_path / "made", mask_id=9)


def test_the_command(causal, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unmask", "convert", str(causal), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    status, out, _ = run("--out", tmp_path / "a", "--add-mask", "--dtype", "bfloat16", "--json")
    assert status == 0 and json.loads(out)["mask_id"] == VOCAB and json.loads(out)["dtype"] == "bfloat16"
    status, out, _ = run("--out", tmp_path / "b", "--mask-id", 7)
    assert status == 0 and "mask id 7, row i - 1 predicts position i" in out
    status, out, err = run("--out", tmp_path / "c")
    assert (status, out) == (2, "") and err.startswith("unmask: error: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "c").exists()
