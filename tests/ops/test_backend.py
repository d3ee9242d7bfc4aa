"""Test which backend runs a call, who decides, and what a user is told, here and in fresh processes with other settings."""

import warnings

import pytest
import torch
from support.oracle import ISAS
from support.processes import WITHOUT_THE_MODULE, printed, python

import fastlm
from fastlm import backend, cli
from fastlm.backend import cpu as native

MU = torch.zeros(3, 5)
OPS = [fastlm.reparameterize, fastlm.reparameterize_with_kl, fastlm.gaussian_kl]


def test_the_kernel_was_built_and_runs_here():
    """This test shows plainly that the build is at fault."""
    assert native.C is not None, native.load_error


def test_backends_lists_all_fastest_first_with_what_stops_them(widest_isa):
    states = fastlm.backends()
    assert list(states) == ["cuda", "triton", "cpu", "reference"]
    assert states["cpu"] == f"available ({widest_isa}, torch's {torch.get_num_threads()} threads)"
    assert states["reference"].startswith("available")
    assert "interpreter" in states["triton"]


def test_the_instruction_sets_are_listed_slowest_first_and_an_unknown_one_is_refused(widest_isa):
    assert native.C.isas()[0] == "baseline"
    with pytest.raises(ValueError, match="avx1024"):
        native.C.set_isa("avx1024")
    assert native.C.isa() == widest_isa


# ---- explain ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_explain_names_the_backend_that_runs(op, widest_isa):
    explanation = fastlm.explain(op, MU, MU)
    assert explanation.backend == "cpu" and explanation.why_not == {"cuda": "the tensors are on cpu"}
    assert str(explanation) == f"{op.__name__} runs on the backend 'cpu'\n  not on 'cuda': the tensors are on cpu"


def test_explain_says_why_a_faster_backend_does_not_run(widest_isa):
    meta = torch.zeros(3, 5, device="meta")
    explanation = fastlm.explain(fastlm.gaussian_kl, meta, meta, free_bits=0.1)
    assert explanation.backend == "reference"
    assert explanation.why_not == dict.fromkeys(("cuda", "cpu", "triton"), "the tensors are on meta")
    assert "not on 'cpu': the tensors are on meta" in str(explanation)


def test_explain_of_a_named_backend(widest_isa):
    explanation = fastlm.explain(fastlm.gaussian_kl, MU, MU, backend="reference")
    assert explanation.backend == "reference" and explanation.why_not == dict.fromkeys(
        ("cuda", "cpu", "triton"), "'reference' was asked for"
    )
    assert fastlm.explain(fastlm.gaussian_kl, MU, MU, backend="cpu").backend == "cpu"


def test_explain_of_a_named_backend_that_cannot():
    meta = torch.zeros(3, 5, device="meta")
    explanation = fastlm.explain(fastlm.gaussian_kl, meta, meta, backend="cpu")
    assert explanation.backend is None
    assert str(explanation).startswith("gaussian_kl cannot run") and "the tensors are on meta" in str(explanation)
    assert fastlm.explain(fastlm.gaussian_kl, meta, meta, backend="triton").backend is None
    with pytest.raises(ValueError, match="backend"):
        fastlm.explain(fastlm.gaussian_kl, MU, MU, backend="gpu")


