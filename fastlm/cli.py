"""The command line: ``fastlm doctor``, ``fastlm bench …``, and ``fastlm lm …``, which is in `fastlm.lm.cli`.

Importing this file brings no torch: each command imports what it needs when it runs, so that help and usage errors are quick.
"""

import argparse
import importlib.util
import os
import platform
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

PACKAGE = Path(__file__).parent
BENCH = Path("benchmarks", "run.py")
BENCH_EXTRA = {"matplotlib", "pytest", "pytest_benchmark", "rich", "safetensors", "sklearn"}
ENVIRONMENT = ("FASTLM_BACKEND", "FASTLM_CPU_ISA", "FASTLM_GPU_SETTINGS", "OMP_NUM_THREADS")


def doctor() -> int:
    """Print what this machine, this torch and this build can do; 0 if a kernel backend is available, else 1."""
    import torch

    from . import __version__, backends
    from .backend import cpu as native

    print(f"fastlm   {__version__}  ({PACKAGE})")
    print(f"python   {platform.python_version()}  ({sys.executable})")
    print(f"torch    {torch.__version__}  ({torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'not built in'})")
    print(f"machine  {platform.machine()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores")
    if native.C is None:
        print(f"built    no C++ module: {native.load_error}")
    else:
        print(f"built    {native.C.__file__}")
        print(f"isa      {native.C.isa()} of {', '.join(native.C.isas())}")
    cuda = importlib.util.find_spec("fastlm._cuda")  # not imported, as it needs a torch with CUDA
    print(f"cuda     {cuda.origin if cuda else 'not built: no nvcc was found (CONTRIBUTING.md)'}")
    for name in ENVIRONMENT:
        print(f"env      {name}={os.environ.get(name, '(not set)')}")
    states = backends()
    for name, state in states.items():
        print(f"backend  {name}: {state}")
    kernels = [name for name, state in states.items() if state.startswith("available") and name != "reference"]
    if not kernels:
        print("\nNo kernel is available: every call runs on the slow PyTorch reference. The reasons stand above.")
    return 0 if kernels else 1


def bench(arguments: list[str], load_package: Callable[[], None]) -> int:
    """Run the checkout's benchmarks/run.py with these options; return its exit code, or 2 where there is no checkout."""
    script = next((folder / BENCH for folder in (PACKAGE.parent, Path.cwd()) if (folder / BENCH).exists()), None)
    if script is None:
        message = (
            f"fastlm bench: the benchmarks are in fastlm's repository, and not in its wheel. There is no {BENCH} in "
            f"{PACKAGE.parent} or in {Path.cwd()}: run this in a clone of the repository, after pip install -e '.[bench]'."
        )
        print(message, file=sys.stderr)
        return 2
    load_package()
    sys.argv[:] = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name in BENCH_EXTRA:
            print(f"fastlm bench needs {error.name}: pip install 'fastlm[bench]'", file=sys.stderr)
            return 2
        raise
    return 0


def language_model(arguments: list[str], load_package: Callable[[], None]) -> int:
    """Run ``fastlm lm …`` and return its exit code, or 1 where its libraries, an extra, are missing."""
    try:
        from .lm.cli import main as lm
    except ImportError as error:
        print(f"fastlm lm: {error}", file=sys.stderr)
        return 1
    return lm(arguments, load_package)


def main(arguments: list[str] | None = None, load_package: Callable[[], None] = lambda: None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: None takes those of the program.
        load_package: runs fastlm/__init__.py where `fastlm_cli` has put it off. It is called before a command runs, and
            neither for a help text nor for a usage error.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="fastlm", description="Fused attention and VAE kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="what this machine, this torch and this build can do, and why not more")
    commands.add_parser("bench", help="measure fastlm beside what you would use instead (--help for more)", add_help=False)
    commands.add_parser("lm", help="the language model, from text files to generated text: fastlm lm --help", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        return bench(rest, load_package)
    if options.command == "lm":
        return language_model(rest, load_package)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    load_package()
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
