"""The published MDLM / SEDD network, written out plainly from its equations: one sequence, unfused, in any float dtype.

Tests compare the trunk with it, so it shares no code with the trunk. It reads a state dict by the published names
(without the prefix `backbone.`); a state dict without adaLN is the plain pre-norm transformer.
"""

import math

import torch


def random_state(vocab_size, dim, num_blocks, mlp, num_heads, cond_dim=None, tied=False, seed=0):
    """Random weights, none of them zero or one, by the published names in the published order.

    Sizes are chosen so that every part matters: gates of order one, modulation well away from the identity.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=None, mean=0.0):
        std = 1 / math.sqrt(shape[-1]) if std is None else std
        return mean + std * torch.randn(*shape, generator=generator)

    state = {"vocab_embed.embedding": normal(vocab_size, dim, std=1.0)}
    if cond_dim is not None:
        state["sigma_map.mlp.0.weight"] = normal(cond_dim, 256)
        state["sigma_map.mlp.0.bias"] = normal(cond_dim, std=0.5)
        state["sigma_map.mlp.2.weight"] = normal(cond_dim, cond_dim)
        state["sigma_map.mlp.2.bias"] = normal(cond_dim, std=0.5)
        exponents = torch.arange(0, dim // num_heads, 2).float() / (dim // num_heads)
        state["rotary_emb.inv_freq"] = 1.0 / (10_000**exponents)
    for i in range(num_blocks):
        block = f"blocks.{i}."
        state[block + "norm1.weight"] = normal(dim, mean=1.0, std=0.3)
        state[block + "attn_qkv.weight"] = normal(3 * dim, dim)
        state[block + "attn_out.weight"] = normal(dim, dim)
        state[block + "norm2.weight"] = normal(dim, mean=1.0, std=0.3)
        state[block + "mlp.0.weight"] = normal(mlp, dim)
        state[block + "mlp.0.bias"] = normal(mlp, std=0.3)
        state[block + "mlp.2.weight"] = normal(dim, mlp)
        state[block + "mlp.2.bias"] = normal(dim, std=0.3)
        if cond_dim is not None:
            state[block + "adaLN_modulation.weight"] = normal(6 * dim, cond_dim)
            state[block + "adaLN_modulation.bias"] = normal(6 * dim, std=0.5)
    state["output_layer.norm_final.weight"] = normal(dim, mean=1.0, std=0.3)
    if not tied:
        state["output_layer.linear.weight"] = normal(vocab_size, dim)
    state["output_layer.linear.bias"] = normal(vocab_size, std=0.3)
    if cond_dim is not None:
        state["output_layer.adaLN_modulation.weight"] = normal(2 * dim, cond_dim)
        state["output_layer.adaLN_modulation.bias"] = normal(2 * dim, std=0.5)
    return state


def layer_norm(x, weight):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight


def sigma_of(mask_rate):
    """Total log-linear noise at time `mask_rate`."""
    return -math.log1p(-(1 - 1e-3) * mask_rate)


def conditioning(state, sigma):
    dtype = state["sigma_map.mlp.0.weight"].dtype
    frequencies = torch.tensor([math.exp(-math.log(10_000) * j / 128) for j in range(128)], dtype=dtype)
    features = torch.cat([torch.cos(sigma * frequencies), torch.sin(sigma * frequencies)])
    x = state["sigma_map.mlp.0.weight"] @ features + state["sigma_map.mlp.0.bias"]
    x = x * torch.sigmoid(x)
    x = state["sigma_map.mlp.2.weight"] @ x + state["sigma_map.mlp.2.bias"]
    return x * torch.sigmoid(x)


def attention(x, state, block, num_heads):
    dim = x.shape[1]
    head_dim = dim // num_heads
    qkv = x @ state[block + "attn_qkv.weight"].T
    outputs = []
    for head in range(num_heads):
        q, k, v = (qkv[:, part * dim + head * head_dim : part * dim + (head + 1) * head_dim] for part in range(3))
        q, k = rotary(q), rotary(k)
        outputs.append(torch.softmax(q @ k.T / math.sqrt(head_dim), dim=-1) @ v)
    return torch.cat(outputs, dim=1) @ state[block + "attn_out.weight"].T


def rotary(x):
    length, dim = x.shape
    frequencies = torch.tensor([10_000 ** (-2 * j / dim) for j in range(dim // 2)], dtype=x.dtype)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * frequencies
    cos, sin = torch.cos(angles), torch.sin(angles)
    a, b = x[:, : dim // 2], x[:, dim // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def modulation(state, prefix, num, sigma):
    """What adaLN gives a block (six vectors) or the final norm (two); the identity where there is none."""
    if "sigma_map.mlp.0.weight" not in state:
        return (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)[:num]
    c = conditioning(state, sigma)
    vectors = state[prefix + "adaLN_modulation.weight"] @ c + state[prefix + "adaLN_modulation.bias"]
    return vectors.split(state["vocab_embed.embedding"].shape[1])


def residuals(state, tokens, num_heads, sigma=0.0):
    """The residual stream [L, D] after each block, for one sequence of token ids."""
    x, after = state["vocab_embed.embedding"][tokens], []
    num_blocks = len([name for name in state if name.endswith("attn_qkv.weight")])
    for i in range(num_blocks):
        block = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(state, block, 6, sigma)
        y = layer_norm(x, state[block + "norm1.weight"]) * (1 + scale1) + shift1
        x = x + gate1 * attention(y, state, block, num_heads)
        y = layer_norm(x, state[block + "norm2.weight"]) * (1 + scale2) + shift2
        y = gelu_tanh(y @ state[block + "mlp.0.weight"].T + state[block + "mlp.0.bias"])
        x = x + gate2 * (y @ state[block + "mlp.2.weight"].T + state[block + "mlp.2.bias"])
        after.append(x)
    return after


def forward(state, tokens, num_heads, sigma=0.0):
    """(hidden [L, D] after the final norm, logits [L, V]) of one sequence of token ids, in the dtype of `state`."""
    x = residuals(state, tokens, num_heads, sigma)[-1]
    shift, scale = modulation(state, "output_layer.", 2, sigma)
    hidden = layer_norm(x, state["output_layer.norm_final.weight"]) * (1 + scale) + shift
    head = state.get("output_layer.linear.weight", state["vocab_embed.embedding"])
    return hidden, hidden @ head.T + state["output_layer.linear.bias"]


def log_probs(logits, mask_id):
    """log p(x0 | xt) [L, V]: the mask id has probability zero, the rest is normalised (MDLM's SUBS; SEDD's ratios)."""
    logits = logits.clone()
    logits[:, mask_id] = -math.inf
    return torch.log_softmax(logits, dim=-1)
