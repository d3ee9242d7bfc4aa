"""Find the calls whose tensors are DTensors, for which dtensor/ has the functions.

torch.distributed.tensor takes a second to import, and only programs that have imported it have DTensors.
"""

import sys
from collections.abc import Callable, Iterable

from torch import Tensor

from ..ops.tensor_classes import register
from ..ops.torch_op import PLAIN


def functions_of(tensors: Iterable[Tensor | None]) -> dict[str, Callable] | None:
    """Return the functions that run calls of DTensors, by the op's name, if some tensors are DTensors and the others plain."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    others = [tensor for tensor in tensors if type(tensor) not in PLAIN]
    if not others or not all(isinstance(tensor, DTensor) for tensor in others):
        return None
    from .dtensor import FUNCTIONS

    return FUNCTIONS


register(functions_of)
