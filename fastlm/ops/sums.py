"""Sums for gradients of what was broadcast."""

from torch import Tensor

from .. import native


def sum_to(gradient: Tensor, target: Tensor) -> Tensor:
    """Sum over the dimensions that ``target`` was broadcast along, in an order that no thread count changes (torch's does).

    ``gradient`` is float32 or float64, and may be longer than ``target`` where that is 1. Returns a tensor of target's shape
    and dtype. On a GPU, where torch's order is fixed, torch sums.
    """
    if gradient.shape == target.shape:
        return gradient.to(target.dtype)
    shape = (1,) * (gradient.dim() - target.dim()) + tuple(target.shape)
    summed = [d for d, (g, t) in enumerate(zip(gradient.shape, shape)) if t == 1 and g != 1]
    kept = [d for d in range(gradient.dim()) if d not in summed]
    if gradient.numel() == 0:
        return target.new_zeros(target.shape)
    if not summed:
        return gradient.reshape(target.shape).to(target.dtype)
    if native.C is None or not gradient.is_cpu:
        return gradient.sum(summed, keepdim=True).reshape(target.shape).to(target.dtype)
    rows = gradient.permute(*summed, *kept).reshape(-1, target.numel()).contiguous()
    total = gradient.new_empty(target.numel())
    native.C.sum_rows(native.view(rows), native.view(total))
    return total.reshape(target.shape).to(target.dtype)
