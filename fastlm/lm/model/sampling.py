"""How the next token is drawn. This file brings no torch: the command line shows the defaults."""

import math
from dataclasses import dataclass


def check_at_least(least: int, **named: int) -> None:
    """Raise a ValueError that names the first argument below ``least``."""
    for name, value in named.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: of the softmax. Below 1 it favours likely tokens; 0 takes the likeliest token each time.
        top_k: draw from this many of the likeliest tokens only; 0 for all.
        top_p: draw only from the likeliest tokens that together have this probability (Holtzman et al. 2020, arXiv:1904.09751);
            1 for all.
        max_new_tokens: the most tokens after the prompt; None for as many as the model has room for.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}")
        check_at_least(0, top_k=self.top_k)
        if self.max_new_tokens is not None:
            check_at_least(1, max_new_tokens=self.max_new_tokens)


GREEDY = Sampling(temperature=0)
