"""Load the CUDA module ``fastlm._cuda`` at the first call that might use it, if torch has CUDA and sees a GPU.

It is not loaded earlier, because a process that has asked the driver cannot fork, and never by a torch without CUDA. Nothing
here raises: ``fastlm.backends()`` shows the reason of a failure.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from . import cpu as native

GET_THEM = (
    "install fastlm again, from its source, where nvcc is on PATH (or after pip install nvidia-cuda-nvcc nvidia-cuda-cccl)"
)


class Loaded(NamedTuple):
    """Hold the module and its converter of tensors, or the reason why there is no module."""

    module: ModuleType | None = None
    view: Callable | None = None
    why_not: str | None = None


@functools.cache
def load() -> Loaded:
    if torch.version.cuda is None:
        return Loaded(why_not=f"torch {torch.__version__} was built without CUDA")
    if not torch.cuda.is_available():
        return Loaded(why_not="torch sees no GPU")
    try:
        module = importlib.import_module("fastlm._cuda")
    except ImportError as error:
        return Loaded(why_not=f"the CUDA module fastlm._cuda cannot be loaded ({error}): {GET_THEM}")
    return Loaded(module, native.view_for(module))


@functools.cache
def _refused(device: int) -> str | None:
    """Return why the module cannot run on that GPU, or None."""
    module = load().module
    with torch.cuda.device(device):
        reason = module.why_not()
    return reason and f"cuda:{device} cannot run fastlm._cuda, built for {module.architectures}: {reason}"


@native.constant_when_compiled
def unavailable(device: int) -> str | None:
    """Return why no kernel runs on the GPU of that index, or None."""
    return load().why_not or _refused(device)


def why_not(tensor: torch.Tensor) -> str | None:
    """Return why no CUDA kernel can take a tensor of this device, or None."""
    if not tensor.is_cuda:
        return "the tensors are on cpu" if tensor.is_cpu else f"the tensors are on {tensor.device}"  # Every CPU call asks.
    return unavailable(tensor.device.index)


def state() -> str:
    """Return what `fastlm.backends()` says."""
    if reason := load().why_not or _refused(torch.cuda.current_device()):
        return reason
    return f"available ({torch.cuda.get_device_name()}; built for {load().module.architectures})"


# ---- how an op runs the kernels: the functions that cpu.py has for the CPU --------------------------------------------------


def empty(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Make an output of a kernel on the device of ``like``, and in its dtype if none is given."""
    return like.new_empty(shape, dtype=dtype)


def view(tensor: torch.Tensor | None):
    """Convert a tensor, or None, to what the module's functions accept."""
    return load().view(tensor)


def launch(name: str, device: torch.device, *args) -> None:
    """Call the module's function of that name on the device and torch's stream there, without waiting for its kernels."""

    def allocate(count: int):
        return view(torch.empty(count, dtype=torch.uint8, device=device))

    with torch.cuda.device(device):
        getattr(load().module, name)(*args, allocate, torch._C._cuda_getCurrentRawStream(device.index))
