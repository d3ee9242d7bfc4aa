"""Print what `make gpu` runs on: fastlm's own doctor, the drivers' tools, and which of Python's packages are missing."""

import importlib.util
import shutil
import subprocess
import sys

# By the name that is imported; what each is for.
NEEDED = {
    "torch": "everything",
    "triton": "attention's kernels: a torch built for GPUs brings it along",
    "numpy": "everything",
    "pytest": "smoke and tests",
    "xdist": "smoke and tests (pytest-xdist)",
    "hypothesis": "tests",
    "pytest_benchmark": "bench (pytest-benchmark)",
    "rich": "bench",
    "matplotlib": "bench",
    "safetensors": "bench",
}
TOOLS = ("nvidia-smi", "rocm-smi")


def main() -> int:
    missing = {name: what for name, what in NEEDED.items() if importlib.util.find_spec(name) is None}
    for name, what in missing.items():
        print(f"missing  {name}, for {what}")
    if "torch" in missing:
        print(f"\n{sys.executable} has no torch. Name a Python that has one for this GPU: make gpu PYTHON=/path/to/python")
        return 1
    import fastlm
    from fastlm import cli

    cli.doctor()
    for tool in filter(shutil.which, TOOLS):
        print(f"\n{tool}:", flush=True)
        subprocess.run([tool], check=False)
    return 0 if not missing and fastlm.backends()["triton"].startswith("available") else 1


if __name__ == "__main__":
    sys.exit(main())
