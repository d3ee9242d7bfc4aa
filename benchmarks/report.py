"""Write the report of a run again, without measuring again.

python benchmarks/report.py [build/bench]            # report.html and report.md, beside the run's bench.json
python benchmarks/report.py build/bench --publish    # and put it into the repository: RESULTS.md, with its pictures
"""

import argparse
from pathlib import Path

from report import DEFAULT_OUT, write_report
from rich.console import Console

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("out", type=Path, nargs="?", default=DEFAULT_OUT, help=f"the run's folder; default: {DEFAULT_OUT}")
parser.add_argument("--publish", action="store_true", help="also write benchmarks/RESULTS.md and its pictures")
options = parser.parse_args()
Console().print(*write_report(options.out, options.publish))
