"""Run the CUDA kernels in tests: on a GPU if there is one, else the same sources, compiled for the host, on CPU tensors.

cuda_on_host/ stands in for CUDA's runtime. Its threads are fibers, which take turns in any order that a test asks for. It does
not show speed, nor how the compiler for GPUs rounds and orders (test_cuda_build.py inspects what that compiler made).
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from filelock import FileLock

from fastlm.backend import cpu as native
from fastlm.backend import cuda as cuda_kernels
from fastlm.ops import latent, noise

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "support" / "cuda_on_host"
ON_GPU = torch.cuda.is_available() and cuda_kernels.unavailable(0) is None
DEVICE = "cuda" if ON_GPU else "cpu"
CUDA = {"backend": "cuda", "device": DEVICE}
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # The module is sanitized if this process is.

FLAGS = "-std=c++17 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno"
SANITIZERS = "-g1 -O1 -DFASTLM_SANITIZE -fsanitize=address,undefined -fno-sanitize-recover=all"


def _sources() -> list[Path]:
    return [*sorted((ROOT / "csrc/cuda").glob("*.cpp")), *sorted((ROOT / "csrc/cuda").glob("*.cu"))]


@functools.cache
def host_module() -> ModuleType:
    """Load csrc/cuda for the host, and compile it if needed."""
    import pybind11

    flags = [*FLAGS.split(), *(SANITIZERS.split() if SANITIZED else ["-O2"]), '-DFASTLM_CUDA_ARCHITECTURES="host"']
    includes = [STAND_IN, pybind11.get_include(), sysconfig.get_path("include")]
    command = [os.environ.get("CXX", "g++"), *flags, *(f"-I{path}" for path in includes), "-x", "c++", *_sources()]
    headers = sorted(
        path for folder in ("csrc/cuda", "csrc/common", "tests/support/cuda_on_host") for path in ROOT.glob(f"{folder}/*")
    )
    digest = hashlib.sha256("\0".join([*map(str, command), *(path.read_text() for path in headers)]).encode()).hexdigest()
    library = ROOT / "build" / "cuda_on_host" / digest[:16] / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library}.lock"):  # Of processes that need it at once, one compiles.
        if not library.exists():
            unfinished = library.with_suffix(f".{os.getpid()}")
            # The compiler itself is not to be sanitized.
            settings = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            subprocess.run([*command, "-o", unfinished], check=True, env=settings)
            unfinished.rename(library)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _on_host() -> SimpleNamespace:
    """Return the stand-ins for the functions of fastlm.backend.cuda."""
    module = host_module()
    view = native.view_for(module)

    def launch(name, device, *args):
        getattr(module, name)(*args, lambda count: view(torch.empty(count, dtype=torch.uint8)), 0)

    return SimpleNamespace(empty=native.empty, view=view, launch=launch)


@contextlib.contextmanager
def use():
    """Run backend="cuda" on DEVICE in the block. If DEVICE is the CPU, the CPU's own kernels are not available meanwhile."""
    if ON_GPU:
        yield
        return
    kernels, modules = _on_host(), (noise, latent)
    saved = [(module, name, getattr(module, name)) for module in (native, cuda_kernels) for name in ("launch", "view")]
    saved += [(module, "IMPLEMENTATIONS", module.IMPLEMENTATIONS) for module in modules]
    for module, name, _ in saved[:4]:
        setattr(module, name, getattr(kernels, name))
    for module in modules:
        module.IMPLEMENTATIONS = tuple(
            dataclasses.replace(one, why_not=lambda tensor: None) if one.backend == "cuda" else one
            for one in module.IMPLEMENTATIONS
        )
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


@contextlib.contextmanager
def schedule(order: str = "forward", skip: int = -1):
    """Set the order in which threads take turns on the host, and which of a kernel's barriers does nothing."""
    os.environ.update(CUDA_ON_HOST_ORDER=order, CUDA_ON_HOST_SKIP=str(skip))
    try:
        yield
    finally:
        del os.environ["CUDA_ON_HOST_ORDER"], os.environ["CUDA_ON_HOST_SKIP"]
