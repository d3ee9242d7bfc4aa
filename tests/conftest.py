"""What every test shares: poisoned memory, every instruction set of the machine, and the same examples each run."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import triton_interpreter  # noqa: F401  (before any kernel is imported)
from support.oracle import ISAS

from fastlm.backend import cpu as native

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # for tests of its modules; last, as it has a conftest.py too

settings.register_profile(
    "fastlm",
    deadline=None,  # a first call compiles, warms up or waits for a busy core
    derandomize=True,  # the same examples in every run: what fails here fails in CI
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastlm")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow_sanitized: left out of `make sanitize`, which is for the C++ code")


def _use(isa: str):
    """Run what follows on one instruction set. Without the C++ module the test fails: a build problem must show."""
    if native.C is None:
        pytest.fail(native.load_error)
    before = native.C.isa()
    native.C.set_isa(isa)
    assert native.C.isa() == isa
    yield isa
    native.C.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this machine can run, in turn."""
    yield from _use(request.param)


@pytest.fixture
def widest_isa():
    """The instruction set that this machine runs fastest."""
    yield from _use(ISAS[-1])


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is filled with NaN, so that an element which a kernel forgot to write shows."""
    torch.use_deterministic_algorithms(True)  # what makes torch fill torch.empty and new_empty
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets the number of threads for one test: ``threads(3)``."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus of a few dozen short texts, for the tests of the language model; not to be changed."""
    from support.lm_corpus import small_corpus  # here, as few tests need it

    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer(corpus):
    """Its vocabulary, of 290 tokens."""
    from fastlm.lm.data.tokenizer import load_tokenizer

    return load_tokenizer(corpus)
