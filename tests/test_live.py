"""`unmask.wrap`: denoisers of live modules. Modules of `transformers` are tiny ones with random weights."""

import copy
import gc
import weakref
from types import SimpleNamespace

import llama_reference as reference
import pytest
import torch
from folders import write_folder
from test_layouts_llama import GROUPED, LENGTH, SIZES, VOCAB, assert_computes, forward, logits_of, make_tokenizer
from torch import nn

import unmask
from unmask import Ancestral, Sampler
from unmask.denoiser import Batch, LogitsDenoiser
from unmask.models.llama import Llama, tensor_shapes
from unmask.models.masked_lm import MaskedLM
from unmask.pickles import CheckpointError
from unmask.workspace import Workspace


class Config(SimpleNamespace):
    """As `transformers` has it."""

    def to_dict(self):
        return dict(vars(self))


class Live(nn.Module):
    """A module with a configuration and tensors of these names. It is never called."""

    def __init__(self, config, state):
        super().__init__()
        self.config = Config(**config)
        for name, tensor in state.items():
            owner = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, nn.Parameter(tensor.clone()))


def make_llama(**config):
    state = reference.random_state(tensor_shapes(GROUPED))
    return state, Live(SIZES | {"model_type": "llama", "mask_token_id": 9} | config, state)


def rows_of(denoiser, batch):
    workspace = Workspace([denoiser.buffers(len(batch.tokens), len(batch.rows), len(batch.lengths))])
    hidden = denoiser.hidden(batch, workspace)
    if denoiser.head.weight is None:
        return hidden
    logits = hidden @ denoiser.head.weight.t()
    return logits if denoiser.head.bias is None else logits + denoiser.head.bias


def make_batch(vocab_size, lengths=(7, 7, 12, 1)):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocab_size, (sum(lengths),), generator=generator)
    rows = torch.tensor([0, 3, 6, 9, 13, 14, 20, 26])
    return Batch(tokens, lengths, rows, (3, 2, 2, 1), torch.ones(len(lengths)))


# Known families


def test_a_known_family_becomes_our_trunk():
    state, module = make_llama()
    denoiser = unmask.wrap(module)
    assert isinstance(denoiser, Llama) and denoiser.name == "Live" and denoiser.dtype is torch.float32
    assert_computes(denoiser, forward(state), shift=True)


def test_it_is_what_load_makes_of_the_same_weights(tmp_path):
    state, module = make_llama()
    stored = unmask.load(write_folder(tmp_path, module.config.to_dict(), state))
    assert torch.equal(logits_of(unmask.wrap(module)), logits_of(stored))
    narrow = unmask.wrap(module, dtype="bfloat16")
    assert torch.equal(logits_of(narrow), logits_of(unmask.load(tmp_path, dtype="bfloat16")))
    assert logits_of(unmask.wrap(module, mask_id=3)).equal(logits_of(stored))
    assert unmask.wrap(module, mask_id=3).spec.mask_id == 3


def test_weights_are_shared_where_their_dtype_is_the_same():
    _, module = make_llama()
    denoiser = unmask.wrap(module)
    assert denoiser.layers.embedding.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    assert denoiser.head.weight.data_ptr() == module.lm_head.weight.data_ptr()
    assert not denoiser.head.weight.requires_grad
    narrow = make_llama()[1].bfloat16()
    assert unmask.wrap(narrow).dtype is torch.bfloat16
    assert unmask.wrap(narrow).head.weight.data_ptr() == narrow.lm_head.weight.data_ptr()
    assert unmask.wrap(narrow).layers.final_norm.weight.dtype is torch.float32


def test_a_trunk_is_kept_until_a_weight_changes():
    state, module = make_llama()
    first = unmask.wrap(module)
    assert unmask.wrap(module) is first and unmask.wrap(module, name="other") is not first
    middle = module.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        middle.mul_(2)
    second = unmask.wrap(module)
    assert second is not first and unmask.wrap(module) is second
    for name, parameter in module.named_parameters():
        parameter.data.copy_(state[name] * 0.5)  # as averaged weights are swapped in: no version counter moves
    assert_computes(unmask.wrap(module), forward({name: tensor * 0.5 for name, tensor in state.items()}), shift=True)
    middle.data = middle.data.clone()
    assert unmask.wrap(module) is not second


def test_a_trunk_does_not_keep_its_module():
    _, module = make_llama()
    alive = weakref.ref(module)
    denoiser = unmask.wrap(module)
    del module
    gc.collect()
    assert alive() is None and logits_of(denoiser).isfinite().all()


def test_a_copied_module_has_a_trunk_of_its_own():
    _, module = make_llama()
    first, other = unmask.wrap(module), copy.deepcopy(module)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert unmask.wrap(module) is first
    assert not logits_of(unmask.wrap(other)).any() and logits_of(first).any()


