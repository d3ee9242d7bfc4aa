"""Find hand-written attention in a graph that torch.compile has traced, and make one call of attention of it.

The graph is the one of torch's functions and methods that dynamo hands to its backends, before autograd has seen it. Steps
mean what `STEPS` says: they are described on the fake tensors that dynamo has left at the nodes. The node that replaces a chain
calls attention on the tensors that autograd traces with, so that the op and its gradient become part of what is compiled.
"""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import _disable_current_modes

from ...ops.noise import seed_tensor
from .chain import Chain
from .deferred import torchs_own
from .products import READERS, chain_of, lead_of, read, weights_first
from .steps import SAME, STEPS, Step

# The least scores that are faster in one call than in inductor's code, measured with two threads of an EPYC with AVX512-BF16.
# Where hidden ones are filled with a finite number, one op more is called.
LEAST, LEAST_FILLED = 1 << 16, 1 << 17


def fuse(graph: Graph) -> None:
    """Replace each chain of hand-written attention in the graph by one node."""
    nodes = list(graph.nodes)
    if not _is_plain(nodes):
        return
    order = {node: at for at, node in enumerate(nodes)}
    autocasts = 0  # that the graph itself has entered
    for node in nodes:
        autocasts += (node.target is _enter_autocast) - (node.target is _exit_autocast)
        if autocasts == 0 and _function(node) in READERS:
            found = _Search(node, order).run()
            if found is not None:
                found.replace(graph)


def _is_plain(nodes: list[Node]) -> bool:
    """Tell whether this is dynamo's outermost graph, without transforms of torch.func and derivatives inside."""
    if not all("grapharg" in node.meta for node in nodes if node.op == "placeholder"):
        return False
    modules = {_module(node) for node in nodes if node.op == "call_function"}
    return not any(f"{module}.".startswith(foreign) for module in modules for foreign in _FOREIGN)


_FOREIGN = "torch._functorch.", "torch._C._functorch.", "torch.autograd.", "torch.func."


# ---- the call ---------------------------------------------------------------------------------------------------------------


class _Slot:
    """The place of a tensor, which is one of the arguments of `Spelled`."""

    def __init__(self, index: int) -> None:
        self.index = index


class _Product(NamedTuple):
    """A call of one of READERS, with a `_Slot` for each tensor."""

    function: Callable
    args: tuple
    kwargs: dict


class Spelled:
    """One call of attention in the place of a chain of nodes: the function of the node that replaces them."""

    __module__, __name__ = __name__, "spelled_attention"

    def __init__(self, scores: _Product, chain: Chain, out: _Product) -> None:
        """Take the products with keys and with values, and the chain between them, with a `_Slot` for each tensor.

        What the products read from their tensors takes the place of the chain's own query and key.
        """
        self._scores, self._chain, self._out = scores, chain, out

    def __call__(self, *tensors: Tensor) -> Tensor | None:
        """Return what the chain gives, or None if this is no way to compute it exactly."""

        def filled(template):
            return map_aggregate(template, lambda leaf: tensors[leaf.index] if type(leaf) is _Slot else leaf)

        scores, out = read(*filled(tuple(self._scores))), read(*filled(tuple(self._out)))
        chain = self._chain
        chain = chain._replace(
            query=scores.left,
            key=scores.right.transpose(-2, -1),
            factors=filled(chain.factors),
            biases=filled(chain.biases),
            hidden=filled(chain.hidden),
        )
        seed = seed_tensor(None, chain.query) if chain.dropout_p else None
        attended = chain.attend(out.right, seed)
        return attended if out.dims is None or attended is None else attended.permute(out.dims)


# ---- the search -------------------------------------------------------------------------------------------------------------


class _Unfit(Exception):
    """The nodes are no hand-written attention, or something is not known while compiling, as a symbolic size."""


# What reading arguments of any kind, and trying the call on fake tensors, raises.
_UNFIT = _Unfit, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError


class _Found(NamedTuple):
    """A chain of nodes, and what replaces the last of them."""

    nodes: list[Node]
    call: Spelled
    tensors: tuple[Node, ...]

    def replace(self, graph: Graph) -> None:
        last = self.nodes[-1]
        with graph.inserting_before(last):
            node = graph.call_function(self.call, self.tensors)
        node.meta = dict(last.meta)
        last.replace_all_uses_with(node)
        for node in reversed(self.nodes):
            graph.erase_node(node)


