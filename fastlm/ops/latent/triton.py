"""Run the Gaussian latent on GPUs by its Triton kernels: the functions of a backend that op.py asks for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backend import triton as triton_kernels


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Make an output of a kernel on the device of ``like``, and in its dtype if none is given."""
    return like.new_empty(shape, dtype=dtype)


def view(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, as Triton's launchers take tensors."""
    return tensor


def launch(name: str, device: torch.device, tensors: tuple, *args) -> None:
    """Plan and start the kernels of a pass on the device, without waiting for them.

    The last four of the arguments are the first of `Options` in kernels/latent.
    """
    kernels = triton_kernels.latent()
    plan = {"reparameterize_forward": kernels.plan_forward, "reparameterize_backward": kernels.plan_backward}[name]
    if tensors[0].numel():
        with torch.cuda.device_of(tensors[0]):
            kernels.run(plan(tensors, *args[:-4], kernels.Options(*args[-4:], kernels.lanes_of(device))))
