"""The Triton kernels of fastlm.kernels: imported at the first call that runs one, as that imports Triton.

With TRITON_INTERPRET=1, set before that, Triton's interpreter runs them on CPU tensors: for tests, as it is very slow.
"""

import functools
import importlib
import importlib.util
import os

import torch

NOT_INSTALLED = None if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"


@functools.cache
def attention():
    """The launchers of attention's kernels."""
    return importlib.import_module("fastlm.kernels.attention")


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(tensor: torch.Tensor) -> str | None:
    """Why no Triton kernel can take a tensor of this device."""
    if tensor.device.type != "cuda" and not (tensor.is_cpu and interpreted()):
        return f"the tensors are on {tensor.device}"
    return NOT_INSTALLED


def state() -> str:
    """What `fastlm.backends()` says."""
    if NOT_INSTALLED:
        return NOT_INSTALLED
    if torch.cuda.is_available():
        return f"available ({torch.cuda.get_device_name()})"
    return "available (Triton's interpreter, which is very slow)" if interpreted() else "torch sees no GPU"
