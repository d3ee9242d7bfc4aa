"""The Triton kernels of fastlm.kernels: imported at the first call that runs one, as that imports Triton.

With TRITON_INTERPRET=1, set before that, Triton's interpreter runs them on CPU tensors: for tests, as it is very slow.
"""

import functools
import importlib
import importlib.util
import os

import torch


@functools.cache
def attention():
    """The launchers of attention's kernels."""
    return importlib.import_module("fastlm.kernels.attention")


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def not_installed() -> str | None:
    """Why there is no Triton, or None."""
    return "Triton is not installed: pip install triton" if importlib.util.find_spec("triton") is None else None


def why_not(tensor: torch.Tensor) -> str | None:
    """Why no Triton kernel can take a tensor of this device."""
    if tensor.device.type != "cuda" and not (tensor.is_cpu and interpreted()):
        return f"the tensors are on {tensor.device}"
    return not_installed()


def state() -> str:
    """What `fastlm.backends()` says."""
    if reason := not_installed():
        return reason
    if torch.cuda.is_available():
        return f"available ({torch.cuda.get_device_name()})"
    return "available (Triton's interpreter, which is very slow)" if interpreted() else "torch sees no GPU"
