"""Checkpoints of every family, written as their authors write them; broken ones; and `save`."""

import json
import os
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import huggingface_hub
import published_forward as published
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from unmask import checkpoints, places
from unmask.checkpoints import CheckpointError
from unmask.denoiser import Batch
from unmask.layouts import Stored
from unmask.workspace import Workspace

VOCAB, DIM, BLOCKS, HEADS, MLP, COND, LENGTH = 53, 64, 3, 2, 256, 24, 16
UNMASK = {"vocab_size": VOCAB, "mask_id": VOCAB - 1, "hidden_dim": DIM, "n_blocks": BLOCKS, "n_heads": HEADS}
UNMASK |= {"mlp_dim": MLP, "model_length": LENGTH, "tie_word_embeddings": True}
MDLM = {"model_type": "mdlm", "vocab_size": VOCAB, "model_length": LENGTH, "hidden_dim": DIM, "cond_dim": COND}
MDLM |= {"n_blocks": BLOCKS, "n_heads": HEADS, "dropout": 0.1, "time_conditioning": False}
SIZES = {"hidden_size": DIM, "cond_dim": COND, "length": LENGTH, "n_blocks": BLOCKS, "n_heads": HEADS}
SEDD = {"tokens": VOCAB - 1, "graph": {"type": "absorb"}, "noise": {"type": "loglinear"}, "model": SIZES}
HYDRA = {"parameterization": "subs", "time_conditioning": False, "noise": {"type": "loglinear"}, "model": SIZES}
HYDRA |= {"data": {"tokenizer_name_or_path": "gpt2"}}
TOKENS = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(0))
RATE = 0.3


def state_of(family="mdlm", seed=0):
    if family == "unmask":
        return published.random_state(VOCAB, DIM, BLOCKS, MLP, HEADS, tied=True, seed=seed)
    return published.random_state(VOCAB, DIM, BLOCKS, MLP, HEADS, COND, seed=seed)


def prefixed(state):
    return {f"backbone.{name}": tensor for name, tensor in state.items()}


def shadow(state):
    return {"decay": 0.9999, "num_updates": 3, "shadow_params": [t for n, t in state.items() if "inv_freq" not in n]}


def write_folder(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def hidden_of(denoiser):
    batch = Batch(TOKENS, (LENGTH,), torch.arange(LENGTH), (LENGTH,), torch.tensor([RATE]))
    workspace = Workspace([denoiser.buffers(LENGTH, LENGTH, 1)])
    return denoiser.hidden(batch, workspace).clone()


def assert_computes(denoiser, state, conditioned):
    """The denoiser is the published network with these weights."""
    assert denoiser.spec.time_conditioned is conditioned
    want = published.forward(state, TOKENS, HEADS, published.sigma_of(RATE) if conditioned else 0.0)
    hidden = hidden_of(denoiser)
    torch.testing.assert_close(hidden, want[0], atol=1e-4, rtol=0)
    logits = hidden @ denoiser.head.weight.t() + denoiser.head.bias
    torch.testing.assert_close(logits, want[1], atol=1e-3, rtol=0)


def make_tokenizer(size=VOCAB - 1, *special):
    words = [*(f"w{i}" for i in range(size - len(special))), *special]
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))


