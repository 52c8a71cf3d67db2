"""Keys and values kept between the steps of a window: what is computed, and against a network that says it plainly."""

import weakref

import pytest
import torch
from llama_reference import random_state
from test_llama import KINDS, VOCAB, make
from toys import Toy

from unmask import Ancestral, Blocks, Caching, Categorical, Confidence, Sampler
from unmask.denoiser import DenoiserSpec
from unmask.graphs import Fetched
from unmask.models.gpt2 import GPT2
from unmask.models.gpt2 import Shape as GPT2Shape
from unmask.models.gpt2 import tensor_shapes as gpt2_shapes

LENGTHS, GREEDY = [40, 23, 64, 31], Categorical(0.0)
POLICIES = {
    "counts": Blocks(Confidence(steps=3), 8),
    "threshold": Blocks(Confidence("entropy", threshold=3.5), 8),
    "one window": Confidence(steps=6),
}
BLOCKED = {"counts", "threshold"}


def sharp(kind):
    """A trunk whose laws differ enough from position to position for orders to be clear."""
    _, model = make(kind)
    model.head.weight.mul_(4)
    return model


def sample(model, policy, caching, **options):
    sampler = Sampler(model, reveal=policy, choose=GREEDY, caching=caching, **{"max_batch": 3, **options})
    return sampler.sample(4, LENGTHS, prompt=[[5, 9], [3], [1] * 11, [2, 4, 6]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_computing_everything_each_step_changes_nothing(kind, name, cache):
    model = sharp(kind)
    plain, kept = sample(model, POLICIES[name], None), sample(model, POLICIES[name], Caching(cache, refresh=1))
    assert torch.equal(plain.tokens, kept.tokens) and torch.equal(plain.reveal_step, kept.reveal_step)
    assert torch.allclose(plain.logprobs, kept.logprobs, atol=1e-4)


def test_learned_positions_are_those_in_the_sequence():
    shape = GPT2Shape(VOCAB, 48, 3, 80, LENGTHS[2])
    spec = DenoiserSpec("gpt2", VOCAB, VOCAB - 1, 48, 3, 4, 80, LENGTHS[2], shift=True)
    model = GPT2(spec, random_state(gpt2_shapes(shape)))
    plain, kept = (sample(model, POLICIES["counts"], caching) for caching in (None, Caching("dual", refresh=1)))
    assert torch.equal(plain.tokens, kept.tokens)


@pytest.mark.parametrize("kind", ["llada", "dream", "qwen3"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("refresh", [None, 2])
def test_the_loop_says_what_it_is(kind, cache, refresh):
    """Greedy decoding with kept keys and values, one sequence at a time, stated with hooks into plain attention."""
    model, policy = sharp(kind), POLICIES["counts"]
    kept = sample(model, policy, Caching(cache, refresh))
    plain = sample(model, policy, None)
    prompts = [[5, 9], [3], [1] * 11, [2, 4, 6]]
    for one, length, prompt in zip(kept, LENGTHS, prompts, strict=True):
        assert one.tokens.tolist() == stated(model, length, prompt, cache, refresh)
    assert not torch.allclose(kept.logprobs, plain.logprobs, atol=1e-4)  # an approximation, and told as one
    assert kept.stats.cost.total.total < plain.stats.cost.total.total


def stated(model, length, prompt, cache, refresh):
    """One sequence; the last block's keys and values too are kept."""
    mask, shift = model.spec.mask_id, model.spec.shift
    tokens = torch.tensor(prompt + [mask] * (length - len(prompt)))
    kept, age = {}, 0
    for start in range(len(prompt), length, 8):
        end = min(start + 8, length)
        size = end - start
        for step in range(3):
            count = size // 3 + (step < size % 3)
            if not count:
                continue
            age = 0 if step == 0 else age + 1
            if refresh is not None and age >= refresh:
                age = 0
            begin = max(start - 1, 0) if shift else start
            part = range(length) if age == 0 else range(begin, end if cache == "dual" else length)
            logits = network(model, tokens, list(part), kept)
            masked = [i for i in range(start, end) if tokens[i] == mask]
            laws = [logits[list(part).index(max(i - 1, 0) if shift else i)] for i in masked]
            laws = [law.index_fill(0, torch.tensor([mask]), -torch.inf).double().softmax(0) for law in laws]
            best = sorted(range(len(masked)), key=lambda k: -laws[k].max().item())[:count]
            for k in best:
                tokens[masked[k]] = laws[k].argmax()
    return tokens.tolist()


def network(model, tokens, part, kept):
    """Logits [len(part), V] of some positions, by the equations; keys and values of the others from `kept`."""
    spec, layers, eps = model.spec, model.layers, model.style.eps
    num_heads, num_kv_heads, head_dim = spec.heads

    def rms(x, norm):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight

    def dense(linear):
        weight = linear.weight.to_dense() if linear.weight.is_mkldnn else linear.weight
        return weight.clone(), 0 if linear.bias is None else linear.bias

    def rotate(x):  # [n, heads, dim] of the positions in `part`
        cos, sin = (table[part][:, None] for table in layers.rope)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    x = layers.embedding[tokens[part]].float()
    for index, block in enumerate(layers.blocks):
        normed = rms(x, block.norm1)
        qkv = torch.cat([normed @ weight.T + bias for weight, bias in map(dense, block.projections)], -1)
        heads = qkv.view(len(part), -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), 1)
        query, key, value = heads
        if block.head_norms is not None:
            query, key = rms(query, block.head_norms[0]), rms(key, block.head_norms[1])
        keys, values = kept.setdefault(index, (torch.zeros(2, len(tokens), num_kv_heads, head_dim)))
        keys[part], values[part] = rotate(key), value
        group = num_heads // num_kv_heads
        scores = torch.einsum("qhd,khd->hqk", rotate(query), keys.repeat_interleave(group, 1)) / head_dim**0.5
        if model.style.block is not None:
            ends = (torch.tensor(part) // model.style.block + 1) * model.style.block
            scores = scores.masked_fill(torch.arange(len(tokens)) >= ends[:, None], -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(group, 1)).flatten(1)
        weight, bias = dense(block.out)
        x = x + attended @ weight.T + bias
        (up, up_bias), (down, down_bias) = dense(block.up), dense(block.down)
        gate, wide = (rms(x, block.norm2) @ up.T + up_bias).chunk(2, dim=-1)
        x = x + (torch.nn.functional.silu(gate) * wide) @ down.T + down_bias
    return rms(x, layers.final_norm) @ model.head.weight.float().T


@pytest.mark.parametrize("stop_id", [None, 9])
@pytest.mark.parametrize("caching", [None, Caching("dual"), Caching("prefix", 2)], ids=str)
def test_a_host_that_learns_late_gets_the_same_samples(caching, stop_id, monkeypatch):
    """Then sequences that are complete take part in more ticks, in which nothing is drawn for them."""
    policy = Blocks(Confidence("entropy", threshold=3.5), 8, stop_id)
    early = sample(sharp("dream"), policy, caching, max_batch=2)
    monkeypatch.setattr(Fetched, "ready", property(lambda self: False))
    late = sample(sharp("dream"), policy, caching, max_batch=2)
    assert torch.equal(early.tokens, late.tokens) and torch.equal(early.reveal_step, late.reveal_step)
    assert late.stats.num_ticks > early.stats.num_ticks and late.stats.num_samples == 4
    assert late.stats.num_tokens == early.stats.num_tokens


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_all_that_is_kept_is_counted_and_let_go(cache):
    model = sharp("dream")
    sampler, plain = (Sampler(model, reveal=POLICIES["counts"], caching=one) for one in (Caching(cache), None))
    _, num_kv_heads, head_dim = model.spec.heads
    size = model.spec.num_blocks * 2 * 3 * 64 * num_kv_heads * head_dim * 4 + 2 * 8 * 3
    plans = [one.plan(3, 64).peak_bytes for one in (sampler, plain)]
    assert plans[0] - plans[1] == size and sampler.sample(3, 64).stats.peak_bytes == plans[0]
    unstarted, stopped = sampler.stream(None, 64), sampler.stream(None, 64)
    next(stopped)
    for run in (unstarted, stopped):
        stored = weakref.ref(run._key_values.stored)
        run.close()
        assert stored() is None and list(run) == []


@pytest.mark.parametrize("name", sorted(BLOCKED))
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_samples_do_not_depend_on_their_company(name, cache):
    model, caching = sharp("llada"), Caching(cache, refresh=3)
    alone = sample(model, POLICIES[name], caching, max_batch=1)
    together = sample(model, POLICIES[name], caching, max_batch=4)
    assert torch.equal(alone.tokens, together.tokens) and torch.equal(alone.reveal_step, together.reveal_step)


def test_a_slot_keeps_nothing_of_who_was_there_before():
    """The windows of a sequence end where those of its predecessor ended."""
    options = {"reveal": POLICIES["one window"], "choose": GREEDY, "caching": Caching("dual")}
    prompts = [[5, 9], [3, 7], [1, 1], [2, 4]]
    one, four = (Sampler(sharp("dream"), max_batch=n, **options).sample(4, 40, prompt=prompts) for n in (1, 4))
    assert torch.equal(one.tokens, four.tokens) and torch.equal(one.reveal_step, four.reveal_step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reveal": Ancestral(4)}, "caching must be None with a planned policy, ancestral:4"),
        ({"guidance": 1.0}, "caching must be None with guidance=1.0"),
        ({"graphs": True}, "caching must be None with graphs=True"),
    ],
)
def test_what_cannot_be_cached_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(sharp("llada"), **{"reveal": Confidence(steps=2), **options}, caching=Caching())
    with pytest.raises(ValueError, match="caching must be None with 'toy', which cannot keep keys and values"):
        Sampler(Toy(9, 8), reveal=Confidence(steps=2), caching=Caching())
    with pytest.raises(ValueError, match="caching must be None with several models"):
        two = {"a": sharp("llada"), "b": sharp("llada")}
        Sampler(two, schedule="a:50% b:50%", reveal=Confidence(steps=2), caching=Caching())
    with pytest.raises(ValueError, match="kind must be one of prefix, dual, got 'suffix'"):
        Caching("suffix")
    with pytest.raises(TypeError, match=r"caching must be what to keep, such as Caching.*, got 'dual'"):
        Sampler(sharp("llada"), reveal=Confidence(steps=2), caching="dual")
    with pytest.raises(ValueError, match="refresh must be at least 1, got 0"):
        Caching(refresh=0)
