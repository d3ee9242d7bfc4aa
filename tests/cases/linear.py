"""The spec of linear: calls that between them cover both of its algorithms, every layout, and the edges of their tiles."""

import torch

from cases.spec import Spec
from fastlm import linear
from fastlm.testing import seeded_normal


def _plain(shape, seed, dtype):
    return seeded_normal(seed, shape, dtype)


def _case(*rows, depth, out, bias=True, transposed=False, input=_plain, weight=_plain):
    """Return what makes the arguments of a call with an input (*rows, depth); ``input`` and ``weight`` make these tensors."""

    def make(dtype) -> dict:
        weights = _plain((depth, out), 2, dtype).t() if transposed else weight((out, depth), 2, dtype)
        biases = seeded_normal(3, (out,), dtype) if bias else None
        return {"input": input((*rows, depth), 1, dtype), "weight": weights, "bias": biases}

    return make


def _with_gaps(shape, seed, dtype):
    return seeded_normal(seed, (*shape[:-2], 2 * shape[-2], shape[-1] + 3), dtype)[..., ::2, 1 : 1 + shape[-1]]


def _with_gaps_between_matrices(shape, seed, dtype):
    return seeded_normal(seed, (shape[0], shape[1] + 1, shape[2] + 2), dtype)[:, : shape[1], 2:]


def _by_columns(shape, seed, dtype):
    return seeded_normal(seed, (*shape[:-2], shape[-1], shape[-2]), dtype).mT


def _every_other(shape, seed, dtype):
    return seeded_normal(seed, (*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]


def _sequence_first(shape, seed, dtype):
    return seeded_normal(seed, (shape[1], shape[0], *shape[2:]), dtype).transpose(0, 1)


_CASES = {
    "one row": _case(depth=96, out=80),
    "few rows": _case(3, depth=75, out=201),
    "16 rows": _case(2, 8, depth=1300, out=70),
    "few rows, transposed": _case(5, depth=67, out=203, transposed=True),
    "one row, transposed": _case(1, depth=130, out=1100, transposed=True, bias=False),
    "many rows": _case(4, 40, depth=300, out=90),
    "many rows, transposed": _case(70, depth=301, out=333, transposed=True),
    "more rows than a block": _case(290, depth=33, out=20),
    "more columns than a block": _case(17, depth=40, out=600, bias=False),
    "depth of 1": _case(50, depth=1, out=9),
    "depth of 1, few rows": _case(2, depth=1, out=9, transposed=True),
    "no depth": _case(20, depth=0, out=9),
    "gaps between matrices": _case(4, 30, input=_with_gaps_between_matrices, depth=50, out=30),
    "no depth, gaps between matrices": _case(4, 3, depth=0, out=9, input=_with_gaps_between_matrices),
    "no depth, few rows": _case(2, depth=0, out=9, bias=False),
    "no rows": _case(0, 3, depth=8, out=9),
    "one column": _case(33, depth=129, out=1),
    "one number": _case(1, depth=1, out=1),
    "input with gaps": _case(37, input=_with_gaps, depth=50, out=30),
    "input by columns": _case(37, input=_by_columns, depth=51, out=30),
    "few rows of input by columns": _case(6, input=_by_columns, depth=51, out=30, transposed=True),
    "every other number of the input": _case(20, input=_every_other, depth=40, out=12),
    "input from sequence first": _case(4, 9, input=_sequence_first, depth=40, out=12),
    "weight with gaps": _case(9, weight=_with_gaps, depth=50, out=30),
    "every other number of the weight": _case(20, weight=_every_other, depth=40, out=12),
}
_DTYPES = torch.float32, torch.bfloat16, torch.float16

SPECS = (Spec("linear", linear, _DTYPES, ("cpu",), ("input", "weight", "bias"), _CASES),)
