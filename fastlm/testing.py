"""What tests and benchmarks of fastlm share, for use on kernels of one's own too. It imports torch only."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def seeded_normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normals for a test or a benchmark, the same in every run; drawn in float64, so that dtypes differ by rounding alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
