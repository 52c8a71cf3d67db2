"""The samplers of one workload: set up, their laws checked, and timed in the turns of a protocol."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from benchmarks.end_to_end_report import EndToEndReport, Section, Variant
from benchmarks.peers import ours
from benchmarks.peers.run import Run
from benchmarks.peers.samplers import PEERS, SamplerPeer
from benchmarks.text_law import Laws
from benchmarks.timing import Clock, host_clock
from benchmarks.verify import Verdict
from benchmarks.workloads import Job
from unmask.reveal import Reveal

Tell = Callable[[str], object]
_OUR_LAW = "exact to 2⁻³⁰ of a row's mass"


class WholeRuns:
    """Every peer in a job, and ours once for each law."""

    def __init__(self, name: str, job: Job, laws: Laws, report: EndToEndReport, tell: Tell):
        self.name, self.job, self.laws, self.report, self.tell = name, job, laws, report, tell
        self.runs: dict[str, Run] = {}
        dtype = str(job.dtype).removeprefix("torch.")
        self.section = Section(name, job.device.type, dtype, job.size, job.network.shape.vocab_size)
        report.sections.append(self.section)

    def set_up(self, names: Iterable[str], paths: Mapping[str, Path | None]) -> None:
        """Peers by name, and ours beside them; paths: of their checkouts, by option."""
        for name in names:
            peer = PEERS[name]
            path = paths[peer.checkout.option] if peer.checkout else None
            why = peer.lacks(self.job, path)
            if not why:
                self.tell(f"{self.name}: setting up {name}, and checking its law")
                why = self._set_up(name, peer, path)
            if why:
                self._skip(name, why)

    def time(self, deadline: float, out: Path | None) -> None:
        """In the report's protocol; after the deadline each only gets the one run that it lacks.

        The report is saved after each run. A peer that fails is dropped; ours must not.
        """
        variants = {variant.name: variant for variant in self.section.variants}
        clock = whole_clock(self.job.device)
        for name, timed in self.report.protocol.turns(list(variants)):
            variant = variants[name]
            spent = variant.seconds and time.monotonic() > deadline
            if spent or variant not in self.section.variants:
                continue
            self.tell(f"{self.name}: {name}, {f'run {len(variant.seconds) + 1}' if timed else 'warm-up'}")
            try:
                if timed:
                    variant.seconds.append(clock(self.runs[name].generate))
                else:
                    variant.nfe = self.runs[name].warm_up() * self.job.size.length / variant.reveals
            except Exception as error:
                if variant.ours is None:
                    raise
                self._skip(name, _said(error))
                self.section.variants.remove(variant)
            self.report.save(out)

    def _set_up(self, name: str, peer: SamplerPeer, path: Path | None) -> str | None:
        """Why the peer cannot be set up, or None."""
        try:
            verdict = self.laws.verdict(name, peer.reveal, lambda job: peer.prepare(job, path))
            run = peer.prepare(self.job, path)
        except Exception as error:  # another project's code, with this machine's versions of its packages
            return _said(error)
        logit_bytes = peer.logit_bytes or self.job.dtype.itemsize
        self._add(name, run, peer, verdict, peer.law, logit_bytes, self._ours(peer))

    def _skip(self, name: str, why: str) -> None:
        self.report.skipped.append({"peer": name, "workload": self.name, "reason": why})

    def _ours(self, peer: SamplerPeer) -> Variant:
        """Of the peer's law; set up if it is not there."""
        reveal = peer.reveal(self.job)
        name = f"unmask {label(reveal)}"
        if name in self.runs:
            return next(variant for variant in self.section.variants if variant.name == name)
        kind = f"unmask {label(peer.reveal(self.laws.job))}"
        verdict = self.laws.verdict(kind, peer.reveal, lambda job: ours.prepare(job, peer.reveal(job)))
        if not verdict.passed:
            self.report.failures.append(f"{name} fails its law check: {verdict.detail}")
        return self._add(name, ours.prepare(self.job, reveal), peer, verdict, _OUR_LAW, 0, None)

    def _add(
        self,
        name: str,
        run: Run,
        peer: SamplerPeer,
        verdict: Verdict,
        law: str,
        logit_bytes: int,
        mine: Variant | None,
    ) -> Variant:
        size = self.job.size
        sequences = run.num_sequences or size.batch
        variant = Variant(
            name=name,
            reveal=label(peer.reveal(self.job)),
            sequences=sequences,
            reveals=run.num_reveals or size.length,
            law=f"{verdict.detail}; {law}",
            law_passed=verdict.passed,
            logits_bytes=logit_bytes * sequences * size.length * self.section.vocab_size,
            ours=mine,
        )
        self.section.variants.append(variant)
        self.runs[name] = run
        return variant


def whole_clock(device: torch.device) -> Clock:
    """Seconds by the host's clock, a GPU waited for before and after."""
    if device.type != "cuda":
        return host_clock

    def clock(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        return host_clock(lambda: (run(), torch.cuda.synchronize()))

    return clock


def label(reveal: Reveal) -> str:
    """Its spelling, but for the numbers of a grid."""
    kind, *rest = str(reveal).split(":")
    return ":".join([kind, *rest[:1]]) + (" own grid" if len(rest) > 1 else "")


def _said(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
