"""The GPT-2 network, written out plainly from its equations: one sequence, bidirectional, unfused, any float dtype.

Tests compare the trunk with it, so it shares no code with the trunk. It reads a state dict by the names of
`transformers`' GPT2LMHeadModel.
"""

import math

import torch


def layer_norm(x, state, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return normed * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def forward(state, tokens, num_heads, eps=1e-5):
    """(hidden [L, D] after the final norm, logits [L, V]) of one sequence of token ids, in the dtype of `state`."""
    x = state["transformer.wte.weight"][tokens] + state["transformer.wpe.weight"][: len(tokens)]
    dim = x.shape[1] // num_heads
    for i in range(len([name for name in state if name.endswith("c_attn.weight")])):
        block = f"transformer.h.{i}."
        q, k, v = linear(layer_norm(x, state, f"{block}ln_1", eps), state, f"{block}attn.c_attn").chunk(3, dim=1)
        outputs = []
        for head in range(num_heads):
            query, key, value = (t[:, head * dim : (head + 1) * dim] for t in (q, k, v))
            outputs.append(torch.softmax(query @ key.T / math.sqrt(dim), dim=-1) @ value)
        x = x + linear(torch.cat(outputs, dim=1), state, f"{block}attn.c_proj")
        y = gelu_tanh(linear(layer_norm(x, state, f"{block}ln_2", eps), state, f"{block}mlp.c_fc"))
        x = x + linear(y, state, f"{block}mlp.c_proj")
    hidden = layer_norm(x, state, "transformer.ln_f", eps)
    return hidden, hidden @ state.get("lm_head.weight", state["transformer.wte.weight"]).T
