"""Write the report's section on context parallelism, with its goals."""

from context_parallel.measure import LEAST_THROUGHPUT, MOST_MEMORY, RANKS, bytes_of, case_of, rate_of, text_of
from context_parallel.steps import ONE_PROCESS
from suite.units import duration, percentiles, rate, size

from report.blocks import Block, Code, Heading, Table, Text, Warn, plain

HEAD = ("", "p50", "p20 – p80", "GFLOP/s", f"of one process (goal ≥ {LEAST_THROUGHPUT})")
HEAD += ("memory in a layer", f"of one process (goal ≤ {MOST_MEMORY})", "attention alone")
ABOUT = f"""\
`fastlm.distributed.attention`, forward and backward, in {RANKS} processes of one thread each over gloo, against
`fastlm.attention` in one process of {RANKS} threads, on the same sequence. Time is from the first process's beginning to the
last one's end. Memory is what a process needs for it: inputs, and how far its resident set rises, results included. It is
given for an attention layer as models have it, where projections make queries, keys and values, and nobody else holds them
(beside its weights), and for attention alone with its inputs, as a share of one process's. Each answer was checked on a shorter
sequence before it was timed."""


def context_parallel_blocks(found: dict | None) -> list[Block]:
    """Return a table of both methods, or why there is none."""
    if found is None:
        return []
    title = Heading(2, "Context parallel")
    if "why_not" in found:
        return [title, Text(plain(f"Not measured: {found['why_not']}."))]
    if "failed" in found:
        return [title, Warn("fastlm.distributed failed or was wrong."), Code(found["failed"])]
    one = next(row for row in found["rows"] if row["way"] == ONE_PROCESS)
    link = found["link"]
    about_link = f"The link between the processes: {link['bandwidth'] / 1e9:.2g} GB/s, {duration(link['latency'])}."
    rows = [_cells(row, one) for row in found["rows"]]
    return [title, Text(ABOUT), Text(plain(f"{text_of(case_of(one))}. {about_link}")), Table(HEAD, rows)]


def _cells(row: dict, one: dict) -> tuple[str, ...]:
    fast, median, slow = percentiles(row["seconds"])
    figures = duration(median), f"{duration(fast)} – {duration(slow)}", rate(rate_of(row, median) / 1e9)
    layer = bytes_of(row, "layer_memory")
    if row is one:
        return ONE_PROCESS, *figures, "", size(layer), "", ""
    throughput, memory = percentiles(one["seconds"])[1] / median, layer / bytes_of(one, "layer_memory")
    return (
        f"**{RANKS} processes, {row['way']}**",
        *figures,
        _judged(throughput, throughput >= LEAST_THROUGHPUT),
        size(layer),
        _judged(memory, memory <= MOST_MEMORY),
        f"{bytes_of(row) / bytes_of(one):.2f} ×",
    )


def _judged(ratio: float, met: bool) -> str:
    return f"{ratio:.2f} × {'met' if met else '**missed**'}"
