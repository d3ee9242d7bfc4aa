"""Let other parts of fastlm run the calls whose tensors are of a class that gives torch's ops a meaning of its own.

fastlm.distributed registers itself here for DTensor: the ops know nothing of what is above them.
"""

from collections.abc import Callable, Iterable

from torch import Tensor

from .torch_op import are_plain

Tensors = Iterable[Tensor | None]
# Each takes the tensors of a call, and returns the functions by which it runs calls with such tensors, by the op's name, or
# None if one of them is neither plain nor its own.
_owners: list[Callable[[Tensors], dict[str, Callable] | None]] = []


def register(owner: Callable[[Tensors], dict[str, Callable] | None]) -> None:
    """Add an owner of classes of tensors."""
    _owners.append(owner)


def runner(op: str, tensors: Tensors) -> Callable | None:
    """Return the function that runs a call of ``op`` in place of the op's own, or None where the op runs it as ever."""
    if are_plain(tensors):
        return None
    for owner in _owners:
        functions = owner(tensors)
        if functions is not None:
            return functions[op]
    return None


def are_known(tensors: Tensors) -> bool:
    """Tell whether fastlm's functions take tensors of these classes, so that a drop-in need not leave the call to torch."""
    tensors = tuple(tensors)
    return are_plain(tensors) or any(owner(tensors) is not None for owner in _owners)
