"""Define the options of bench_rows.py, and write into pytest-benchmark's JSON as "missing" why rows have no time."""

import pytest

from suite.row_items import MISSING, missing, row_of


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the long sizes, and every dtype")
    parser.addoption("--tiny", action="store_true", help="one size of a few rows for each section")
    parser.addoption("--only", help="the section of that name, or all whose names have this in them")
    parser.addoption("--size", action="append", default=[], help="in place of the section's own, e.g. 1x8x512x64")


def pytest_configure(config):
    config.stash[MISSING] = {}


def pytest_runtest_makereport(item, call):
    if call.excinfo is not None and not call.excinfo.errisinstance(KeyboardInterrupt):
        error = call.excinfo.value
        reason = error.msg if isinstance(error, pytest.skip.Exception) else f"{type(error).__name__}: {error}".splitlines()[0]
        item.config.stash[MISSING][row_of(item)] = reason


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["missing"] = missing(config)
