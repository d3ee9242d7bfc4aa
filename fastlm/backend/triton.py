"""Import the Triton kernels of fastlm.kernels at the first call that runs one, because they import Triton.

If TRITON_INTERPRET=1 is set before that, Triton's interpreter runs them on CPU tensors. It is very slow, and meant for tests.
"""

import functools
import importlib
import importlib.util
import os

import torch

NOT_INSTALLED = None if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"


@functools.cache
def attention():
    """Return the module that launches attention's kernels."""
    return importlib.import_module("fastlm.kernels.attention")


@functools.cache
def latent():
    """Return the module that launches the latent's kernels."""
    return importlib.import_module("fastlm.kernels.latent")


@functools.cache
def noise():
    """Return the module that launches the kernel of the noise."""
    return importlib.import_module("fastlm.kernels.noise")


def interpreted() -> bool:
    """Tell whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(tensor: torch.Tensor) -> str | None:
    """Return why no Triton kernel can take a tensor of this device, or None."""
    if tensor.device.type != "cuda" and not (tensor.is_cpu and interpreted()):
        return f"the tensors are on {tensor.device}"
    return NOT_INSTALLED


def state() -> str:
    """Return what `fastlm.backends()` says."""
    if NOT_INSTALLED:
        return NOT_INSTALLED
    if torch.cuda.is_available():
        return f"available ({torch.cuda.get_device_name()})"
    return "available (Triton's interpreter, which is very slow)" if interpreted() else "torch sees no GPU"
