"""Measure what the machine can do at most, in the run that is compared with it: arithmetic by dtype, and memory bandwidth.

The rate of a dtype is the best of torch's matrix product and of a loop of multiply-adds on all of torch's threads (peak_fma.c,
which the C compiler builds for this machine): torch's float32 product uses half the vector width of some CPUs.

Everything here ends by the clock, on the slowest machine too: products begin small and grow while there is time.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from suite.device import CPU, CUDA, Device

SOURCE = Path(__file__).with_name("peak_fma.c")
FLOATS = 1 << 26  # 256 MiB of float32 are more than any cache.
GEMM_SIZES = 128, 256, 512, 1024, 2048
GPU_GEMM_SIZES = 1024, 2048, 4096, 8192
GPU_DTYPES = "float32", "bfloat16"  # The sections on a GPU have these.
GPU_STEPS = 1 + len(GPU_DTYPES)  # `of_gpu` tells so many.
GEMM_SECONDS = 2.0  # All products of a dtype together take so many.
FMA_ROUNDS = 5_000_000  # about 0.1 s
REPEATS, SECONDS = 10, 2.0  # A measurement ends after either.
BUILD_SECONDS = 60

Say = Callable[[str], None]  # It is told what begins.


def _silent(text: str) -> None:
    pass


def bandwidths(say: Say = _silent, device: Device = CPU) -> dict[str, float]:
    """Return GB/s (1e9 bytes) of torch's own threads: ``copy_`` counts bytes read and written, ``sum`` only reads."""
    say("the memory's bandwidth")
    source, target = torch.ones(FLOATS, device=device.name), torch.empty(FLOATS, device=device.name)
    size = source.numel() * source.element_size()
    copy = 2 * size / _least_seconds(lambda: target.copy_(source), device=device) / 1e9
    read = size / _least_seconds(source.sum, device=device) / 1e9
    return {"copy_gb_s": round(copy, 1), "read_gb_s": round(read, 1), "bandwidth_gb_s": round(max(copy, read), 1)}


def arithmetic(say: Say = _silent) -> dict[str, dict]:
    """Return GFLOP/s of torch's product and of multiply-adds, and the peak of each dtype, which nothing can exceed.

    Half precision may be computed by converting to float32, where that is faster. float64 has half of float32's lanes.
    """
    gemm = {}
    for name in ("float32", "bfloat16", "float16"):
        say(f"the peak: torch's product in {name}")
        gemm[name] = gemm_rate(getattr(torch, name))
    say("the peak: multiply-adds")
    fma, why_not = fma_rates()
    rates = {name: max(rate, fma.get(name, 0.0)) for name, rate in gemm.items()}
    single = rates["float32"]
    peak = {name: max(rate, single) for name, rate in rates.items()} | {"float64": round(single / 2, 1)}
    return {"gemm_gflop_s": gemm, "fma_gflop_s": fma or {"why_not": why_not}, "peak_gflop_s": peak}


def of_gpu(say: Say = _silent) -> dict[str, dict]:
    """Return the bandwidths of the GPU's memory, and as its peak the rate of torch's product in each dtype."""
    bandwidth, rates = bandwidths(say, CUDA), {}
    for name in GPU_DTYPES:
        say(f"the GPU's peak: torch's product in {name}")
        rates[name] = gemm_rate(getattr(torch, name), device=CUDA, sizes=GPU_GEMM_SIZES)
    return bandwidth | {"peak_gflop_s": rates}


def fma_rates() -> tuple[dict[str, float], str | None]:
    """Return GFLOP/s by dtype of all of torch's threads together; or nothing, and why."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return {}, "no C compiler was found"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "peak_fma.so")
        command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", library, SOURCE]
        try:
            built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            return {}, f"{compiler} took more than {BUILD_SECONDS} s"
        if built.returncode:
            return {}, f"{compiler}: {(built.stderr.strip() or 'failed').splitlines()[0]}"
        module = ctypes.CDLL(str(library))
    rates = {name: _rate_of_threads(getattr(module, name)) for name in ("float32", "bfloat16")}
    return {name: rate for name, rate in rates.items() if rate}, None


def _rate_of_threads(function: Callable[[int], int]) -> float:
    """Return GFLOP/s of all threads together. ctypes releases the GIL, so that Python's threads run side by side."""
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        operations = sum(pool.map(function, [FMA_ROUNDS] * threads))
        seconds = _least_seconds(lambda: list(pool.map(function, [FMA_ROUNDS] * threads)), repeats=3)
    return round(operations / seconds / 1e9, 1)


def gemm_rate(
    dtype: torch.dtype, product: Callable = torch.matmul, device: Device = CPU, sizes: tuple[int, ...] = GEMM_SIZES
) -> float:
    """Return GFLOP/s of the best of products of growing size. The next size is tried where there is time left for it."""
    best, end = 0.0, time.perf_counter() + GEMM_SECONDS
    for size in sizes:
        # (size, size) each; the warm-up and one more, at the best rate so far.
        expected = 2 * (2 * size**3) / (best * 1e9) if best else 0.0
        left = end - time.perf_counter()
        if expected > left:
            break
        a, b = (torch.randn(size, size, device=device.name).to(dtype) for _ in range(2))
        seconds = _least_seconds(lambda: product(a, b), repeats=3, seconds=left / 2, device=device)  # noqa: B023
        best = max(best, 2 * size**3 / seconds / 1e9)
    return round(best, 1)


def _least_seconds(work: Callable, repeats: int = REPEATS, seconds: float = SECONDS, device: Device = CPU) -> float:
    """Return the fastest of one or more runs, as a limit is what the machine does when nothing disturbs it."""
    end = time.perf_counter() + seconds
    work()
    least = _seconds(work, device)
    for _ in range(repeats - 1):
        if time.perf_counter() > end:
            break
        least = min(least, _seconds(work, device))
    return least


def _seconds(work: Callable, device: Device) -> float:
    if device.clear_cache:
        device.clear_cache()
    start = device.clock()
    work()
    return device.clock() - start