@pytest.fixture
def omegaconf(monkeypatch):
    """Classes under omegaconf's names, whose pickles look like its own; gone again before anything is loaded."""
    modules = {name: ModuleType(name) for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.nodes")}

    def make(module, name):
        cls = type(name, (), {"__module__": module, "__init__": lambda self, **state: self.__dict__.update(state)})
        setattr(modules[module], name, cls)
        return cls

    node, mapping = make("omegaconf.nodes", "AnyNode"), make("omegaconf.dictconfig", "DictConfig")

    def config(value):
        if isinstance(value, dict):
            return mapping(_metadata=None, _parent=None, _content={k: config(v) for k, v in value.items()})
        return node(_metadata=None, _parent=None, _val=value)

    def write(path, content):
        with monkeypatch.context() as patch:
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            torch.save(content, path)

    config.write = write
    return config


# Families


def test_unmask_folder(tmp_path):
    state, tokenizer = state_of("unmask"), make_tokenizer()
    folder = checkpoints.save(tmp_path / "deep" / "mine", UNMASK, state, tokenizer=tokenizer)
    denoiser = checkpoints.load(folder)
    assert_computes(denoiser, state, conditioned=False)
    assert denoiser.head.weight is denoiser.embedding
    assert denoiser.name == "mine" and checkpoints.load(folder, name="x").name == "x"
    assert denoiser.spec.tokenizer == checkpoints.fingerprint(tokenizer)
    assert denoiser.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert denoiser.spec.num_parameters == sum(t.numel() for t in state.values())
    spec = denoiser.spec
    assert (spec.family, spec.vocab_size, spec.mask_id, spec.hidden_size) == ("unmask", VOCAB, VOCAB - 1, DIM)
    assert (spec.num_blocks, spec.num_heads, spec.intermediate_size, spec.max_length) == (BLOCKS, HEADS, MLP, LENGTH)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("conditioned", [False, True])
def test_mdlm_hub_folder(tmp_path, conditioned):
    state = state_of()
    config = MDLM | {"time_conditioning": conditioned}
    denoiser = checkpoints.load(write_folder(tmp_path / "mdlm-owt", config, prefixed(state)))
    assert_computes(denoiser, state, conditioned)
    assert (denoiser.spec.family, denoiser.spec.mask_id, denoiser.name) == ("mdlm", VOCAB - 1, "mdlm-owt")
    assert denoiser.tokenizer is None and denoiser.spec.tokenizer is None


def test_the_default_of_cond_dim_in_the_published_config_class_does_not_matter(tmp_path):
    state = state_of()
    for config in (MDLM | {"cond_dim": 129}, {k: v for k, v in MDLM.items() if k != "cond_dim"}):
        assert_computes(checkpoints.load(write_folder(tmp_path, config, prefixed(state))), state, conditioned=False)


def test_sedd_hub_folder(tmp_path):
    state = state_of()
    denoiser = checkpoints.load(write_folder(tmp_path, SEDD, state))
    assert_computes(denoiser, state, conditioned=True)
    assert (denoiser.spec.family, denoiser.spec.mask_id) == ("sedd", VOCAB - 1)


def test_sedd_hub_folder_with_pickled_weights(tmp_path):
    state = state_of()
    (tmp_path / "config.json").write_text(json.dumps(SEDD))
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_computes(checkpoints.load(tmp_path), state, conditioned=True)


def test_sedd_training_run_samples_with_averaged_weights(tmp_path):
    raw, averaged = state_of(seed=1), state_of(seed=2)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(json.dumps(SEDD))  # JSON is YAML
    path = tmp_path / "checkpoints-meta" / "checkpoint.pth"
    path.parent.mkdir()
    torch.save({"model": raw, "ema": shadow(averaged), "optimizer": {"state": {}}, "step": 7}, path)
    for source in (path, tmp_path):
        assert_computes(checkpoints.load(source), averaged, conditioned=True)


@pytest.mark.parametrize("parameterization", ["subs", "sedd"])
def test_lightning_checkpoint_samples_with_averaged_weights(tmp_path, omegaconf, parameterization):
    raw, averaged = state_of(seed=1), state_of(seed=2)
    conditioned = parameterization == "sedd"
    config = HYDRA | {"parameterization": parameterization, "time_conditioning": conditioned}
    content = {"state_dict": prefixed(raw), "ema": shadow(averaged), "hyper_parameters": {"config": omegaconf(config)}}
    omegaconf.write(tmp_path / "last.ckpt", content)
    denoiser = checkpoints.load(tmp_path / "last.ckpt")
    assert "omegaconf" not in sys.modules
    assert_computes(denoiser, averaged, conditioned)
    assert denoiser.spec.family == ("sedd" if conditioned else "mdlm")
    assert denoiser.spec.mask_id == VOCAB - 1


def test_lightning_checkpoint_without_average(tmp_path, omegaconf):
    state = state_of()
    content = {"state_dict": prefixed(state), "hyper_parameters": {"config": omegaconf(HYDRA)}}
    omegaconf.write(tmp_path / "last.ckpt", content)
    assert_computes(checkpoints.load(tmp_path / "last.ckpt"), state, conditioned=False)


def test_bundled_models_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ASSETS", tmp_path)
    checkpoints.save(tmp_path / "small-one", UNMASK, state_of("unmask"))
    assert checkpoints.load("small-one").name == "small-one"
    with pytest.raises(CheckpointError, match=r"no checkpoint 'other': .*bundled model \(small-one\)"):
        checkpoints.load("other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_device(tmp_path, dtype):
    denoiser = checkpoints.load(write_folder(tmp_path, MDLM, prefixed(state_of())), dtype=dtype, device="cpu")
    assert hidden_of(denoiser).dtype is denoiser.head.weight.dtype is dtype


# Tokenizers and mask ids


def test_tokenizer_argument(tmp_path):
    folder = write_folder(tmp_path / "m", MDLM, prefixed(state_of()))
    tokenizer = make_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = (tokenizer, tmp_path / "tokenizer.json", str(tmp_path))
    assert {checkpoints.load(folder, tokenizer=t).spec.tokenizer for t in given} == {checkpoints.fingerprint(tokenizer)}
    assert checkpoints.fingerprint(make_tokenizer(20)) != checkpoints.fingerprint(tokenizer)
    assert checkpoints.fingerprint(tokenizer).startswith("sha256:") and len(checkpoints.fingerprint(tokenizer)) == 19
    with pytest.raises(CheckpointError, match="tokenizer has 54 ids, the model only 53"):
        checkpoints.load(folder, tokenizer=make_tokenizer(VOCAB + 1))
    with pytest.raises(CheckpointError, match=r"config.json: not a tokenizer.json"):
        checkpoints.load(folder, tokenizer=folder / "config.json")


def test_mask_id_is_the_tokenizers_own_mask_token(tmp_path, omegaconf):
    folder = write_folder(tmp_path / "m", MDLM, prefixed(state_of()))
    assert checkpoints.load(folder, tokenizer=make_tokenizer(VOCAB, "[MASK]", "[PAD]")).spec.mask_id == VOCAB - 2
    write_folder(folder, MDLM | {"mask_token_id": 5}, prefixed(state_of()))
    assert checkpoints.load(folder).spec.mask_id == 5
    config = HYDRA | {"data": {"tokenizer_name_or_path": "text8"}}
    content = {"state_dict": prefixed(state_of()), "hyper_parameters": {"config": omegaconf(config)}}
    omegaconf.write(tmp_path / "text8.ckpt", content)
    assert checkpoints.load(tmp_path / "text8.ckpt").spec.mask_id == 4


# Broken checkpoints


def test_every_wrong_tensor_is_listed(tmp_path):
    state = prefixed(state_of())
    del state["backbone.blocks.1.norm2.weight"], state["backbone.blocks.0.attn_out.weight"]
    state["backbone.blocks.2.mlp.0.bias"] = torch.zeros(7)
    state["backbone.blocks.3.extra"] = torch.zeros(2, 3)
    state["backbone.blocks.0.norm1.weight"] = torch.zeros(DIM, dtype=torch.int32)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(write_folder(tmp_path, MDLM, state))
    assert str(caught.value).splitlines()[1:] == [
        "  missing blocks.0.attn_out.weight [64, 64]",
        "  missing blocks.1.norm2.weight [64]",
        "  extra blocks.3.extra [2, 3]",
        "  misshapen blocks.2.mlp.0.bias: got [7], expected [256]",
        "  not floating point blocks.0.norm1.weight: got torch.int32",
    ]


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        ({"model_type": "unmask", "vocab_size": 5}, "hidden_dim, n_blocks, mlp_dim, tie_word_embeddings, mask_id"),
        ({"model_type": "mdlm", "vocab_size": VOCAB, "hidden_dim": DIM}, "n_blocks, n_heads, model_length, time_cond"),
        ({"model": {"hidden_size": DIM}, "graph": {}}, "model.n_blocks, model.n_heads, model.length, tokens, graph"),
        ({"model": SIZES}, "time_conditioning, parameterization"),
    ],
)
def test_configuration_without_needed_keys(tmp_path, config, lacking):
    with pytest.raises(CheckpointError, match=f"configuration lacks {lacking}"):
        checkpoints.load(write_folder(tmp_path, config, state_of()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SEDD | {"graph": {"type": "uniform"}}, "graph.type must be one of absorb; got 'uniform'"),
        (SEDD | {"noise": {"type": "geometric"}}, "noise.type must be one of loglinear; got 'geometric'"),
        (HYDRA | {"parameterization": "d3pm"}, "parameterization must be one of subs, sedd; got 'd3pm'"),
        (MDLM | {"n_heads": "two"}, "n_heads in the configuration must be an integer, got 'two'"),
        (MDLM | {"n_heads": 0}, "hidden size 64 must be a multiple of twice the number of heads, got 0"),
        (MDLM | {"mask_id": VOCAB}, r"mask_id must be in \[0, vocab_size = 53\), got 53"),
        ({"model_type": "mamba"}, "unknown family, model_type 'mamba'"),
    ],
)
def test_unsupported_configurations(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(write_folder(tmp_path, config, state_of()))


def test_truncated_and_absent_files(tmp_path):
    folder = write_folder(tmp_path / "m", MDLM, prefixed(state_of()))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 1000, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model.safetensors: truncated"):
            checkpoints.load(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model.safetensors, .* and no pytorch_model.bin.index.json"):
        checkpoints.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not JSON"):
        checkpoints.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no config.json"):
        checkpoints.load(folder)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"a folder or a .ckpt, .pth or .pt file"):
        checkpoints.load(tmp_path / "notes.txt")


def test_truncated_pickles(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": prefixed(state_of())}, path)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"last.ckpt: truncated"):
            checkpoints.load(path)


def test_odd_pickles(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"weights": {}}, path)
    with pytest.raises(CheckpointError, match=r"must hold 'state_dict' .*got \['weights'\]"):
        checkpoints.load(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="must hold a dictionary, got list"):
        checkpoints.load(path)
    torch.save({"state_dict": prefixed(state_of())}, path)
    with pytest.raises(CheckpointError, match=r"holds no configuration, and has no config.json or .hydra"):
        checkpoints.load(path)
    torch.save({"state_dict": prefixed(state_of()), "ema": {"shadow_params": [torch.zeros(1)]}}, path)
    with pytest.raises(CheckpointError, match=r"shadow_params must be a list of \d+ tensors, got 1 tensors"):
        checkpoints.load(path)


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__], ids=str)
def test_a_pickle_that_would_run_code_is_refused(tmp_path, function):
    path, proof = tmp_path / "evil.ckpt", tmp_path / "proof"
    torch.save({"state_dict": prefixed(state_of()), "x": Evil(function, f"open({str(proof)!r}, 'w')")}, path)
    with pytest.raises(CheckpointError, match=f"could run code: it names .*{function.__name__}"):
        checkpoints.load(path)
    assert not proof.exists()


