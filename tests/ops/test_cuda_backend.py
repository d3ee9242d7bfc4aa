"""Test which calls the backend cuda takes, and what it tells a user, with tensors that only claim to be on a GPU."""

import contextlib
import sys
import types
import warnings

import pytest
import torch
from support.processes import printed, python
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm import backend
from fastlm.backend import cuda as cuda_kernels
from fastlm.backend import triton as triton_kernels

OPS = [fastlm.reparameterize, fastlm.reparameterize_with_kl, fastlm.gaussian_kl]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the other tests run on it")


def forget() -> None:
    """Forget what was found out about the module, and which warnings were given."""
    cuda_kernels.load.cache_clear()
    cuda_kernels._refused.cache_clear()
    backend._warned.clear()


@pytest.fixture
def pretend(monkeypatch):
    """Return a function that makes torch claim CUDA and a GPU, and fastlm have the given module, or none."""

    def use(module=None):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setitem(sys.modules, "fastlm._cuda", module)
        forget()

    yield use
    forget()


@pytest.fixture
def gpu():
    """Make tensors without numbers, on a GPU that is not there."""
    with FakeTensorMode():
        yield torch.zeros(3, 5, device="cuda")


def a_module() -> types.SimpleNamespace:
    return types.SimpleNamespace(architectures="90", use_exchange=lambda api: False, why_not=lambda: None)


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_on_a_gpu_gets_the_cuda_kernels(op, gpu, pretend):
    pretend(a_module())
    explanation = fastlm.explain(op, gpu, gpu)
    assert explanation.backend == "cuda" and not explanation.why_not
    assert fastlm.backends()["cuda"] == "available (a GPU; built for 90)"


@pytest.mark.parametrize("op", OPS)
def test_without_the_module_the_triton_kernels_run(op, gpu, pretend):
    pytest.importorskip("triton")
    pretend(None)
    explanation = fastlm.explain(op, gpu, gpu)
    assert explanation.backend == "triton" and "nvcc" in explanation.why_not["cuda"]


def test_without_triton_too_the_reference_runs_and_one_warning_says_how_to_get_them(gpu, pretend, monkeypatch):
    op = fastlm.gaussian_kl  # The noise's reference would need a real GPU.
    pretend(None)
    monkeypatch.setattr(triton_kernels, "NOT_INSTALLED", "Triton is not installed: pip install triton")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            op(gpu, gpu)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "gaussian_kl on cuda runs on the slow PyTorch reference" in message
    assert "fastlm._cuda cannot be loaded" in message and "nvcc" in message and "pip install nvidia-cuda-nvcc" in message
    assert "pip install triton" in message
    assert cuda_kernels.GET_THEM in fastlm.backends()["cuda"]
    with pytest.raises(fastlm.UnsupportedError, match="nvcc"):
        op(gpu, gpu, backend="cuda")


def test_a_gpu_that_the_module_is_not_for_gets_the_triton_kernels(gpu, pretend):
    pytest.importorskip("triton")
    module = a_module()
    module.why_not = lambda: "no kernel image is available for execution on the device"
    pretend(module)
    explanation = fastlm.explain(fastlm.gaussian_kl, gpu, gpu)
    assert explanation.backend == "triton"
    assert explanation.why_not["cuda"] == f"cuda:0 cannot run fastlm._cuda, built for 90: {module.why_not()}"
    assert fastlm.backends()["cuda"] == explanation.why_not["cuda"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logvar": torch.zeros(3, 5)}, "logvar must be on mu's device cuda:0; got cpu"),
        ({"prior_mu": torch.zeros(5)}, "prior_mu must be on mu's device cuda:0; got cpu"),
        ({"prior_logvar": torch.zeros(5)}, "prior_logvar must be on mu's device cuda:0; got cpu"),
        ({"seed": torch.tensor(1)}, "seed must be on cuda:0, like the other tensors; got cpu"),
        ({"seed": torch.arange(3)}, "seed must be on cuda:0, like the other tensors; got cpu"),
    ],
)
def test_tensors_on_different_devices_are_refused_by_name(wrong, message, gpu, pretend):
    pretend(a_module())
    with pytest.raises(ValueError) as raised:
        fastlm.reparameterize_with_kl(**{"mu": gpu, "logvar": gpu, **wrong})
    assert str(raised.value) == message


def test_a_failed_launch_says_what_cuda_says(gpu, pretend, monkeypatch):
    def fails(*args):
        raise RuntimeError("CUDA: no kernel image is available for execution on the device")

    module = a_module()
    module.reparameterize_forward = fails
    pretend(module)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    with pytest.raises(RuntimeError, match="CUDA: no kernel image"):
        cuda_kernels.launch("reparameterize_forward", gpu.device)


def test_a_cpu_only_torch_never_touches_the_module():
    code = "import sys, torch, fastlm; fastlm.backends(); print('fastlm._cuda' in sys.modules, torch.version.cuda)"
    if torch.version.cuda is None:
        assert printed(code) == "False None"
        assert "was built without CUDA" in fastlm.backends()["cuda"]


def test_to_import_fastlm_does_not_ask_the_driver():
    """Import and call fastlm without asking the driver, because a process that has asked it cannot fork."""
    code = """
import torch
def never(): raise AssertionError("asked")
torch.cuda.is_available = never
torch.version.cuda = "13.0"
import fastlm
print(fastlm.gaussian_kl(torch.ones(3), torch.zeros(3)).item())
"""
    assert printed(code) == "1.5"


def test_the_compiler_need_not_see_how_the_module_is_loaded():
    @torch.compile(backend="eager", fullgraph=True)
    def reason(x):
        return x + 1 if cuda_kernels.unavailable(0) else x

    cuda_kernels.load.cache_clear()
    assert reason(torch.zeros(1)).item() == 1.0


def test_the_doctor_tells_whether_the_module_was_built():
    process = python("import sys; from fastlm.cli import main; sys.exit(main(['doctor']))")
    line = next(line for line in process.stdout.splitlines() if line.startswith("cuda"))
    assert "_cuda" in line or "not built" in line