def test_bundled_models_from_their_published_names():
    """Names with the prefix of a whole training module."""
    loaded = unmask.load("sotu-light")
    found = unmask.checkpoints.read("sotu-light")
    config = {
        "model_type": "unmask",
        "vocab_size": 2048,
        "hidden_dim": 128,
        "n_blocks": 4,
        "n_heads": 2,
        "mlp_dim": 512,
    }
    config |= {"mask_id": loaded.spec.mask_id, "model_length": 256, "tie_word_embeddings": True}
    module = Live(config, {f"backbone.{name}": tensor.float() for name, tensor in found.parameters.items()})
    batch = make_batch(2000)
    torch.testing.assert_close(rows_of(unmask.wrap(module), batch), rows_of(loaded, batch), atol=1e-5, rtol=0)


# Modules that are called


class Toy(nn.Module):
    """Logits that depend on the whole sequence; as they are, or as an attribute."""

    def __init__(self, as_attribute):
        super().__init__()
        self.table, self.as_attribute = nn.Embedding(VOCAB, VOCAB), as_attribute

    def forward(self, tokens):
        logits = self.table(tokens) + self.table(tokens).mean(1, keepdim=True)
        return SimpleNamespace(logits=logits) if self.as_attribute else logits


@pytest.mark.parametrize("as_attribute", [True, False])
def test_a_foreign_module_is_called_for_logits(as_attribute):
    module = Toy(as_attribute)
    denoiser = unmask.wrap(module, mask_id=5)
    assert isinstance(denoiser, LogitsDenoiser) and denoiser.spec.vocab_size == VOCAB
    batch = make_batch(VOCAB)
    wanted, start = [], 0
    for length in batch.lengths:
        output = module(batch.tokens[None, start : start + length])
        wanted.append(getattr(output, "logits", output)[0])
        start += length
    torch.testing.assert_close(rows_of(denoiser, batch), torch.cat(wanted)[batch.rows].detach())
    assert (Sampler(denoiser, reveal=Ancestral(3)).sample(2, 6).tokens != 5).all()


def test_tokenizers():
    tokenizer = make_tokenizer("<mask>")
    assert unmask.wrap(Toy(True), tokenizer=tokenizer).spec.mask_id == 19
    of_transformers = SimpleNamespace(backend_tokenizer=make_tokenizer("[BLANK]"), mask_token_id=19)
    denoiser = unmask.wrap(Toy(True), tokenizer=of_transformers)
    assert denoiser.spec.mask_id == 19 and denoiser.tokenizer is of_transformers.backend_tokenizer
    _, module = make_llama()
    assert unmask.wrap(module, tokenizer=tokenizer) is unmask.wrap(module, tokenizer=tokenizer)
    assert unmask.wrap(module, tokenizer=tokenizer).spec.mask_id == 9  # its configuration's


def test_errors():
    with pytest.raises(TypeError, match=r"module must be a torch module, got str; unmask.load reads checkpoints"):
        unmask.wrap("gpt2")
    with pytest.raises(CheckpointError, match="Toy: no mask id: "):
        unmask.wrap(Toy(True))
    with pytest.raises(ValueError, match=r"dtype must be None for Toy, which runs as it is, in torch.float32; got bf"):
        unmask.wrap(Toy(True), mask_id=5, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"tokenizer must be a tokenizers.Tokenizer, a file, or a fast .* got int"):
        unmask.wrap(Toy(True), tokenizer=5)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16; Live has float16"):
        unmask.wrap(make_llama()[1].half())
    with pytest.raises(CheckpointError, match="Live: the tensors are not those of this llama model:\n  extra adapter"):
        module = make_llama()[1]
        module.register_parameter("adapter", nn.Parameter(torch.zeros(2)))
        unmask.wrap(module)
    with pytest.raises(TypeError, match=r"Silent must return logits or have them as .logits, got <class 'NoneType'>"):
        unmask.wrap(type("Silent", (nn.Module,), {"forward": lambda self, tokens: None})(), mask_id=1)


# Masked language models


