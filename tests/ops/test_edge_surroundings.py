"""Test every op under one table of surroundings of a call.

They are the default dtype and device, tracing, forward-mode derivatives, modes, and subclasses, negated views and ZeroTensors
in the place of each tensor. A call bypasses torch's dispatcher only if all of its tensors are known to be plain; all other
calls must give the right results, too.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.processes import printed
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.ops import torch_op
from fastlm.ops.noise import normal
from fastlm.testing import seeded_normal


def n(seed: int, *shape: int) -> torch.Tensor:
    return seeded_normal(seed, shape, torch.float32)


def decode(key_cache, value_cache, **arguments):
    """Decode on copies of the caches, and return these among the results, because rows were appended to them."""
    with torch.no_grad():
        key_cache, value_cache = key_cache.clone(), value_cache.clone()
    results = fastlm.kvcache_attention(key_cache=key_cache, value_cache=value_cache, **arguments, return_lse=True)
    return *results, key_cache, value_cache


CU = torch.tensor([0, 3, 9], dtype=torch.int32)
CACHED = torch.tensor([3, 0], dtype=torch.int32)
QKV = {"query": n(1, 2, 4, 9, 8), "key": n(2, 2, 2, 11, 8), "value": n(3, 2, 2, 11, 8)}
LATENT = {"mu": n(1, 4, 6), "logvar": n(2, 4, 6)}
PRIORS = {"prior_mu": n(3, 6), "prior_logvar": n(4, 4, 6)}
CALLS: dict[str, tuple[Callable, dict]] = {
    "attention": (
        lambda **k: fastlm.attention(**k, causal=True, return_lse=True),
        {**QKV, "mask": n(4, 9, 11), "sinks": n(5, 4), "alibi_slopes": n(6, 4).abs()},
    ),
    "attention, plain": (fastlm.attention, QKV),
    "varlen_attention": (
        lambda **k: fastlm.varlen_attention(**k, cu_seqlens_q=CU, cu_seqlens_k=CU, return_lse=True),
        {"query": n(1, 9, 4, 8), "key": n(2, 9, 2, 8), "value": n(3, 9, 2, 8), "sinks": n(5, 4), "alibi_slopes": n(6, 4).abs()},
    ),
    "scaled_dot_product_attention": (
        lambda **k: fastlm.scaled_dot_product_attention(**k, enable_gqa=True),
        {**QKV, "attn_mask": n(4, 9, 11)},
    ),
    "kvcache_attention": (
        lambda **k: decode(**k, cache_seqlens=CACHED),
        {
            "query": n(1, 2, 4, 1, 8), "key_cache": n(2, 2, 2, 12, 8), "value_cache": n(3, 2, 2, 12, 8),
            "key": n(4, 2, 2, 1, 8), "value": n(5, 2, 2, 1, 8), "sinks": n(6, 4), "alibi_slopes": n(7, 4).abs(),
        },
    ),
    "reparameterize": (lambda **k: fastlm.reparameterize(**k, seed=3), LATENT),
    "reparameterize_with_kl": (lambda **k: fastlm.reparameterize_with_kl(**k, seed=3), {**LATENT, **PRIORS}),
    "gaussian_kl": (fastlm.gaussian_kl, {**LATENT, **PRIORS}),
    # As many weights as the kernel is faster with, and so small that the sums differ by less than assert_same allows.
    "linear": (fastlm.linear, {"input": 0.01 * n(1, 3, 600), "weight": 0.1 * n(2, 1024, 600), "bias": n(3, 1024)}),
}  # fmt: skip
POSITIONS = [(call, name) for call, (_, arguments) in CALLS.items() for name in arguments]
DIFFERENTIABLE = [(call, name) for call, name in POSITIONS if name != "alibi_slopes" and call != "kvcache_attention"]


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernels."""


def results_of(call: str, **changed) -> tuple[torch.Tensor, ...]:
    function, arguments = CALLS[call]
    results = function(**{**arguments, **changed})
    return results if isinstance(results, tuple) else (results,)


def assert_same(results, expected) -> None:
    for result, value in zip(results, expected, strict=True):
        result = result.inner if isinstance(result, Wrapped) else result
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-6)


# ---- kinds of tensors -------------------------------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """Wrap another tensor, as DTensor does, without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


