"""Checkpoints that `transformers` wrote: the same logits as its own modules, whose attention is made bidirectional."""

import json

import pytest
import torch

from unmask import checkpoints
from unmask.denoiser import Batch
from unmask.workspace import Workspace

transformers = pytest.importorskip("transformers", reason="compares with modules of transformers, which is not here")

VOCAB, DIM, MASK, LENGTH = 99, 48, 7, 40
SIZES = {"vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": 80, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu"}
ROPE = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 5e3}
GPT2 = {"vocab_size": VOCAB, "n_embd": DIM, "n_layer": 3, "n_head": 4, "n_positions": 64}

# name -> (transformers' name of the model, its configuration)
MODELS = {
    "llama": ("Llama", SIZES | {"rope_parameters": ROPE, "rms_norm_eps": 1e-5}),
    "llama, no groups, tied": ("Llama", SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, biases": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama 3": ("Llama", SIZES | {"rope_parameters": LLAMA3}),
    "llama, linear": ("Llama", SIZES | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "qwen2": ("Qwen2", SIZES | {"rope_parameters": ROPE}),
    "qwen2, tied": ("Qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 16, "rope_parameters": ROPE}),
    "gpt2": ("GPT2", GPT2 | {"layer_norm_epsilon": 1e-4}),
    "gpt2, untied": ("GPT2", GPT2 | {"n_inner": 64, "tie_word_embeddings": False}),
}


def make(name):
    """The module, with weights none of which is zero or one."""
    kind, config = MODELS[name]
    options = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager"}
    config = getattr(transformers, f"{kind}Config")(**config, **options)
    module = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = "norm" in key or ".ln_" in key
            parameter.copy_(one + 0.3 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    return module


def logits_of(module, tokens):
    """[L, V], every position seeing all."""
    everything = torch.zeros(1, 1, len(tokens), len(tokens))
    return module(input_ids=tokens[None], attention_mask=everything).logits[0]


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("shift", [None, False], ids=["shifted", "not shifted"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_module(name, shift, tmp_path):
    module = make(name)
    module.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    configure(tmp_path, mask_token_id=MASK, **({} if shift is None else {"shift": shift}))
    denoiser = checkpoints.load(tmp_path)
    assert denoiser.spec.shift is (shift is None) and denoiser.spec.mask_id == MASK
    assert denoiser.spec.num_parameters == sum(parameter.numel() for parameter in module.parameters())
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = torch.arange(2 * LENGTH)
    batch = Batch(tokens.flatten(), (LENGTH,) * 2, rows, (LENGTH,) * 2, torch.ones(2))
    hidden = denoiser.hidden(batch, Workspace([denoiser.buffers(2 * LENGTH, 2 * LENGTH, 2)]))
    found = (hidden @ denoiser.head.weight.t()).view(2, LENGTH, VOCAB)
    with torch.no_grad():
        wanted = torch.stack([logits_of(module, each) for each in tokens])
    if shift is None:
        wanted = torch.cat([wanted[:, :1], wanted[:, :-1]], dim=1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_the_first_published_names_of_gpt2(tmp_path):
    """Without the prefix `transformer.`, with the causal mask as a buffer."""
    from folders import write_folder

    module = make("gpt2")
    state = {name.removeprefix("transformer."): tensor for name, tensor in module.transformer.state_dict().items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    denoiser = checkpoints.load(write_folder(tmp_path, module.config.to_dict(), state), mask_id=MASK)
    batch = Batch(torch.arange(LENGTH), (LENGTH,), torch.arange(1, LENGTH), (LENGTH - 1,), torch.ones(1))
    hidden = denoiser.hidden(batch, Workspace([denoiser.buffers(LENGTH, LENGTH, 1)]))
    with torch.no_grad():
        wanted = logits_of(module, torch.arange(LENGTH))[:-1]
    torch.testing.assert_close(hidden @ denoiser.head.weight.t(), wanted, atol=1e-4, rtol=0)
