"""Draw the noise of every op: standard normals that are a pure function of a seed and a position."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..backend import Implementation, select
from ..backend import cpu as native
from ..backend import cuda as cuda_kernels
from ..backend import triton as triton_kernels
from ..reference import noise as reference
from .checks import check_integer, is_integer
from .torch_op import define_op, may_bypass_dispatcher

SEED_RANGE = range(-(2**63), 2**64)  # torch.manual_seed takes the same.


def check_seed(seed: int | Tensor | None, like: Tensor) -> None:
    """Check for None, an int, or an int64 tensor on the device of ``like``: 0-d, or (B,) with B = ``like.shape[0]``."""
    if seed is None:
        return
    if not isinstance(seed, Tensor):
        if not is_integer(seed):
            raise TypeError(f"seed must be an int, an int64 tensor or None; got {type(seed).__name__}")
        if int(seed) not in SEED_RANGE:
            raise ValueError(f"seed must lie in [-2**63, 2**64); got {seed}")
        return
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64; got {seed.dtype}")
    if seed.dim() != 0 and tuple(seed.shape) != tuple(like.shape[:1]):
        expected = f"0-d or of shape ({like.shape[0]},)" if like.dim() else "0-d"
        raise ValueError(f"seed must be {expected}, one per example; got shape {tuple(seed.shape)}")
    if seed.device != like.device:
        raise ValueError(f"seed must be on {like.device}, like the other tensors; got {seed.device}")


def seed_tensor(seed: int | Tensor | None, like: Tensor) -> Tensor:
    """Convert a checked seed to an int64 tensor on the device of ``like``.

    None draws one from torch's default generator, so that torch.manual_seed and checkpointing work as ever. Integers from
    2**63 up stand for the same 64 bits as their negative twins.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), device=like.device)
    if isinstance(seed, Tensor):
        return seed
    seed = int(seed)
    return torch.scalar_tensor(seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=like.device)


# ---- the op -----------------------------------------------------------------------------------------------------------------


def _fake(seed: Tensor, shape: tuple[int, ...], position: int) -> Tensor:
    return seed.new_empty(shape, dtype=torch.float32)


def _normal_op(draw: Callable, *devices: str, name: str = "normal") -> Callable[[Tensor, tuple[int, ...], int], Tensor]:
    """Make a backend's ``run(seed, shape, position)`` by the torch op on those devices, with ``draw`` as its implementation."""
    op = define_op(name, "(Tensor seed, SymInt[] shape, int position) -> Tensor", draw, _fake, devices)

    def run(seed: Tensor, shape: tuple[int, ...], position: int) -> Tensor:
        return (draw if may_bypass_dispatcher(seed) else op)(seed, shape, position)

    return run


def _draw_cpu(seed: Tensor, shape: tuple[int, ...], position: int) -> Tensor:
    out = native.empty(seed, shape, torch.float32)
    native.C.normal(seed.item(), position, native.view(out))
    return out


def _draw_cuda(seed: Tensor, shape: tuple[int, ...], position: int) -> Tensor:
    """Draw on the GPU, where the kernel reads the seed."""
    out = cuda_kernels.empty(seed, shape, torch.float32)
    cuda_kernels.launch("normal", out.device, cuda_kernels.view(seed), position, cuda_kernels.view(out))
    return out


def _draw_triton(seed: Tensor, shape: tuple[int, ...], position: int) -> Tensor:
    """Draw on the GPU, where the kernel reads the seed."""
    out, kernels = seed.new_empty(shape, dtype=torch.float32), triton_kernels.noise()
    with torch.cuda.device_of(out):
        kernels.run(kernels.plan_normal(seed, position, out))
    return out


def _draw_reference(seed: Tensor, shape: tuple[int, ...], position: int) -> Tensor:
    element = torch.arange(position, position + math.prod(shape), device=seed.device)
    return reference.normal(seed, element).to(torch.float32).reshape(shape)


IMPLEMENTATIONS = (
    Implementation("cuda", _normal_op(_draw_cuda, "CUDA"), cuda_kernels.why_not),
    Implementation("cpu", _normal_op(_draw_cpu, "CPU"), native.why_not),
    Implementation("triton", _normal_op(_draw_triton, "CPU", "CUDA", name="triton_normal"), triton_kernels.why_not),
    Implementation("reference", _draw_reference, lambda tensor: None),
)


def normal(
    shape: tuple[int, ...],
    *,
    seed: int | Tensor | None = None,
    position: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """Return float32 standard normals of ``shape``: elements ``position``, ``position + 1``, … of the stream of ``seed``.

    They are the numbers of ``torch.func._random.normal`` with key ``[seed, position / 4]``, to the rounding of the formula.
    """
    position = check_integer("position", position, 0, 2**63 - 1)
    scalar = torch.empty((), dtype=torch.float32, device=device)  # It has no dimension, so that only a single seed fits.
    check_seed(seed, scalar)
    shape = torch.Size(shape)
    run = select("normal", IMPLEMENTATIONS, (scalar.expand(shape),), backend)
    return run(seed_tensor(seed, scalar), shape, position)
