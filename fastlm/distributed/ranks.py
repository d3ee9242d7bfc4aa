"""Tell which processes share a sequence, and let them agree on a call before any of them waits for another's rows."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Ranks(NamedTuple):
    """Hold the processes of a group, of which this one has the number ``rank``."""

    group: Any  # a ProcessGroup, or None for all processes
    rank: int
    size: int


def ranks_of(group: Any, mesh: Any) -> Ranks:
    """Return the ranks of a process group, of a DeviceMesh of one dimension, or of all processes."""
    if group is not None and mesh is not None:
        raise ValueError("group and mesh name the processes twice: pass one of them")
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group needs torch.distributed's process groups: call torch.distributed.init_process_group first")
    if mesh is not None:
        if not hasattr(mesh, "get_group"):
            raise TypeError(f"mesh must be a DeviceMesh; got {type(mesh).__name__}")
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, e.g. mesh['cp']; got {mesh.ndim}")
        group = mesh.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must contain this process")
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group must be a ProcessGroup or None; got {type(group).__name__}")
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group))


class Checked(NamedTuple):
    """Hold what one rank knows of a call after its own checks."""

    result: Any  # for this rank alone
    numbers: tuple[int, ...]  # which all ranks get to know, as many on each
    same: dict[str, Any]  # which must be the same on all ranks, by the names of arguments


def agree(ranks: Ranks, device: torch.device, check: Callable[[], Checked], count: int) -> tuple[Any, list[tuple[int, ...]]]:
    """Run ``check`` on every rank, and return its result and the ``count`` numbers of all ranks; or raise on all of them.

    A rank whose check raises raises that; the others raise a RuntimeError that says which rank it was and what it raised. If
    something differs that must be the same, all raise a ValueError that names it.
    """
    error, checked = None, Checked(None, (0,) * count, {})
    try:
        checked = check()
    except Exception as raised:  # noqa: BLE001  (The others must hear of any.)
        error = raised
    told = gather(ranks, [error is not None, _digest(checked.same), *checked.numbers], device)
    if any(failed for failed, *_ in told) or len({digest for _, digest, *_ in told}) > 1:
        _raise_on_all(ranks, error, checked.same)
    return checked.result, [tuple(numbers) for _, _, *numbers in told]


def gather(ranks: Ranks, numbers: list[int], device: torch.device) -> list[list[int]]:
    """Return the numbers of all ranks, as many on each."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    rows = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(rows, mine, group=ranks.group)
    return torch.stack(rows).tolist()


def _digest(same: dict[str, Any]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(same).encode(), digest_size=7).digest(), "little")


def _raise_on_all(ranks: Ranks, error: Exception | None, same: dict[str, Any]) -> None:
    told: list = [None] * ranks.size
    dist.all_gather_object(told, (None if error is None else f"{type(error).__name__}: {error}", same), group=ranks.group)
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(told):
        if message is not None:
            raise RuntimeError(f"rank {rank} of the group raised {message}")
    first = told[0][1]
    for rank, (_, other) in enumerate(told):
        for name, value in first.items():
            if other[name] != value:
                raise ValueError(f"{name} must be the same on all ranks; rank 0 has {value}, and rank {rank} {other[name]}")