def test_explain_computes_nothing(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("explain ran the call")

    monkeypatch.setattr("fastlm.ops.latent.IMPLEMENTATIONS", (backend.Implementation("cpu", never, lambda t: None),))
    assert fastlm.explain(fastlm.reparameterize_with_kl, MU, MU).backend == "cpu"
    with pytest.raises(AssertionError, match="ran the call"):
        fastlm.reparameterize_with_kl(MU, MU, free_bits=0.1)  # An option, because calls without any choose no implementation.


def test_explain_leaves_torch_s_generator_alone():
    state = torch.random.get_rng_state()
    fastlm.explain(fastlm.reparameterize, MU, MU)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_explain_checks_the_call_as_ever():
    with pytest.raises(ValueError, match="free_bits"):
        fastlm.explain(fastlm.gaussian_kl, MU, MU, free_bits=-1.0)
    with pytest.raises(TypeError):
        fastlm.explain(torch.add, MU, MU)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_named_backend_that_cannot_run_is_refused(op, name):
    meta = torch.zeros(3, 5, device="meta")
    with pytest.raises(fastlm.UnsupportedError, match=f"{op.__name__} .*'{name}': the tensors are on meta"):
        op(meta, meta, backend=name)
    assert issubclass(fastlm.UnsupportedError, NotImplementedError)


# ---- fresh processes --------------------------------------------------------------------------------------------------------

EXPLAIN = "import torch, fastlm; print(fastlm.explain(fastlm.gaussian_kl, torch.zeros(3), torch.zeros(3)).backend)"
CALL = "import torch, fastlm; print(fastlm.gaussian_kl(torch.ones(3), torch.zeros(3)).item())"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_fastlm_backend_sets_the_default(name):
    assert printed(EXPLAIN, FASTLM_BACKEND=name) == name
    assert printed(CALL, FASTLM_BACKEND=name) == "1.5"


@pytest.mark.parametrize(("name", "error"), [("gpu", "ValueError"), ("triton", "UnsupportedError")])
def test_a_fastlm_backend_that_cannot_run_is_refused_at_the_call(name, error):
    process = python(CALL, FASTLM_BACKEND=name)
    assert process.returncode == 1 and error in process.stderr and f"'{name}'" in process.stderr
    if name == "gpu":
        assert "FASTLM_BACKEND" in process.stderr


def test_an_argument_beats_fastlm_backend():
    code = CALL.replace("torch.zeros(3))", "torch.zeros(3), backend='reference')")
    assert printed(code, FASTLM_BACKEND="triton") == "1.5"


@pytest.mark.parametrize("isa", ISAS)
def test_fastlm_cpu_isa_sets_the_instruction_set(isa):
    code = "import fastlm; print(fastlm.backend.cpu.C.isa(), fastlm.backends()['cpu'])"
    assert printed(code, FASTLM_CPU_ISA=isa).startswith(f"{isa} available ({isa}, ")


def test_a_bogus_fastlm_cpu_isa_leaves_the_reference_and_says_so():
    assert printed(CALL, FASTLM_CPU_ISA="mmx") == "1.5"
    state = printed("import fastlm; print(fastlm.backends()['cpu'])", FASTLM_CPU_ISA="mmx")
    assert "FASTLM_CPU_ISA" in state and "mmx" in state and "available" not in state


# ---- without the C++ module -------------------------------------------------------------------------------------------------


def test_without_the_module_the_package_runs_on_the_reference_and_says_why():
    assert printed(WITHOUT_THE_MODULE + CALL) == "1.5"
    assert printed(WITHOUT_THE_MODULE + EXPLAIN) == "reference"
    state = printed(WITHOUT_THE_MODULE + "import fastlm; print(fastlm.backends()['cpu'])")
    assert "fastlm._C" in state and "blocked by the test" in state and "available" not in state


def test_without_the_module_the_cpu_backend_is_refused_with_the_reason():
    process = python(WITHOUT_THE_MODULE + CALL.replace("torch.zeros(3))", "torch.zeros(3), backend='cpu')"))
    assert process.returncode == 1
    assert "UnsupportedError" in process.stderr and "blocked by the test" in process.stderr


def test_without_the_module_gradients_work_too():
    code = """
import torch, fastlm
mu = torch.ones(3, requires_grad=True)
z, kl = fastlm.reparameterize_with_kl(mu, mu, seed=1)
(z.sum() + kl).backward()
print(mu.grad.isfinite().all().item())
"""
    assert printed(WITHOUT_THE_MODULE + code) == "True"


def test_without_the_module_a_large_call_warns_once_and_a_small_one_never():
    code = """
import warnings, torch, fastlm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    def kl(n, **options):
        fastlm.gaussian_kl(torch.zeros(n), torch.zeros(n), **options)
        print(len(caught))
    kl(1000); kl(1 << 20, backend="reference"); kl(1 << 20); kl(1 << 20); kl(1 << 20)
    print(caught[0].message, caught[0].filename)
"""
    *counts, message = printed(WITHOUT_THE_MODULE + code).splitlines()
    assert counts == ["0", "0", "1", "1", "1"]
    assert "reference" in message and "gaussian_kl" in message and "blocked by the test" in message
    assert message.endswith("<string>"), "the warning points at the user's line"


def test_with_the_module_no_call_warns(widest_isa):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlm.gaussian_kl(torch.zeros(1 << 17), torch.zeros(1 << 17))


# ---- imports ----------------------------------------------------------------------------------------------------------------


def test_triton_says_what_it_lacks():
    code = "import fastlm; print(fastlm.backends()['triton'])"
    if not torch.cuda.is_available():
        assert printed(code) == "torch sees no GPU"
    assert "pip install triton" in printed("import sys, importlib.util as u; u.find_spec = lambda name: None; " + code)


def test_importing_fastlm_imports_no_optional_package():
    optional = [
        "triton",
        "matplotlib",
        "transformers",
        "diffusers",
        "sklearn",
        "scipy",
        "pytest",
        "rich",
        "torch._dynamo",
        "torch.onnx",
    ]
    code = f"import torch, sys; before = set(sys.modules); import fastlm; print(set({optional}) & (set(sys.modules) - before))"
    assert printed(code) == "set()"
    assert (
        printed("import fastlm, sys; print([name for name in sys.modules if name.startswith('fastlm.integrations.')])") == "[]"
    )


# ---- the command line -------------------------------------------------------------------------------------------------------


def test_the_doctor_tells_versions_instruction_set_and_backends(capsys, widest_isa):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    for fact in (fastlm.__version__, torch.__version__, widest_isa, native.C.__file__, *fastlm.backends().values()):
        assert fact in report


def test_the_doctor_reports_a_missing_module_and_fails():
    process = python(WITHOUT_THE_MODULE + "from fastlm.cli import main; sys.exit(main(['doctor']))")
    assert process.returncode == 1
    assert "blocked by the test" in process.stdout and "reference" in process.stdout
