"""Test the measurement of context parallelism on the simplest attention that is one, and on one that is wrong."""

import json
import os

import pytest
import torch
from context_parallel.measure import RANKS, Turns, bytes_of, measure, rate_of
from context_parallel.processes import Processes
from context_parallel.steps import ALONE, ONE_PROCESS, Case
from report.context_parallel import context_parallel_blocks
from suite.device import CLEAR_REFS
from support.gathered import gathered_attention, wrong_attention
from torch import distributed

LINUX = pytest.mark.skipif(not CLEAR_REFS.exists(), reason="memory is measured on Linux only")
SMALL = Case(512, 8, 2, torch.float32, True)
WAYS = ONE_PROCESS, "all-to-all", ALONE


def silent(text: str) -> None:
    pass


def rank_and_threads() -> tuple[int, int]:
    return distributed.get_rank(), torch.get_num_threads()


def fail_on_one(rank: int) -> None:
    if distributed.get_rank() == rank:
        raise ValueError("as it should")
    distributed.barrier()


def end_one(rank: int) -> None:
    if distributed.get_rank() == rank:
        os._exit(3)


@LINUX
def test_the_right_answer_is_measured():
    found = json.loads(json.dumps(measure([SMALL], WAYS, Turns(2), silent, gathered_attention)))
    assert found["link"]["bandwidth"] > 1e6 and 0 < found["link"]["latency"] < 1
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == list(WAYS)
    one, two = rows[ONE_PROCESS], rows["all-to-all"]
    numbers = 512 * 64 * 4  # rows, head_dim, bytes
    assert [each["input_bytes"] for each in one["memory"]] == [(8 + 2 + 2 + 8) * numbers]
    assert [each["input_bytes"] for each in two["memory"]] == [(8 + 2 + 2 + 8) * numbers // RANKS] * RANKS
    assert bytes_of(one) >= 2 * one["memory"][0]["input_bytes"]  # The results are as large.
    assert [each["input_bytes"] for each in two["layer_memory"]] == [2 * 8 * numbers // RANKS] * RANKS  # rows, out's gradient
    assert bytes_of(one, "layer_memory") >= (2 + 2 + 8 + 2 + 2 + 8) * numbers  # these, q, k and v, out, and the results
    assert "layer_memory" not in rows[ALONE]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows.values())
    flops = 7 * 2 * 64 * 8 * (512 * 513 // 2)  # products, operations, head_dim, heads, scores
    assert rate_of(one, 2.0) == flops / 2.0
    assert set(one["errors"]) == {"output", "gradient of query", "gradient of key", "gradient of value"}


def test_a_wrong_answer_is_an_error():
    with pytest.raises(AssertionError, match="all-to-all.*gradient of key"):
        measure([SMALL], ("all-to-all",), Turns(1), silent, wrong_attention)


def test_the_report_holds_both_methods_to_the_goals():
    """Write a table of made-up figures: the first method just meets the goals, the second just misses them."""
    shape = SMALL._replace(dtype="float32")._asdict()

    def row(way: str, seconds: float, *sizes: int) -> dict:
        memory = [{"bytes": n, "input_bytes": 100} for n in sizes]
        alone = [{"bytes": 2 * n, "input_bytes": 0} for n in sizes]
        return shape | {"way": way, "seconds": [seconds], "layer_memory": memory, "memory": alone}

    rows = [row(ONE_PROCESS, 9.0, 900), row("all-to-all", 10.0, 400, 500), row("ring", 10.1, 510, 400)]
    table = context_parallel_blocks({"link": {"bandwidth": 1e9, "latency": 1e-4}, "rows": rows})[-1]
    judged = [(cells[4], *cells[6:]) for cells in table.rows]
    assert judged[0] == ("", "", "")
    assert judged[1:] == [("0.90 × met", "0.60 × met", "0.56 ×"), ("0.89 × **missed**", "0.61 × **missed**", "0.57 ×")]
    assert "no cores" in context_parallel_blocks({"why_not": "no cores"})[-1].text
    assert "Traceback" in context_parallel_blocks({"failed": "Traceback"})[-1].text
    assert context_parallel_blocks(None) == []


@pytest.mark.parametrize(
    ("function", "rank", "reason"), [(fail_on_one, 0, "as it should"), (end_one, 1, "exit code 3|Connection")]
)
def test_processes_join_one_group_and_one_that_fails_is_an_error(function, rank, reason):
    processes = Processes(2, threads=1)
    with pytest.raises(RuntimeError, match=f"process . of 2(.|\n)*({reason})"), processes:
        assert processes.run(rank_and_threads) == [(0, 1), (1, 1)]
        processes.run(function, rank)
    assert all(process.returncode is not None for process in processes.processes)
