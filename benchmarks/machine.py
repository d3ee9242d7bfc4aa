"""The machine a report was measured on, and the memory bandwidth and arithmetic that it really has."""

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastlm

FLOATS = 1 << 26  # 256 MiB of float32: beyond any cache
ROUNDS = 10
GEMM = 2048


def describe() -> dict:
    """What a reader needs to judge the figures, and to repeat them; bandwidths in GB/s (1e9 bytes)."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastlm": fastlm.__version__,
        "commit": _commit(),
        "backends": fastlm.backends(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **_bandwidths(),
        "gemm_gflop_s": _gemm_rates(),
    }


class OthersShare:
    """What share of the machine's CPU time went to other programs, or to other guests of its host, in a ``with`` block."""

    def __enter__(self):
        self.start = _cpu_times()
        return self

    def __exit__(self, *exception):
        if self.start is None:
            self.share = None
            return
        total, busy, own = (end - start for end, start in zip(_cpu_times(), self.start))
        self.share = round(max(0.0, busy - own) / total, 3)


def _cpu_times() -> tuple[float, float, float] | None:
    """Seconds of all CPUs together: of all kinds, busy, and busy with this process and its children. Linux only."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (
        int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in stat.read_text().split()[1:9]
    )
    busy = user + nice + system + irq + softirq + steal
    return busy + idle + iowait, busy, sum(os.times()[:4])


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout, or no git


def _bandwidths() -> dict[str, float]:
    """Of torch's own threads: ``copy_`` counts the bytes read and those written, ``sum`` reads alone."""
    source, target = torch.ones(FLOATS), torch.empty(FLOATS)
    size = source.numel() * source.element_size()
    copy = 2 * size / _least_seconds(lambda: target.copy_(source)) / 1e9
    read = size / _least_seconds(source.sum) / 1e9
    return {"copy_gb_s": round(copy, 1), "read_gb_s": round(read, 1), "bandwidth_gb_s": round(max(copy, read), 1)}


def _gemm_rates() -> dict[str, float]:
    """What each dtype's arithmetic can reach: torch's matrix product, or float32's where that is faster, being converted to."""
    single, half = _gemm_rate(torch.float32), _gemm_rate(torch.bfloat16)
    return {"float32": single, "bfloat16": max(single, half), "float16": single, "float64": round(single / 2, 1)}


def _gemm_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(GEMM, GEMM).to(dtype) for _ in range(2))
    return round(2 * GEMM**3 / _least_seconds(lambda: a @ b, rounds=3) / 1e9, 1)


def _least_seconds(work: Callable, rounds: int = ROUNDS) -> float:
    """The best of some rounds: a limit is what the machine does when nothing disturbs it."""
    work()
    return min(_seconds(work) for _ in range(rounds))


def _seconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
