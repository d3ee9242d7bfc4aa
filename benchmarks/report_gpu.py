"""The report's sections on GPUs: what was measured on one, and what machine code lets expect, never in one table."""

import bench_gpu
import bench_gpu_latent
from report_tables import markdown_table

ABOUT_PREDICTIONS = """\
**Predictions, not measurements.** Each kernel was compiled for the GPU, with the settings that it would be launched with there,
and the instructions of its hot loop were counted by unit. *Share of peak* is what that lets expect of the GPU's dense bfloat16
matrix throughput: from no two units working at the same time to all of them at once. Real kernels lie between; memory,
latencies and the ends of loops are not in it. *float per score* counts additions, multiplications and maxima in float32, those
that rescale the output included. `python benchmarks/static_roofline.py --gpu sm_120` has other GPUs."""

ABOUT_LATENT = """\
`reparameterize_with_kl` against the same in plain PyTorch. *of bandwidth* counts each input read once and each result written
once per pass, against a copy of 1 GiB on the same GPU; *peak MiB* is what a call takes beyond its inputs, results included."""


def predictions_section(predictions: dict | None) -> str:
    """A table of predictions, or why there is none."""
    if predictions is None:
        return ""
    if "why_not" in predictions:
        return f"## GPU kernels: predictions\n\nNone: {predictions['why_not']}."
    rows = markdown_table(predictions["head"], predictions["rows"])
    return f"## GPU kernels: predictions\n\n{ABOUT_PREDICTIONS}\n\n{rows}"


def measured_section(attention: list[dict] | None, latent: list[dict] | None) -> str:
    """What bench_gpu.py and bench_gpu_latent.py measured, or that nothing was."""
    if not attention and not latent:
        return "## GPU\n\nNo GPU was at hand: nothing here was measured on one."
    parts = ["## GPU", "Medians of single calls with a cold second-level cache."]
    if attention:
        parts += ["### Attention", markdown_table(bench_gpu.HEADER, [bench_gpu.cells(row) for row in attention])]
    if latent:
        rows = [bench_gpu_latent.cells(row, latent) for row in latent]
        parts += ["### The latent", ABOUT_LATENT, markdown_table(bench_gpu_latent.HEADER, rows)]
    return "\n\n".join(parts)
