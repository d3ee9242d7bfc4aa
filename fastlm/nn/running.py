"""Know which module of a watched model runs: hooks that put an observer on the thread's stack, and take it off again."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..ops.attention import observer

Observe = Callable[[], observer.Observer]


class Hook:
    """Be one of the two hooks of a watched module. A copy or a pickle of the module gets one that does nothing."""

    def __init__(self, observe: Observe | None = None, watch: observer.Watch | None = None, name: str = "") -> None:
        self.observe, self.watch, self.name = observe, watch, name

    def __reduce__(self) -> tuple:
        return type(self), ()


class _Enter(Hook):
    """Put an observer on the stack: a forward pre-hook."""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling() and self.observe is not None:
            observer.stack().append(self.observe())


class _Leave(Hook):
    """Take the observer off the stack, and what an interrupted module left above it: a forward hook."""

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        if torch.compiler.is_compiling() or self.watch is None:
            return
        stack = observer.stack()
        for i in range(len(stack) - 1, -1, -1):
            if stack[i].watch is self.watch and stack[i].name == self.name:
                del stack[i:]
                return


def hook(model: nn.Module, watch: observer.Watch, observe: Callable[[str], observer.Observer]) -> list:
    """Hook the modules of a model that may call attention; return the handles that remove the hooks.

    ``observe(name)`` makes the observer of a module's forward, whose ``name`` is that name.
    """
    handles = []
    for name, module in model.named_modules():
        if _may_attend(module):
            enter, leave = _Enter(lambda name=name: observe(name), watch, name), _Leave(None, watch, name)
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    return handles


_NO_ATTENTION = ("torch.nn.", "fastlm.", "transformers.activations", "transformers.pytorch_utils")


def _may_attend(module: nn.Module) -> bool:
    """Tell whether a module's forward may call attention: the libraries' linear layers, norms and activations do not."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return any(True for _ in module.children()) or not type(module).__module__.startswith(_NO_ATTENTION)


def is_ours(hook: object) -> bool:
    """Tell whether a hook only looks which module runs, so that it is no reason to run every module by its forward."""
    return isinstance(hook, Hook)


@contextlib.contextmanager
def inside(module: nn.Module) -> Iterator[None]:
    """Let the hooks know that a module runs whose forward is not called."""
    entering = [hook for hook in module._forward_pre_hooks.values() if is_ours(hook)]
    for hook in entering:
        hook(module, ())
    try:
        yield
    finally:
        for hook in module._forward_hooks.values() if entering else ():
            if is_ours(hook):
                hook(module, (), None)


def forget(watch: observer.Watch) -> None:
    """Take the observers of a watch off this thread's stack."""
    stack = observer.stack()
    stack[:] = [one for one in stack if one.watch is not watch]