class Subclass(torch.Tensor):
    """Have memory of its own, and override nothing."""


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers as a view whose negative bit is set."""
    view = torch.conj(torch.complex(torch.zeros_like(tensor), -tensor)).imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


KINDS = {
    "a wrapper": Wrapped,
    "a subclass": lambda tensor: tensor.as_subclass(Subclass),
    "a negated view": negated,
    "a parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
}


# No cache is a wrapper here, because `decode` writes to a copy, and the copy of a wrapper is the tensor inside.
@pytest.mark.parametrize(
    ("call", "name", "kind"),
    [(call, name, kind) for call, name in POSITIONS for kind in KINDS if kind != "a wrapper" or "cache" not in name],
)
def test_every_tensor_of_a_call_counts(call, name, kind):
    assert_same(results_of(call, **{name: KINDS[kind](CALLS[call][1][name])}), results_of(call))


@pytest.mark.parametrize(("call", "name"), [(c, name) for c, name in POSITIONS if "cache" not in name])
def test_a_zero_tensor_is_zeros(call, name):
    """torch makes such tensors, which have no memory, for derivatives that it knows to be 0."""
    tensor = CALLS[call][1][name]
    assert_same(
        results_of(call, **{name: torch._efficientzerotensor(tensor.shape)}),
        results_of(call, **{name: torch.zeros_like(tensor)}),
    )


@pytest.mark.parametrize(("call", "name"), DIFFERENTIABLE)
def test_gradients_through_a_negated_view(call, name):
    leaf = CALLS[call][1][name].clone().requires_grad_()
    losses = [sum(result.sum() for result in results_of(call, **{name: of(leaf)})) for of in (torch.clone, negated)]
    expected, gradient = (torch.autograd.grad(loss, leaf)[0] for loss in losses)
    torch.testing.assert_close(gradient, expected)


# ---- settings of a process or a thread --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("call", CALLS)
def test_the_default_dtype_changes_nothing(call, dtype):
    """Run the call three times, because heap corruption shows late."""
    leaves = {name: t.clone().requires_grad_() for c, name in DIFFERENTIABLE if c == call for t in [CALLS[call][1][name]]}
    expected = _with_gradients(call, leaves)
    torch.set_default_dtype(dtype)
    try:
        for _ in range(3):
            results = _with_gradients(call, leaves)
    finally:
        torch.set_default_dtype(torch.float32)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype and torch.equal(result, value)


def _with_gradients(call: str, leaves: dict) -> list[torch.Tensor]:
    results = results_of(call, **leaves)
    gradients = torch.autograd.grad(sum(r.sum() for r in results), list(leaves.values())) if leaves else ()
    return [*(r.detach() for r in results), *gradients]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_the_default_device_changes_nothing(call, backend, monkeypatch):
    leaves = {name: t.clone().requires_grad_() for c, name in DIFFERENTIABLE if c == call for t in [CALLS[call][1][name]]}
    changed = {**leaves, **({"backend": backend} if backend else {})}
    expected = results_of(call, **changed)
    expected = [*expected, *(torch.autograd.grad(sum(r.sum() for r in expected), list(leaves.values())) if leaves else ())]
    torch.set_default_device("meta")
    try:
        results = results_of(call, **changed)
        results = [*results, *(torch.autograd.grad(sum(r.sum() for r in results), list(leaves.values())) if leaves else ())]
    finally:
        torch.set_default_device(None)
    for result, value in zip(results, expected, strict=True):
        assert result.is_cpu
        torch.testing.assert_close(result, value)


def test_noise_under_a_default_dtype_and_device():
    expected = normal((5,), seed=1), fastlm.explain(fastlm.gaussian_kl, **LATENT).backend
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        results = normal((5,), seed=1), fastlm.explain(fastlm.gaussian_kl, **LATENT).backend
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(results[0], expected[0]) and results[1] == expected[1]


class Counting(TorchDispatchMode):
    """Count the ops of fastlm that the mode sees."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func.namespace == "fastlm"
        return func(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", CALLS)
def test_modes_see_the_ops(call):
    expected = results_of(call)
    with Counting() as mode:
        assert_same(results_of(call), expected)
    assert mode.seen == 1


@pytest.mark.parametrize("call", CALLS)
def test_plain_calls_bypass_the_dispatcher_and_watched_ones_do_not(call):
    tensors = CALLS[call][1].values()
    assert torch_op.may_bypass_dispatcher(*tensors)
    with torch.inference_mode():
        assert torch_op.may_bypass_dispatcher(*tensors, torch.ones(1))
    for context in (Counting(), Passing(), forward_ad.dual_level(), torch.autograd.profiler.profile()):
        with context:
            assert not torch_op.may_bypass_dispatcher(*tensors)
    torch.func.vmap(lambda x: _assert(not torch_op.may_bypass_dispatcher(*tensors), x))(torch.ones(2))
    for kind in KINDS:
        if kind != "a parameter":
            assert not torch_op.may_bypass_dispatcher(*tensors, KINDS[kind](torch.ones(2)))
    assert not torch_op.may_bypass_dispatcher(*tensors, torch.ones(2, device="meta"))


def _assert(condition: bool, result):
    assert condition
    return result


# ---- tracing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_a_trace_computes_what_the_call_does(call):
    _, arguments = CALLS[call]
    names = list(arguments)
    traced = torch.jit.trace(
        lambda *tensors: results_of(call, **dict(zip(names, tensors))), tuple(arguments.values()), check_trace=False
    )
    others = [t.abs() * 0.7 if name == "alibi_slopes" else 0.7 * t for name, t in arguments.items()]
    assert_same(traced(*others), results_of(call, **dict(zip(names, others))))


# ---- forward-mode derivatives, which the reference computes -----------------------------------------------------------------


def central_difference(call: str, name: str, tangent: torch.Tensor) -> list[torch.Tensor]:
    arguments = {k: v.double() for k, v in CALLS[call][1].items()}
    step = 1e-5

    def at(sign):
        return results_of(call, **{**arguments, name: arguments[name] + sign * step * tangent.double()})

    return [(after - before) / (2 * step) for after, before in zip(at(1), at(-1))]


@pytest.mark.parametrize("way", ["torch.func.jvp", "forward_ad"])
@pytest.mark.parametrize(("call", "name"), DIFFERENTIABLE)
def test_forward_mode_derivatives(call, name, way):
    """Compare with a difference of float64 calls, which a seed gives the same float32 noise."""
    tensor = CALLS[call][1][name]
    tangent = n(9, *tensor.shape)
    if way == "torch.func.jvp":
        _, tangents = torch.func.jvp(lambda t: results_of(call, **{name: t}), (tensor,), (tangent,))
    else:
        with forward_ad.dual_level():
            duals = results_of(call, **{name: forward_ad.make_dual(tensor, tangent)})
            tangents = [forward_ad.unpack_dual(dual).tangent for dual in duals]
    for actual, expected in zip(tangents, central_difference(call, name, tangent), strict=True):
        actual = torch.zeros_like(expected) if actual is None else actual.double()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_mixtures_of_derivatives():
    q, k, v = (n(i, 1, 2, 5, 4) for i in (1, 2, 3))

    def loss(backend):
        return lambda q: fastlm.attention(q, k, v, causal=True, backend=backend).square().sum()

    for transform in (torch.func.jacfwd, torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.grad(f))):
        torch.testing.assert_close(transform(loss(None))(q), transform(loss("reference"))(q))
    _, linear = torch.func.linearize(lambda q: fastlm.attention(q, k, v), q)
    torch.testing.assert_close(
        linear(v), torch.func.jvp(lambda q: fastlm.attention(q, k, v, backend="reference"), (q,), (v,))[1]
    )