HUB_ERRORS = {
    "is not a folder, and it cannot be had from the Hugging Face hub: no route": ConnectionError("no route"),
    "is not a folder, and it cannot be had from the Hugging Face hub: off": hub_errors.LocalEntryNotFoundError("off"),
    "is neither a folder nor a public model": hub_errors.RepositoryNotFoundError.__new__(
        hub_errors.RepositoryNotFoundError  # its constructor wants an HTTP response
    ),
}


@pytest.mark.parametrize("message", HUB_ERRORS)
def test_hub_errors(monkeypatch, message):
    def fail(*_, **__):
        raise HUB_ERRORS[message]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=f"'some/model' {message}"):
        checkpoints.load("some/model")


def test_hub_id(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "0123abcd", MDLM, prefixed(state_of()))
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **_: asked.append(hub_id) or str(folder))
    assert checkpoints.load("kuleshov-group/mdlm-owt").name == "mdlm-owt"
    assert asked == ["kuleshov-group/mdlm-owt"]


def test_pickled_weights_are_fetched_only_where_there_are_no_others(tmp_path, monkeypatch):
    held = [f"model-{i}-of-2.safetensors" for i in (1, 2)] + ["model.safetensors.index.json", "pytorch_model.bin"]
    held += ["config.json", "pytorch_model.bin.index.json", "pytorch_model-1-of-2.bin", "README.md", "tokenizer.json"]

    def fetch(files):
        fetched = tmp_path / str(len(files))

        def download(_, allow_patterns):
            fetched.mkdir(exist_ok=True)
            for file in files:
                if any(fnmatch(file, pattern) for pattern in allow_patterns):
                    (fetched / file).touch()
            return str(fetched)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(CheckpointError):
            checkpoints.load("some/model")
        return set(os.listdir(fetched))

    assert fetch(held) == {file for file in held if "pytorch" not in file and file != "README.md"}
    pickled = [file for file in held if "safetensors" not in file]
    assert fetch(pickled) == set(pickled) - {"README.md"}


