"""Plans: a planner chooses kernels, grids and arguments once for calls that are alike, and each call's tensors are put in.

A planner that is `planned_once` never sees a call's tensors. It is given tensors of the same layouts without data, so that a
plan can depend on nothing else, and cannot keep a call's memory.
"""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch

ON_AMD = torch.version.hip is not None
_MOST = 512  # Plans that are kept, the last ones used. A model has a few for each length.


class Scratch:
    """A contiguous tensor that launches of one plan hand to each other. Each call has its own."""

    def __init__(self, *shape: int, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype


def converted(tensor: Tensor | None, convert: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return `convert` of a planner's tensor, or None. Each call converts its own, unless a layout makes that needless."""
    made = None if tensor is None else convert(tensor)
    if made is not tensor:
        made.converted_from = tensor, convert
    return made


class Plan(NamedTuple):
    """The launches of all calls that are alike, with functions of the list of a call's tensors."""

    launches: list[tuple[Launch, dict[str, Callable]]]  # With functions that make some arguments, by name.
    makers: list[Callable]  # Each makes a tensor that comes behind those in the list.

    def launches_of(self, tensors: list[Tensor]) -> list[Launch]:
        """Return the launches of a call, and add to the list what they need beside its tensors."""
        for make in self.makers:
            tensors.append(make(tensors))
        launches = []
        for (kernel, grid, arguments, options, binaries), fillers in self.launches:
            own = {name: fill(tensors) for name, fill in fillers.items()}
            launches.append(Launch(kernel, grid, arguments | own, options, binaries))
        return launches


class _Key(tuple):
    """All that a plan may depend on, one behind the other. Equal keys have one plan."""

    arguments: tuple  # of the call to plan, whose tensors the key does not keep


def planned_once(planner: Callable[..., list[Launch]]) -> Callable[..., list[Launch]]:
    """Let a planner run once for calls that are alike: their tensors' layouts and all other arguments are equal.

    Its arguments are tensors, what can be hashed, and tuples of these.
    """

    @functools.wraps(planner)
    def plan(*args) -> list[Launch]:
        tensors, parts = [], [planner]
        _read(args, tensors, parts)
        key = _Key((*parts, tensors[0].device))  # Each device has plans of its own, because each has binaries of its own.
        key.arguments = args
        return _plan(key).launches_of(tensors)

    return plan


def _read(values: tuple, tensors: list[Tensor], parts: list) -> None:
    """Add the tensors of tuples in tuples to a list, and to another their layouts and all other values."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            is_large = ON_AMD and value.untyped_storage().nbytes() >= 1 << 31  # Other loads are compiled then.
            parts += value.dtype, value.shape, value.stride(), _is_aligned(value), is_large
        elif isinstance(value, tuple):
            parts += type(value), len(value)
            _read(value, tensors, parts)
        else:
            parts.append(value)


def _is_aligned(tensor: Tensor) -> bool:
    """Tell whether a tensor starts at a multiple of 16 bytes, as the compiler and descriptors want it."""
    return tensor.data_ptr() % 16 == 0


def _stand_in(tensor: Tensor) -> Tensor:
    """Return a tensor of the same layout without data."""
    shape, strides = tensor.shape, tensor.stride()
    made = torch.empty_strided(shape, strides, dtype=tensor.dtype, device="meta")
    return made if _is_aligned(tensor) else made.as_strided(shape, strides, 1)


def _with_stand_ins(values: tuple, made: list[Tensor]) -> tuple:
    """Return tuples in tuples with a stand-in for each tensor, which is added to a list."""
    fields = []
    for value in values:
        if isinstance(value, Tensor):
            made.append(_stand_in(value))
            value = made[-1]
        fields.append(_with_stand_ins(value, made) if isinstance(value, tuple) else value)
    return _class_of(values)(fields)


def _class_of(values: tuple) -> Callable[[list], tuple]:
    """Return what makes a tuple of the same class of its fields."""
    return getattr(values, "_make", tuple)


@functools.lru_cache(_MOST)
def _plan(key: _Key) -> Plan:
    """Run the planner, which is the key's first part, on tensors without data."""
    planner, arguments = key[0], vars(key).pop("arguments")
    tensors: list[Tensor] = []
    launches = planner(*_with_stand_ins(arguments, tensors))
    recorder = _Recorder(tensors)
    return Plan([(launch, recorder.fillers(launch.arguments)) for launch in launches], recorder.makers)


forget_plans = _plan.cache_clear


class _Recorder:
    """The places of a plan's tensors in the list of a call's, with which it turns arguments into functions of that list."""

    def __init__(self, tensors: list[Tensor]):
        self._places = {id(tensor): place for place, tensor in enumerate(tensors)}
        self.makers: list[Callable] = []

    def fillers(self, arguments: dict) -> dict[str, Callable]:
        """Return the functions that make those arguments, by name, that a call has of its own."""
        fillers = ((name, self._filler(value)) for name, value in arguments.items())
        return {name: fill for name, fill in fillers if fill}

    def _filler(self, value: Any) -> Callable | None:
        """Return the function that makes a value, or None if all calls have the same."""
        if isinstance(value, tuple):
            fillers = [(i, fill) for i, fill in enumerate(map(self._filler, value)) if fill]
            return functools.partial(_filled, _class_of(value), list(value), fillers) if fillers else None
        if isinstance(value, (Tensor, Scratch)):
            return itemgetter(self._place(value))
        if isinstance(value, TensorDescriptor):
            base, rest = self._filler(value.base), (value.shape, value.strides, value.block_shape)
            return lambda tensors: TensorDescriptor(base(tensors), *rest)
        return None

    def _place(self, value: Tensor | Scratch) -> int:
        """Return the place of a tensor. If it is no call's own, it gets one behind those that there are."""
        if id(value) not in self._places:
            self.makers.append(self._maker(value))
            self._places[id(value)] = len(self._places)
        return self._places[id(value)]

    def _maker(self, value: Tensor | Scratch) -> Callable:
        """Return the function that makes a tensor of those before it."""
        if isinstance(value, Scratch):
            return lambda tensors: torch.empty(value.shape, dtype=value.dtype, device=tensors[0].device)
        source, convert = value.converted_from  # Without it, the planner made a tensor that calls would not have.
        place = self._place(source)
        return lambda tensors: convert(tensors[place])


def _filled(make: Callable[[list], tuple], fields: list, fillers: list[tuple[int, Callable]], tensors: list[Tensor]) -> tuple:
    """Return a tuple whose fields are those of all calls, and where there is a filler its own."""
    fields = fields.copy()
    for i, fill in fillers:
        fields[i] = fill(tensors)
    return make(fields)
