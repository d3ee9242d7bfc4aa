"""The specs of the attention functions: calls that between them cover the features."""

import torch

from cases.spec import Spec
from fastlm import attention, kvcache_attention, scaled_dot_product_attention, varlen_attention
from fastlm.testing import seeded_normal

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 runs on the reference alone
_DIFFERENTIABLE = ("query", "key", "value", "mask", "sinks")


# ---- cases ------------------------------------------------------------------------------------------------------------------


def _qkv(dtype, batch=2, heads=4, kv_heads=None, q_len=37, k_len=None, head_dim=16, value_dim=None, layout="bhld") -> dict:
    """query, key and value; "blhd" lays them out as the transpose of (batch, rows, heads, head_dim)."""
    kv_heads, k_len, value_dim = kv_heads or heads, q_len if k_len is None else k_len, value_dim or head_dim
    shapes = {"query": (heads, q_len, head_dim), "key": (kv_heads, k_len, head_dim), "value": (kv_heads, k_len, value_dim)}
    tensors = {name: seeded_normal(i, (batch, *shape), dtype) for i, (name, shape) in enumerate(shapes.items())}
    if layout == "blhd":
        tensors = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in tensors.items()}
    return tensors


def case(sizes: dict | None = None, mask=None, bool_mask=None, sinks=None, alibi_slopes=None, **options):
    """Makes the arguments of a call; mask, sinks and slopes are given by their shapes."""

    def make(dtype) -> dict:
        extra = {}
        if mask is not None:
            extra["mask"] = seeded_normal(10, mask, dtype)
        if bool_mask is not None:
            extra["mask"] = seeded_normal(11, bool_mask, dtype) > -0.3
        if sinks is not None:
            extra["sinks"] = seeded_normal(12, sinks, dtype)
        if alibi_slopes is not None:
            extra["alibi_slopes"] = seeded_normal(13, alibi_slopes, torch.float32).abs() / 8
        return {**_qkv(dtype, **(sizes or {})), **extra, "return_lse": True, **options}

    return make


def _masked_out(dtype) -> dict:
    """Rows, blocks of keys, and a whole head that the mask leaves nothing of."""
    call = case({"q_len": 70, "k_len": 150, "batch": 1})(dtype)
    mask = torch.ones(1, 4, 70, 150, dtype=torch.bool)
    mask[:, 0, 3:9] = mask[:, 1, :, 60:140] = mask[:, 2] = False
    return {**call, "mask": mask}


def _rising(dtype) -> dict:
    """Scores that rise or fall along the keys, slowly or fast, so that the running maximum is passed by as much."""
    call = case({"q_len": 9, "k_len": 330, "batch": 1})(dtype)
    slopes = torch.tensor([0.01, 0.04, 1.0, -1.0], dtype=torch.float64)
    return {**call, "mask": (slopes[:, None, None] * torch.arange(330)).to(dtype)}


_GROUPED = {"heads": 6, "kv_heads": 2, "q_len": 21, "k_len": 45}

