"""A sampler that is set up for whole runs of a job, ours or a peer's."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Run:
    """generate: does one run, tokens int64 [num_sequences, L]. num_calls: of the network in a run, or the network
    itself, to be watched. num_sequences, num_reveals: what a run does of the job, all of it where left out.
    """

    generate: Callable[[], Tensor]
    num_calls: float | nn.Module
    num_sequences: int | None = None
    num_reveals: int | None = None

    def warm_up(self) -> float:
        """Does one run; the network calls in it."""
        if not isinstance(self.num_calls, nn.Module):
            self.generate()
            return self.num_calls
        seen: list[None] = []
        hook = self.num_calls.register_forward_pre_hook(lambda module, arguments: seen.append(None))
        try:
            self.generate()
        finally:
            hook.remove()
        return len(seen)