class _Search:
    """Follow one product through the graph to where its softmax meets values."""

    def __init__(self, product: Node, order: dict[Node, int]) -> None:
        self._product, self._order = product, order
        self._nodes = [product]
        self._aliases = [product]  # the nodes that are the same tensor, after steps in place
        self._known: dict[int, Node] = {}  # which node a fake tensor belongs to, by its id

    def run(self) -> _Found | None:
        """Return the chain, or None if there is none or something forbids to compute it at its end."""
        try:
            chain = self._begin()
            while chain is not None:
                node, at = self._next()
                if _function(node) in READERS:
                    return self._end(chain, node, at)
                chain = self._after(chain, node, at)
        except _UNFIT:  # The chain stays inductor's. torch itself tells what is wrong with its calls.
            pass
        return None

    def _begin(self) -> Chain | None:
        args, kwargs = self._value_of(self._product.args), self._value_of(self._product.kwargs)
        operands = read(_function(self._product), args, kwargs)
        lead = None if operands is None else lead_of(operands)
        if lead is None or not operands.left.is_cpu:
            return None
        scores = math.prod((*lead, operands.left.shape[-2], operands.right.shape[-1]))
        if scores < LEAST:
            return None
        return chain_of(operands, lead)

    def _next(self) -> tuple[Node, int]:
        """Return the next node that uses the tensor, and the tensor's position among its arguments."""
        users = {user for alias in self._aliases for user in alias.users if not self._asks_dtype(user)} - set(self._nodes)
        if not users:
            raise _Unfit
        node = min(users, key=self._order.__getitem__)
        places = [at for at, arg in enumerate(node.args) if isinstance(arg, Node) and arg in self._aliases]
        writes = _writes(node)
        if len(places) != 1 or (writes and places != [0]) or (not writes and len(users) > 1):
            raise _Unfit
        self._nodes.append(node)
        self._aliases = [*self._aliases, node] if writes else [node]
        return node, places[0]

    def _asks_dtype(self, user: Node) -> bool:
        """Tell whether a node converts another tensor to the dtype of this one."""
        return _function(user) is Tensor.type_as and user.args[0] not in self._aliases

    def _after(self, chain: Chain, node: Node, at: int) -> Chain | None:
        """Return the chain after one more step, or None if the node is none."""
        step = _step(node)
        if step is None:
            return None
        rest = self._value_of((*node.args[:at], *node.args[at + 1 :]))
        after = step.describe(chain, at, *rest, **self._value_of(node.kwargs))
        if after is SAME or after is None:
            return chain if after is SAME else None
        return after._replace(dtype=chain.dtype) if step.out_of_place is not None else after

    def _end(self, chain: Chain, node: Node, at: int) -> _Found | None:
        """Return the chain if the node is its product with values, and a call of attention has the same result."""
        function = _function(node)
        node_args, at = weights_first(function, node.args, at)
        args, kwargs = self._value_of(node_args), self._value_of(node.kwargs)
        operands = read(function, args, kwargs)
        if operands is None or operands.left is not args[at] or operands.added is not None or chain.why_not(operands.right):
            return None
        is_filled = chain.hidden and chain.fill != -math.inf
        if not self._can_wait() or (is_filled and math.prod(chain.shape) < LEAST_FILLED):
            return None
        tensors: list[Node] = []

        def slot(leaf: object) -> object:
            known = self._known[id(leaf)] if isinstance(leaf, Tensor) else leaf
            if not isinstance(known, Node):
                return leaf
            if known is node_args[at]:  # Of the weights only the shape is read.
                return args[at]
            if known not in tensors:
                tensors.append(known)
            return _Slot(tensors.index(known))

        product = self._product
        call = Spelled(
            _Product(_function(product), map_aggregate(product.args, slot), map_aggregate(product.kwargs, slot)),
            chain._replace(**{name: map_aggregate(getattr(chain, name), slot) for name in ("factors", "biases", "hidden")}),
            _Product(function, map_aggregate(node_args, slot), map_aggregate(node.kwargs, slot)),
        )
        return _Found(self._nodes, call, tuple(tensors)) if _gives(call, self._value_of(tensors), node) else None

    def _can_wait(self) -> bool:
        """Tell whether the chain means the same where its last node is, and nobody else sees what is between its ends."""
        start, end = self._order[self._product], self._order[self._nodes[-1]]
        between = [node for node, at in self._order.items() if start < at < end and node not in self._nodes]
        users = {user for node in self._nodes[:-1] for user in node.users}
        return users <= set(self._nodes) and not any(map(_may_write, between))

    # ---- arguments ----------------------------------------------------------------------------------------------------------

    def _value_of(self, args: object) -> object:
        """Return arguments with fake tensors, and numbers for constant ones, in the place of nodes."""
        return map_aggregate(args, lambda arg: self._value_of_node(arg) if isinstance(arg, Node) else arg)

    def _value_of_node(self, node: Node) -> object:
        constant = _constant(node)
        if constant is not None:
            return constant
        value = node.meta.get("example_value")
        if not isinstance(value, FakeTensor) or value.layout is not torch.strided or value.is_nested or value.is_neg():
            raise _Unfit
        if not all(type(size) is int for size in (*value.shape, *value.stride())):
            raise _Unfit
        self._known[id(value)] = node
        return value


