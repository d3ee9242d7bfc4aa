"""Functions with their tangents, so that tests of values and gradients test derivatives of second order."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.testing import seeded_normal

TANGENT = "_tangent"  # ends the name of an argument's tangent


def with_tangents(function: Callable) -> Callable:
    """Return a function of the arguments and their tangents that returns the outputs and their tangents."""

    def both(**arguments):
        names = [name.removesuffix(TANGENT) for name in arguments if name.endswith(TANGENT)]
        tangents = tuple(arguments.pop(name + TANGENT) for name in names)

        def of(*tensors: Tensor):
            outputs = function(**{**arguments, **dict(zip(names, tensors))})
            return outputs if isinstance(outputs, tuple) else (outputs,)

        outputs, their_tangents = torch.func.jvp(of, tuple(arguments[name] for name in names), tangents)
        return *outputs, *their_tangents

    return both


def add_tangents(arguments: dict, names: tuple[str, ...]) -> dict:
    """Return the arguments with a tangent for each floating tensor among those named.

    torch gives no tangent to a tensor that is expanded, so that such a one becomes contiguous.
    """
    given = [name for name in names if isinstance(arguments.get(name), Tensor) and arguments[name].is_floating_point()]
    tensors = {name: t.contiguous() if 0 in (t := arguments[name]).stride() else t for name in given}
    tangents = {name + TANGENT: seeded_normal(50 + i, t.shape, t.dtype) for i, (name, t) in enumerate(tensors.items())}
    return {**arguments, **tensors, **tangents}


def and_tangents(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names with those of their tangents."""
    return *names, *(name + TANGENT for name in names)
