"""Add forward hooks to modules, and find them again by their function, as copies and pickles of a module keep them."""

from collections.abc import Callable

from torch import nn


def add_hooks(module: nn.Module, before: Callable, after: Callable | None = None) -> None:
    """Let functions of this package run before, and after, each forward of the module. Both get its keyword arguments."""
    module.register_forward_pre_hook(before, with_kwargs=True)
    if after is not None:
        module.register_forward_hook(after, with_kwargs=True)


def has_hook(module: nn.Module, before: Callable) -> bool:
    """Return whether `add_hooks` has been called with that function, on the module or on the one that it was copied from."""
    return before in module._forward_pre_hooks.values()


def remove_hooks(module: nn.Module, *functions: Callable) -> None:
    """Remove the hooks that run these functions."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key, function in tuple(hooks.items()):
            if function in functions:
                del hooks[key], with_kwargs[key]
