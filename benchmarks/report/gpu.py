"""The report's sections on GPUs: what was measured on one, and what machine code lets expect, never in one table."""

from collections.abc import Iterable

from gpu import attention as bench_gpu
from gpu import latent as bench_gpu_latent

from report.blocks import Block, Heading, Table, Text, plain

ABOUT_PREDICTIONS = """\
**Predictions, not measurements.** Each kernel was compiled for the GPU, with the settings that it would be launched with there,
and the instructions of its hot loop were counted by unit. *Share of peak* is what that lets expect of the GPU's dense bfloat16
matrix throughput: from no two units working at the same time to all of them at once. Real kernels lie between; memory,
latencies and the ends of loops are not in it. *float per score* counts additions, multiplications and maxima in float32, those
that rescale the output included. `python benchmarks/gpu_kernels.py --predict --gpu sm_120` has other GPUs."""

ABOUT_LATENT = """\
`reparameterize_with_kl` against the same in plain PyTorch. *of bandwidth* counts each input read once and each result written
once per pass, against a copy of 1 GiB on the same GPU; *peak MiB* is what a call takes beyond its inputs, results included."""


def prediction_blocks(predictions: dict | None) -> list[Block]:
    """A table of predictions, or why there is none."""
    if predictions is None:
        return []
    title = Heading(2, "GPU kernels: predictions")
    if "why_not" in predictions:
        return [title, Text(plain(f"None: {predictions['why_not']}."))]
    rows = [[plain(cell) for cell in row] for row in predictions["rows"]]
    blocks = [title, Text(ABOUT_PREDICTIONS), Table(predictions["head"], rows)]
    return blocks + [Text(plain(f"Not all: {why}.")) for why in [predictions.get("why_not_all")] if why]


def measured_blocks(attention: list[dict] | None, latent: list[dict] | None) -> list[Block]:
    """What gpu/attention.py and gpu/latent.py measured, or that nothing was."""
    if not attention and not latent:
        return [Heading(2, "GPU"), Text("No GPU was at hand: nothing here was measured on one.")]
    blocks: list[Block] = [Heading(2, "GPU"), Text("Medians of single calls with a cold second-level cache.")]
    if attention:
        blocks += [Heading(3, "Attention"), _table(bench_gpu.HEADER, map(bench_gpu.cells, attention))]
    if latent:
        rows = [bench_gpu_latent.cells(row, latent) for row in latent]
        blocks += [Heading(3, "The latent"), Text(ABOUT_LATENT), _table(bench_gpu_latent.HEADER, rows)]
    return blocks


def _table(head: tuple, rows: Iterable[tuple]) -> Table:
    return Table(head, [[plain(cell) for cell in row] for row in rows])
