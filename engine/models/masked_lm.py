"""Masked language models of `transformers`, run as they are up to their last hidden rows."""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from unmask.denoiser import Batch, Denoiser, DenoiserSpec, Head
from unmask.work import Flops
from unmask.workspace import Workspace


class Parts(NamedTuple):
    """A masked language model cut where the sampler needs it. transform: what its head does before the decoder.
    first_position: where the body begins to count positions."""

    body: nn.Module
    transform: Callable[[Tensor], Tensor]
    decoder: nn.Linear
    first_position: int = 0


def _bert(module: nn.Module) -> Parts:
    return Parts(module.bert, module.cls.predictions.transform, module.cls.predictions.decoder)


def _roberta(module: nn.Module) -> Parts:
    head = module.lm_head

    def transform(rows: Tensor) -> Tensor:
        return head.layer_norm(nn.functional.gelu(head.dense(rows)))

    return Parts(module.roberta, transform, head.decoder, module.config.pad_token_id + 1)


def _modernbert(module: nn.Module) -> Parts:
    return Parts(module.model, module.head, module.decoder)


SPLIT = {"bert": _bert, "roberta": _roberta, "xlm-roberta": _roberta, "camembert": _roberta, "modernbert": _modernbert}


def split(module: nn.Module) -> Parts | None:
    """The parts of a module whose `config.model_type` is known to have them; None for another."""
    cut = SPLIT.get(getattr(getattr(module, "config", None), "model_type", None))
    try:
        return None if cut is None else cut(module)
    except AttributeError:  # the family's, but without a masked language model's head
        return None


class MaskedLM(Denoiser):
    """The body computes all positions of equally long sequences at once; the head's transform, and the draw, are done
    at the rows asked for only. The weights are the module's own. The body allocates its activations itself."""

    def __init__(self, parts: Parts, spec: DenoiserSpec, *, tokenizer: Tokenizer | None, name: str):
        self.parts, self.spec, self.tokenizer, self.name = parts, spec, tokenizer, name
        weight, bias = parts.decoder.weight, parts.decoder.bias
        self.device, self.dtype = weight.device, weight.dtype
        self.head = Head(weight.detach(), None if bias is None else bias.detach())

    def buffers(self, max_tokens: int, max_rows: int, max_batch: int) -> dict[str, tuple[int, torch.dtype]]:
        return {}

    @torch.no_grad()
    def hidden(self, batch: Batch, workspace: Workspace) -> Tensor:
        if batch.longest > self.spec.max_length:
            raise ValueError(f"sequences must have at most {self.spec.max_length} tokens, got {batch.longest}")
        found = [torch.empty(0, self.spec.hidden_size, dtype=self.dtype, device=self.device), *self._states(batch)]
        return self.parts.transform(torch.cat(found))

    def _states(self, batch: Batch) -> Iterable[Tensor]:
        """The body's rows, for one run of equally long sequences after another."""
        ends = [0, *accumulate(batch.row_counts)]
        for span in batch.token_spans:
            rows = batch.rows[ends[span.sequences.start] : ends[span.sequences.stop]]
            if len(rows):
                states = self.parts.body(batch.tokens[span.keys].view(span.num_sequences, -1))[0]
                yield states.flatten(0, 1)[rows - span.keys.start]

    def flops(self, length: int, num_rows: int) -> Flops:
        """An estimate: two operations for each parameter of the body and position, and for each of the head and row."""
        in_head = self.spec.hidden_size * (self.spec.hidden_size + self.spec.vocab_size)
        in_body = max(0, self.spec.num_parameters - in_head)
        return Flops(blocks=2 * in_body * length, attention=0, head=2 * in_head * num_rows)
