"""Swapping the modules of an existing model for fastlm's, in place, and back.

A `Swap` describes a kind of module that can be swapped. The files of this package register the kinds of torch; each integration
registers those of its library when it is imported.
"""

from dataclasses import dataclass, field

from torch import nn


class Swap:
    """How one kind of module is swapped for fastlm's, and back.

    The state that ``undo`` needs is on the module, so that a copy or a pickle of a swapped model can be restored as well.
    """

    original: type[nn.Module]
    subclasses = False  # whether to swap subclasses of ``original`` too, whose code may do something else
    methods: tuple[str, ...] = ()  # the methods that the swap replaces

    def concerns(self, module: nn.Module) -> bool:
        """Return whether the module is of this kind and may gain by the swap; the report is silent about all others."""
        return isinstance(module, self.original)

    def why_not(self, module: nn.Module) -> str | None:
        """Return why this module must stay as it is, or None."""
        return None

    def swap(self, module: nn.Module) -> str:
        """Swap a module in place, and return a text on what it was and is."""
        raise NotImplementedError

    def is_swapped(self, module: nn.Module) -> bool:
        """Return whether a module has been swapped."""
        raise NotImplementedError

    def undo(self, module: nn.Module) -> str:
        """Undo the swap of a module in place, and return a text on what it was and is."""
        raise NotImplementedError


class ClassSwap(Swap):
    """A swap that gives the module the class ``replacement``, a subclass of ``original`` with the same state.

    Parameters, hooks, the state_dict and an optimizer's references all stay as they are.
    """

    methods = ("forward",)

    def __init__(self, original: type[nn.Module], replacement: type[nn.Module]) -> None:
        self.original, self.replacement = original, replacement

    def swap(self, module: nn.Module) -> str:
        module.__class__ = self.replacement
        return f"{_name(self.original)} -> {_name(self.replacement)}"

    def is_swapped(self, module: nn.Module) -> bool:
        return type(module) is self.replacement

    def undo(self, module: nn.Module) -> str:
        module.__class__ = self.original
        return f"{_name(self.replacement)} -> {_name(self.original)}"


@dataclass
class Report:
    """What `replace` or `restore` did. It is printable.

    Attributes:
        swapped: for each swapped module, by its name in the model, what it was and is.
        left: for each module of a known kind that was not swapped, the reason.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, text: str) -> None:
        """Note what happened to a module. More than one thing may."""
        self.swapped[name] = f"{self.swapped[name]}; {text}" if name in self.swapped else text

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        lines += [f"  {names}: {what}" for what, names in _by_text(self.swapped).items()]
        lines += [f"  {names} is left: {reason}" for reason, names in _by_text(self.left).items()]
        return "\n".join(lines)

    __repr__ = __str__


def _by_text(modules: dict[str, str]) -> dict[str, str]:
    """Return each text with the modules that it is said of; of many, the first one and their number."""
    names: dict[str, list[str]] = {}
    for name, text in modules.items():
        names.setdefault(text, []).append(name or "the model")
    return {t: ", ".join(n) if len(n) <= 3 else f"{n[0]} and {len(n) - 1} others" for t, n in names.items()}


_swaps: list[Swap] = []


def register(swap: Swap) -> None:
    """Add a kind of module to those that `replace` and `restore` know."""
    _swaps.append(swap)


def replace(model: nn.Module) -> Report:
    """Swap every module of ``model`` that fastlm has a faster one for, in place, with the same parameters and results.

    torch.nn.Linear and torch.nn.MultiheadAttention are always known, alone and inside torch.nn.Transformer's layers. The models
    of a library are known once its integration has been imported, e.g. ``import fastlm.integrations.transformers``.

    Args:
        model: any module. It may be such a module itself.

    Returns:
        What was swapped, and what was left and why: ``print(fastlm.replace(model))``. Code that calls
        ``F.scaled_dot_product_attention`` itself needs no swap, and is not in the report: see `fastlm.use`.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_model(model)
    report = Report()
    for name, module in model.named_modules():
        for swap in _swaps:
            if not swap.concerns(module) or swap.is_swapped(module):
                continue
            if reason := _why_not(swap, module):
                report.left[name] = reason
            else:
                report.add(name, swap.swap(module))
    return report


def restore(model: nn.Module) -> Report:
    """Undo `replace`: turn every swapped module of ``model`` back into what it was, in place.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_model(model)
    report = Report()
    for name, module in model.named_modules():
        for swap in _swaps:
            if not swap.is_swapped(module):
                continue
            if reason := _own_method(swap, module):
                report.left[name] = reason
            else:
                report.add(name, swap.undo(module))
    return report


def check_model(model: nn.Module) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def _why_not(swap: Swap, module: nn.Module) -> str | None:
    if type(module) is not swap.original and not swap.subclasses:
        return f"{_name(type(module))} is a subclass of {_name(swap.original)}, whose code may do something else"
    return _own_method(swap, module) or swap.why_not(module)


def _own_method(swap: Swap, module: nn.Module) -> str | None:
    """Return why a swap or its undoing would have no effect, or None: a method on the module itself hides that of its class."""
    own = next((method for method in swap.methods if method in vars(module)), None)
    return own and f"{own} was set on this module itself (as accelerate's hooks do), which hides that of its class"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
