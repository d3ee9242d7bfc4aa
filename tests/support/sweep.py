"""Say how much of the kernels' tests runs: FASTLM_SWEEP multiplies the random calls, and above 1 every case has every dtype."""

import os

SWEEP = float(os.environ.get("FASTLM_SWEEP", "1"))
EVERY_DTYPE = SWEEP > 1


def scaled(examples: int) -> int:
    """Return how many random calls a test makes that makes so many by default."""
    return max(1, round(examples * SWEEP))