# Saving


def test_save_in_bf16_keeps_vectors_in_fp32(tmp_path):
    state = state_of("unmask")
    folder = checkpoints.save(tmp_path / "m", UNMASK, state, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16) if tensor.ndim > 1 else tensor)
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "unmask", **UNMASK}


def test_save_is_reproducible_and_replaces_its_own_files_only(tmp_path):
    folder = checkpoints.save(tmp_path / "m", UNMASK, state_of("unmask"))
    first = (folder / "model.safetensors").read_bytes()
    (folder / "notes.txt").write_text("keep")
    checkpoints.save(folder, UNMASK, state_of("unmask", seed=1))
    assert (folder / "model.safetensors").read_bytes() != first
    checkpoints.save(folder, UNMASK, state_of("unmask"))
    assert (folder / "model.safetensors").read_bytes() == first
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "notes.txt"]
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_save_that_fails_leaves_no_trace(tmp_path, monkeypatch, existing):
    folder = tmp_path / "m"
    if existing:
        checkpoints.save(folder, UNMASK, state_of("unmask"))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(folder, UNMASK, state_of("unmask", seed=1))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert folder.exists() is existing


def test_save_checks_what_it_writes(tmp_path):
    state = state_of("unmask")
    del state["blocks.0.norm1.weight"]
    with pytest.raises(CheckpointError, match=r"missing blocks.0.norm1.weight"):
        checkpoints.save(tmp_path / "m", UNMASK, state)
    with pytest.raises(CheckpointError, match="configuration lacks mask_id"):
        checkpoints.save(tmp_path / "m", {k: v for k, v in UNMASK.items() if k != "mask_id"}, state_of("unmask"))
    with pytest.raises(ValueError, match="dtype must be one of"):
        checkpoints.save(tmp_path / "m", UNMASK, state_of("unmask"), dtype=torch.float16)
    assert not any(tmp_path.iterdir())


