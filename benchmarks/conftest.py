"""`--full`, and the rows that have no time: pytest-benchmark's JSON gets why, as "missing"."""

import pytest

MISSING = pytest.StashKey[dict]()
ROW = ("op", "workload", "dtype", "implementation")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the long sizes, and every dtype")


def pytest_configure(config):
    config.stash[MISSING] = {}


def pytest_runtest_makereport(item, call):
    if call.excinfo is not None:
        row = tuple(item.callspec.params[name] for name in ROW)
        error = call.excinfo.value
        reason = error.msg if isinstance(error, pytest.skip.Exception) else f"{type(error).__name__}: {error}".splitlines()[0]
        item.config.stash[MISSING][row] = reason


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["missing"] = [{**dict(zip(ROW, row)), "why_not": reason} for row, reason in config.stash[MISSING].items()]
