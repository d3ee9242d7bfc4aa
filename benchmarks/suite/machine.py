"""Describe the machine that a report was measured on, with the memory bandwidth and arithmetic that it really has."""

import datetime
import importlib.util
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console

import fastlm
from suite import peak
from suite.device import CUDA
from suite.terminal import Activity

LIBRARIES = ("transformers", "diffusers", "timm", "onnxruntime", "jax")
PEAKS = 5  # `peaks` tells so many steps of the CPU.


def describe() -> dict:
    """Return what a reader needs to judge the figures and to repeat them."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if CUDA.available() else {}),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_versions(),
        "fastlm": fastlm.__version__,
        "commit": commit(),
        "backends": fastlm.backends(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def peaks(console: Console) -> dict[str, dict[str, float]]:
    """Measure bandwidths in GB/s (1e9 bytes) and rates in GFLOP/s; see peak.py."""
    with Activity(console, total=PEAKS + (peak.GPU_STEPS if CUDA.available() else 0)) as activity:

        def say(text: str) -> None:
            activity.say(text)
            activity.advance()

        of_gpu = {"gpu_peaks": peak.of_gpu(say)} if CUDA.available() else {}
        return peak.bandwidths(say) | peak.arithmetic(say) | of_gpu


def best_peaks(measured: list[dict]) -> dict[str, dict[str, float]]:
    """Return the best of several, as a limit is what the machine does when nothing disturbs it."""
    return {name: _best([each[name] for each in measured]) for name in measured[0]}


def _best(values: list):
    if isinstance(values[0], dict):
        return {name: _best([value[name] for value in values]) for name in values[0]}
    return max(values)


class OthersShare:
    """Measure the share of CPU time that went to other programs, or other guests of the host, in a ``with`` block."""

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
    """Return seconds of all CPUs together: in all, busy, and busy with this process and its children. Linux only."""
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


def _versions() -> dict[str, str]:
    """Return the versions of the libraries, where installed, that fastlm is compared with or measured in."""
    return {name: metadata.version(name) for name in LIBRARIES if importlib.util.find_spec(name)}


def commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # This is no checkout, or there is no git.
