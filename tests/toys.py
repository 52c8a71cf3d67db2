"""Toy denoisers whose law is known exactly, and a random transformer pair. Shared by the tests of the sampler."""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from unmask.denoiser import Batch, Denoiser, DenoiserSpec, Head
from unmask.models.dit import DiT, Shape, tensor_shapes
from unmask.work import Flops

MASK = 1  # neither first nor last, so that ids and ranks of real tokens differ


class Toy(Denoiser):
    """A denoiser whose hidden rows are the logits; it counts its network calls and the sequences in them."""

    device = torch.device("cpu")
    tokenizer = None
    name = "toy"

    def __init__(self, vocab_size: int, max_length: int, *, mask_id: int = MASK):
        self.spec = DenoiserSpec("toy", vocab_size, mask_id, 1, 0, 1, 1, max_length, num_parameters=vocab_size)
        self.head = Head(None)
        self.num_calls = self.num_events = 0

    def buffers(self, max_tokens: int, max_rows: int, max_batch: int) -> dict[str, tuple[int, torch.dtype]]:
        return {}

    def hidden(self, batch: Batch, workspace) -> Tensor:
        self.num_calls += 1
        self.num_events += len(batch.lengths)
        return self.logits(batch)

    def flops(self, length: int, num_rows: int) -> Flops:
        return Flops(blocks=2 * length * self.spec.num_parameters, attention=length * num_rows, head=num_rows)

    def logits(self, batch: Batch) -> Tensor:
        """[R, V]. Here: a hash of the whole sequence and the position, so that any wrong input shows in the output."""
        lengths, counts = torch.tensor(batch.lengths), torch.tensor(batch.row_counts)
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(len(batch.tokens)) - starts.repeat_interleave(lengths)
        code = (batch.tokens + 1) * (2 * place + 3) ** 2 % 10007
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        total = torch.zeros(len(lengths), dtype=torch.int64).index_add_(0, owner, code)
        seed = total.repeat_interleave(counts) * 31 + place[batch.rows] * 17
        return torch.sin(seed[:, None] * 0.37 + torch.arange(self.spec.vocab_size) * 1.7) * 2


Conditional = Callable[[tuple[int, ...], int], np.ndarray]


class Tabulated(Toy):
    """p(x_i | revealed tokens) from a table over all partly masked sequences of one length.

    conditional(state, position) -> [real ids] probabilities; state holds real ids 0 … num_ids - 1, or None where it is
    masked. Tokens are real ids with the mask id put in between. The mask id gets a high score: it must not be drawn.
    """

    def __init__(self, num_ids: int, length: int, conditional: Conditional, name: str = "toy"):
        super().__init__(num_ids + 1, length)
        self.name, self.conditional, self.num_ids, self.length = name, conditional, num_ids, length
        self.ids = np.delete(np.arange(num_ids + 1), MASK)
        self.table = torch.full((num_ids + 1,) * length + (length, num_ids + 1), 3.0)
        for state in product([None, *range(num_ids)], repeat=length):
            tokens = tuple(MASK if value is None else int(self.ids[value]) for value in state)
            for position in range(length):
                with np.errstate(divide="ignore"):
                    scores = np.log(conditional(state, position))
                self.table[(*tokens, position)][self.ids] = torch.from_numpy(scores).float()

    def logits(self, batch: Batch) -> Tensor:
        states = batch.tokens.view(-1, self.length).repeat_interleave(torch.tensor(batch.row_counts), 0)
        return self.table[(*states.unbind(1), batch.rows % self.length)]

    def values(self, tokens: Tensor) -> np.ndarray:
        """Real ids 0 … num_ids - 1 of finished sequences [S, L]."""
        return np.searchsorted(self.ids, tokens.numpy())


def consistent(num_ids: int, length: int, seed: int, name: str = "toy") -> Tabulated:
    """Exact conditionals of one joint law (attribute `joint`) with strong dependence and a third of it zero."""
    rng = np.random.default_rng(seed)
    joint = rng.gamma(0.5, size=(num_ids,) * length) * (rng.random((num_ids,) * length) > 1 / 3)
    joint /= joint.sum()

    def conditional(state: tuple, position: int) -> np.ndarray:
        fits = (slice(None) if v is None or i == position else slice(v, v + 1) for i, v in enumerate(state))
        weight = joint[tuple(fits)].sum(axis=tuple(i for i in range(length) if i != position))
        # Tokens of one step may combine to what the law excludes; then anything may follow.
        return weight / weight.sum() if weight.sum() > 0 else np.full(num_ids, 1 / num_ids)

    toy = Tabulated(num_ids, length, conditional, name)
    toy.joint = joint
    return toy


