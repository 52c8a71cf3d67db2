"""How many network calls a trajectory takes, by the law of its events, and so how long."""

EPS = 1e-5  # the time at which the published sampler's trajectories end


def expected_events(num_steps: int, length: int) -> float:
    """Steps of a linear trajectory that reveal something in one sequence: each position has one of them, at random."""
    return num_steps * (1 - (1 - 1 / num_steps) ** length)


def rows_per_event(num_steps: int, length: int) -> float:
    return length / expected_events(num_steps, length)


def expected_published_calls(num_steps: int, length: int, batch: int) -> float:
    """Steps in which the published cached sampler runs its network: the first, and any after one that changed
    something in any of its sequences. Each position changes in a given step with probability (1 - EPS) / num_steps."""
    unchanged = (1 - (1 - EPS) / num_steps) ** (batch * length)
    return 1 + (num_steps - 1) * (1 - unchanged)


def published_seconds(num_steps: int, calls: float, call: float, cached: float, last: float) -> float:
    """Of a whole run: steps with the network, steps with its kept output, and the last argmax."""
    return calls * call + (num_steps - calls) * cached + last
