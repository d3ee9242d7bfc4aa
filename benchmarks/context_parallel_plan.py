"""Plan attention over a sequence that is spread over ranks, by a model, and hold the model against two processes here.

python benchmarks/context_parallel_plan.py               # tables: from which length on a transfer costs little, by link
python benchmarks/context_parallel_plan.py --measure     # measure two processes against one, into build/context_parallel.json
python benchmarks/context_parallel_plan.py --publish     # draw both plots into benchmarks/results/context_parallel/

fastlm/distributed/README.md explains the model.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from context_parallel import measure, plots, tables
from context_parallel.steps import ALONE, ONE_PROCESS, Case
from report.plot_style import save
from report.tables import listed
from rich.console import Console

HERE = Path(__file__).parent
MEASURED, PICTURES = HERE.parent / "build" / "context_parallel.json", HERE / "results" / "context_parallel"
WAYS = ONE_PROCESS, "all-to-all", "ring", ALONE
TURNS = measure.Turns(5)
CASES = [
    Case(sequence, 8, key_heads, dtype, causal)
    for dtype, key_heads, causal, sequence in product(
        (torch.float32, torch.bfloat16), (8, 2), (True, False), (1024, 2048, 4096, 8192)
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true", help=f"measure here, into {MEASURED.name}")
    parser.add_argument("--publish", action="store_true", help="draw the plots into the repository")
    options = parser.parse_args()
    console = Console()
    if options.measure:
        MEASURED.parent.mkdir(exist_ok=True)
        found = measure.measure(CASES, WAYS, TURNS, console.print)
        MEASURED.write_text(json.dumps(found, indent=1))
        console.print(listed("Measured", tables.MEASURED_HEAD, tables.measured_rows(found)))
    if options.publish:
        PICTURES.mkdir(exist_ok=True)
        save(plots.exposed(), PICTURES / "exposed.png")
        if MEASURED.exists():
            save(plots.measured(json.loads(MEASURED.read_text())), PICTURES / "measured.png")
    if not (options.measure or options.publish):
        for kind, causal in (("Causal", True), ("Full", False)):
            title = tables.TITLE.format(kind=kind)
            console.print(listed(title, tables.CROSSOVER_HEAD, tables.crossover_rows(causal)))
        console.print(listed(tables.HIDING_TITLE, tables.HIDING_HEAD, tables.hiding_rows()))


if __name__ == "__main__":
    main()
