"""Write the report's predictions for GPUs, or that no row was measured on one."""

from report.blocks import Block, Heading, Table, Text, plain

ABOUT_PREDICTIONS = """\
**Predictions, not measurements.** Each kernel was compiled for the GPU, with the settings that it would be launched with there,
and the instructions of its hot loop were counted by unit. *Share of peak* is what that lets expect of the GPU's dense bfloat16
matrix throughput. In brackets are its bounds: no two units work at the same time, or all of them at once. What is expected
depends on the *programs* for which a multiprocessor has registers, memory and threads: each uses one unit at a time, and others
use other units meanwhile. Memory, latencies and the ends of loops are not in it.
`python benchmarks/gpu_kernels.py --predict --gpu sm_120` has other GPUs."""

NOT_MEASURED = [Heading(2, "GPU"), Text("No GPU was at hand: nothing here was measured on one.")]


def prediction_blocks(predictions: dict | None) -> list[Block]:
    """Return a table of predictions, or why there is none."""
    if predictions is None:
        return []
    title = Heading(2, "GPU kernels: predictions")
    if "why_not" in predictions:
        return [title, Text(plain(f"None: {predictions['why_not']}."))]
    rows = [[plain(cell) for cell in row] for row in predictions["rows"]]
    blocks = [title, Text(ABOUT_PREDICTIONS), Table(predictions["head"], rows)]
    return blocks + [Text(plain(f"Not all: {why}.")) for why in [predictions.get("why_not_all")] if why]
