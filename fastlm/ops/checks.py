"""Check arguments for all ops. A TypeError or ValueError names the argument, what was expected and what came."""

import math

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Check for a dense tensor of a floating dtype that the kernels know."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {tensor.layout}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got a nested one")


def is_integer(value) -> bool:
    """Tell whether a value counts as an integer: Python's, torch's symbolic and NumPy's, but no bool."""
    return isinstance(value, (int, torch.SymInt, np.integer)) and not isinstance(value, bool)


def as_integer(value: int) -> int:
    """Convert an integer, as `is_integer` has it, to one that torch's ops take."""
    return int(value) if isinstance(value, np.integer) else value


def check_integer(name: str, value: int, low: int, high: int) -> int:
    """Check for an integer in [low, high], and return it as torch's ops take it."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high}; got {value}")
    return as_integer(value)


def check_number(name: str, value: float, low: float) -> float:
    """Check for a finite number of at least ``low``, which may be -inf."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not low <= value < math.inf or value == -math.inf:  # NaN is refused, too.
        raise ValueError(f"{name} must be finite{f' and at least {low:g}' if low > -math.inf else ''}; got {value}")
    return float(value)


# ---- autocast ---------------------------------------------------------------------------------------------------------------


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that an autocast region gives a tensor for a product. It leaves float64 alone, as torch does."""
    device = tensor.device.type
    converts = tensor.dtype in UP_TO_FLOAT32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if converts else tensor.dtype


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Convert tensors to the dtypes of an autocast region, as torch does for its own attention and products."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    return tuple(t.to(autocast_dtype(t)) if isinstance(t, Tensor) else t for t in tensors)
