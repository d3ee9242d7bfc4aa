"""Write the model's figures as rows of text, for the terminal and for fastlm/distributed/README.md."""

import statistics
from dataclasses import replace

from suite.units import count

from context_parallel import measure
from context_parallel.links import CPU, ETHERNET_10, H100, LINKS, MODELS, layer_of
from context_parallel.measure import case_of
from context_parallel.steps import ONE_PROCESS
from context_parallel.times import TOLERABLE, crossover, rows_that_hide
from context_parallel.traffic import METHODS, one_process_memory

RANKS = 8
TITLE = (
    "{kind}; a model, not a measurement: rows of the whole sequence from which on the transfer that nothing hides takes at "
    f"most {TOLERABLE:.0%} of the computation's time. "
    f"Forward and backward, bfloat16, {RANKS} ranks of {H100.flops / 1e12:.0f} TFLOP/s"
)
HIDING_TITLE = (
    f"A model, not a measurement: rows of a rank from which on a step of the full ring hides its transfer. bfloat16, "
    f"{H100.flops / 1e12:.0f} TFLOP/s"
)
CROSSOVER_HEAD = ("link", *(f"{model}, {method}" for model in MODELS for method in METHODS))
MEASURED_HEAD = ("case", "method", "throughput, of one process", "memory in a layer", "of attention alone", "the model's")
HIDING_HEAD = ("link", *(f"{model}, {name}" for model in MODELS for name in ("forward", "backward")))


def crossover_rows(causal: bool) -> list[tuple[str, ...]]:
    """Return a row for each link: from which whole sequence on the exposed transfer is tolerable, by model and method.

    The last one is of two-core CPU machines in float32.
    """
    layers = [layer_of(model, 1, causal) for model in MODELS]
    plans = [plan(layer, RANKS) for layer in layers for plan in METHODS.values()]
    single = [replace(plan, layer=replace(plan.layer, itemsize=4)) for plan in plans]
    rows = [(link.name, *(_text(crossover(plan, link, H100)) for plan in plans)) for link in LINKS]
    return [*rows, (f"{ETHERNET_10.name}, {CPU.name}", *(_text(crossover(plan, ETHERNET_10, CPU)) for plan in single))]


def hiding_rows() -> list[tuple[str, ...]]:
    """Return a row for each link: from how many rows of a rank on a step of the ring hides its transfer, by model and pass."""
    passes = [(layer_of(model, 1), backward) for model in MODELS for backward in (False, True)]
    return [(link.name, *(f"{rows_that_hide(*each, link, H100):,}" for each in passes)) for link in LINKS]


def measured_rows(found: dict) -> list[tuple[str, ...]]:
    """Return a row for each measured case and method: throughput, memory and the model's memory, as shares of one process's."""
    ones = {case_of(row): row for row in found["rows"] if row["way"] == ONE_PROCESS}
    rows = []
    for row in found["rows"]:
        if row["way"] not in METHODS:
            continue
        case = case_of(row)
        layer, one = case.layer, ones[case]
        plan = METHODS[row["way"]](layer, measure.RANKS)
        modelled = max(map(plan.memory, range(measure.RANKS))) / one_process_memory(layer)
        throughput = statistics.median(one["seconds"]) / statistics.median(row["seconds"])
        memory = [measure.bytes_of(row, what) / measure.bytes_of(one, what) for what in ("layer_memory", "memory")]
        figures = (f"{figure:.2f}" for figure in (throughput, *memory, modelled))
        rows.append((measure.text_of(case), row["way"], *figures))
    return rows


def _text(rows: int | None) -> str:
    return "–" if rows is None else count(rows)
