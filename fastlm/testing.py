"""Make inputs and check errors in tests and benchmarks of fastlm, and of your own kernels. This file imports torch only.

The rule of errors: *golden* is the reference in float64 on the very same inputs. *Plain* is the reference in the inputs' own
dtype, as plain PyTorch computes it. A result's error may be a small factor times the error of plain, plus a few ulps of the
largest golden value.
"""

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VALUE_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
ULPS = 4


def seeded_normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw the same normals in every run. They are drawn in float64, so that dtypes differ by rounding alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ulp_of_largest(values: Tensor, dtype: torch.dtype) -> float:
    """Return the distance between neighbours of ``dtype`` at the largest finite magnitude of ``values``."""
    finite = values[values.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    info = torch.finfo(dtype)
    return max(math.ldexp(info.eps, math.frexp(largest)[1] - 1), info.smallest_normal * info.eps)


def worst_error(actual: Tensor, golden: Tensor) -> float:
    """Return the largest difference where both are finite."""
    difference = (actual.double() - golden.double()).abs()
    finite = difference[difference.isfinite()]
    return finite.max().item() if finite.numel() else 0.0


def errors_of(actual: Tensor, golden: Tensor) -> Tensor:
    """Return the error of each element in float64; it is infinite where a NaN or an infinity is out of place.

    NaN and infinities must stand exactly where the golden answer, rounded to the dtype of ``actual``, has them.
    """
    rounded, actual, golden = golden.detach().to(actual.dtype).double(), actual.detach().double(), golden.detach().double()
    in_place = (actual == rounded) | (actual.isnan() & rounded.isnan())
    special = torch.where(in_place, 0.0, math.inf).to(actual)
    return torch.where(actual.isfinite() & rounded.isfinite(), (actual - golden).abs(), special)


def allowed_error(plain: Tensor, golden: Tensor, factor: float, slack: float) -> float:
    """Return ``factor`` times the error of ``plain``, plus a few times ``slack``, which is an ulp of the largest value."""
    return factor * worst_error(plain, golden) + ULPS * slack


def assert_within(actual: Tensor, golden: Tensor, allowed: float, what: str = "the result") -> None:
    """Assert that no element of ``actual`` is wrong by more than ``allowed``, and that NaN and infinities are in place."""
    assert actual.shape == golden.shape, f"{what} has shape {tuple(actual.shape)}, not {tuple(golden.shape)}"
    errors = errors_of(actual, golden)
    at = ((errors > allowed) | errors.isinf()).nonzero()
    assert not len(at), (
        f"{what}: {len(at)} of {errors.numel()} are wrong by more than {allowed:.3g}, the first, at {at[0].tolist()}, "
        f"{actual[tuple(at[0])]} where golden is {golden[tuple(at[0])]}; the worst by {errors.max():.3g}"
    )


def assert_as_good_as_plain(
    actual: Tensor, plain: Tensor, golden: Tensor, factor: float, what: str = "the result", slack: float | None = None
) -> None:
    """Assert that no error of ``actual`` exceeds the `allowed_error`; ``slack`` is one ulp of the largest value by default."""
    assert actual.dtype == plain.dtype, f"{what} is {actual.dtype}, not {plain.dtype}"
    slack = ulp_of_largest(golden, actual.dtype) if slack is None else slack
    assert_within(actual, golden, allowed_error(plain, golden, factor, slack), what)


def separate_compiler_caches() -> None:
    """Give torch.compile a cache of its own in a process that ATEN_CPU_CAPABILITY holds to narrower vectors.

    The cache does not look at that variable, and code for vectors of one width corrupts the heap of a process that uses another
    (seen with torch 2.13).
    """
    if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
        folder = Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{capability}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
