"""Who is timed: every implementation in an operator's registry, and for sample_head its peers and its parts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module

from torch import Tensor

from benchmarks import verify
from benchmarks.cases import Case
from benchmarks.cases.sample_head import HeadCase, draw
from benchmarks.ceilings import readers
from benchmarks.peers import HEAD_PEERS, Peer
from benchmarks.peers.torch_chain import head_alone
from benchmarks.timing import Run
from benchmarks.verify import Verdict
from unmask.kernels.dispatch import Implementation, Operator


@dataclass(frozen=True)
class Variant:
    """Something timed beside others.

    role   implementation, peer, part (of what the peers do) or ceiling
    bind   what is run, on the tensors of a case
    check  (case, draws) -> whether it is right; None where there is nothing to be wrong
    lacks  why it cannot run here, or None
    moved  the bytes and FLOPs of its own, where they are not those of the case
    """

    name: str
    role: str
    bind: Callable[[Case], Run]
    check: Callable[[Case, int], Verdict] | None = None
    lacks: str | None = None
    moved: Callable[[Case], tuple[int, int]] = lambda case: (case.num_bytes, case.flops)


def registered(name: str) -> Operator:
    """An operator's registry entry; the attribute of unmask.kernels with its name is the function."""
    return import_module(f"unmask.kernels.{name}").OPERATOR


def implementations(operator: str, asked: frozenset[str] | None = None) -> list[Variant]:
    """Of an operator, all or those asked for by name, also those that cannot run here."""
    every = registered(operator).implementations
    return [_implementation(operator, one, asked is not None) for one in every if asked is None or one.name in asked]


def beside(operator: str, part: str, device: str, read: str) -> list[Variant]:
    """What stands beside the implementations. `read`: the operation that reads memory fastest, on a CPU."""
    if operator != "sample_head":
        return []
    found = [_peer(peer, device) for peer in HEAD_PEERS if part in peer.parts]
    if part == "whole":
        found.append(Variant("torch, head alone", "part", _head_alone, moved=_head_alone_moves))
        if device == "cpu":
            moved = lambda case: (case.weight.nbytes, 0)  # noqa: E731
            name = f"read of the weight ({read})"
            found.append(Variant(name, "ceiling", lambda case: readers(case.weight)[read], moved=moved))
    return found


@cache
def _implementation(operator: str, one: Implementation, asked: bool) -> Variant:
    usable, reason = one.status()
    lacks = reason if not usable or (one.on_request() and not asked) else None
    check = partial(_agrees, one.name)
    if operator == "sample_head":
        check = partial(_sampler, partial(draw, one.name), 10 if one.name == "reference" else 1)
    return Variant(one.name, "implementation", lambda case: partial(case.run, one.name), check, lacks)


@cache
def _peer(peer: Peer, device: str) -> Variant:
    def drawn(hidden: Tensor, weight: Tensor | None, keys: Tensor) -> Tensor:
        return peer.draw(hidden, weight)

    def bind(case: HeadCase) -> Run:
        return partial(peer.draw, case.hidden, case.weight)

    check = lambda case, draws: verify.check_law(drawn, case, draws)  # noqa: E731
    return Variant(peer.name, "peer", bind, check, peer.lacks(device))


def _sampler(drawn: verify.Draw, slower: int, case: HeadCase, draws: int) -> Verdict:
    """Of the law, drawn once for all sizes, and of the tokens at this size. What is slower draws less."""
    law = verify.check_law(drawn, case, draws // slower)
    if not law.passed:
        return law
    same = verify.check_tokens(case, drawn(case.hidden, case.weight, case.keys))
    return Verdict(same.passed, f"{law.detail}, {same.detail}" if same.passed else same.detail)


def _agrees(impl: str, case: Case, draws: int) -> Verdict:
    if impl == "reference":
        return Verdict(True, "the specification")
    return verify.check_agreement(*case.compare(impl), case.allowed)


def _head_alone(case: HeadCase) -> Run:
    return lambda: head_alone(case.hidden, case.weight)


def _head_alone_moves(case: HeadCase) -> tuple[int, int]:
    logits = case.num_rows * case.vocab_size * case.weight.itemsize
    return case.weight.nbytes + case.hidden.nbytes + logits, case.flops
