"""The noise that every op draws: standard normals that are a pure function of a seed and a position."""

import torch
from torch import Tensor

from ..backend import Implementation, cpu_why_not, select
from ..backend import cpu as native
from ..backend import cuda as cuda_kernels
from ..reference import noise as reference
from .checks import check_integer, is_integer

SEED_RANGE = range(-(2**63), 2**64)  # what torch.manual_seed takes


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
    """A checked seed as an int64 tensor on the device of ``like``.

    None draws one from torch's default generator, so that torch.manual_seed and checkpointing work as ever. Integers from
    2**63 up stand for the same 64 bits as their negative twins.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), device=like.device)
    if isinstance(seed, Tensor):
        return seed
    seed = int(seed)
    return torch.scalar_tensor(seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=like.device)


def _normal_cpu(out: Tensor, seed: Tensor, position: int) -> Tensor:
    native.C.normal(seed.item(), position, native.view(out))
    return out


def _normal_cuda(out: Tensor, seed: Tensor, position: int) -> Tensor:
    """The seed is read on the device."""
    cuda_kernels.launch("normal", out.device, cuda_kernels.view(seed), position, cuda_kernels.view(out))
    return out


def _normal_reference(out: Tensor, seed: Tensor, position: int) -> Tensor:
    element = torch.arange(position, position + out.numel(), device=out.device)
    return out.copy_(reference.normal(seed, element).reshape(out.shape))


IMPLEMENTATIONS = (
    Implementation("cuda", _normal_cuda, cuda_kernels.why_not),
    Implementation("cpu", _normal_cpu, cpu_why_not),
    Implementation("reference", _normal_reference, lambda tensor: None),
)


def normal(
    shape: tuple[int, ...],
    *,
    seed: int | Tensor | None = None,
    position: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """float32 standard normals of ``shape``: elements ``position``, ``position + 1``, … of the stream of ``seed``.

    The same numbers as ``torch.func._random.normal`` with key ``[seed, position / 4]``, to the rounding of the formula.
    """
    position = check_integer("position", position, 0, 2**63 - 1)
    out = torch.empty(shape, dtype=torch.float32, device=device)
    if native.C and out.is_cpu:
        native.in_huge_pages(out)
    scalar = out.new_empty(())  # no leading dimension, so that one seed alone fits
    check_seed(seed, scalar)
    return select("normal", IMPLEMENTATIONS, (out,), backend)(out, seed_tensor(seed, scalar), position)