def inconsistent(num_ids: int, length: int, seed: int, name: str = "toy") -> Tabulated:
    """Conditionals that belong to no joint law: the order of reveal decides the law."""
    drawn: dict[tuple, np.ndarray] = {}
    rng = np.random.default_rng(seed)
    for state in product([None, *range(num_ids)], repeat=length):
        for position in range(length):
            drawn[state, position] = rng.dirichlet(np.full(num_ids, 0.5))
    return Tabulated(num_ids, length, lambda state, position: drawn[state, position], name)


class HiddenMarkov(Toy):
    """p(x_i | revealed tokens) of a hidden Markov chain, by forward and backward passes over the whole batch.

    start [K], transition [K, K], emission [K, num_ids]. Mask id and token ids as in `Tabulated`.
    """

    def __init__(self, length: int, start: np.ndarray, transition: np.ndarray, emission: np.ndarray):
        num_states, num_ids = emission.shape
        super().__init__(num_ids + 1, length)
        self.length, self.start, self.transition, self.emission = length, start, transition, emission
        self.ids = np.delete(np.arange(num_ids + 1), MASK)
        # Likelihood [V, K] of a token, 1 where it is masked.
        self.likelihood = torch.ones(num_ids + 1, num_states)
        self.likelihood[self.ids] = torch.from_numpy(emission.T).float()

    def logits(self, batch: Batch) -> Tensor:
        """Forward and backward messages are [L, K, B], so that each step is one small product over the whole batch."""
        tokens = batch.tokens.view(-1, self.length)
        evidence = self.likelihood[tokens].permute(1, 2, 0).contiguous()  # [L, K, B]
        transition, start = (torch.from_numpy(given).float() for given in (self.transition, self.start))
        ahead, behind = torch.empty_like(evidence), torch.empty_like(evidence)
        ahead[0], behind[-1] = start[:, None], 1.0
        for i in range(1, self.length):
            message = transition.T @ ahead[i - 1].mul(evidence[i - 1])
            ahead[i] = message.div_(message.sum(0))
            back = transition @ behind[-i].mul(evidence[-i])
            behind[-i - 1] = back.div_(back.sum(0))
        counts = torch.tensor(batch.row_counts)
        owner, place = torch.arange(len(counts)).repeat_interleave(counts), batch.rows % self.length
        posterior = ahead[place, :, owner] * behind[place, :, owner]  # [R, K], without the position's own token
        scores = torch.full((len(owner), self.spec.vocab_size), 3.0)
        scores[:, self.ids] = (posterior @ self.likelihood[self.ids].T).log()
        return scores - posterior.sum(1, keepdim=True).log()

    def values(self, tokens: Tensor) -> np.ndarray:
        return np.searchsorted(self.ids, tokens.numpy())

    def log_law(self, values: np.ndarray) -> np.ndarray:
        """log p(x) fp64 [S] of whole sequences [S, L] of real ids."""
        message, total = np.broadcast_to(self.start, (len(values), len(self.start))), np.zeros(len(values))
        for column in values.T:
            message = message * self.emission.T[column]
            mass = message.sum(1)
            total += np.log(mass)
            message = message / mass[:, None] @ self.transition
        return total


def random_dit(name: str, num_blocks: int, *, vocab_size=512, hidden=64, heads=2, mlp=128, length=256, seed=0) -> DiT:
    """A transformer with random weights and a head sharp enough that neighbouring tokens matter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(Shape(vocab_size, hidden, num_blocks, mlp, tied=True))
    tensors = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[key] = 1 + 0.1 * noise if "norm" in key else noise * 2 / max(1, shape[-1]) ** 0.5
    spec = DenoiserSpec("unmask", vocab_size, vocab_size - 1, hidden, num_blocks, heads, mlp, length)
    return DiT(spec, tensors, name=name)


def states_of(tokens: Sequence[int], toy: Tabulated) -> tuple:
    """A template or sequence of token ids as a state of `Tabulated.conditional`."""
    real = {int(token): value for value, token in enumerate(toy.ids)}
    return tuple(real.get(int(token)) for token in tokens)
