"""What the tests of the drop-in functions share: a tiny live model, and copies of the published code, where given."""

import contextlib
import importlib
import io
import os
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.peers.checkout import importable

VOCAB, MASK, EOS = 23, 22, 3


class TinyModel(nn.Module):
    """Two layers of bidirectional attention with random weights, called as live models of transformers are.

    Positions are relative, so that padding on the left changes nothing. The mask id is as likely as others.
    """

    def __init__(self, seed=0, vocab_size=VOCAB, hidden=32, mask_id=MASK, forbid_mask=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, hidden), nn.Linear(hidden, vocab_size)
        self.layers = nn.ModuleList(nn.Linear(hidden, 3 * hidden) for _ in range(2))
        self.near = nn.Parameter(torch.empty(2, 33))
        self.config = SimpleNamespace(max_position_embeddings=512, vocab_size=vocab_size)
        self.generation_config = SimpleNamespace(mask_token_id=mask_id, pad_token_id=EOS)
        self.num_calls = 0
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                scale = 3.0 if parameter is self.near else 1.5 / hidden**0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if forbid_mask:
                self.head.bias[mask_id] = -1e4

    @property
    def device(self):
        return self.embed.weight.device

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.num_calls += 1
        x, length = self.embed(input_ids), input_ids.shape[1]
        place = torch.arange(length) if position_ids is None else position_ids[:, None, :]
        near = (place[..., None, :] - place[..., :, None]).clamp(-16, 16) + 16
        seen = torch.ones(1, 1, 1, dtype=torch.bool)
        if isinstance(attention_mask, torch.Tensor):
            seen = attention_mask.bool().view(len(x), -1, length)
        for layer, bias in zip(self.layers, self.near, strict=True):
            q, k, v = layer(x).chunk(3, -1)
            scores = q @ k.mT / x.shape[-1] ** 0.5 + bias[near].view(-1, length, length)
            x = torch.sin(2 * x + 4 * scores.masked_fill(~seen, -1e9).softmax(-1) @ v)
        return SimpleNamespace(logits=self.head(x))


def prompts(*shape, seed=0):
    """Ids that are neither masked nor the end of text."""
    return torch.randint(EOS + 1, MASK, shape, generator=torch.Generator().manual_seed(seed))


def module_of(variable, name, what, bare=()):
    """A module of the copy that an environment variable points to; the test is skipped without one.

    bare: packages around it whose own code, which needs more than samplers do, is left out.
    """
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not say where {what} is")
    packages = {package: ModuleType(package) for package in bare}
    for package, module in packages.items():
        module.__path__ = [str(Path(folder, *package.split(".")))]
    with warnings.catch_warnings(), importable(Path(folder), (name.split(".")[0],), given=packages, stand_ins=()):
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@contextlib.contextmanager
def silent():
    """Without what published code prints and warns of."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
