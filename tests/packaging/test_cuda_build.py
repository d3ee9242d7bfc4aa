"""Read from fastlm._cuda, without running it, the GPUs it was built for, its kernels' resources, and the libraries it links."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.cuda_host import SANITIZED

ARCHITECTURES = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
# A kernel may take 128 registers, so that the 65,536 of a processor hold four blocks of 128 threads. float32 may take 80.
MOST_REGISTERS = 128
MOST_IN_FLOAT32 = 80

unwanted = SANITIZED or "FASTLM_CUDA=OFF" in os.environ.get("CMAKE_ARGS", "")
found = importlib.util.find_spec("fastlm._cuda")
MODULE = found.origin if found else None
built = pytest.mark.skipif(found is None, reason="fastlm was built without nvcc")


@pytest.mark.skipif(unwanted, reason="built without the CUDA kernels, as was asked for")
def test_where_nvcc_is_on_the_path_the_module_was_built():
    assert found or not shutil.which("nvcc")


def output(*command, **options) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


def cuobjdump_path() -> str:
    """Return the path of cuobjdump, from the CUDA toolkit or from Triton."""
    if tool := shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin"):
        return tool
    triton = pytest.importorskip("triton", reason="needs cuobjdump, of CUDA's toolkit or of Triton")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def cuobjdump(*options: str) -> str:
    return output(cuobjdump_path(), *options, MODULE)


@pytest.fixture(scope="module")
def kernels() -> list[tuple[str, str, dict]]:
    """Return (architecture, kernel, resources) of every kernel."""
    rows, arch, name = [], None, None
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if header := re.match(r"arch = (\w+)", line.strip()):
            arch = header[1]
        elif function := re.match(r"Function (\w+):", line.strip()):
            name = function[1]
        elif "REG:" in line:
            rows.append((arch, name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}))
    return rows


@built
def test_every_architecture_has_every_kernel(kernels):
    names = {name for _, name, _ in kernels}
    assert len(names) == 1 + 2 * 4 * 2 + 2  # Noise; forward and backward by dtype, with and without prior; totals.
    archs = {arch for arch, _, _ in kernels}
    assert archs <= ARCHITECTURES and {(arch, name) for arch, name, _ in kernels} == {(a, n) for a in archs for n in names}


@built
def test_the_newest_comes_as_ptx_too_for_gpus_that_are_to_come(kernels):
    newest = max((arch for arch, _, _ in kernels), key=lambda arch: int(arch.removeprefix("sm_")))
    assert newest in cuobjdump("-lptx")


@built
def test_nothing_is_spilled(kernels):
    """STACK counts a thread's bytes in local memory: spilled registers, or an array whose index is not known."""
    assert not [(arch, name) for arch, name, takes in kernels if takes["STACK"] or takes["LOCAL"]]


@built
def test_tensors_are_read_and_written_16_bytes_at_a_time(kernels):
    path = os.pathsep.join([os.environ["PATH"], str(Path(cuobjdump_path()).parent)])  # cuobjdump calls nvdisasm.
    code = output(cuobjdump_path(), "-sass", "-arch", kernels[0][0], MODULE, env=os.environ | {"PATH": path})
    bodies = [body for body in re.split(r"Function : ", code)[1:] if re.match(r"\w*(forward|backward)_kernel", body)]
    assert len(bodies) == 16
    for body in bodies:
        assert len(re.findall(r"LDG\.E\S*\.128", body)) >= 2 and "STG.E.128" in body, body.splitlines()[0]


@built
def test_registers_leave_room_for_many_threads(kernels):
    def most(name: str) -> int:
        return MOST_IN_FLOAT32 if re.search(r"kernelIfLb\d", name) else MOST_REGISTERS

    assert not [(arch, name, takes["REG"]) for arch, name, takes in kernels if takes["REG"] > most(name)]


@built
def test_it_knows_nothing_of_torch():
    symbols = [line.split()[-1] for line in output("nm", "-D", MODULE).splitlines()]
    assert "PyInit__cuda" in symbols
    assert not [symbol for symbol in symbols if re.search(r"torch|c10|aten|_ZN2at|THP", symbol)]


@built
def test_cuda_s_runtime_is_within():
    """Otherwise the module would require the very version that it was built with."""
    needed = re.findall(r"NEEDED\s+(\S+)", output("objdump", "-p", MODULE))
    assert needed and not [name for name in needed if "cuda" in name or "torch" in name]
