"""Test attention over a sequence that is spread over 2 and 4 processes: it is one process's, whatever the features.

All-to-all has one process's bits; all-gather and the ring are held to the rule of errors. One run of processes computes all
cases of a method, and the test of each case compares what came of it.
"""

import functools

import pytest
import torch
from cases import SPECS
from support import ranks
from support.oracle import Oracle, Results, run
from support.spread import gradients_of, run_share, shares, spread, together

DIFFERENTIABLE = ("query", "key", "value", "mask", "sinks")
CASES = {
    f"{name}: {case}": (SPECS[name].function, make)
    for name in ("attention", "varlen_attention")
    for case, make in SPECS[name].cases.items()
}


def fits(method: str, world: int, call: dict) -> bool:
    """Tell whether a method can spread a call over so many ranks."""
    return method != "all-to-all" or call["query"].shape[1] >= world


def spread_call(function, call: dict, rank: int, world: int, method: str, uneven: bool) -> Results:
    """Return this rank's outputs and gradients of a call."""
    gradients, share = gradients_of(function(**call)), shares(call, world, uneven)
    dim = 0 if call["query"].dim() == 3 else 2
    before = sum(s["query"].shape[dim] for s in share[:rank])
    rows = slice(before, before + share[rank]["query"].shape[dim])
    own = [gradients[0].movedim(dim, 0)[rows].movedim(0, dim), *(gradient[..., rows] for gradient in gradients[1:])]
    return run_share(spread(function), share[rank], own, DIFFERENTIABLE, method=method)


def all_cases(rank: int, world: int, dtype: torch.dtype, method: str) -> dict:
    """Return this rank's results of all cases, by name and by whether lengths are uneven."""
    calls = {name: (function, make(dtype)) for name, (function, make) in CASES.items()}
    return {
        (name, uneven): spread_call(function, call, rank, world, method, uneven)
        for name, (function, call) in calls.items()
        if fits(method, world, call)
        for uneven in (False, True)
    }


@functools.cache
def results_of(world: int, dtype: torch.dtype, method: str) -> list[dict]:
    return ranks.run(all_cases, world, dtype, method)


def found(case: str, world: int, dtype: torch.dtype, method: str, uneven: bool) -> Results:
    """Return the results of all ranks, put together."""
    parts = [results[case, uneven] for results in results_of(world, dtype, method)]
    return together(parts, CASES[case][1](dtype))


def of_rows(outputs: tuple, dtype: torch.dtype) -> list:
    """Return the gradients of a whole call's outputs."""
    return gradients_of(outputs)


def is_rounded(what: str, call: dict, world: int) -> bool:
    """Tell whether a result of all-to-all has no bits of one process, because ranks add up shares of it.

    With fewer key heads than ranks these are the gradients of keys and values. Parts of a group of queries have as few rows as
    decoding has, in these small calls, and the CPU's kernels add up in another order there.
    """
    if what == "gradient of mask":
        return call["mask"].dim() < 3 or call["mask"].shape[-3] == 1
    return call["key"].shape[1] < world and (what not in ("output 0", "output 1") or call["query"].shape[-2] < 8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("world", [2, 4])
def test_all_to_all_has_the_bits_of_one_process(world, uneven, case):
    function, make = CASES[case]
    for dtype in (torch.float32, torch.bfloat16):
        call = make(dtype)
        if not fits("all-to-all", world, call):
            continue
        results = found(case, world, dtype, "all-to-all", uneven)
        expected = run(function, call, DIFFERENTIABLE, of_rows)
        for what, result in results.items():
            assert is_rounded(what, call, world) or torch.equal(result, expected[what]), (dtype, what)
        if any(is_rounded(what, call, world) for what in results):
            Oracle(function, call, DIFFERENTIABLE, set(), of_rows).compare(results)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize(("method", "world"), [("ring", 2), ("ring", 4), ("all-gather", 4)])
def test_the_others_are_as_good_as_plain_pytorch(method, world, uneven, case):
    function, make = CASES[case]
    for dtype in (torch.float32, torch.bfloat16):
        call = make(dtype)
        oracle = Oracle(function, call, DIFFERENTIABLE, set(), of_rows)
        oracle.compare(found(case, world, dtype, method, uneven))
