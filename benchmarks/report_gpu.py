"""The report's sections on GPUs: what was measured on one, and what machine code lets expect, never in one table."""

import bench_gpu
from report_tables import markdown_table

ABOUT_PREDICTIONS = """\
**Predictions, not measurements.** Each kernel was compiled for the GPU, with the settings that it would be launched with there,
and the instructions of its hot loop were counted by unit. *Share of peak* is what that lets expect of the GPU's dense bfloat16
matrix throughput: from no two units working at the same time to all of them at once. Real kernels lie between; memory,
latencies and the ends of loops are not in it. *float per score* counts additions, multiplications and maxima in float32, those
that rescale the output included. `python benchmarks/static_roofline.py --gpu sm_120` has other GPUs."""


def predictions_section(predictions: dict | None) -> str:
    """A table of predictions, or why there is none."""
    if predictions is None:
        return ""
    if "why_not" in predictions:
        return f"## GPU kernels: predictions\n\nNone: {predictions['why_not']}."
    rows = markdown_table(predictions["head"], predictions["rows"])
    return f"## GPU kernels: predictions\n\n{ABOUT_PREDICTIONS}\n\n{rows}"


def measured_section(rows: list[dict] | None) -> str:
    """What bench_gpu.py measured, or that nothing was."""
    if not rows:
        return "## GPU\n\nNo GPU was at hand: nothing here was measured on one."
    rows = markdown_table(bench_gpu.HEADER, [bench_gpu.cells(row) for row in rows])
    return f"## GPU\n\nMedians of single calls with a cold second-level cache.\n\n{rows}"
