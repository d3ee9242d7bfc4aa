"""Test what happens when the ranks of a group do not call attention alike, or not at all: an error on each of them, no hang."""

import os
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support import ranks
from torch.distributed.tensor import distribute_tensor

import fastlm
from fastlm.distributed import attention, varlen_attention
from fastlm.testing import seeded_normal


def qkv(length=8, heads=4, head_dim=8, dtype=torch.float32) -> dict:
    """Return a rank's rows."""
    return {n: seeded_normal(i, (1, heads, length, head_dim), dtype) for i, n in enumerate(("query", "key", "value"))}


OTHER_SEEDS = ({"dropout_p": 0.1, "seed": torch.tensor([seed])} for seed in (1, 2))
FROM_RANK_0, FROM_RANK_1 = (f"RuntimeError: rank {rank} of the group raised TypeError: " for rank in (0, 1))
CALLS = {  # What each of two ranks passes, and what each raises, or both.
    "dtype": ({}, {"key": torch.ones(1, 4, 8, 8).int()}, FROM_RANK_1 + "key must be", "TypeError: key must be"),
    "head_dim": ({}, qkv(head_dim=16), "ValueError: query's batch size, heads and head_dim must be the same on all ranks"),
    "dtypes": ({}, qkv(dtype=torch.bfloat16), "ValueError: query's dtype must be the same .* rank 0 has torch.float32"),
    "causal": ({"causal": True}, {}, "ValueError: causal or window must be the same on all ranks"),
    "seed": ({"dropout_p": 0.1, "seed": 1}, {"dropout_p": 0.1, "seed": 2}, "ValueError: seed .* 0 has 1, and rank 1 2"),
    "seeds": (*OTHER_SEEDS, "ValueError: seed must be the same"),
    "gradients": ({"query": qkv()["query"].requires_grad_()}, {}, "ValueError: what requires gradients must be the same"),
    "method": ({"method": "ring"}, {}, "ValueError: method must be the same"),
    "no method": ({"method": "rings"}, {"method": "rings"}, "ValueError: method must be one of .*; got 'rings'"),
    "heads": (*[qkv(heads=1) | {"method": "all-to-all"}] * 2, "ValueError: method='all-to-all' needs a query head for each"),
    "mask": ({"mask": torch.zeros(8, 16)}, {"mask": torch.zeros(7, 16)}, r"ValueError: mask .* rank 1; got \(7, 16\)"),
    "rows": ({"mask": torch.zeros(8, 16)}, {"mask": torch.zeros(16)}, r"ValueError: mask .* or on none; got \[8, 1\]"),
    "mask's keys": (*[{"mask": torch.zeros(8, 8)}] * 2, r"ValueError: mask .*\(8, 16\) on rank 0; got \(8, 8\)"),
    "mask's kind": ({"mask": torch.zeros(8, 16)}, {"mask": torch.zeros(8, 16).bool()}, "ValueError: mask must be the same"),
    "no mask": ({"mask": 3.0}, {}, "TypeError: mask must be a tensor", FROM_RANK_0 + "mask must be a tensor"),
    "not a tensor": ({"query": None}, {}, "TypeError: query must be a tensor", FROM_RANK_0 + "query must be a tensor"),
    "statistics": (*[{"method": "ring", "return_stats": ("entropy",)}] * 2, "UnsupportedError: return_stats"),
    "backend": (*[{"backend": "cuda"}] * 2, "UnsupportedError: attention .*'cuda'"),
}


