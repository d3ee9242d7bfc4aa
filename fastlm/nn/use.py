"""Routing attention calls to fastlm in code that one cannot edit."""

import functools
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from ..ops.attention import has_kernel, scaled_dot_product_attention
from ..ops.checks import DTYPES
from ..ops.latent import standard_normal
from ..ops.tensor_classes import are_known
from ..ops.torch_op import PLAIN, is_eager
from . import blocks, handwritten
from .entry_points import EntryPoints
from .multi_head_call import MultiHeadCall
from .why_not import SUBCLASS, call_why_not, mask_dtype_fits


class use:  # noqa: N801 (read as a verb: `with fastlm.use():`)
    """Run attention on fastlm's kernels inside ``with fastlm.use() as report:``, whoever calls it and however it is written.

    The block routes ``F.scaled_dot_product_attention`` and ``F.multi_head_attention_forward``, and so every
    torch.nn.MultiheadAttention and the layers of torch.nn.Transformer. Functions of fastlm stand in for these, under the names
    that loaded modules have for them, so that nothing else takes longer (products some
    microseconds, while ``handwritten`` attention is looked for); a copy that an object or a closure holds is not found,
    nor is the function that a graph of torch.fx names. A user's own TorchFunctionMode sees the functions of fastlm. The block
    holds for the thread that entered it, and for the backward that this thread runs. After it, everything is as before. A
    recomputation by torch.utils.checkpoint must run inside too. Under ``torch.compile``, code that was compiled outside is
    compiled again inside, and the other way round; compiled code is routed in all threads as long as one is in a block, and
    attention of a user's own subclass of Tensor cannot be compiled there.

    With ``handwritten``, attention that is spelled out, such as ``softmax(q @ k.mT * scale + bias, -1) @ v``, is found while it
    runs: a product of queries and transposed keys (by ``@``, matmul, bmm, baddbmm or einsum, 3 to 5 dimensions) and what
    follows are recorded, and become one call where the weights meet the values. The tensors in between have the shape, strides
    and dtype that torch gives them, and are computed by torch's own calls, to the bit, if anything else needs them. Dropout
    draws fastlm's noise from a seed of torch's generator. Rows whose keys are all hidden by -inf give zeros, where torch gives
    NaN. Code that changes a query, key or mask in place before the weights meet the values gets an error, if the change shows
    in the tensor's version (as one through ``.data`` or numpy does not). Small products, and those of compiled or transformed
    code, are torch's; for compiled code there is a pass (fastlm.integrations.inductor).

    Jagged tensors (B, H, lengths, D), transposes of (B, lengths, H, D), are attended within as packed sequences.

    Large samples of torch.distributions (rsample of Normal and of all that is made of its noise, on a CPU) draw fastlm's noise
    from a seed of torch's generator, too: torch.manual_seed repeats them, but they are not torch's.

    torch's own function runs what kernels cannot do: other dtypes and devices, other nested tensors and subclasses of Tensor
    (but DTensor), calls inside ``sdpa_kernel(SDPBackend.MATH)`` or torch.jit.trace, and bad input, for which torch raises its
    own errors.

    Args:
        handwritten: whether to look for attention that is spelled out.

    Attributes, in which compiled code does not count:
        routed: the number of calls that ran on fastlm.
        left: for each reason, the number of calls that were left to torch.
        drawn: the number of samples of torch.distributions whose noise fastlm drew.
    """

    def __init__(self, handwritten: bool = True) -> None:
        self.handwritten = handwritten
        self.routed = self.drawn = 0
        self.left: Counter[str] = Counter()

    def __str__(self) -> str:
        lines = [f"{self.routed} calls of attention ran on fastlm, {self.left.total()} were left to torch"]
        lines += [f"  {count} times: {reason}" for reason, count in self.left.items()]
        return "\n".join(lines + [f"{self.drawn} samples drew fastlm's noise"] * (self.drawn > 0))

    __repr__ = __str__

    def __enter__(self) -> "use":
        _entry_points.put_in()
        blocks.enter(self)
        return self

    def __exit__(self, *_) -> None:
        blocks.leave()
        _entry_points.take_out()

    def _count(self, reason: str | None) -> None:
        if reason is None:
            self.routed += 1
        else:
            self.left[reason] += 1


# ---- the whole process ------------------------------------------------------------------------------------------------------

_enabling = threading.Lock()


def enable(handwritten: bool = True) -> use:
    """Do what `use` does, in the whole process and all its threads, until `disable`. Return the report, which counts all.

    A second call returns the first one's report, and changes nothing.
    """
    with _enabling:
        if blocks.everywhere is None:
            _entry_points.put_in()
            blocks.everywhere = use(handwritten)
        return blocks.everywhere


