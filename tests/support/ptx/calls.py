"""The calls that are interpreted: some of several blocks, with attention's features between them, and those of the specs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from cases import SPECS
from cases import attention as cases
from support.derivatives import add_tangents, and_tangents, with_tangents
from support.oracle import Oracle, noisy_results
from support.stats import with_stats

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class PtxCall(NamedTuple):
    """A call of an op's function, and the dtypes that it is interpreted in."""

    function: str  # The name of its spec.
    make: Callable[[torch.dtype], dict]
    dtypes: tuple[torch.dtype, ...]
    has_tangents: bool = False  # Forward mode, too, and the gradients of all its results: second derivatives.
    has_stats: bool = False  # All of attention's statistics, too.

    def oracle(self, dtype: torch.dtype, has_gradients: bool = True) -> Oracle:
        """Return what holds the call's results, and its gradients, to the rule of errors."""
        spec, call = SPECS[self.function], self.make(dtype)
        function, names = spec.function, spec.differentiable if has_gradients else ()
        if self.has_stats:
            function = with_stats(function)
        if self.has_tangents:
            function, call, names = with_tangents(function), add_tangents(call, names), and_tangents(names)
        return Oracle(function, call, names, noisy_results(spec.name))


def _call(*dtypes: torch.dtype, sizes: dict | None = None, **options) -> PtxCall:
    sizes = {"batch": 1, "heads": 2, "q_len": 150, "k_len": 170, "head_dim": 64} | (sizes or {})
    return PtxCall("attention", cases.case(sizes, **options), dtypes)


def _varlen(*dtypes: torch.dtype, q_lens=(130, 1, 0, 64), k_lens=(140, 7, 3, 100), head_dim=64, **options) -> PtxCall:
    return PtxCall("varlen_attention", cases.packed(list(q_lens), list(k_lens), head_dim=head_dim, **options), dtypes)


def _kvcache(*dtypes: torch.dtype, lengths=(700, 333), dim=64, **options) -> PtxCall:
    options = {"capacity": 1024, "head_dim": dim, "value_dim": dim} | options
    return PtxCall("kvcache_attention", cases.cached(list(lengths), **options), dtypes)


_GROUPED = {"heads": 4, "kv_heads": 2}

CALLS = {
    "plain": _call(F16, BF16, F32),
    "causal": _call(BF16, F16, F32, causal=True),
    "grouped": _call(BF16, F16, sizes=_GROUPED, causal=True),
    "window and softcap": _call(F16, F32, sizes=_GROUPED, window=(64, 0), softcap=2.0),
    "slopes and sinks": _call(BF16, sizes=_GROUPED, alibi_slopes=(4,), sinks=(4,), causal=True),
    "mask and dropout": _call(BF16, F32, mask=(1, 2, 150, 170), dropout_p=0.2, seed=1),
    "boolean mask": _call(F16, BF16, bool_mask=(1, 2, 150, 170)),
    "window": _call(BF16, F16, sizes={"k_len": 600}, window=(330, 0)),  # All three phases have blocks.
    "long": _call(F16, BF16, sizes={"heads": 1, "q_len": 20, "k_len": 1100}),
    "rows without keys": _call(BF16, F16, sizes={"q_len": 300, "k_len": 130}, causal=True),
    "with statistics": _call(BF16, F16, sizes={"k_len": 400}, causal=True)._replace(has_stats=True),
    "head_dim 40 and 24": _call(BF16, F32, sizes={"head_dim": 40, "value_dim": 24}),
    "head_dim 128": _call(BF16, F32, sizes={"head_dim": 128}, causal=True),
    "head_dim 256": _call(F16, F32, sizes={"head_dim": 256}),
    "packed": _varlen(F16, BF16, F32, causal=True),
    "packed with dropout": _varlen(BF16, dropout_p=0.25, seed=5, window=(50, 10)),
    "with tangents": _call(BF16, F32, causal=True)._replace(has_tangents=True),
    "cache": _kvcache(BF16, F32, heads=8),
    "cache, paged and appended": _kvcache(BF16, F16, added=3, q_len=3, page=16, causal=True, heads=8),
    "cache, a page holds a block": _kvcache(BF16, q_len=2, page=256, causal=True, heads=8),
    "cache, pages end in a block": _kvcache(BF16, capacity=1008, page=24, window=(300, 0), heads=8),
    "cache, head_dim 128": _kvcache(F16, F32, dim=128, window=(100, 0)),
}

# What `make test` interprets for a GPU, each in its first dtype.
COVERING = {
    "sm_80": ("causal", "mask and dropout", "packed", "cache, paged and appended", "reparameterize_with_kl: everything"),
    "sm_90": ("grouped", "window and softcap"),
    "sm_100": ("window", "head_dim 128", "rows without keys"),
}


def spec_calls() -> dict[str, PtxCall]:
    """Return the cases of the ops' specs, each in one dtype. They are small: most have one block."""
    calls = {}
    for spec in SPECS.values():
        if "triton" in spec.backends:
            for i, (case, make) in enumerate(spec.cases.items()):
                calls[f"{spec.name}: {case}"] = PtxCall(spec.name, make, (spec.dtypes[i % len(spec.dtypes)],))
    return calls
