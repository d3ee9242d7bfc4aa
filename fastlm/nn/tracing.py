"""Support of torch.fx and torch.jit.script, which treat a swapped module as they treat the module of torch that it replaces."""

from collections.abc import Callable
from types import FunctionType

from torch import nn
from torch.fx import Proxy


def call_of_leaf(module: nn.Module, *args) -> Proxy | None:
    """Record the call of ``module`` as one node if torch.fx.symbolic_trace makes the call, or else return None.

    torch.fx traces into every module whose class is not in torch.nn, and cannot follow code that depends on shapes.
    """
    for proxy in args:
        if isinstance(proxy, Proxy):
            path = proxy.tracer.path_of_module(module)
            return proxy.tracer.create_proxy("call_module", path, args, {}) if path else None  # the root is no leaf
    return None


def forward_for_script(cls: type[nn.Module]) -> Callable:
    """Copy ``cls.forward`` as the method ``_scripted_forward``, which torch.jit.script compiles instead of fastlm's."""
    forward = cls.forward
    copy = FunctionType(forward.__code__, forward.__globals__, "_scripted_forward", forward.__defaults__)
    copy.__annotations__ = forward.__annotations__
    return copy
