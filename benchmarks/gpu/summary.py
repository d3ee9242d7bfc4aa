"""Write the report of `make gpu` from what its steps left, and pack all of it into one archive. Imports nothing but Python."""

import datetime
import platform
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gpu import pytest_journal
from gpu.steps import LOG, result_of

REPORT, ARCHIVE = "report.md", "fastlm-gpu.tar.gz"
LAST_LINES = 12  # Of the log of a step that failed.
DRY_RUN = "**A dry run, in Triton's interpreter on a CPU: nothing below is a GPU's figure.**"


def pack(out: Path, names: list[str], dry_run: bool) -> Path:
    """Write the report of the steps of these names into ``out``, pack it with their folders, and return the archive."""
    out.joinpath(REPORT).write_text("\n".join(_lines(out, names, dry_run)) + "\n")
    archive = out / ARCHIVE
    with tarfile.open(archive, "w:gz") as file:
        file.add(out / REPORT, REPORT)
        for name in filter(lambda name: (out / name).exists(), names):
            file.add(out / name, name)
    return archive


def _lines(out: Path, names: list[str], dry_run: bool) -> Iterator[str]:
    """Yield the report's lines."""
    yield "# fastlm on a GPU"
    yield f"\n{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, commit {_commit()}, {_torch()}\n"
    if dry_run:
        yield DRY_RUN + "\n"
    yield "| step | | result | seconds | log |\n|---|---|---|---|---|"
    found = {name: result_of(out / name) for name in names}
    for name, result in found.items():
        if result:
            yield f"| {name} | {result['what']} | {result['status']} | {result['seconds']} | {name}/{LOG} |"
        else:
            yield f"| {name} | | not run | | |"
    for name, result in found.items():
        if result:
            yield from _details(out / name, name, result)


def _details(folder: Path, name: str, result: dict) -> Iterator[str]:
    """Yield what a step has to tell: the end of its log where it failed, its failures, and the pages it wrote."""
    details = [*_tests(folder), *_pages(folder, name)]
    if result["status"] != "passed" and not any(folder.glob("*.jsonl")):
        log = (folder / LOG).read_text().splitlines()
        details += ["", "```", *log[-LAST_LINES:], "```"]
    if result["runs"] > 1:
        details.insert(0, f"\nThe GPU was lost {result['runs'] - 1} times, and the step went on in a new process.")
    if details:
        yield f"\n## {name}"
        yield from details


def _tests(folder: Path) -> Iterator[str]:
    """Yield the counts of the step's tests, why tests were left out, and which failed, with the last line of why."""
    path = folder / "tests.jsonl"
    if not path.exists():
        return
    rows = pytest_journal.read(path)
    yield "\n" + ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(row["outcome"] for row in rows).items()))
    for reason, count in Counter(row["message"] for row in rows if row["outcome"] == "skipped").items():
        yield f"\n- {count} skipped: {reason.removeprefix('Skipped: ')}"
    for row in (row for row in rows if row["outcome"] == "failed"):
        lines = [line for line in row["message"].splitlines() if line.startswith("E ")] or row["message"].splitlines()[-1:]
        yield f"\n- `{row['test']}` failed: {' '.join(lines[0].split())[:300] if lines else ''}"


def _pages(folder: Path, name: str) -> Iterator[str]:
    """Yield a line for each page that the step wrote, or the page itself where it is short."""
    if (folder / "tiles.md").exists():
        yield "\n" + (folder / "tiles.md").read_text()
    for page in ("report.html", "report.md", "bench.json", "tiles.patch"):
        if (folder / page).exists():
            yield f"\n- {name}/{page}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _torch() -> str:
    """Return the versions of Python and torch, and the GPU's name, asked in a process that may fail."""
    gpu = "torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'"
    code = f"import torch; print('torch', torch.__version__ + ',', {gpu})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return f"Python {platform.python_version()}, {found.stdout.strip() or 'no torch'}"