_CASES = {
    "plain": case(),
    "longer than a block": case({"q_len": 131, "k_len": 203, "batch": 1, "heads": 2, "head_dim": 64}),
    "transposed": case({"layout": "blhd", "heads": 3}),
    "one of each": case({"batch": 1, "heads": 1, "q_len": 1, "head_dim": 1}),
    "head_dim 40 and 24": case({"head_dim": 40, "value_dim": 24}),
    "head_dim 80 and 7": case({"head_dim": 80, "value_dim": 7}),
    "head_dim 256": case({"head_dim": 256, "batch": 1, "heads": 2}),
    "causal": case(causal=True),
    "causal, more queries than keys": case({"q_len": 40, "k_len": 23}, causal=True),
    "causal, longer than blocks": case({"q_len": 150, "k_len": 170, "batch": 1}, causal=True),
    "window": case({"q_len": 120, "k_len": 140, "batch": 1}, window=(9, 4)),
    "window to the left": case(window=(3, None), causal=True),
    "window of one": case(window=(0, 0)),
    "grouped": case(_GROUPED, causal=True),
    "one head of keys": case({"heads": 5, "kv_heads": 1, "q_len": 3, "k_len": 80}),
    "mask": case(mask=(2, 4, 37, 37)),
    "mask for all": case(mask=(37, 37)),
    "mask per key": case(_GROUPED, mask=(2, 1, 1, 45)),
    "mask per query": case(_GROUPED, mask=(6, 21, 1)),
    "mask of one number": case(mask=()),
    "bool mask": case(bool_mask=(2, 4, 37, 37)),
    "bool mask per key": case(_GROUPED, bool_mask=(2, 1, 1, 45), causal=True),
    "masked out": _masked_out,
    "rising scores": _rising,
    "slopes": case(_GROUPED, alibi_slopes=(6,), causal=True),
    "slopes per example": case({"q_len": 50, "k_len": 30}, alibi_slopes=(2, 4)),
    "softcap": case(softcap=1.5, scale=0.7),
    "negative scale": case(scale=-0.5),
    "sinks": case(_GROUPED, sinks=(6,), window=(4, 0)),
    "sinks alone": case({"q_len": 20, "k_len": 6}, sinks=(4,), causal=True),
    "dropout": case(_GROUPED, dropout_p=0.3, seed=7),
    "dropout per example": case(dropout_p=0.5, seed=torch.tensor([3, 2**62]), causal=True),
    "no keys": case({"k_len": 0}, sinks=(4,)),
    "no queries": case({"q_len": 0, "k_len": 5}),
    "no batch": case({"batch": 0}),
    "everything": case(
        {"heads": 6, "kv_heads": 3, "q_len": 70, "k_len": 90, "head_dim": 24, "value_dim": 40, "layout": "blhd"},
        mask=(2, 1, 70, 90), sinks=(6,), alibi_slopes=(2, 6), softcap=4.0, scale=0.4, window=(30, 5), dropout_p=0.1, seed=-1,
    ),
}  # fmt: skip


def packed(q_lens: list[int], k_lens: list[int], heads=4, kv_heads=2, head_dim=16, **options):
    """Makes the arguments of a call of varlen_attention."""

    def make(dtype) -> dict:
        extra = dict(options)
        if "sinks" in extra:
            extra["sinks"] = seeded_normal(12, (heads,), dtype)
        if "alibi_slopes" in extra:
            extra["alibi_slopes"] = seeded_normal(13, (len(q_lens), heads), torch.float32).abs() / 8
        return {
            "query": seeded_normal(1, (sum(q_lens), heads, head_dim), dtype),
            "key": seeded_normal(2, (sum(k_lens), kv_heads, head_dim), dtype),
            "value": seeded_normal(3, (sum(k_lens), kv_heads, head_dim), dtype),
            "cu_seqlens_q": torch.tensor([0, *q_lens]).cumsum(0).int(),
            "cu_seqlens_k": torch.tensor([0, *k_lens]).cumsum(0).int(),
            "return_lse": True,
            **extra,
        }

    return make


_VARLEN_CASES = {
    "plain": packed([5, 60, 1], [9, 60, 30]),
    "causal": packed([5, 60, 1], [9, 60, 30], causal=True),
    "empty sequences": packed([0, 7, 0, 4, 0], [3, 0, 0, 9, 0], causal=True),
    "no sequences": packed([], []),
    "dropout": packed([5, 12, 3], [5, 12, 8], dropout_p=0.25, seed=5),
    "dropout per sequence": packed([5, 12, 3], [5, 12, 8], dropout_p=0.25, seed=torch.tensor([5, 6, 7])),
    "everything": packed(
        [33, 80, 2], [50, 75, 2], softcap=3.0, window=(20, 0), sinks=True, alibi_slopes=True, dropout_p=0.1, seed=3
    ),
}


