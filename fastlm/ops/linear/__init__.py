"""Compute ``input @ weight.T + bias`` on a CPU where torch leaves the machine unused; elsewhere it is torch's own product.

On many machines torch's products are slow for few rows, as in decoding, whose limit is the memory that the weights are read
from, and for half precision, if the processor has no instructions for it. cpu.py holds the rule of which products the kernel
takes.
Sources: Goto & van de Geijn, "Anatomy of high-performance matrix multiplication" (2008); Van Zee & van de Geijn, "BLIS: a
framework for rapidly instantiating BLAS functionality" (2015).
"""

from torch import Tensor

from ...backend import DEFAULT, Implementation, select
from ...reference import linear as reference
from ..tensor_classes import runner
from ..torch_op import export_only
from . import cpu
from .call import TENSORS, LinearCall
from .cpu import gains
from .op import linear_op

__all__ = ["gains", "linear"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Compute ``torch.nn.functional.linear(input, weight, bias)``, with its rules, errors and derivatives.

    Args:
        input: (..., K), any strides. The kernel takes float32, bfloat16 and float16; torch takes the rest.
        weight: (N, K) in input's dtype. A transposed (K, N) tensor, as that of transformers' Conv1D, is read where it lies.
        bias: (N,) in input's dtype, or None.
        backend: 'cpu' for the kernel, 'reference' for torch's own product; None picks the one that is faster for the dtype, the
            number of rows and this machine.

    Returns:
        out (..., N) in input's dtype. The kernel sums in float32, in an order that the number of threads does not change.

    Raises:
        Whatever torch raises for arguments that do not fit.
        UnsupportedError: the named ``backend`` cannot run the call.
    """
    if backend is None:
        if DEFAULT is None:
            out = cpu.fast_path(input, weight, bias)
            if out is not None:
                return out
        else:  # FASTLM_BACKEND may name a backend whose linear is torch's.
            backend = DEFAULT if DEFAULT == "cpu" else "reference"
    return _run(LinearCall(input, weight, bias, backend))


def _run(call: LinearCall) -> Tensor:
    """Choose the backend and run the call."""
    tensors = call[:TENSORS]
    elsewhere = runner("linear", tensors)
    if elsewhere is not None:
        return elsewhere(_run, call)
    return select("linear", IMPLEMENTATIONS, tensors, call.backend, export_only())(call)


IMPLEMENTATIONS = (
    Implementation("cpu", linear_op(cpu.forward, _run, ("CPU",)), cpu.why_not, cpu.why_slower),
    Implementation("reference", lambda call: reference.linear(*call[:TENSORS]), lambda *tensors: None, is_torch=True),
)
