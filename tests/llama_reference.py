"""The Llama network, written out plainly from its equations: one sequence, bidirectional, unfused, any float dtype.

Tests compare the trunk with it, so it shares no code with the trunk. It reads a state dict by the names of
`transformers`' LlamaForCausalLM; biases and norms of heads are used where the state has them.
"""

import math

import torch


def random_state(shapes, seed=0):
    """Random weights of these shapes by name, none of them zero or one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(name, shape):
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 0.3 * noise + ("norm" in name or "ln" in name) * name.endswith("weight")
        return noise if "embed" in name or "wte" in name else noise / math.sqrt(shape[-1])

    return {name: normal(name, shape) for name, shape in shapes.items()}


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def linear(x, state, name):
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def rotary(x, base):
    """Rotates [L, C]: column i is paired with i + C / 2."""
    length, dim = x.shape
    frequencies = torch.tensor([base ** (-2 * j / dim) for j in range(dim // 2)], dtype=x.dtype)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * frequencies
    cos, sin, a, b = torch.cos(angles), torch.sin(angles), x[:, : dim // 2], x[:, dim // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)


def attention(x, state, prefix, num_heads, num_kv_heads, base, eps, seen):
    q, k, v = (linear(x, state, f"{prefix}{name}_proj") for name in "qkv")
    dim, outputs = q.shape[1] // num_heads, []
    for head in range(num_heads):
        group = head // (num_heads // num_kv_heads)
        query = q[:, head * dim : (head + 1) * dim]
        key, value = (t[:, group * dim : (group + 1) * dim] for t in (k, v))
        if f"{prefix}q_norm.weight" in state:
            query = rms_norm(query, state[f"{prefix}q_norm.weight"], eps)
            key = rms_norm(key, state[f"{prefix}k_norm.weight"], eps)
        scores = rotary(query, base) @ rotary(key, base).T / math.sqrt(dim)
        outputs.append(torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1) @ value)
    return linear(torch.cat(outputs, dim=1), state, f"{prefix}o_proj")


def forward(state, tokens, num_heads, num_kv_heads, *, base=10_000.0, eps=1e-6, block=None):
    """(hidden [L, D] after the final norm, logits [L, V]) of one sequence of token ids, in the dtype of `state`.

    block: a position sees those of its own group of so many, and of the groups before.
    """
    x, place = state["model.embed_tokens.weight"][tokens], torch.arange(len(tokens))
    seen = place[None] // (block or len(tokens)) <= place[:, None] // (block or len(tokens))
    for i in range(len([name for name in state if name.endswith("q_proj.weight")])):
        prefix = f"model.layers.{i}."
        y = rms_norm(x, state[f"{prefix}input_layernorm.weight"], eps)
        x = x + attention(y, state, f"{prefix}self_attn.", num_heads, num_kv_heads, base, eps, seen)
        y = rms_norm(x, state[f"{prefix}post_attention_layernorm.weight"], eps)
        gate, up = linear(y, state, f"{prefix}mlp.gate_proj"), linear(y, state, f"{prefix}mlp.up_proj")
        x = x + linear(gate * torch.sigmoid(gate) * up, state, f"{prefix}mlp.down_proj")
    hidden = rms_norm(x, state["model.norm.weight"], eps)
    return hidden, hidden @ state.get("lm_head.weight", state["model.embed_tokens.weight"]).T
