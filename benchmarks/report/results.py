"""Read a run for the report: one `Result` per row, merged from the times and the memory in the run's JSON file."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from suite.catalog import rows_of, sections
from suite.rows import Cost, Row, Setting
from suite.units import percentiles

FROM_CHECKS = "error", "allowed"  # A row's "extra_info" has these.


@dataclass
class Result:
    """A row of the report. What was not measured is None, and ``why_not`` says why there is no time."""

    row: Row
    cost: Cost
    seconds: float | None = None  # the median of the rounds of all turns
    fast: float | None = None  # the 20th percentile
    slow: float | None = None  # the 80th; the machine was at rest where the two are close
    error: float | None = None  # as a share of the largest golden value
    allowed: float | None = None
    flops: int | None = None  # operations of a call, where they were counted and not computed
    peak_bytes: int | None = None  # peak extra memory, results included
    result_bytes: int | None = None  # outputs and gradients alone
    why_not: str | None = None
    why_no_peak: str | None = None
    speed_up: float | None = None  # over the baseline of the same setting
    peak_ratio: float | None = None  # to the baseline's
    noisy: bool = False  # whether its spread, or the baseline's, is wider than their difference

    @property
    def setting(self) -> Setting:
        return self.row.setting

    @property
    def throughput(self) -> float | None:
        """Return the throughput in the unit of its cost."""
        return self.cost.throughput(self.seconds) if self.seconds else None

    def peaks(self, machine: dict) -> dict:
        """Return the bandwidth and the peaks of the device that the row ran on."""
        return machine["gpu_peaks"] if self.cost.device == "cuda" else machine

    def limit(self, machine: dict) -> float | None:
        """Return the roofline: the throughput that memory and arithmetic allow, whichever is less."""
        if self.cost.bytes_moved is None:
            return None
        peaks = self.peaks(machine)
        by_memory = peaks["bandwidth_gb_s"] * self.cost.work / max(self.cost.bytes_moved, 1)
        return min(by_memory, peaks["peak_gflop_s"][self.row.dtype]) if self.cost.flops else by_memory

    def share(self, machine: dict) -> float | None:
        """Return the share of that limit; of the arithmetic's peak where operations were counted."""
        if not self.seconds:
            return None
        if self.flops:
            return self.flops / self.seconds / 1e9 / self.peaks(machine)["peak_gflop_s"][self.row.dtype]
        limit = self.limit(machine)
        return self.throughput / limit if limit else None


def read(path: Path) -> dict:
    """Read a run's JSON file.

    Raises:
        ValueError: it is not one.
    """
    try:
        run = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a run's JSON file: {error}") from error
    if not isinstance(run, dict) or "benchmarks" not in run:
        raise ValueError(f"{path} is not a run's JSON file: it has no 'benchmarks'")
    return run


def times_of(run: dict) -> dict[Row, list[float]]:
    """Return the seconds of each row's rounds, of all its turns, in the order that they were measured in."""
    times: dict[Row, list[float]] = {}
    for entry in run["benchmarks"]:
        times.setdefault(_row(entry["params"]), []).extend(entry["stats"]["data"])
    return times


def results_of(run: dict) -> list[Result]:
    """Return a row per section, size, dtype and implementation, in the order of the sections."""
    times, missing = times_of(run), {_row(row): row["why_not"] for row in run.get("missing", ())}
    checks = {_row(entry["params"]): entry["extra_info"] for entry in run["benchmarks"]}
    # Operations are counted as the baseline first runs. An entry from before that has none.
    flops = {_row(e["params"]).setting: e["extra_info"]["flops"] for e in run["benchmarks"] if e["extra_info"].get("flops")}
    peaks = {_row(row): row for row in run.get("memory", ())}
    rows = _in_order({**times, **missing})
    results = [_result(row, times.get(row), checks.get(row, {}), missing.get(row), peaks.get(row, {})) for row in rows]
    for result in results:
        result.flops = flops.get(result.setting) if result.seconds else None
    _compare(results)
    return results


def _in_order(rows: Iterable[Row]) -> list[Row]:
    """Sort by section, then setting as they were measured, then implementation as the section lists them."""
    rows = list(rows)
    op = {name: i for i, name in enumerate(sections())}
    setting = {each: i for i, each in enumerate(dict.fromkeys(row.setting for row in rows))}
    place = {row: i for each in setting for i, row in enumerate(rows_of(each, full=True))}
    return sorted(rows, key=lambda row: (op[row.op], setting[row.setting], place[row]))


def _result(row: Row, times: list[float] | None, check: dict, why_not: str | None, peak: dict) -> Result:
    result = Result(row, sections()[row.op].cost(row.setting), **{name: check.get(name) for name in FROM_CHECKS})
    if times:
        result.fast, result.seconds, result.slow = percentiles(times)
    result.why_not, result.why_no_peak = why_not, peak.get("why_not")
    result.peak_bytes, result.result_bytes = peak.get("bytes"), peak.get("result_bytes")
    return result


def _row(fields: dict) -> Row:
    return Row(*(fields[name] for name in Row._fields))


def _compare(results: list[Result]) -> None:
    bases = {r.setting: r for r in results if r.row.implementation == sections()[r.row.op].baseline}
    for result in results:
        base = bases.get(result.setting)
        if base is None:
            continue
        if base.seconds and result.seconds:
            result.speed_up = base.seconds / result.seconds
            spread = max(base.slow - base.fast, result.slow - result.fast)
            result.noisy = base is not result and spread > abs(base.seconds - result.seconds)
        if base.peak_bytes and result.peak_bytes:
            result.peak_ratio = result.peak_bytes / base.peak_bytes
