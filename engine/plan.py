"""What a run will do, before any network call."""

from dataclasses import asdict, dataclass

from unmask.cost import Cost, Seconds, flops_dict


@dataclass(frozen=True, eq=False)
class Plan:
    """The whole run in integers: how many network calls, by whom, how full the ticks are, what it costs.

    num_samples, num_tokens: sequences, and positions to reveal in all of them. reveal, schedule: as text.
    num_ticks, occupancy: see `unmask.timeline`. cost: the calls, their FLOPs and the schedule's saving.
    peak_bytes: all buffers of the run together: without the weights, the scratch memory of operators (the head's is at
    most 8 MiB on a CPU and 64 MB on a GPU) and whatever a `LogitsDenoiser`'s model allocates. seconds: predicted from a
    calibration; None without one, and with a `LogitsDenoiser`, of which nothing is known to predict them from.
    """

    num_samples: int
    num_tokens: int
    reveal: str
    schedule: str
    num_ticks: int
    occupancy: float
    cost: Cost
    peak_bytes: int
    seconds: Seconds | None = None

    @property
    def events(self) -> int:
        """Network calls of single sequences, in total."""
        return self.cost.num_events

    @property
    def events_per_sequence(self) -> float:
        return self.events / self.num_samples

    @property
    def nfe(self) -> dict[str, float]:
        """Network evaluations per sequence, mean, by model."""
        return {name: self.cost.events_of(name) / self.num_samples for name in self.cost.flops}

    def to_json(self) -> dict:
        """What `unmask plan --json` prints."""
        return {
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "reveal": self.reveal,
            "schedule": self.schedule,
            "events_per_sequence": self.events_per_sequence,
            "events": self.events,
            "ticks": self.num_ticks,
            "occupancy": self.occupancy,
            "nfe": self.nfe,
            "flops": flops_dict(self.cost.total),
            "flops_one_model": flops_dict(self.cost.one_model),
            "saved": asdict(self.cost.saving),
            "peak_bytes": self.peak_bytes,
            "seconds": None if self.seconds is None else self.seconds.to_json(),
        }

    def __str__(self) -> str:
        flops, saving = self.cost.total, self.cost.saving
        nfe = ", ".join(f"{name} {value:.1f}" for name, value in self.nfe.items())
        predicted = () if self.seconds is None else (f"predicted       {self.seconds}",)
        return "\n".join(
            (
                f"{self.num_samples} sequences, {self.num_tokens:,} tokens to reveal; {self.reveal}; {self.schedule}",
                f"network calls   {self.events_per_sequence:.1f} per sequence ({nfe})",
                f"ticks           {self.num_ticks:,}, {self.occupancy:.1%} full",
                f"FLOPs           {flops.total:.3g} (blocks {flops.blocks:.3g}, attention {flops.attention:.3g}, "
                f"head {flops.head:.3g})",
                f"saved           {saving.with_head:.1%} against the costliest model alone "
                f"({saving.without_head:.1%} without the head)",
                f"memory          {self.peak_bytes / 2**20:.1f} MiB beyond the weights",
                *predicted,
            )
        )