# What is in memory already


def test_build_is_load_without_files(tmp_path):
    state = state_of()
    stored = Stored(Path("a live model"), state, MDLM)
    denoiser = checkpoints.build(stored, tokenizer=make_tokenizer(), name="mine")
    assert_computes(denoiser, state, conditioned=False)
    assert (denoiser.name, denoiser.spec.mask_id) == ("mine", VOCAB - 1) and denoiser.tokenizer is not None
    assert checkpoints.build(stored, dtype="bfloat16").dtype is torch.bfloat16
    assert checkpoints.build(stored).name == "mdlm"
    del state["blocks.0.norm1.weight"]
    with pytest.raises(CheckpointError, match=r"^a live model: .*\n  missing blocks.0.norm1.weight"):
        checkpoints.build(stored)


def test_mask_id_argument(tmp_path):
    assert checkpoints.load(write_folder(tmp_path, MDLM, prefixed(state_of())), mask_id=7).spec.mask_id == 7
    stored = Stored(Path("m"), state_of(), SEDD)
    assert checkpoints.build(stored, mask_id=VOCAB - 1).spec.mask_id == VOCAB - 1
    with pytest.raises(CheckpointError, match="mask_id must be 52, which sedd fixes, got 7"):
        checkpoints.build(stored, mask_id=7)
    with pytest.raises(CheckpointError, match=r"mask_id must be in \[0, vocab_size = 53\), got 53"):
        checkpoints.build(Stored(Path("m"), state_of(), MDLM), mask_id=VOCAB)
