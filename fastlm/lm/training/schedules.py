"""The weight of the KL over training: too much of it too early, and the decoder learns to do without the latent."""

from collections.abc import Callable

Schedule = Callable[[float], float]  # of the share of training that is done, in [0, 1]


def constant(done: float) -> float:
    return 1.0


def linear(done: float, ramp: float = 0.5) -> float:
    """From 0 to 1 over the first half (Bowman et al. 2016)."""
    return min(1.0, done / ramp)


def cyclical(done: float, cycles: int = 4, ramp: float = 0.5) -> float:
    """From 0 to 1, again and again (Fu et al. 2019, arXiv:1903.10145): each cycle starts from a better latent."""
    return 1.0 if done >= 1 else min(1.0, done * cycles % 1.0 / ramp)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cyclical": cyclical}


def kl_weight(schedule: str, done: float, *, beta: float = 1.0, warm_start: float = 0.0) -> float:
    """The weight when a share ``done`` of training is behind: none in the first ``warm_start`` of it, where the model learns as
    a plain autoencoder (Li et al. 2019, arXiv:1909.00868), then the schedule's, of ``beta`` at most."""
    if done < warm_start:
        return 0.0
    return beta * SCHEDULES[schedule]((done - warm_start) / (1 - warm_start) if warm_start < 1 else 1.0)
