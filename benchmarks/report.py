"""The report of a run, from its JSON files: report.md with its pictures, and the tables that the terminal shows.

python benchmarks/report.py [build/bench]      # write it again without measuring again
"""

import argparse
import re
from itertools import groupby
from pathlib import Path

import report_plots
from bench_results import Result, load, results_of
from report_digits import digits_section
from report_gpu import measured_section, predictions_section
from report_tables import full_table, goals_table, machine_table, memory_table, missing_list, terminal_table
from rich.console import Console
from rich.table import Table

DEFAULT_OUT = Path(__file__).parents[1] / "build" / "bench"
DISTURBED = 0.05  # share of the CPU time that went to others, from which the report warns
ABOUT_GOALS = """
*of limit* is the row's share of what the machine allows (*Limit*, below); *the goal's* is the share that the goal would take.
Over 100 % it is out of reach on this machine, if torch's matrix product uses all of that: without instructions for products of
bfloat16, 2.5 times what SDPA reaches with float32's is more than there is. Between 90 and 100 % it is hardly in reach, as the
limit of attention is the rate of one large matrix product, which packs its operands once and takes no exponentials: at head_dim
64 those are 7 vector operations beside the 128 of the products for as many scores, 5 % of the time at the least.

Peak extra memory counts the results and gradients, which no implementation can do without; the table under *Memory* tells what
each takes beyond them. A forward and backward that stores no noise draws it twice: twice the time of `normal` for as many
elements is a floor under `reparameterize_with_kl`, whatever the memory.
"""

METHOD = """\
## How it was measured

- **Answers first.** Each fastlm row was checked against the reference in float64 before it was timed. *error* is that of
  its worst result (output or gradient): the largest error over the largest value. Each result is allowed twice what plain
  PyTorch in the same dtype gets wrong (gradients: three times), plus 4 ulps. Peers, whose noise is their own, are not checked.
- **Time** is the median of a forward and backward where there are gradients, of the forward alone elsewhere; beside it the 20th
  and the 80th percentile. The implementations of one setting take turns, three each. Allocating the results counts.
- **Throughput** of attention counts the floating-point operations of its two products (five more in the backward), half of them
  where it is causal and the window's share where there is one: work that an implementation does beyond that does not count for
  it. Decoding counts the bytes of the cache, the VAE's latent its elements.
- **Limit** is what the machine allows: the rate of torch's own matrix product (2048 x 2048 x 2048, the best of float32's and
  the dtype's), or the memory bandwidth where each input is read and each result written once per pass, whichever is less.
  The bandwidth is the better of torch's `copy_` (bytes read and written) and `sum` (bytes read) on 256 MiB; more than 100 % of
  it means that data stayed in caches. More than 100 % of the product's rate means that torch's product leaves vector
  instructions of the machine unused, as its float32 one does with AVX-512 on AMD's CPUs: there the limit is not the machine's.
- **Peak memory** is how far the process's resident set rises above what it was before the call, its inputs being there: all
  that is allocated during the call, results and gradients included. Each in a process of its own, after warm-up, float32 only.
- *compile* is `torch.compile` of the first peer, compiled for each size anew; compile time does not count.
- Speed-ups and ratios compare with the first peer, in the same run on the same threads.
"""


def write_report(out: Path) -> list[Table]:
    """Write report.md and its pictures into ``out``; the ops as tables for the terminal, if they were measured."""
    machine, ops, digits = load(out, "machine"), load(out, "ops"), load(out, "digits")
    sections = ["# fastlm: benchmark report", _summary(machine), _bold(warning(machine))]
    results = results_of(ops, load(out, "memory") or []) if ops else []
    by_op = [(op, list(rows)) for op, rows in groupby(results, key=lambda r: r.op)]
    if results:
        sections += ["## Goals", goals_table(results, machine), ABOUT_GOALS]
        sections += [_op_section(op, rows, machine, out) for op, rows in by_op]
    if any(r.peak_bytes for r in results):
        report_plots.memory(results, out / "memory.png")
        sections += ["## Memory", "![peak extra memory](memory.png)", memory_table(results)]
    if digits:
        sections += [digits_section(digits, out)]
    sections += [measured_section(load(out, "gpu"), load(out, "gpu_latent")), predictions_section(load(out, "predictions"))]
    sections += [METHOD, "## The machine", machine_table(machine)]
    out.joinpath("report.md").write_text("\n\n".join(section.strip() for section in sections if section) + "\n")
    return [terminal_table(op, rows) for op, rows in by_op]


def _summary(machine: dict) -> str:
    return (
        f"Measured {machine['date']}: {machine['cpu']}, {machine['threads']} threads, memory bandwidth "
        f"{machine['bandwidth_gb_s']} GB/s. torch {machine['torch']}; fastlm {machine['fastlm']} ({machine['commit']}), "
        f"its C++ kernels {machine['backends']['cpu']}."
    )


def _bold(text: str) -> str:
    return f"**{text}**" if text else ""


def warning(machine: dict) -> str:
    """What to say of a run that was not alone on the machine; empty where it was."""
    share = machine.get("others_share") or 0.0
    if share <= DISTURBED:
        return ""
    return f"Do not trust these times: while the ops were timed, other programs or guests had {share:.0%} of the CPU time."


def _op_section(op: str, results: list[Result], machine: dict, out: Path) -> str:
    picture = ""
    if len({r.cost.size for r in results if r.seconds}) > 1:
        name = "throughput_" + re.sub(r"\W+", "_", op) + ".png"
        report_plots.throughput(results, machine, out / name)
        picture = f"![throughput of {op}]({name})"
    return "\n\n".join([f"## {op}", picture, full_table(results, machine), missing_list(results)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=DEFAULT_OUT, help=f"the run's folder; default: {DEFAULT_OUT}")
    Console().print(*write_report(parser.parse_args().out))


if __name__ == "__main__":
    main()
