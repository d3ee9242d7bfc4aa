"""Checks that the ops share. Each raises TypeError or ValueError that names the argument, what was expected and what came."""

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: Tensor) -> None:
    """A dense tensor of a floating dtype that the kernels know."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {tensor.layout}")


def check_integer(name: str, value: int, low: int, high: int) -> int:
    """An integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high}; got {value}")
    return value


def check_number(name: str, value: float, low: float) -> float:
    """A finite number of at least ``low``, which may be -inf."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not low <= value < math.inf or value == -math.inf:  # also where it is NaN
        raise ValueError(f"{name} must be finite{f' and at least {low:g}' if low > -math.inf else ''}; got {value}")
    return float(value)
