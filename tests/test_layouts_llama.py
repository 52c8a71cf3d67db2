"""Layouts of the Llama and GPT-2 trunks: published names, shards, mask ids, broken checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import gpt2_reference
import llama_reference as reference
import pytest
import torch
from folders import write_folder
from llama_reference import random_state
from tokenizers import Tokenizer, models

from unmask import checkpoints
from unmask.checkpoints import CheckpointError
from unmask.denoiser import Batch
from unmask.layouts import Stored
from unmask.models import gpt2
from unmask.models.llama import Shape, tensor_shapes
from unmask.workspace import Workspace

VOCAB, DIM, BLOCKS, MLP, LENGTH, BASE = 101, 48, 2, 80, 32, 5_000.0
TOKENS = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": BLOCKS, "intermediate_size": MLP}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
SIZES |= {"rope_theta": BASE, "rms_norm_eps": 1e-5}
LLADA = {"model_type": "llada", "d_model": DIM, "n_layers": BLOCKS, "n_heads": 4, "n_kv_heads": 4, "rope": True}
LLADA |= {"mlp_hidden_size": MLP, "vocab_size": VOCAB - 3, "embedding_size": VOCAB, "max_sequence_length": LENGTH}
LLADA |= {"rope_theta": BASE, "rms_norm_eps": 1e-5, "weight_tying": False, "include_bias": False}
LLADA |= {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "mask_token_id": 9}
GPT2 = {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": DIM, "n_layer": BLOCKS, "n_head": 4}
GPT2 |= {"n_positions": LENGTH, "mask_token_id": 9}

PLAIN = Shape(VOCAB, DIM, BLOCKS, MLP, 4, 4, 12)
GROUPED = PLAIN._replace(num_kv_heads=2)


def state_of(shape=GROUPED):
    return random_state(tensor_shapes(shape))


def llada_names(state):
    """As the published checkpoint calls them."""
    ends = {"model.embed_tokens.weight": "wte", "model.norm.weight": "ln_f", "lm_head.weight": "ff_out"}
    layers = {"self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.down_proj": "ff_out"}
    layers |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "mlp.up_proj": "up_proj"}
    layers |= {f"self_attn.{name}_proj": f"{name}_proj" for name in "qkv"}
    found = {}
    for name, tensor in state.items():
        if name in ends:
            found[f"model.transformer.{ends[name]}.weight"] = tensor
        else:
            index, layer = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            found[f"model.transformer.blocks.{index}.{layers[layer]}.weight"] = tensor
    return found


def wrapped_names(state, prefix):
    """Of a module whose embedding was taken out of its body (`DiscreteDiffusionModel`)."""
    embeddings = "model.embed_tokens.weight", "transformer.wte.weight"
    return {
        "embed_tokens.weight" if name in embeddings else name.replace(prefix, "denoise_model.", 1): tensor
        for name, tensor in state.items()
    }


def logits_of(denoiser):
    """[L, V] of `TOKENS`."""
    batch = Batch(TOKENS, (LENGTH,), torch.arange(LENGTH), (LENGTH,), torch.ones(1))
    hidden = denoiser.hidden(batch, Workspace([denoiser.buffers(LENGTH, LENGTH, 1)]))
    return hidden.float() @ denoiser.head.weight.float().t()


def assert_computes(denoiser, logits, shift):
    assert denoiser.spec.shift is shift
    wanted = torch.cat([logits[:1], logits[:-1]]) if shift else logits
    torch.testing.assert_close(logits_of(denoiser), wanted.float(), atol=1e-4, rtol=0)


def forward(state, heads=(4, 2), **options):
    return reference.forward(state, TOKENS, *heads, base=BASE, eps=1e-5, **options)[1]


def make_tokenizer(*special, size=20):
    words = [*(f"w{i}" for i in range(size - len(special))), *special]
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))


# Families


def test_llada(tmp_path):
    state = state_of(PLAIN)
    denoiser = checkpoints.load(write_folder(tmp_path, LLADA, llada_names(state), num_shards=3))
    assert_computes(denoiser, forward(state, (4, 4)), shift=False)
    assert (denoiser.spec.family, denoiser.spec.mask_id, denoiser.spec.max_length) == ("llada", 9, LENGTH)


def test_llada_with_a_tied_head(tmp_path):
    state = state_of(PLAIN._replace(tied=True))
    denoiser = checkpoints.load(write_folder(tmp_path, LLADA | {"weight_tying": True}, llada_names(state)))
    assert_computes(denoiser, forward(state, (4, 4)), shift=False)


def test_dream(tmp_path):
    state = state_of(GROUPED._replace(qkv_bias=True))
    config = SIZES | {"model_type": "Dream", "mask_token_id": 9, "tie_word_embeddings": False}
    denoiser = checkpoints.load(write_folder(tmp_path, config, state, num_shards=2))
    assert_computes(denoiser, forward(state), shift=True)
    assert denoiser.spec.family == "dream" and denoiser.spec.num_kv_heads == 2


def test_sdar(tmp_path):
    """Norms of heads, whose width is its own, and attention by blocks."""
    state = state_of(GROUPED._replace(head_dim=16, head_norms=True))
    config = SIZES | {"model_type": "sdar", "mask_token_id": 9, "head_dim": 16, "block_size": 4}
    denoiser = checkpoints.load(write_folder(tmp_path, config, state, num_shards=2))
    assert_computes(denoiser, forward(state, block=4), shift=False)
    assert denoiser.spec.head_dim == 16


@pytest.mark.parametrize("pickled", [False, True])
def test_diffullama(tmp_path, pickled):
    """Its configuration counts the ids before the mask token was added."""
    state = state_of()
    config = SIZES | {"model_type": "llama", "vocab_size": VOCAB - 1, "mask_token_id": VOCAB - 1}
    folder = write_folder(tmp_path, config, wrapped_names(state, "model."), num_shards=2, pickled=pickled)
    denoiser = checkpoints.load(folder)
    assert_computes(denoiser, forward(state), shift=True)
    assert denoiser.spec.vocab_size == VOCAB


@pytest.mark.parametrize("model_type", ["a2d-llama", "a2d-qwen2", "a2d-qwen3"])
def test_converted_models_are_not_shifted(tmp_path, model_type):
    shape = GROUPED._replace(qkv_bias="qwen2" in model_type, head_norms="qwen3" in model_type)
    state = state_of(shape)
    config = SIZES | {"model_type": model_type, "mask_token_id": 9}
    assert_computes(checkpoints.load(write_folder(tmp_path, config, state)), forward(state), shift=False)


def test_diffugpt(tmp_path):
    state = random_state(gpt2.tensor_shapes(gpt2.Shape(VOCAB, DIM, BLOCKS, 4 * DIM, LENGTH)))
    logits = gpt2_reference.forward(state, TOKENS, 4)[1]
    stored = wrapped_names(state, "transformer.") | {"lm_head.weight": state["transformer.wte.weight"].clone()}
    config = GPT2 | {"vocab_size": VOCAB - 1}
    denoiser = checkpoints.load(write_folder(tmp_path / "wrapped", config, stored))
    assert_computes(denoiser, logits, shift=True)
    assert (denoiser.spec.family, denoiser.spec.vocab_size) == ("diffugpt", VOCAB)
    plain = checkpoints.load(write_folder(tmp_path / "plain", GPT2 | {"shift": False}, state))
    assert_computes(plain, logits, shift=False)
    assert plain.spec.family == "gpt2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_and_loaded_dtypes(tmp_path, dtype):
    state = {name: tensor.to(torch.bfloat16) for name, tensor in state_of().items()}
    config = SIZES | {"model_type": "llama", "mask_token_id": 9}
    denoiser = checkpoints.load(write_folder(tmp_path, config, state), dtype=dtype)
    assert denoiser.head.weight.dtype is denoiser.dtype is dtype
    if dtype is torch.float32:
        assert_computes(denoiser, forward({name: tensor.float() for name, tensor in state.items()}), shift=True)


def test_the_faster_dtype_is_found_by_one_block(tmp_path):
    config = SIZES | {"model_type": "llama", "mask_token_id": 9}
    folder = write_folder(tmp_path, config, state_of())
    assert checkpoints.load(folder, dtype="auto").dtype in (torch.float32, torch.bfloat16)


# Mask ids


def test_mask_id(tmp_path):
    config = SIZES | {"model_type": "llama"}
    folder = write_folder(tmp_path, config, state_of())
    with pytest.raises(CheckpointError, match=r"no mask id: .* has no mask_token_id, .* as mask_id=, below 101"):
        checkpoints.load(folder)
    assert checkpoints.load(folder, mask_id=33).spec.mask_id == 33
    for token in ("<mask>", "<|mask|>", "<|MASK|>", "<|mdm_mask|>"):
        assert checkpoints.load(folder, tokenizer=make_tokenizer(token)).spec.mask_id == 19
    with pytest.raises(CheckpointError, match="no mask id"):
        checkpoints.load(folder, tokenizer=make_tokenizer())
    with pytest.raises(CheckpointError, match=r"mask_id must be in \[0, vocab_size = 101\), got 101"):
        checkpoints.load(folder, mask_id=VOCAB)


# Broken checkpoints


def test_every_wrong_tensor_is_listed_by_its_published_name():
    stored = llada_names(state_of(PLAIN))
    del stored["model.transformer.blocks.1.attn_out.weight"], stored["model.transformer.ff_out.weight"]
    stored |= {"model.transformer.wpe.weight": torch.zeros(2, 3), "model.transformer.ln_f.weight": torch.zeros(7)}
    stored["model.transformer.blocks.0.ff_norm.weight"] = torch.zeros(DIM, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.build(Stored(Path("tiny"), stored, LLADA))
    assert str(caught.value).splitlines() == [
        "tiny: the tensors are not those of this llada model:",
        "  missing model.transformer.blocks.1.attn_out.weight [48, 48]",
        "  missing model.transformer.ff_out.weight [101, 48]",
        "  extra model.transformer.wpe.weight [2, 3]",
        "  misshapen model.transformer.ln_f.weight: got [7], expected [48]",
        "  not floating point model.transformer.blocks.0.ff_norm.weight: got torch.int8",
    ]


def test_an_unknown_family_is_told_the_known_ones():
    with pytest.raises(CheckpointError) as caught:
        checkpoints.build(Stored(Path("tiny"), state_of(), {"model_type": "mamba", "hidden_size": 4}))
    first, *lines = str(caught.value).splitlines()
    assert first == "tiny: unknown family, model_type 'mamba'. It lacks of the known ones:"
    said = dict(line.strip().split(": ", 1) for line in lines)
    assert said["gpt2"] == (
        "model_type 'gpt2', n_embd, n_layer, n_head, n_positions, a tensor transformer.wte.weight or wte.weight or "
        "embed_tokens.weight"
    )
    assert said["dream, sdar, llama, qwen2, qwen3"].endswith(
        "num_hidden_layers, num_attention_heads, intermediate_size, max_position_embeddings"
    )
    assert said["llada"].endswith("max_sequence_length, a tensor model.transformer.wte.weight")
    assert {"unmask", "mdlm", "mdlm or sedd, hydra configuration"} <= said.keys()


PLAIN_LLAMA = SIZES | {"model_type": "llama", "mask_token_id": 9}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLADA | {"block_type": "sequential"}, "block_type must be one of llama; got 'sequential'"),
        (LLADA | {"alibi": True}, "alibi must be one of None; got True"),
        (LLADA | {"attention_layer_norm": True}, "attention_layer_norm must be one of None; got True"),
        ({"model_type": "llada", "d_model": 4}, "configuration lacks n_layers, n_heads, mlp_hidden_size"),
        (LLADA | {"n_heads": 0}, "heads must be positive"),
        (PLAIN_LLAMA | {"hidden_act": "gelu"}, "hidden_act must be one of silu; got 'gelu'"),
        (PLAIN_LLAMA | {"use_sliding_window": True}, "use_sliding_window must be false"),
        (PLAIN_LLAMA | {"num_key_value_heads": 3}, "a multiple of those of keys, .* got 4, 3 and 12"),
        (PLAIN_LLAMA | {"head_dim": 7}, "an even number of columns; got 4, 2 and 7"),
        (PLAIN_LLAMA | {"rms_norm_eps": "small"}, "rms_norm_eps in the configuration must be a number, got 'small'"),
        (PLAIN_LLAMA | {"rope_scaling": {"type": "yarn"}}, "rope_scaling must be one of default, linear, llama3; got"),
        (PLAIN_LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "lacks low_freq_factor, high_freq_fac"),
        (PLAIN_LLAMA | {"rope_parameters": {"full_attention": {}}}, "one rotary embedding, got full_attention"),
        (PLAIN_LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be one of 1.0; got 0.5"),
        (PLAIN_LLAMA | {"quantization_config": {"bits": 4}}, "must not be quantised, got a quantization_config"),
        (SIZES | {"model_type": "sdar", "mask_token_id": 9}, "configuration lacks block_size"),
        (GPT2 | {"activation_function": "relu"}, "activation_function must be one of gelu_new, .* got 'relu'"),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights must be one of True; got False"),
        (GPT2 | {"n_head": 5}, "n_embd must be a multiple of n_head = 5, got 48"),
    ],
)
def test_unsupported_configurations(config, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.build(Stored(Path("tiny"), {}, config))


# Shards


@pytest.mark.parametrize("pickled", [False, True])
def test_broken_shards(tmp_path, pickled):
    folder = write_folder(tmp_path, PLAIN_LLAMA, state_of(), num_shards=3, pickled=pickled)
    first, second, third = sorted(folder.glob("*-of-*"))
    index = next(folder.glob("*.index.json"))
    whole, places = first.read_bytes(), index.read_text()
    first.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{first.name}: truncated"):
        checkpoints.load(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"their shards do not hold: model.embed_tokens.weight, model"):
        checkpoints.load(folder)
    first.write_bytes(whole)
    second.unlink(), third.unlink()
    with pytest.raises(CheckpointError, match=f"shards that are not there: {second.name}, {third.name}"):
        checkpoints.load(folder)
    for damaged in ("{", "[]", "{}", json.dumps({"weight_map": {"a": "../elsewhere"}}), places.replace('"model', "1")):
        index.write_text(damaged)
        with pytest.raises(CheckpointError, match="must hold a weight_map of tensor names to files"):
            checkpoints.load(folder)


PEAK = """
import sys
import torch
from pathlib import Path
from unmask import checkpoints

