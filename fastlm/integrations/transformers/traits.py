"""Traits of transformers' attention classes, read from their code, which decide how fastlm may serve them.

transformers reads sources to find out whether a model's attention can be exchanged (`_can_set_attn_implementation`). This file
reads the compiled functions of each class instead, once per class.
"""

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Arguments that an eager function may have: fastlm's attention implements them, or ignores them as eager functions do.
KNOWN = {"dropout", "scaling", "softcap", "s_aux", "position_bias", "output_attentions", "is_causal", "sliding_window"}


@dataclass(frozen=True)
class Traits:
    """The traits of an attention class.

    Attributes:
        eager: the model's eager function, which the class runs without an interface, or None.
        unknown: the arguments that the eager function has and fastlm's attention lacks.
        for_others: why no implementation but transformers' own can serve the class, or None.
    """

    eager: Callable | None
    unknown: tuple[str, ...]
    for_others: str | None


@torch.compiler.assume_constant_result  # torch.compile ignores caches, and cannot trace the reading of code
def traits_of(cls: type[nn.Module]) -> Traits:
    """Return the traits of an attention class that goes through the AttentionInterface."""
    return _traits_of(cls)


@torch.compiler.assume_constant_result
def takes_any_mask(config: type[PreTrainedConfig]) -> bool:
    """Return whether all attentions of the models with such a config hand their masks to the interface unchanged."""
    return _takes_any_mask(config)


@cache
def _traits_of(cls: type[nn.Module]) -> Traits:
    functions = list(_functions(cls))
    eager = next((f.__globals__[name] for f in functions for name in f.__code__.co_names if _is_eager(f, name)), None)
    parameters = list(inspect.signature(eager).parameters.values())[5:] if eager else []
    unknown = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in KNOWN)
    for_others = any(("eager", "sdpa") in function.__code__.co_consts for function in functions)
    return Traits(eager, unknown, "prepares its mask for 'eager' and 'sdpa' alone" if for_others else None)


@cache
def uses_interface(cls: type[nn.Module]) -> bool:
    """Return whether a class looks its attention function up in transformers' AttentionInterface."""
    return any("get_interface" in function.__code__.co_names for function in _functions(cls))


@cache
def computes_attention(cls: type[nn.Module]) -> bool:
    """Return whether a class that is named like an attention computes its weights itself."""
    named = re.search("Attention|Attn", cls.__name__)
    own = {"softmax", "Softmax", "scaled_dot_product_attention"}
    return bool(named) and not uses_interface(cls) and any(own & set(f.__code__.co_names) for f in _functions(cls))


_SWITCH = re.compile("flash|sdpa|fused_attn|memory_efficient|xformers|attn_impl|attention_impl")


def own_switches(model: PreTrainedModel) -> list[str]:
    """Return the settings by which a model chooses its attention without the interface: ``config.use_flash_attn=False``."""
    config = vars(model.config)
    settings = [(f"config.{name}", value) for name, value in config.items() if not name.startswith("_")]
    for name, inner in config.items():
        settings += [(f"config.{name}[{key!r}]", value) for key, value in inner.items()] if isinstance(inner, dict) else []
    for cls, module in {type(module): module for module in model.modules() if computes_attention(type(module))}.items():
        settings += [(f"{cls.__name__}.{name}", value) for name, value in vars(module).items() if not name.startswith("_")]
    return [f"{name}={value!r}" for name, value in settings if _SWITCH.search(name) and isinstance(value, bool | str)]


@cache
def makes_masks(cls: type[nn.Module]) -> bool:
    """Return whether a class makes another mask of the one it gets, which then must be one of eager's."""
    functions = [f for f in _functions(cls) if "attention_mask" in f.__code__.co_varnames]
    return any(re.search(r"\battention_mask = (?!encoder_attention_mask)", inspect.getsource(f)) for f in functions)


@cache
def _takes_any_mask(config: type[PreTrainedConfig]) -> bool:
    classes = [cls for module in _models_of(config) for cls in vars(module).values() if isinstance(cls, type)]
    modules = [cls for cls in classes if issubclass(cls, nn.Module)]
    served = list(filter(uses_interface, modules))
    return bool(served) and not any(map(makes_masks, served)) and not any(map(computes_attention, modules))


def _functions(cls: type[nn.Module]) -> Iterator[types.FunctionType]:
    """Yield the methods of a class and of its bases below torch.nn.Module, without their decorators."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for function in map(inspect.unwrap, filter(inspect.isfunction, vars(base).values())):
            if inspect.isfunction(function):
                yield function


def _is_eager(function: types.FunctionType, name: str) -> bool:
    return name.endswith("eager_attention_forward") and name in function.__globals__


def _models_of(config: type[PreTrainedConfig]) -> Iterator[types.ModuleType]:
    """Yield the Python modules with the models of a config class: those named modeling_* beside it, and its own."""
    for base in config.__mro__[: config.__mro__.index(PreTrainedConfig)]:
        package = base.__module__.rpartition(".")[0]
        for name, module in list(sys.modules.items()):
            if name == base.__module__ or (package and name.startswith(f"{package}.modeling_")):
                yield module
