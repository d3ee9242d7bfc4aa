"""The command line: ``fastlm doctor``, and ``fastlm lm …``, which is in `fastlm.lm.cli`."""

import argparse
import importlib.util
import os
import platform
import sys

import torch

from . import __version__, backends, native

ENVIRONMENT = ("FASTLM_BACKEND", "FASTLM_CPU_ISA", "OMP_NUM_THREADS")


def doctor() -> int:
    """Print what this machine, this torch and this build can do; 0 if a kernel backend is available, else 1."""
    print(f"fastlm   {__version__}  ({os.path.dirname(__file__)})")
    print(f"python   {platform.python_version()}  ({sys.executable})")
    print(f"torch    {torch.__version__}  ({torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'not built in'})")
    print(f"machine  {platform.machine()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores")
    if native.C is None:
        print(f"built    no C++ module: {native.why_not}")
    else:
        print(f"built    {native.C.__file__}")
        print(f"isa      {native.C.isa()} of {', '.join(native.C.isas())}")
    cuda = importlib.util.find_spec("fastlm._cuda")  # not imported: that is for a torch with CUDA
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


def language_model(arguments: list[str]) -> int:
    """``fastlm lm …``; its libraries are an extra, and so imported only now."""
    try:
        from .lm.cli import main as lm
    except ImportError as error:
        print(f"fastlm lm: {error}", file=sys.stderr)
        return 1
    return lm(arguments)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["lm"]:
        return language_model(arguments[1:])
    parser = argparse.ArgumentParser(prog="fastlm", description="Fused attention and VAE kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="what this machine, this torch and this build can do, and why not more")
    commands.add_parser("lm", help="the language model, from text files to generated text: fastlm lm --help", add_help=False)
    parser.parse_args(arguments)
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
