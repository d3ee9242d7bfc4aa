"""Calls of attention that are spread over ranks: what each rank has of them, and one process's results put together again."""

from collections.abc import Callable

import torch
from support.oracle import Results
from torch import Tensor

import fastlm.distributed
from fastlm.testing import seeded_normal

ROWS = {"query": "queries", "key": "keys", "value": "keys"}


def lengths_of(total: int, world: int, uneven: bool) -> list[int]:
    """Return how many of the rows each rank has; if uneven, the second rank of four has none."""
    parts = [0.6, 0.0, 0.1][: world - 1] if uneven else [1 / world] * (world - 1)
    lengths = [int(total * part) for part in parts]
    return [*lengths, total - sum(lengths)]


def shares(call: dict, world: int, uneven: bool = False) -> list[dict]:
    """Return each rank's arguments: its rows of query, key, value and mask, and everything else."""
    dim = call["query"].dim() - 2 if call["query"].dim() == 4 else 0
    queries, keys = (lengths_of(call[name].shape[dim], world, uneven) for name in ("query", "key"))
    parts = {name: call[name].split(queries if name == "query" else keys, dim) for name in ROWS}
    mask = call.get("mask")
    if mask is not None and mask.dim() > 1 and mask.shape[-2] == call["query"].shape[2] and mask.shape[-2] > 1:
        parts["mask"] = mask.split(queries, -2)
    return [call | {name: of_ranks[rank] for name, of_ranks in parts.items()} for rank in range(world)]


def gradients_of(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Return gradients for a whole call's results, which are numbered through all rows."""
    return [seeded_normal(100 + i, result.shape, torch.float64).to(result.dtype) for i, result in enumerate(results)]


def run_share(function: Callable, share: dict, gradients: list[Tensor], differentiable: tuple[str, ...], **options) -> Results:
    """Return one rank's outputs, and the gradients of its tensors."""
    leaves = {n: share[n].detach().requires_grad_() for n in differentiable if is_learned(share.get(n))}
    outputs = function(**share | leaves | options)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    grads = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return results | {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}


def is_learned(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def together(parts: list[Results], call: dict) -> Results:
    """Put the results of all ranks together: rows one after the other, and the sum of what each has a part of."""
    packed = call["query"].dim() == 3
    found = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        of_rows = name in ("output 0", "gradient of query", "gradient of key", "gradient of value")
        if name.startswith("output") or of_rows:
            found[name] = torch.cat(tensors, dim=0 if packed and of_rows else 1 if packed else 2)
        elif name == "gradient of mask" and tensors[0].shape != call["mask"].shape:
            found[name] = torch.cat(tensors, dim=-2)
        else:
            found[name] = torch.stack([tensor.double() for tensor in tensors]).sum(dim=0).to(tensors[0].dtype)
    return found


def spread(function: Callable) -> Callable:
    """Return the function of fastlm.distributed for one of fastlm's."""
    return getattr(fastlm.distributed, function.__name__)
