"""Run all that is to be run on a machine with a GPU (`make gpu`): README.md, "On a GPU".

    make gpu                                   # python3, with its torch and its Triton as they are; no network
    make gpu PYTHON=/opt/env/bin/python        # another Python
    make gpu STEP="smoke tests"                # some of the steps; each takes less than ten minutes
    make gpu GPU=--resume                      # go on with a run that was interrupted
    make gpu STEP=tiles GPU=--apply            # put the tiles that were timed into the kernels' table
    make gpu GPU=--dry-run                     # without a GPU: tiny sizes in Triton's interpreter

Each step has a folder in build/gpu (--out) with its log and what it found, and keeps it if the next one fails. At the end all
of it is one archive, with a report. The exit code is 1 where a step failed.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from gpu import summary
from gpu.install import SITE
from gpu.steps import PASSED, Step, run_step

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
DEFAULT_OUT = ROOT / "build" / "gpu"
MOST_PROCESSES = 16  # Compiling kernels keeps the CPUs busy, and the GPU has memory for so many contexts.
LEFT_TO_END = 45.0  # A program that shares its time out gets so many seconds less than its step.


def steps(dry_run: bool) -> dict[str, Step]:
    """Return the steps by name, in their order."""
    module, tests = partial(_module, "-m"), ROOT / "tests"
    every = (
        Step("install", "fastlm, built for this Python", 540, module("gpu.install"), BENCHMARKS),
        Step("doctor", "what is here, and what is missing", 90, module("gpu.doctor"), BENCHMARKS),
        Step("smoke", "every kernel once, against the reference", 180, partial(_tests, True, dry_run), tests),
        Step("tests", "the tests that need the device", 480, partial(_tests, False, dry_run), tests),
        Step("bench", "attention, decoding and the latent beside other libraries", 480, partial(_bench, dry_run), BENCHMARKS),
        Step("tiles", "tiles by time, and a patch of their table", 480, partial(_tiles, dry_run), BENCHMARKS),
    )
    return {step.name: step for step in every}


def _module(*words: str):
    """Return a maker of the command line of a module, whatever the folder."""
    return lambda folder: [sys.executable, *words]


def _tests(smoke: bool, dry_run: bool, folder: Path) -> list[str]:
    """Return the command line of tests in several processes. A dry run has the smoke test and those that wait for a GPU."""
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    command = [sys.executable, "-m", "pytest", "-p", "gpu.pytest_journal", "--journal", str(folder / "tests.jsonl")]
    command += ["-n", str(processes), "-q", "-m", "gpu", "--durations=15", "-p", "no:cacheprovider"]
    if smoke:
        return [*command, "ops/test_gpu_smoke.py"]
    waiting = [str(path.relative_to(ROOT / "tests")) for path in sorted((ROOT / "tests" / "ops").glob("test_gpu_*.py"))]
    return [*command, "--ignore=ops/test_gpu_smoke.py", *(waiting if dry_run else ["ops"])]


def _bench(dry_run: bool, folder: Path) -> list[str]:
    seconds = steps(dry_run)["bench"].seconds - LEFT_TO_END
    command = [sys.executable, "run.py", "GPU: ", "--seconds", f"{seconds:.0f}", "--out", str(folder)]
    return command + ["--dry-run"] * dry_run + ["--resume"] * (folder / "bench.jsonl").exists()


def _tiles(dry_run: bool, folder: Path) -> list[str]:
    seconds = steps(dry_run)["tiles"].seconds - LEFT_TO_END
    return [sys.executable, "tune_tiles.py", "--time", "--seconds", f"{seconds:.0f}", "--out", str(folder)]


def environment(dry_run: bool) -> dict[str, str]:
    """Return the environment of the steps."""
    # The last setting lets torch's own products be deterministic, which tests ask for.
    mine = {"PYTHONPATH": os.pathsep.join((str(SITE), str(BENCHMARKS))), "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
    mine |= {"FASTLM_SWEEP": "0.25", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return os.environ | mine | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry_run else {})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", nargs="*", metavar="STEP", help=f"some of {', '.join(steps(False))}; all by default")
    parser.add_argument("--resume", action="store_true", help="leave out what is done, and go on where a step was interrupted")
    parser.add_argument("--apply", action="store_true", help="put the timed tiles into kernels/attention/timed_tiles.py")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter; no figure is a GPU's")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default: {DEFAULT_OUT}")
    options = parser.parse_args()
    if options.apply and options.dry_run:
        parser.error("--apply is for tiles that were timed on a GPU, and a --dry-run times none")
    if unknown := set(options.step) - set(steps(False)):
        parser.error(f"STEP must be among {', '.join(steps(False))}; got {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    options = parse_options()
    out, settings, chosen = options.out.resolve(), environment(options.dry_run), steps(options.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in options.step or chosen:
        print(f"\n──── {name}: {chosen[name].what} (at most {chosen[name].seconds:.0f} s)", flush=True)
        results.append(run_step(chosen[name], out, settings, options.resume))
        print(f"──── {name}: {results[-1]['status']} in {results[-1]['seconds']} s", flush=True)
    patch = out / "tiles" / "tiles.patch"
    if options.apply and patch.exists():
        subprocess.run(["git", "apply", str(patch)], cwd=ROOT, check=True)
        print(f"{patch} is applied: git diff shows it")
    archive = summary.pack(out, [step.name for step in chosen.values()], options.dry_run)
    print(f"\n{(out / summary.REPORT).read_text()}\nAll of it: {archive}")
    return 0 if all(result["status"] == PASSED for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
