"""The context in which models of other libraries attend over a sequence that is spread over the processes of a group.

A model that looks its attention up by name, as those of transformers do (``attn_implementation="fastlm"``), is given this
rank's part of the sequence and computes it as ever. Only its attention must know of the other ranks:

    with fastlm.distributed.context_parallel(group):
        logits = model(input_ids=ids, position_ids=places).logits  # ids (B, L_local), places (B, L_local) in the whole sequence
        loss = cross_entropy(logits, targets, reduction="sum") / count  # labels shifted before the cut, counted on all ranks
        loss.backward()

The sum of the ranks' losses is the loss of one process, and the sum of the ranks' gradients of a parameter its gradient, to
rounding; both sums are the caller's. Dropout of attention is that of one process; dropout that torch draws elsewhere is not. A
cache has the keys of this rank's part alone, so that ``generate`` is wrong in the context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.noise import seed_tensor
from .attention import attention
from .ranks import Ranks, gather, ranks_of


class _Context(NamedTuple):
    ranks: Ranks
    method: str


# The context that is open, in all threads: a backward pass recomputes checkpointed layers in threads of its own.
_open: _Context | None = None


@contextmanager
def context_parallel(group: Any = None, *, mesh: Any = None, method: str = "auto") -> Iterator[None]:
    """Let models attend over the whole sequence, of which each rank of a group has a contiguous part, in rank order.

    Forward and backward pass belong inside. A model's masks may be causal, windows and padding. It is given this rank's part of
    the padding, (B, L_local), or a mask of your own, (B, 1, L_local, sum of L_local): this rank's rows over all ranks' keys.

    Args:
        group, mesh, method: as in `fastlm.distributed.attention`.

    Raises:
        TypeError, ValueError: group or mesh is none that this process is in.
    """
    global _open
    before, _open = _open, _Context(ranks_of(group, mesh), method)
    try:
        yield
    finally:
        _open = before


def is_open() -> bool:
    """Return whether there is a context around the call."""
    return _open is not None


def size() -> int:
    """Return how many ranks share the sequence; 1 outside of the context."""
    return 1 if _open is None else _open.ranks.size


def has_start() -> bool:
    """Return whether this rank has the start of the sequence; True outside of the context."""
    return _open is None or _open.ranks.rank == 0


def attend(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """Call `attention` with the group and the method of the context."""
    return attention(query, key, value, group=_open.ranks.group, method=_open.method, **options)


def total(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks, on all of them; outside of the context, the tensor.

    Its gradient is that of the sum of all ranks' losses.
    """
    return tensor if _open is None else _Total.apply(tensor, _open.ranks)


def has_processes() -> bool:
    """Return whether this process is one of torch.distributed, in the context or not."""
    return dist.is_available() and dist.is_initialized()


def total_of_all(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, in the context or not; without torch.distributed, the tensor.

    Its gradient is that of the sum of all processes' losses.
    """
    return _Total.apply(tensor, ranks_of(None, None)) if has_processes() else tensor


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        out = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=ranks.group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(grad, ctx.ranks), None


def side_by_side(part: Tensor) -> Tensor:
    """Return the parts (B, L_r) of all ranks, bool, as one tensor (B, sum of L_r).

    Raises:
        ValueError: on all ranks, if their batches differ.
    """
    ranks = _open.ranks
    batches, lengths = zip(*gather(ranks, list(part.shape), part.device))
    if len(set(batches)) > 1:
        raise ValueError(f"all ranks of a group must have the same batch; got batches of {', '.join(map(str, batches))}")
    padded = torch.nn.functional.pad(part.to(torch.uint8), (0, max(lengths) - part.shape[1]))
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=ranks.group)
    return torch.cat([other[:, :length] for other, length in zip(parts, lengths)], 1).to(torch.bool)


def common_seed(seed: int | Tensor | None, like: Tensor) -> int | Tensor | None:
    """Return the seed, or, in the context and with None given, one that all ranks share.

    All draw one from torch's default generator, on the device of ``like``, and take the first rank's: so the generators stay in
    step, and the noise is that of one process.
    """
    if seed is not None or _open is None:
        return seed
    seed = seed_tensor(None, like)
    dist.broadcast(seed, group=_open.ranks.group, group_src=0)
    return seed