def test_attention_in_forward_mode_stays_on_its_kernel():
    def backend(query):
        return fastlm.explain(fastlm.attention, query, QKV["key"], QKV["value"]).backend

    with forward_ad.dual_level():
        assert backend(QKV["query"]) == backend(forward_ad.make_dual(QKV["query"], QKV["query"])) == "cpu"


def test_the_latent_in_forward_mode_stays_on_its_kernel():
    x = QKV["query"]
    with forward_ad.dual_level():
        for mu in (x, forward_ad.make_dual(x, x)):
            assert fastlm.explain(fastlm.reparameterize, mu, x).backend == "cpu"


# ---- C++ refuses bad input itself, also without the checks of the public functions ------------------------------------------


OPTIONS = (None, None, 0.3, 0.0, 0.0)
REFUSED = {
    "a value that is too short": {"value": QKV["value"][:, :, :5].contiguous()},
    "a key of another dtype": {"key": QKV["key"].double()},
    "float64": {"query": QKV["query"].double(), "key": QKV["key"].double(), "value": QKV["value"].double()},
    "a query of 3 dimensions": {"query": QKV["query"][0]},
    "heads that do not divide": {"key": n(2, 2, 3, 11, 8), "value": n(3, 2, 3, 11, 8)},
    "another head_dim": {"key": n(2, 2, 2, 11, 7)},
    "a mask that is too small": {"mask": torch.zeros(2, 4, 9, 10)},
    "an integer mask": {"mask": torch.zeros(2, 4, 9, 11, dtype=torch.int64)},
    "too few sinks": {"sinks": torch.zeros(3)},
    "too few slopes": {"alibi_slopes": torch.zeros(2, 3)},
    "a seed of another dtype": {"seed": torch.zeros((), dtype=torch.int32)},
    "too many seeds": {"seed": torch.zeros(3, dtype=torch.int64)},
    "cu_seqlens with a batch": {"cu_seqlens_q": CU, "cu_seqlens_k": CU},
    "a window past the integers": {"left": 2**70},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_the_op_itself_refuses(case):
    names = ("query", "key", "value", "mask", "sinks", "alibi_slopes", "seed", "cu_seqlens_q", "cu_seqlens_k", "left")
    changed = {**QKV, **REFUSED[case]}
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.fastlm.attention(*(changed.get(name) for name in names), *OPTIONS[1:])


LATENT_REFUSED = {
    "a logvar of another shape": ({"logvar": n(2, 4, 5)}, {}),
    "a logvar of another dtype": ({"logvar": LATENT["logvar"].double()}, {}),
    "integers": ({"mu": torch.zeros(4, 6, dtype=torch.int64), "logvar": torch.zeros(4, 6, dtype=torch.int64)}, {}),
    "a prior that does not fit": ({"prior_mu": n(3, 5)}, {}),
    "seeds that do not fit": ({}, {"seed": torch.zeros(3, dtype=torch.int64)}),
    "a seed of another dtype": ({}, {"seed": torch.zeros((), dtype=torch.int32)}),
    "more event dimensions than there are": ({}, {"event_dims": 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", LATENT_REFUSED)
def test_the_latents_op_itself_refuses(case):
    changed, other = LATENT_REFUSED[case]
    tensors = {**LATENT, "prior_mu": None, "prior_logvar": None, **changed}
    seed = other.get("seed", torch.zeros((), dtype=torch.int64))
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.fastlm.reparameterize(
            *tensors.values(), seed, True, other.get("event_dims", 1), 0.0, -math.inf, math.inf, None, 1.0
        )


def test_a_loop_that_torch_could_not_run_is_an_error():
    code = """
import ctypes, torch, fastlm
from fastlm.backend import cpu as native
body = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
fails = body(lambda *_: 1)
native.C.use_thread_pool(ctypes.cast(fails, ctypes.c_void_p).value)
for call in (lambda: fastlm.attention(*torch.randn(3, 4, 4, 64, 64)), lambda: fastlm.gaussian_kl(*torch.randn(2, 512, 512))):
    try:
        call()
    except RuntimeError as error:
        print("torch_parallel_for" in str(error))
"""
    assert printed(code).split() == ["True", "True"]


def test_index_tensors_that_another_thread_overwrites_are_read_once():
    code = """
import threading, time, torch, fastlm
rows = 20000
x = torch.randn(rows, 1, 64)
good = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
cu = good.clone()
stop = False

def overwrite():
    while not stop:
        cu[1] = 2**30
        cu[1] = rows // 2

thread = threading.Thread(target=overwrite)
expected = fastlm.varlen_attention(x, x, x, good, good, causal=True, window=(300, 0))
thread.start()
for _ in range(8):
    try:
        assert torch.equal(fastlm.varlen_attention(x, x, x, cu, cu, causal=True, window=(300, 0)), expected)
    except ValueError:
        pass
stop = True
thread.join()
print("survived")
"""
    assert printed(code) == "survived"


# ---- caches are written in place --------------------------------------------------------------------------------------------


def test_autograd_is_told_of_what_decoding_writes():
    cache, weight = torch.zeros(1, 2, 8, 16), torch.ones(1, 2, 8, 16, requires_grad=True)
    stale = (cache * weight).sum()  # It saves the cache for its backward.
    new = {"key": torch.ones(1, 2, 1, 16), "value": torch.ones(1, 2, 1, 16)}
    lengths = torch.tensor([0], dtype=torch.int32)
    fastlm.kvcache_attention(n(1, 1, 2, 1, 16), cache, torch.zeros_like(cache), lengths, **new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    before = cache._version
    fastlm.kvcache_attention(n(1, 1, 2, 1, 16), cache, torch.zeros_like(cache), lengths)  # It writes nothing.
    assert cache._version == before


@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_caches_that_torch_would_not_write_to_are_refused(name, backend):
    _, arguments = CALLS["kvcache_attention"]
    arguments = {**copy.copy(arguments), "cache_seqlens": CACHED, "backend": backend}
    with pytest.raises(ValueError, match=f"{name} is written in place, without a gradient"):
        fastlm.kvcache_attention(**{**arguments, name: arguments[name].clone().requires_grad_()})
    with pytest.raises(ValueError, match=f"{name} is written in place: its rows must not share memory"):
        fastlm.kvcache_attention(**{**arguments, name: arguments[name][:1].expand(2, -1, -1, -1)})
    reading = {k: v for k, v in arguments.items() if k not in ("key", "value")}
    fastlm.kvcache_attention(**{**reading, name: arguments[name][:1].expand(2, -1, -1, -1)})
    with torch.no_grad():
        fastlm.kvcache_attention(**{**arguments, name: arguments[name].clone().requires_grad_()})


def test_caches_of_inference_mode():
    with torch.inference_mode():
        arguments = {name: tensor.clone() for name, tensor in CALLS["kvcache_attention"][1].items()}
        results = fastlm.kvcache_attention(**arguments, cache_seqlens=CACHED)
    torch.testing.assert_close(results, results_of("kvcache_attention")[0])