def disable() -> None:
    """Undo `enable`. Blocks of `use` go on."""
    with _enabling:
        if blocks.everywhere is not None:
            blocks.everywhere = None
            _entry_points.take_out()


# ---- the functions that stand in for torch's --------------------------------------------------------------------------------


def _routed(theirs: Callable, attend: Callable, attend_classes: Callable) -> Callable:
    """Return a function that runs ``attend`` inside a block, and torch's function elsewhere.

    ``attend(args, kwargs)`` returns (what the call returns, None), or (None, why it is left to torch); so does
    ``attend_classes(args, kwargs, given)``, which runs instead if arguments ``given`` override torch's functions.
    """

    @functools.wraps(theirs)
    def ours(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling():  # The graph is used as long as ours is in place.
            out, reason = attend(args, kwargs)
            if reason is SUBCLASS:
                return _compiled_of_subclasses(theirs, args, kwargs)
            return out if reason is None else theirs(*args, **kwargs)
        block = blocks.current()
        if block is None:
            return theirs(*args, **kwargs)
        if torch._C._is_torch_function_mode_enabled():  # Each mode of the user's sees the call first, and calls ours again.
            return handle_torch_function(ours, (*args, *kwargs.values()), *args, **kwargs)
        given = _overriding((*args, *kwargs.values()), PLAIN)
        if given and are_known(given):
            given = []  # so that fastlm's function runs, and not _leave_classes
        out, reason = attend_classes(args, kwargs, given) if given else attend(args, kwargs)
        block._count(reason)
        if reason is None:
            return out
        with blocks.Outside():
            if given:  # Their classes may ask whether it is the function of that name.
                with _entry_points.suspended():
                    return theirs(*args, **kwargs)
            return theirs(*args, **kwargs)

    return ours


def _overriding(args: tuple, known: frozenset[type]) -> list:
    """Return the arguments that override torch's functions, without those of ``known`` classes."""
    return [arg for arg in args if type(arg) not in known and hasattr(type(arg), "__torch_function__")]


def _compiled_of_subclasses(theirs: Callable, args: tuple, kwargs: dict):
    """Call torch's function in a graph, where torch's names cannot be put back for a class that compares functions with them.

    torch's own CausalBias compares, so its method is called directly. A user's class may compare, so it is refused.
    """
    for arg in (*args, *kwargs.values()):
        kind = type(arg)
        if isinstance(arg, Tensor) and kind.__name__ == "CausalBias":
            return kind._dispatch(*args, **kwargs)
        if isinstance(arg, Tensor) and not kind.__module__.startswith("torch."):
            raise NotImplementedError(
                f"torch.compile inside fastlm.use takes no attention of a {kind.__name__}; call it outside"
            )
    return theirs(*args, **kwargs)


def _leave_classes(args: tuple, kwargs: dict, given: list) -> tuple[None, str]:
    """Leave a call to torch, as the classes of its arguments know better what it means."""
    return None, SUBCLASS


def _attend_jagged(args: tuple, kwargs: dict, given: list) -> tuple[Tensor | None, str | None]:
    """Attend within jagged tensors, and leave all other classes to torch."""
    jagged = sys.modules.get("torch.nested._internal.nested_tensor")  # Whoever has such a tensor has imported it.
    if jagged is None or any(type(arg) is not jagged.NestedTensor for arg in given):
        return _leave_classes(args, kwargs, given)
    from .jagged import attend_jagged  # It imports much of torch that most programs do not need.

    return attend_jagged(*args, **kwargs)


def _attend(args: tuple, kwargs: dict) -> tuple[Tensor | None, str | None]:
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    reason = call_why_not(tensors) or _why_not(*args, **kwargs)
    if reason is None:
        try:
            return scaled_dot_product_attention(*args, **kwargs), None
        except (TypeError, ValueError) as error:
            reason = str(error)
    return None, reason


def _attend_with_projections(args: tuple, kwargs: dict) -> tuple[tuple[Tensor, Tensor | None] | None, str | None]:
    call = MultiHeadCall(*args, **kwargs)
    reason = call.why_not()
    return (call.run() if reason is None else None), reason


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Return why a call of ``F.scaled_dot_product_attention`` is left to torch, or None."""
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensors are not fused"
    if not query.shape[-1]:
        return "the vectors of query have no elements"
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        return "enable_gqa without a dimension of heads"
    if attn_mask is not None and (attn_mask.dim() < 2 or not mask_dtype_fits(attn_mask, query)):
        return "attn_mask is not of the dimensions or dtypes that torch takes"
    if not has_kernel(query, value):
        return f"no kernel takes {query.dtype} on {query.device}"
    return None


def _deferring(theirs: Callable) -> Callable:
    """Return a function that inside a block defers torch's product of queries and keys, and is torch's else."""

    @functools.wraps(theirs)
    def ours(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return theirs(*args, **kwargs)
        block = blocks.current()
        if block is None or not block.handwritten:
            return theirs(*args, **kwargs)
        if torch._C._is_torch_function_mode_enabled():  # Each mode of the user's sees the call first, and calls ours again.
            return handle_torch_function(ours, (*args, *kwargs.values()), *args, **kwargs)
        if handwritten.may_be_scores(args, kwargs):
            scores = handwritten.begin(theirs, args, kwargs, block._count)
            return theirs(*args, **kwargs) if scores is None else scores
        if not _overriding(args, _TAKEN):
            return theirs(*args, **kwargs)
        with _entry_points.suspended():  # Their classes may ask whether it is the function of that name.
            return theirs(*args, **kwargs)

    handwritten.stands_in_for(ours, theirs)
    return ours


_TAKEN = PLAIN | {handwritten.Deferred}


def _off_in_blocks(theirs: Callable[[], bool]) -> Callable[[], bool]:
    """Return a switch that keeps torch's modules, in a block, from fused code that calls none of the functions above."""

    @functools.wraps(theirs)
    def ours() -> bool:
        return not torch.compiler.is_dynamo_compiling() and blocks.current() is None and theirs()

    return ours


def _counting(theirs: Callable) -> Callable:
    """Return torch's FlexAttention that a block counts as left to torch."""

    @functools.wraps(theirs)
    def ours(*args, **kwargs):
        block = None if torch.compiler.is_dynamo_compiling() else blocks.current()
        if block is not None:
            block._count("FlexAttention is a compiler of its own")
        return theirs(*args, **kwargs)

    return _named("counted_flex_attention", ours)


LEAST_NOISE = 1 << 15  # Below so many normals, torch's single thread draws them as fast.


def _drawing(theirs: Callable) -> Callable:
    """Return the noise of torch.distributions that a block draws by fastlm's kernel, where that is faster."""

    @functools.wraps(theirs)
    def ours(shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
        block = blocks.current() if is_eager() else None
        taken = dtype in DTYPES and device is not None and torch.device(device).type == "cpu"
        if block is None or not taken or math.prod(shape) < LEAST_NOISE:
            return theirs(shape, dtype, device)
        block.drawn += 1
        return standard_normal(tuple(shape), dtype, torch.randint(2**63 - 1, (), device="cpu"))

    return _named("drawn_normal", ours)


def _named(name: str, ours: Callable) -> Callable:
    """Name the function as this module does, so that pickles and torch.compile's caches never take it for torch's."""
    ours.__module__, ours.__name__, ours.__qualname__ = __name__, name, name
    return ours


routed_sdpa = _named("routed_sdpa", _routed(F.scaled_dot_product_attention, _attend, _attend_jagged))
routed_multi_head = _named(
    "routed_multi_head", _routed(F.multi_head_attention_forward, _attend_with_projections, _leave_classes)
)
fast_path = _named("fast_path", _off_in_blocks(torch.backends.mha.get_fastpath_enabled))

deferred_matmul = _named("deferred_matmul", _deferring(torch.matmul))
deferred_bmm = _named("deferred_bmm", _deferring(torch.bmm))
deferred_baddbmm = _named("deferred_baddbmm", _deferring(torch.baddbmm))
deferred_einsum = _named("deferred_einsum", _deferring(torch.einsum))
deferred_matmul_method = _named("deferred_matmul_method", _deferring(Tensor.matmul))
deferred_bmm_method = _named("deferred_bmm_method", _deferring(Tensor.bmm))
deferred_baddbmm_method = _named("deferred_baddbmm_method", _deferring(Tensor.baddbmm))

_entry_points = EntryPoints(
    (
        (F.scaled_dot_product_attention, routed_sdpa),
        (F.multi_head_attention_forward, routed_multi_head),
        (torch.backends.mha.get_fastpath_enabled, fast_path),
        (torch.matmul, deferred_matmul),
        (torch.bmm, deferred_bmm),
        (torch.baddbmm, deferred_baddbmm),
        (torch.einsum, deferred_einsum),
    ),
    skipped=(__name__, "torch._C"),  # torch itself looks up in its C++ module what its functions are
    methods=(
        (Tensor, "matmul", deferred_matmul_method),
        (Tensor, "__matmul__", deferred_matmul_method),
        (Tensor, "bmm", deferred_bmm_method),
        (Tensor, "baddbmm", deferred_baddbmm_method),
    ),
    later=(
        ("torch.nn.attention.flex_attention", "flex_attention", _counting),
        ("torch.distributions.utils", "_standard_normal", _drawing),
    ),
)