def cached(
    lengths: list[int], capacity=64, q_len=1, added=None, heads=4, kv_heads=2, head_dim=16, value_dim=16, page=None, **options
):
    """Makes the arguments of a call of kvcache_attention; what lies past a length is NaN."""

    def make(dtype) -> dict:
        batch, new, extra = len(lengths), added or 0, dict(options)
        total = [length + new for length in lengths]
        caches = {}
        for i, (name, dim) in enumerate((("key_cache", head_dim), ("value_cache", value_dim))):
            cache = seeded_normal(i, (batch, kv_heads, capacity, dim), dtype)
            for b, length in enumerate(total):
                cache[b, :, length:] = torch.nan
            if page:  # pages lie in no order; those past a length are numbered wildly
                cache = cache.unflatten(2, (-1, page)).permute(0, 2, 3, 1, 4).flatten(0, 1).flip(0).contiguous()
            caches[name] = cache
        if page:
            pages = batch * capacity // page
            table = torch.arange(pages - 1, -1, -1, dtype=torch.int32).view(batch, -1)
            past = torch.arange(table.shape[1]) * page >= torch.tensor(total)[:, None]
            extra["block_table"] = table.masked_fill(past, 2**31 - 1)
        if added is not None:
            extra["key"] = seeded_normal(3, (batch, kv_heads, added, head_dim), dtype)
            extra["value"] = seeded_normal(4, (batch, kv_heads, added, value_dim), dtype)
        if "sinks" in extra:
            extra["sinks"] = seeded_normal(12, (heads,), dtype)
        query = seeded_normal(5, (batch, heads, q_len, head_dim), dtype)
        seqlens = torch.tensor(lengths, dtype=torch.int32)
        return {"query": query, **caches, "cache_seqlens": seqlens, "return_lse": True, **extra}

    return make


_CACHE_CASES = {
    "plain": cached([5, 64, 33]),
    "appended": cached([5, 0, 33], added=1, causal=True),
    "appended, several": cached([5, 0, 33], q_len=3, added=3, causal=True),
    "longer than asked": cached([5, 0, 33], q_len=2, added=7, causal=True, value_dim=24),
    "paged": cached([5, 64, 33, 0], page=8),
    "paged, appended": cached([5, 60, 31], q_len=2, added=2, page=16, causal=True),
    "split": cached([1500, 700, 512], capacity=1536, heads=8),
    "split, paged": cached([1500, 513], capacity=1536, page=64, added=3, q_len=3, causal=True),
    "many queries": cached([600, 9], capacity=800, q_len=60, added=60, causal=True),
    "everything": cached([900, 41], capacity=1024, page=32, added=1, window=(600, 0), softcap=2.0, sinks=True, head_dim=40),
    "nothing cached": cached([0, 0]),
    "no batch": cached([]),
}

_TORCH_CASES = {
    "plain": lambda dtype: _qkv(dtype),
    "causal": lambda dtype: {**_qkv(dtype, q_len=40, k_len=60), "is_causal": True},
    "causal, fewer keys": lambda dtype: {**_qkv(dtype, q_len=60, k_len=40), "is_causal": True},
    "mask": lambda dtype: {**_qkv(dtype), "attn_mask": seeded_normal(10, (4, 1, 37), dtype)},
    "grouped": lambda dtype: {**_qkv(dtype, heads=6, kv_heads=2), "enable_gqa": True, "scale": 0.3},
    "three dimensions": lambda dtype: {name: t[0] for name, t in _qkv(dtype).items()},
    "two dimensions": lambda dtype: {name: t[0, 0] for name, t in _qkv(dtype).items()},
    "five dimensions": lambda dtype: {
        **{name: t.unsqueeze(0).expand(3, -1, -1, -1, -1) for name, t in _qkv(dtype).items()},
        "attn_mask": seeded_normal(10, (3, 1, 1, 37, 37), dtype),
    },
}

SPECS = (
    Spec("attention", attention, _DTYPES, ("cpu", "triton"), _DIFFERENTIABLE, _CASES),
    Spec("varlen_attention", varlen_attention, _DTYPES, ("cpu", "triton"), ("query", "key", "value", "sinks"), _VARLEN_CASES),
    Spec("kvcache_attention", kvcache_attention, _DTYPES, ("cpu", "triton"), (), _CACHE_CASES),
    Spec(
        "scaled_dot_product_attention",
        scaled_dot_product_attention,
        _DTYPES,
        ("cpu", "triton"),
        ("query", "key", "value", "attn_mask"),
        _TORCH_CASES,
    ),
)
