"""Test every op, in every case, dtype and backend, on every instruction set, against the reference in float64."""

from functools import cache

import pytest
from cases import SPECS
from support.oracle import Oracle, noisy_results

CALLS = [
    pytest.param(spec.name, case, dtype, backend, id=f"{spec.name}-{case}-{str(dtype).removeprefix('torch.')}-{backend}")
    for spec in SPECS.values()
    for case in spec.cases
    for dtype in spec.dtypes
    for backend in spec.backends
    if backend == "cpu"  # test_cuda.py, test_triton_attention.py and test_triton_latent.py test the others.
]


@cache
def oracle(name, case, dtype) -> Oracle:
    spec = SPECS[name]
    return Oracle(spec.function, spec.cases[case](dtype), spec.differentiable, noisy_results(name))


@pytest.mark.parametrize(("name", "case", "dtype", "backend"), CALLS)
def test_values_and_gradients_are_as_good_as_plain_pytorch(name, case, dtype, backend, isa):
    oracle(name, case, dtype).check(backend=backend)


def test_each_spec_has_cases_and_a_backend():
    for spec in SPECS.values():
        assert spec.cases and spec.backends and spec.dtypes
