"""The devices that a section may run on: how time and memory are measured on each."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

CLEAR_REFS = Path("/proc/self/clear_refs")  # Writing 5 resets the high-water mark of the resident set (man 5 proc).
CACHE_BYTES = 256 << 20  # More than the second-level cache of any GPU.


@dataclass(frozen=True)
class Device:
    """A device by torch's name, and its measurements."""

    name: str
    available: Callable[[], bool]
    clock: Callable  # Returns the present moment. The difference of two moments is in seconds.
    clear_cache: Callable[[], None] | None  # Is run before each timed call. None: calls are timed several at a time.
    peak_bytes: Callable[[Callable], tuple[int, object]]  # Returns the peak extra memory of a call, and the call's result.
    capture: Callable[[Callable], Callable]  # Returns a call without its cost on the host, where the device knows such a thing.

    def move(self, arguments: dict) -> dict:
        """Return the arguments of a call with its tensors on the device."""
        return {name: value.to(self.name) if isinstance(value, Tensor) else value for name, value in arguments.items()}


# ---- the CPU ----------------------------------------------------------------------------------------------------------------


def _resident_peak(call: Callable) -> tuple[int, object]:
    """Measure how far the resident set rises above what it was before the call."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc gives back what the warm-up left in the heap.
        libc.malloc_trim(0)
    CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    result = call()
    return max(0, _status("VmHWM") - before), result


def _status(field: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


# ---- the GPU ----------------------------------------------------------------------------------------------------------------


class Moment:
    """A point in the time of the GPU's current stream, marked by a CUDA event."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        """Wait for this moment, and return the seconds since the earlier one."""
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3  # elapsed_time counts milliseconds.


@cache
def _cache_filler() -> Tensor:
    return torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")


def _fill_cache() -> None:
    """Overwrite the second-level cache. The GPU is busy with that while the timed call is launched, so no launch is timed."""
    _cache_filler().zero_()


def _allocator_peak(call: Callable) -> tuple[int, object]:
    """Measure how far torch's allocator rises above what it held before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def _as_graph(call: Callable) -> Callable:
    """Return a call that replays a CUDA graph of ``call``, and returns the same results, written anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # It compiles, and allocates what lasts.
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay():
        graph.replay()
        return results

    return replay


def gpu_is_lost() -> bool:
    """Tell whether an error has ended the GPU's context, as an access out of bounds does: all later calls would fail."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


CPU = Device("cpu", lambda: True, time.perf_counter, None, _resident_peak, lambda call: call)
CUDA = Device("cuda", torch.cuda.is_available, Moment, _fill_cache, _allocator_peak, _as_graph)
DEVICES = {device.name: device for device in (CPU, CUDA)}


def stand_in_for_gpu() -> None:
    """Put the CPU in the GPU's place, for a dry run in Triton's interpreter. Call it before sections are listed."""
    DEVICES["cuda"] = CPU


def measure_memory(call: Callable) -> dict[str, int]:
    """Return the peak extra memory of a call, on the device where its results lie, and the bytes of these results.

    The warm-up brings in code pages, thread stacks and compiled kernels.
    """
    on_gpu = any(tensor.is_cuda for tensor in _tensors(call()))
    peak, result = (CUDA if on_gpu else CPU).peak_bytes(call)
    return {"bytes": peak, "result_bytes": sum(tensor.nbytes for tensor in _tensors(result))}


def _tensors(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else ()
