"""Schedules of the KL's weight. If the weight grows too early, the decoder learns to ignore the latent."""

from collections.abc import Callable

Schedule = Callable[[float], float]  # from the share of training that is done, in [0, 1], to a weight in [0, 1]


def constant(done: float) -> float:
    """Return 1 at every step."""
    return 1.0


def linear(done: float, ramp: float = 0.5) -> float:
    """Return a weight that grows from 0 to 1 over the first half (Bowman et al. 2016)."""
    return min(1.0, done / ramp)


def cyclical(done: float, cycles: int = 4, ramp: float = 0.5) -> float:
    """Return a weight that grows from 0 to 1 in each cycle (Fu et al. 2019, arXiv:1903.10145).

    Each cycle starts from a better latent than the one before.
    """
    return 1.0 if done >= 1 else min(1.0, done * cycles % 1.0 / ramp)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cyclical": cyclical}


def kl_weight(schedule: str, done: float, *, beta: float = 1.0, warm_start: float = 0.0) -> float:
    """Return the KL's weight when the share ``done`` of training is over.

    It is 0 in the first share ``warm_start``, where the model learns as a plain autoencoder (Li et al. 2019, arXiv:1909.00868).
    Then it is ``beta`` times the schedule's.
    """
    if done < warm_start:
        return 0.0
    return beta * SCHEDULES[schedule]((done - warm_start) / (1 - warm_start) if warm_start < 1 else 1.0)