def _gives(call: Spelled, tensors: list[Tensor], node: Node) -> bool:
    """Tell whether the call has a result like the node's, by trying it on fake tensors."""
    with tensors[0].fake_mode, torch.no_grad():  # Whoever watches what is saved for backwards must not see the trial.
        out = call(*tensors)
    like = node.meta["example_value"]
    return out is not None and (out.shape, out.stride(), out.dtype) == (like.shape, like.stride(), like.dtype)


# ---- nodes ------------------------------------------------------------------------------------------------------------------

_OPERATORS = {operator.matmul: torch.matmul} | {
    getattr(operator, name): getattr(Tensor, f"__{name}__")
    for name in ("mul", "imul", "truediv", "itruediv", "add", "iadd", "sub", "isub")
}


def _function(node: Node) -> Callable | None:
    """Return the function or the method of Tensor that a node calls, as READERS and STEPS name it."""
    if node.op == "call_method":
        return torchs_own(getattr(Tensor, node.target, None))
    return _OPERATORS.get(node.target, node.target) if node.op == "call_function" else None


def _step(node: Node) -> Step | None:
    return STEPS.get(_function(node))


def _writes(node: Node) -> bool:
    """Tell whether the node is a step in place."""
    step = _step(node)
    return step is not None and step.out_of_place is not None


def _module(node: Node) -> str:
    return getattr(node.target, "__module__", None) or "torch"  # Builtins of torch have none.


def _may_write(node: Node) -> bool:
    """Tell whether a node may change a tensor or a mode of torch: everything may that is not known."""
    if node.op in ("placeholder", "get_attr"):
        return False
    if not node.users or "out" in node.kwargs or node.target in _WRITING:
        return True
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "_")
    known = node.op == "call_method" or (node.op == "call_function" and _module(node).split(".")[0] in _KNOWN)
    return not known or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


_KNOWN = "torch", "_operator", "builtins", "math"
_WRITING = {getattr(operator, name) for name in operator.__all__ if name.startswith("i") and hasattr(operator, name[1:])}
_WRITING |= {operator.setitem, operator.delitem, _enter_autocast, _exit_autocast}


def _constant(node: object) -> Tensor | None:
    """Return the value of a tensor without dimensions, such as ``torch.tensor(2.0).sqrt()``, or None for any other argument."""
    if not isinstance(node, Node) or _function(node) not in _CONSTANTS or any(map(_writes_or_views, node.users)):
        return None
    args = tuple(_constant(arg) if isinstance(arg, Node) else arg for arg in node.args)
    if not args or any(not isinstance(arg, (int, float, Tensor)) for arg in args):
        return None
    with _disable_current_modes():
        return node.target(*args, **node.kwargs) if node.op == "call_function" else getattr(args[0], node.target)(*args[1:])


_CONSTANTS = {torch.tensor, torch.scalar_tensor, torch.sqrt, Tensor.sqrt}


def _writes_or_views(node: Node) -> bool:
    """Tell whether a node is none of the functions that may use a constant."""
    step = _step(node)
    return _function(node) not in _CONSTANTS if step is None else step.is_view or step.out_of_place is not None
