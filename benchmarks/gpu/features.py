"""Compile every feature of the Triton kernels once, because the interpreter does not know the compiler's rules."""

import torch
from fastlm.kernels import attention
from torch import Tensor

from gpu import ahead_of_time, latent


def _tensor(*shape: int, dtype=torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _call(query: Tensor, key: Tensor, value: Tensor, arch: str, **options) -> list[attention.Launch]:
    """Return the launches of forward and backward."""
    call = attention.Call(query, key, value, **{"scale": 0.1} | options, arch=arch)
    out, lse = _tensor(*query.shape[:3], value.shape[3], dtype=query.dtype), _tensor(*query.shape[:3], dtype=torch.float32)
    statistics = _tensor(*query.shape[:3], 2, dtype=torch.float32)
    floating = call.mask is not None and call.mask.is_floating_point()
    grads = (query, key, value, _tensor(*call.mask.shape) if floating else None)
    forward = attention.plan_forward(call, out, lse, statistics)
    return forward + attention.plan_backward(call, out, statistics, out, lse, grads, lse)


def _tangents(query: Tensor, key: Tensor, value: Tensor, arch: str, names: tuple, **options) -> list[attention.Launch]:
    """Return the launches of the forward with the tangents of these tensors, and of its backward."""
    call = attention.Call(query, key, value, **{"scale": 0.1} | options, arch=arch)
    given = {name: getattr(call, name) if name in names else None for name in attention.TangentTensors._fields}
    tangents = attention.TangentTensors(**given)
    out, lse = _tensor(*query.shape[:3], value.shape[3], dtype=query.dtype), _tensor(*query.shape[:3], dtype=torch.float32)
    results = attention.JvpResults(out, lse, _tensor(*lse.shape, 2, dtype=torch.float32), out, lse)
    floating = call.mask is not None and call.mask.is_floating_point()
    grads = (query, key, value, call.mask if floating else None)
    forward = attention.plan_jvp(call, tangents, results)
    return forward + attention.plan_jvp_backward(call, tangents, results, out, lse, grads, (lse, lse))


def _stats(query: Tensor, key: Tensor, value: Tensor, arch: str, names: tuple, **options) -> list[attention.Launch]:
    """Return the launches of forward and backward with these statistics, and of the passes for the mass of the keys."""
    call = attention.Call(query, key, value, **{"scale": 0.1} | options, arch=arch)
    out, lse = _tensor(*query.shape[:3], value.shape[3], dtype=query.dtype), _tensor(*query.shape[:3], dtype=torch.float32)
    statistics, by_key = _tensor(*lse.shape, 2, dtype=torch.float32), _tensor(*lse.shape[:2], key.shape[2], dtype=torch.float32)
    max_key = _tensor(*lse.shape, dtype=torch.int32)
    given = {"entropy": lse, "max_logit": lse, "key_mass": by_key}
    given = {name: grad if name in names else None for name, grad in given.items()}
    stats = attention.StatsGrads(**given, max_key=max_key if "max_logit" in names else None)
    floating = call.mask is not None and call.mask.is_floating_point()
    grads = (query, key, value, _tensor(*call.mask.shape) if floating else None)
    forward = attention.plan_forward(call, out, lse, statistics, attention.RowStats(lse, lse, max_key))
    forward += attention.plan_key_mass(call, statistics, by_key) + attention.plan_mass_mean(call, statistics, by_key, lse)
    return forward + attention.plan_backward(call, out, statistics, out, lse, grads, lse, stats)


def _kvcache(query: Tensor, cache: Tensor, arch: str, **options) -> list[attention.Launch]:
    """Return the launches of attention with a KV cache."""
    lengths, lse = _tensor(query.shape[0], dtype=torch.int32), _tensor(*query.shape[:3], dtype=torch.float32)
    call = attention.KVCacheCall(query, cache, cache, lengths, **{"scale": 0.1} | options, arch=arch)
    return attention.plan_kvcache(call, query, lse)


def features(arch: str) -> dict[str, list[attention.Launch]]:
    """Return attention's launches of calls that between them have every option, and of the smallest calls."""
    query, key, value = _tensor(2, 8, 300, 64), _tensor(2, 2, 333, 64), _tensor(2, 2, 333, 40)
    packed = _tensor(1, 8, 900, 64), _tensor(1, 2, 900, 64), _tensor(1, 2, 900, 64)
    single = [_tensor(2, 2, 64, 64, dtype=torch.float32)] * 3
    far = torch.empty_strided((2, 2, 300, 64), (64, 64, 1 << 25, 1), dtype=torch.float16, device="meta")
    one, (many, two, three) = _tensor(1, 1, 1, 64), (_tensor(length, dtype=torch.int32) for length in (9, 2, 3))
    a_seed, seeds, places = (_tensor(*shape, dtype=torch.int64) for shape in ((), (2,), (2, 4)))
    slopes, sinks = _tensor(2, 8, dtype=torch.float32), _tensor(8)
    cache, pages = _tensor(3, 2, 4096, 64), _tensor(99, 16, 2, 64)
    table, new = _tensor(3, 30, dtype=torch.int32), _tensor(3, 2, 2, 64)
    score_options = {"alibi_slopes": slopes, "sinks": sinks, "softcap": 30.0, "left": 100, "right": 5}
    dropped = {"drop_below": 1 << 29, "keep_scale": 1.2}
    return {
        "everything": _call(query, key, value, arch, mask=_tensor(2, 1, 300, 333), seed=seeds, **score_options, **dropped),
        "bool mask": _call(query, key, value, arch, mask=_tensor(333, dtype=torch.bool)),
        "mask per query, a part": _call(query, key, value, arch, mask=_tensor(8, 300, 1), places=places, right=0),
        "mask of one number": _call(query, key, value, arch, mask=_tensor()),
        "one of each": _call(one, one, one, arch, right=0),
        "window, a part": _call(query, key, value, arch, left=64, right=0, seed=a_seed, places=places, **dropped),
        "dropout of next to nothing": _call(query, key, value, arch, seed=a_seed, drop_below=2, keep_scale=1.0),
        "dropout of everything": _call(query, key, value, arch, seed=a_seed, drop_below=1 << 32, keep_scale=0.0),
        "rows far apart": _call(*[far] * 3, arch, right=0),
        "packed": _call(*packed, arch, cu_seqlens_q=many, cu_seqlens_k=many, right=0),
        "packed, one sequence": _call(*packed, arch, cu_seqlens_q=two, cu_seqlens_k=two, left=7),
        "negative scale": _call(query, key, value, arch, scale=-1.0),
        "all tangents": _tangents(
            query,
            key,
            value,
            arch,
            attention.TangentTensors._fields,
            mask=_tensor(2, 1, 300, 333),
            seed=a_seed,
            **score_options,
            **dropped,
        ),  # fmt: skip
        "tangents of query, a part": _tangents(
            query, key, value, arch, ("query",), mask=_tensor(333, dtype=torch.bool), places=places
        ),
        "tangents of key, packed": _tangents(*packed, arch, ("key",), cu_seqlens_q=many, cu_seqlens_k=many, right=0),
        "tangents of value, TF32": _tangents(*single, arch, ("value",), allow_tf32=True),
        "all statistics": _stats(
            query,
            key,
            value,
            arch,
            ("entropy", "max_logit", "key_mass"),
            mask=_tensor(2, 1, 300, 333),
            seed=a_seed,
            **score_options,
            **dropped,
        ),  # fmt: skip
        "entropy, bool mask": _stats(query, key, value, arch, ("entropy",), mask=_tensor(333, dtype=torch.bool)),
        "max_logit, packed, a part": _stats(
            *packed, arch, ("max_logit",), cu_seqlens_q=three, cu_seqlens_k=three, places=places, right=0
        ),
        "key_mass, TF32": _stats(*single, arch, ("key_mass",), allow_tf32=True),
        "statistics of rows far apart": _stats(*[far] * 3, arch, ("entropy", "key_mass"), right=0),
        "TF32": _call(*single, arch, allow_tf32=True),
        "KV cache": _kvcache(_tensor(3, 8, 2, 64), cache, arch, key=new, value=new, **score_options | {"alibi_slopes": sinks}),
        "KV cache, paged": _kvcache(_tensor(3, 8, 1, 64), pages, arch, block_table=table, key=new, value=new),
        "KV cache, one of each": _kvcache(one, one, arch, key=one, value=one),
    }


def failures(arch: str) -> int:
    """Compile every feature for a GPU, print a line for each kernel, and return how many kernels did not compile."""
    failed = 0
    for name, launches in (features(arch) | latent.features(arch)).items():
        for launch in launches:
            line = f"{arch}: {name}: {launch.kernel.__name__}"
            try:
                ahead_of_time.compile_launch(launch, arch)
            except Exception as error:
                failed += 1
                line += f" FAILED: {type(error).__name__}: {error}"
            print(line, flush=True)
    return failed
