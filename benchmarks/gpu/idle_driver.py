"""Let Triton launch kernels where there is no GPU: its own launcher runs, on functions of NVIDIA's driver that do nothing."""

import ctypes
import re
import subprocess
from pathlib import Path

import triton
from triton.backends.nvidia import driver
from triton.runtime import driver as runtime

from gpu.ahead_of_time import target_of


def _write_driver(folder: Path) -> Path:
    """Write a libcuda.so.1 with all functions that Triton's launcher calls; each returns 0, success."""
    sources = [Path(driver.__file__).with_name(name).read_text() for name in ("driver.c", "driver.py")]
    names = set(re.findall(r"\bcu[A-Z]\w+", "".join(sources)))
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
    subprocess.run(["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-o", library, source], check=True)
    return library


class IdleDriver(driver.CudaDriver):
    """Triton's driver of one NVIDIA GPU that is not there. It takes every kernel, and tensors of the CPU."""

    def __init__(self, arch: str):
        self._target = target_of(arch)
        self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
        self.utils.get_device_properties = lambda device: {"max_shared_mem": 1 << 20}
        self.utils.load_binary = lambda *binary: (1, 1, 0, 0, 1024)  # Module, function, registers, spills, most threads.
        self.utils.unload_module = lambda module: None
        self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0

    def get_current_target(self):
        return self._target


def activate(arch: str, folder: Path) -> None:
    """Make this process's Triton launch for a GPU that is not there; the driver's library is written to the folder."""
    ctypes.CDLL(str(_write_driver(folder)), mode=ctypes.RTLD_GLOBAL)
    triton.knobs.nvidia.libcuda_path = str(folder)
    runtime.set_active(IdleDriver(arch))
