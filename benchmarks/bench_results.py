"""The results of a run as the report reads them: one `Result` per row, merged from the JSON files of its steps."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from op_rows import Cost, all_rows, baseline, cost


@dataclass
class Result:
    """A row of the report. What was not measured is None; ``why_not`` says why there is no time."""

    op: str
    workload: str
    dtype: str
    implementation: str
    cost: Cost
    seconds: float | None = None  # median of all rounds
    fast: float | None = None  # the 20th and 80th percentiles: how much the machine was at rest
    slow: float | None = None
    error: float | None = None  # share of the largest golden value
    allowed: float | None = None
    peak_bytes: int | None = None  # peak extra memory, results included
    result_bytes: int | None = None  # outputs and gradients alone
    why_not: str | None = None
    why_no_peak: str | None = None
    speed_up: float | None = None  # over the baseline of the same setting
    peak_ratio: float | None = None  # to the baseline's

    @property
    def setting(self) -> tuple[str, str, str]:
        return self.op, self.workload, self.dtype

    @property
    def throughput(self) -> float | None:
        """In the unit of its cost."""
        return self.cost.work / self.seconds / 1e9 if self.seconds else None

    def limit(self, machine: dict) -> float:
        """The throughput that the machine's memory and its arithmetic allow, whichever is less: the roofline."""
        by_memory = machine["bandwidth_gb_s"] * self.cost.work / max(self.cost.bytes_moved, 1)
        return min(by_memory, machine["gemm_gflop_s"][self.dtype]) if self.cost.unit == "GFLOP/s" else by_memory


def load(folder: Path, name: str):
    """The content of ``name``.json, or None where that step was not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def results_of(ops: dict, memory: list[dict]) -> list[Result]:
    """A row per op, size, dtype and implementation, in the order of the benchmarks."""
    times: dict[tuple, list[float]] = {}
    checks: dict[tuple, dict] = {}
    for row in ops["benchmarks"]:
        times.setdefault(_key(row["params"]), []).extend(row["stats"]["data"])  # the rounds of all turns
        checks[_key(row["params"])] = {name: row["extra_info"].get(name) for name in ("error", "allowed")}
    missing = {_key(row): row["why_not"] for row in ops["missing"]}
    peaks = {_key(row): row for row in memory}
    seen = [key for key in all_rows(full=True) if key in times or key in missing]
    measured = [_result(key, times.get(key), checks.get(key, {}), missing.get(key), peaks.get(key, {})) for key in seen]
    _compare(measured)
    return measured


def _result(key: tuple, times: list[float] | None, check: dict, why_not: str | None, peak: dict) -> Result:
    result = Result(*key, cost(*key[:3]), why_not=why_not, why_no_peak=peak.get("why_not"), **check)
    if times:
        result.seconds = statistics.median(times)
        result.fast, *_, result.slow = statistics.quantiles(times, n=5)
    result.peak_bytes, result.result_bytes = peak.get("bytes"), peak.get("result_bytes")
    return result


def _key(row: dict) -> tuple[str, str, str, str]:
    return row["op"], row["workload"], row["dtype"], row["implementation"]


def _compare(results: list[Result]) -> None:
    bases = {r.setting: r for r in results if r.implementation == baseline(r.op)}
    for result in results:
        base = bases.get(result.setting)
        if base and base.seconds and result.seconds:
            result.speed_up = base.seconds / result.seconds
        if base and base.peak_bytes and result.peak_bytes:
            result.peak_ratio = result.peak_bytes / base.peak_bytes


# ---- figures as text --------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Three digits and a unit: "172 µs", "2.31 ms"."""
    value, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms")
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def size(count: int) -> str:
    """Bytes in MiB: "12.1 MiB"."""
    return f"{count / 2**20:.1f} MiB"


def markdown_table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
