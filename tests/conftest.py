"""Give every test poisoned memory, every instruction set of the machine, and the same examples in each run."""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from support import triton_interpreter  # noqa: F401  (before any kernel is imported)
from support.oracle import ISAS, instruction_set

from fastlm.testing import separate_compiler_caches

# Tests import the modules of benchmarks/.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # Last, because it has a conftest.py, too.

settings.register_profile(
    "fastlm",
    deadline=None,  # A first call compiles, warms up or waits for a busy core.
    derandomize=True,  # Every run has the same examples: a test that fails here fails in CI.
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastlm")

separate_compiler_caches()

# A run of the benchmark in a process of its own is none of xdist's, whose workers pytest-benchmark does not time.
os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_collectstart(collector):
    """Load our profile for each module: torch.testing loads one of its own when a module before it imports that."""
    settings.load_profile("fastlm")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect no garbage while tests are collected: there is none, and to look for it takes a fourth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items):
    """Run first the groups whose first test does the work of all: at the end, the other process would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs kernels on the GPU where there is one; `make gpu` runs these")
    config.addinivalue_line("markers", "slow_sanitized: left out of `make sanitize`, which is for the C++ code")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[], object]], object]:
    """Return a function of a name and of what makes its value, of JSON's types. One of xdist's processes makes it for all."""
    folder, made = tmp_path_factory.getbasetemp(), {}
    folder = folder if worker_id == "master" else folder.parent

    def value_of(name: str, make: Callable[[], object]) -> object:
        if name not in made:
            path = folder / f"{name}.json"
            with FileLock(f"{path}.lock"):  # The others wait for the first.
                if not path.exists():
                    path.write_text(json.dumps(make()))
            made[name] = json.loads(path.read_text())
        return made[name]

    return value_of


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test on each instruction set that this machine can run."""
    with instruction_set(request.param):
        yield request.param


@pytest.fixture
def widest_isa():
    """Run the test on the instruction set that this machine runs fastest."""
    with instruction_set(ISAS[-1]):
        yield ISAS[-1]


@pytest.fixture
def any_size(widest_isa, monkeypatch):
    """Let hand-written attention of any size be found."""
    monkeypatch.setattr("fastlm.nn.handwritten.products.LEAST", ((1, 1), (1, 1)))


@pytest.fixture(autouse=True)
def poison():
    """Fill fresh memory with NaN, so that an element that a kernel forgot to write shows."""
    torch.use_deterministic_algorithms(True)  # This makes torch fill torch.empty and new_empty.
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Return a function that sets the number of threads for one test: ``threads(3)``."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Prepare a corpus of a few dozen short texts, for the tests of the language model. Tests must not change it."""
    from support.lm_corpus import small_corpus  # Imported here, because few tests need it.

    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer(corpus):
    """Load the corpus's vocabulary of 290 tokens."""
    from fastlm.lm.data.tokenizer import load_tokenizer

    return load_tokenizer(corpus)
