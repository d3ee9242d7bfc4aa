"""Write figures as text, and compute statistics of samples."""

import math
import statistics


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th, interpolated between samples; of a single sample, itself."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]


def growth_exponent(sizes: list[float], values: list[float]) -> float | None:
    """Fit b of ``value = a size^b`` to the logarithms by least squares; None without two sizes and values."""
    points = [(math.log(size), math.log(value)) for size, value in zip(sizes, values) if value > 0]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points)).slope


def duration(seconds: float) -> str:
    """Write three digits and a unit: "172 µs", "2.31 ms"."""
    value, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms") if seconds < 1 else (seconds, "s")
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def size(count: int) -> str:
    """Write bytes in MiB: "12.1 MiB"."""
    return f"{count / 2**20:.1f} MiB"


def count(n: int) -> str:
    """Write 3200 as "3,200", 65536 as "64K", 1048576 as "1M"."""
    return f"{n / 2**20:.3g}M" if n >= 2**20 else f"{n / 2**10:.3g}K" if n >= 2**14 else f"{n:,}"


def rate(value: float) -> str:
    """Write three digits: "0.0275", "194", "27,500"."""
    return f"{value:.3g}" if value < 999.5 else f"{float(f'{value:.3g}'):,.0f}"


def times(ratio: float) -> str:
    """Write two digits: "0.98 ×", "1.0 ×", "28 ×"."""
    return (f"{ratio:#.2g}".removesuffix(".") if ratio < 99.5 else f"{ratio:.0f}") + " ×"


def or_dash(value: float | None, write) -> str:
    return "–" if value is None else write(value)