torch.set_num_threads(1)
def field(name):
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith(name))

checkpoints.load(sys.argv[1], dtype="bfloat16")  # whatever is loaded and allocated once
before = field("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
denoiser = checkpoints.load(sys.argv[2], dtype="bfloat16")
print(field("VmHWM") - before, field("VmRSS") - before)
"""


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_takes_the_memory_of_the_model_and_little_more(tmp_path, pickled):
    """A model of 37 MiB in bf16, stored as 73 MiB of fp32 in 12 shards; no tensor has more than 2.3 MiB."""
    shape = Shape(1500, 384, 16, 640, 6, 2, 64)
    config = {
        "model_type": "llama",
        "vocab_size": 1500,
        "hidden_size": 384,
        "num_hidden_layers": 16,
        "mask_token_id": 9,
    }
    config |= {"intermediate_size": 640, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    config |= {"max_position_embeddings": 64}
    state = {name: torch.ones(size) for name, size in tensor_shapes(shape).items()}
    large = write_folder(tmp_path / "large", config, state, num_shards=12, pickled=pickled)
    tiny = write_folder(tmp_path / "tiny", PLAIN_LLAMA, state_of(), num_shards=2, pickled=pickled)
    command = [sys.executable, "-c", PEAK, str(tiny), str(large)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    peak, kept = map(int, answer.stdout.split())
    size = sum(tensor.numel() for tensor in state.values()) * 2
    print(f"{peak / 2**20:.1f} MiB at the peak, {kept / 2**20:.1f} kept, of {size / 2**20:.1f}")
    assert size > 36 << 20 and kept > 0.9 * size
    assert peak < 1.4 * size, f"{peak / 2**20:.1f} MiB at the peak, {kept / 2**20:.1f} kept, of {size / 2**20:.1f}"
