"""Load the C++ module ``fastlm._C`` if it was built, give it torch's own thread pool, and set its instruction set.

Nothing here raises: ``fastlm.backends()`` shows the reason of a failure.
"""

import ctypes
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

# Codes of the dtypes in csrc/common/view.h.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.int32: 5,
    torch.int64: 6,
}
OTHER = 7
CPU, CUDA = 1, 2  # DLPack's codes of devices.


def _use_torch_threads(module: ModuleType) -> None:
    """Hand over torch's parallel_for. A thread pool of our own beside torch's would fight it for the cores."""
    libraries = Path(torch.__file__).parent / "lib"
    found = [path for name in ("libtorch_cpu.so", "libtorch_cpu.dylib") if (path := libraries / name).exists()]
    if not found:
        raise ImportError(f"no libtorch_cpu in {libraries}")
    torch_cpu = ctypes.CDLL(str(found[0]))  # torch has loaded it already; this only finds it.
    try:
        module.use_thread_pool(ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value)
    except AttributeError:
        raise ImportError(f"torch {torch.__version__} has no torch_parallel_for: fastlm needs torch 2.10 or later") from None
    # A forked child has none of its parent's threads, and OpenMP would wait for them for ever: there, loops run serially.
    os.register_at_fork(after_in_child=lambda: module.use_thread_pool(0))


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("fastlm._C")
        _use_torch_threads(module)
        module.set_isa(os.environ.get("FASTLM_CPU_ISA") or module.fastest_isa())
    except ImportError as error:
        return None, f"the C++ module fastlm._C cannot be loaded: {error}"
    except ValueError as error:
        return None, f"FASTLM_CPU_ISA: {error}"
    return module, None


C, load_error = _load()


def why_not(tensor: torch.Tensor) -> str | None:
    """Return why the C++ kernels cannot take a tensor of this device, or None."""
    if not tensor.is_cpu:
        return f"the tensors are on {tensor.device}"
    return load_error


def state() -> str:
    """Return what `fastlm.backends()` says."""
    return load_error or f"available ({C.isa()}, torch's {torch.get_num_threads()} threads)"


def constant_when_compiled(function: Callable) -> Callable:
    """Mark a function whose result torch.compile takes for a constant, so that it need not look into it.

    torch.compiler.assume_constant_result does the same, but imports the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True
    return function


def _itself(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor


def _described(tensor: torch.Tensor | None) -> tuple | None:
    """Return (address, dtype code, strides, shape, device code, the tensor, so that it lives as long as the tuple)."""
    if tensor is None:
        return None
    device = CPU if tensor.is_cpu else CUDA
    return tensor.data_ptr(), DTYPE_CODES.get(tensor.dtype, OTHER), tensor.stride(), tuple(tensor.shape), device, tensor


# Through DLPack's C exchange API the C++ code reads a tensor itself (csrc/common/python_views.h), in a tenth of the time that
# Python takes to describe one.
_exchange_api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def view_for(module: ModuleType | None) -> Callable:
    """Return the converter from a tensor, or None, to what the module's functions accept."""
    return _itself if module and _exchange_api and module.use_exchange(_exchange_api) else _described


view = view_for(C)


HUGE_PAGES_FROM = 1 << 22  # Bytes. Smaller outputs mostly come from memory that the process has already touched.


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, after asking for huge pages if it is large, as NumPy does. Nobody has written to it yet."""
    if tensor.nbytes >= HUGE_PAGES_FROM:
        C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def empty(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Make an output of a kernel on the device of ``like``, and in its dtype if none is given."""
    sizes = shape or ((),)  # Passed one by one: a tuple of sizes costs 1 us more; so does naming the dtype.
    own_dtype = dtype is None or dtype is like.dtype
    return in_huge_pages(like.new_empty(*sizes) if own_dtype else like.new_empty(*sizes, dtype=dtype))


def launch(name: str, device: torch.device, *args) -> None:
    """Call the module's function of that name."""
    getattr(C, name)(*args)