def raised(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


def each_call(rank: int, world: int) -> dict[str, str]:
    """Return what this rank raises at each call; between them, a call works."""
    found = {}
    for name, call in CALLS.items():
        found[name] = raised(attention, **qkv() | call[rank])
        attention(**qkv())
    return found


def test_a_call_that_does_not_fit_raises_on_all_ranks():
    for rank, found in enumerate(ranks.run(each_call, 2)):
        for name, (_, _, *expected) in CALLS.items():
            assert re.match(expected[min(rank, len(expected) - 1)], found[name]), (name, rank, found[name])


def wrong_offsets(rank: int, world: int) -> list[str]:
    rows = {name: tensor.squeeze(0).transpose(0, 1) for name, tensor in qkv().items()}
    cu = [torch.tensor(offsets, dtype=torch.int32) for offsets in ([0, 5, 16], [0, 5, 8], [1, 5, 16], [0, 17, 16])]
    found = [raised(varlen_attention, **rows, cu_seqlens_q=cu[0], cu_seqlens_k=other) for other in cu]
    return [*found, raised(varlen_attention, **rows, cu_seqlens_q=cu[rank], cu_seqlens_k=cu[0])]


def test_offsets_are_those_of_all_rows():
    for found in ranks.run(wrong_offsets, 2):
        assert found[0] == "nothing"
        assert all("cu_seqlens_k must start at 0, not fall, and end at the rows of all ranks, 16" in e for e in found[1:4])
        assert found[4].startswith("ValueError: cu_seqlens_q must be the same on all ranks")


# ---- ranks that are gone ----------------------------------------------------------------------------------------------------


def one_dies(rank: int, world: int, when: str, method: str) -> tuple[str, float]:
    """Return what this rank raises, and after how many seconds; the last rank ends its process."""
    tensors = {name: tensor.requires_grad_() for name, tensor in qkv().items()}
    if when == "before":
        attention(**tensors)
        if rank == world - 1:
            os._exit(1)
    start = time.monotonic()

    def step():
        out = attention(**tensors, method=method)
        if when == "between" and rank == world - 1:
            os._exit(1)
        out.sum().backward()

    return raised(step), time.monotonic() - start


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("method", ["all-to-all", "all-gather", "ring"])
def test_a_rank_that_dies_is_an_error_on_the_others(when, method):
    *found, _ = ranks.run(one_dies, 3, when, method, dead=(2,))
    for error, seconds in found:
        assert error.startswith(("RuntimeError", "DistBackendError")), error
        assert seconds < 30


def one_stays_away(rank: int, world: int) -> tuple[str, float]:
    group = dist.new_group(timeout=timedelta(seconds=2))
    attention(**qkv(), group=group)
    start = time.monotonic()
    error = raised(attention, **qkv(), group=group) if rank == 0 else "nothing"
    return error, time.monotonic() - start


def test_a_rank_that_stays_away_is_an_error_after_the_timeout_of_the_group():
    (error, seconds), _ = ranks.run(one_stays_away, 2)
    assert error.startswith("RuntimeError") and 1 < seconds < 30


# ---- groups -----------------------------------------------------------------------------------------------------------------


def test_processes_are_needed():
    with pytest.raises(ValueError, match="init_process_group"):
        attention(**qkv())


def wrong_groups(rank: int, world: int) -> list[str]:
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "cp"))
    other = [dist.new_group([r]) for r in range(world)][1 - rank]
    group = dist.group.WORLD
    arguments = [{"group": group, "mesh": mesh["dp"]}, {"mesh": mesh}, {"mesh": "cp"}, {"group": "cp"}, {"group": other}]
    return [raised(attention, **qkv(), **given) for given in arguments]


def of_dtensors(rank: int, world: int) -> str:
    mesh = dist.init_device_mesh("cpu", (world,))
    return raised(attention, **{name: distribute_tensor(tensor, mesh) for name, tensor in qkv().items()})


def test_dtensors_are_refused():
    for error in ranks.run(of_dtensors, 2):
        assert error.startswith("TypeError: query, key and value must be plain tensors")


def test_wrong_groups_are_refused():
    for found in ranks.run(wrong_groups, 2):
        for error, words in zip(found, ["twice", "one dimension", "mesh must be", "group must be", "contain this process"]):
            assert words in error


def one_rank(rank: int, world: int) -> list[bool]:
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "cp"))["cp"]
    expected, seed = fastlm.attention(**qkv(), dropout_p=0.5, seed=3), {"dropout_p": 0.5, "seed": 3}
    return [
        torch.equal(attention(**qkv(), mesh=mesh, method=method, **seed), expected)
        for method in ("auto", "ring", "all-to-all", "all-gather")
    ] + ["method must be" in raised(attention, **qkv(), mesh=mesh, method="rings")]


def test_a_group_of_one_is_one_process():
    assert all(all(found) for found in ranks.run(one_rank, 2))