class Body(nn.Module):
    """States that depend on the whole sequence and the position, in a tuple as bodies of transformers give them."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCAB, 16)

    def forward(self, tokens):
        states = self.words(tokens) + torch.arange(tokens.shape[1])[:, None] / 10
        return (states + states.mean(1, keepdim=True),)


class ToyMaskedLM(nn.Module):
    """A body and a head under the names of a family."""

    def __init__(self, family):
        super().__init__()
        self.config = Config(model_type=family, max_position_embeddings=40, pad_token_id=1, mask_token_id=4)
        body, dense, norm, decoder = Body(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, VOCAB)
        transform = nn.Sequential(dense, nn.GELU(), norm)
        if family == "bert":
            self.bert, self.cls = body, nn.Module()
            self.cls.predictions = nn.Module()
            self.cls.predictions.transform, self.cls.predictions.decoder = transform, decoder
        elif family == "modernbert":
            self.model, self.head, self.decoder = body, transform, decoder
        else:
            self.roberta, self.lm_head = body, nn.Module()
            self.lm_head.dense, self.lm_head.layer_norm, self.lm_head.decoder = dense, norm, decoder
        self.whole = lambda tokens: decoder(transform(body(tokens)[0]))

    def forward(self, tokens):
        return SimpleNamespace(logits=self.whole(tokens))


@pytest.mark.parametrize("family", ["bert", "roberta", "camembert", "modernbert"])
def test_a_masked_language_model_is_split_from_its_head(family):
    module = ToyMaskedLM(family).eval()
    denoiser, rows = unmask.wrap(module), []
    assert isinstance(denoiser, MaskedLM) and denoiser.spec.mask_id == 4
    transform = denoiser.parts.transform
    denoiser.parts = denoiser.parts._replace(transform=lambda states: rows.append(len(states)) or transform(states))
    batch = make_batch(VOCAB)
    asked = LogitsDenoiser(lambda tokens: module(tokens).logits, denoiser.spec)
    torch.testing.assert_close(rows_of(denoiser, batch), rows_of(asked, batch), atol=1e-5, rtol=0)
    assert rows == [len(batch.rows)]
    with pytest.raises(ValueError, match=r"at most (38|40) tokens, got 41"):
        rows_of(denoiser, Batch(torch.zeros(41).long(), (41,), torch.tensor([0]), (1,), torch.ones(1)))
    assert denoiser.flops(10, 2).head == 2 * 2 * 16 * (16 + VOCAB)


# Masked language models of transformers


def make_masked_lm(kind, training=False):
    transformers = pytest.importorskip("transformers", reason="makes modules of transformers, which is not here")
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 1}
    if kind == "DistilBert":
        sizes = {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        sizes |= {"max_position_embeddings": 40}
    if kind == "ModernBert":
        sizes |= {"global_attn_every_n_layers": 2, "local_attention": 8, "bos_token_id": 0, "eos_token_id": 2}
        sizes |= {"cls_token_id": 0, "sep_token_id": 2}
    module = getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(one + 0.3 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    return module.train(training)


SPLIT = ("Bert", "Roberta", "XLMRoberta", "ModernBert")


@pytest.mark.parametrize("kind", [*SPLIT, "DistilBert"])
def test_masked_language_models(kind):
    """The split model and the model that is asked for all logits say the same, and what the module itself says."""
    module = make_masked_lm(kind)
    denoiser = unmask.wrap(module, mask_id=4)
    assert type(denoiser) is (MaskedLM if kind in SPLIT else LogitsDenoiser)
    assert denoiser.spec.max_length == (38 if "Roberta" in kind else 40)
    asked = LogitsDenoiser(lambda tokens: module(tokens).logits, denoiser.spec)
    batch = make_batch(VOCAB)
    rows = rows_of(denoiser, batch)
    torch.testing.assert_close(rows, rows_of(asked, batch), atol=1e-4, rtol=0)
    with torch.no_grad():
        alone = module(batch.tokens[None, 14:26]).logits[0]
    torch.testing.assert_close(rows[5:7], alone[batch.rows[5:7] - 14], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", SPLIT)
def test_masked_language_models_are_sampled(kind):
    module = make_masked_lm(kind)
    denoiser = unmask.wrap(module, mask_id=4)
    asked = LogitsDenoiser(lambda tokens: module(tokens).logits, denoiser.spec)
    arguments = {"num_samples": 3, "length": [20, 12, 20], "seed": 1, "prompt": [[5, 6]] * 3}
    one, other = (Sampler(each, reveal=Ancestral(6)).sample(**arguments) for each in (denoiser, asked))
    assert torch.equal(one.tokens, other.tokens) and 4 not in one.tokens


def test_a_masked_language_model_in_training_is_refused():
    with pytest.raises(ValueError, match="BertForMaskedLM must be in evaluation mode"):
        unmask.wrap(make_masked_lm("Bert", training=True), mask_id=4)


def test_a_causal_module_of_transformers():
    """Its own attention is causal, the denoiser's is not."""
    transformers = pytest.importorskip("transformers", reason="makes modules of transformers, which is not here")
    config = SIZES | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="eager")).eval()
    tokens = torch.arange(3, 3 + LENGTH)
    with torch.no_grad():
        wanted = module(tokens[None], attention_mask=torch.zeros(1, 1, LENGTH, LENGTH)).logits[0]
    batch = Batch(tokens, (LENGTH,), torch.arange(1, LENGTH), (LENGTH - 1,), torch.ones(1))
    denoiser = unmask.wrap(module, mask_id=VOCAB - 1)
    torch.testing.assert_close(rows_of(denoiser, batch), wanted[:-1], atol=1e-4, rtol=0)
