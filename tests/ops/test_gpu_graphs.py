"""Test the GPU kernels in CUDA graphs, under torch.compile, on a side stream and on a second GPU.

Where there is no GPU, these tests are rehearsed in Triton's interpreter: a graph is a call made again, a stream is none, and
both devices are the CPU.
"""

from contextlib import nullcontext

import pytest
import torch
from suite.device import CPU, CUDA
from support.triton_interpreter import DEVICE, ON_GPU

import fastlm
from fastlm.testing import seeded_normal

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = pytest.mark.gpu

captured = (CUDA if ON_GPU else CPU).capture
LENGTH = 300 if ON_GPU else 20
SEVERAL = range(3)


def normals(first: int, *shape: int, device=DEVICE) -> list[torch.Tensor]:
    """Return query, key and value."""
    return [seeded_normal(first + i, shape, torch.float16).to(device) for i in range(3)]


def values_and_gradients(query, key, value, **options) -> tuple[torch.Tensor, ...]:
    """Return the output of a causal call, and the gradients of its sum of squares."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = fastlm.attention(*leaves, causal=True, backend="triton", **options)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def assert_same(results, expected) -> None:
    """Assert the same bits."""
    for i, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(actual, wanted), f"result {i}"


# ---- CUDA graphs ------------------------------------------------------------------------------------------------------------


def test_attention_and_its_gradients_in_a_graph():
    tensors, seed = normals(0, 1, 2, LENGTH, 16), torch.tensor(1, device=DEVICE)
    replay = captured(lambda: values_and_gradients(*tensors, dropout_p=0.2, seed=seed))
    for i in SEVERAL:
        for tensor, new in zip(tensors, normals(10 * i, 1, 2, LENGTH, 16)):
            tensor.copy_(new)
        seed.fill_(i)
        assert_same(replay(), values_and_gradients(*tensors, dropout_p=0.2, seed=i))


@pytest.mark.parametrize("page", [None, 16])
def test_decoding_in_a_graph(page):
    """Change lengths, query and what is appended between replays; the graph reads them where they lie."""
    shape, table = (2, 1, 64, 16), None
    if page:
        shape, table = (8, page, 1, 16), torch.randperm(8, device=DEVICE).int().view(2, 4)
    caches = [torch.zeros(shape, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    mirrors = [cache.clone() for cache in caches]
    query, key, value = (seeded_normal(i, (2, heads, 1, 16), torch.float16).to(DEVICE) for i, heads in enumerate((4, 1, 1)))
    seqlens = torch.tensor([0, 17], dtype=torch.int32, device=DEVICE)

    def step(key_cache, value_cache):
        new = {"key": key, "value": value, "block_table": table}
        return (fastlm.kvcache_attention(query, key_cache, value_cache, seqlens, **new, backend="triton"),)

    replay = captured(lambda: step(*caches))
    for i in SEVERAL:
        for j, tensor in enumerate((query, key, value)):
            tensor.copy_(seeded_normal(10 * i + j, tensor.shape, torch.float16))
        assert_same(replay(), step(*mirrors))
        assert_same(caches, mirrors)
        seqlens.add_(1)


# ---- torch.compile ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_with_gradients(mode):
    options = {"mode": mode} if ON_GPU else {"backend": "aot_eager"}

    def model(query, key, value):
        return fastlm.attention(query * 2, key + 1, value, causal=True, backend="triton").relu()

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, **options)
    for i in SEVERAL:
        leaves = [tensor.requires_grad_() for tensor in normals(10 * i, 1, 2, LENGTH, 16)]
        results = []
        for function in (compiled, model):
            out = function(*leaves)
            results.append([out.detach().clone(), *(g.clone() for g in torch.autograd.grad(out.square().sum(), leaves))])
        assert_same(*results)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_decoding(mode):
    options = {"mode": mode} if ON_GPU else {"backend": "aot_eager"}
    cache, seqlens = normals(0, 2, 1, 64, 16)[0], torch.tensor([40, 7], dtype=torch.int32, device=DEVICE)

    def model(query):
        return fastlm.kvcache_attention(query * 2, cache, cache, seqlens, backend="triton") + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, **options)
    for i in SEVERAL:
        query = seeded_normal(i, (2, 4, 1, 16), torch.float16).to(DEVICE)
        assert_same([compiled(query).clone()], [model(query)])


# ---- streams and devices ----------------------------------------------------------------------------------------------------


def test_kernels_wait_for_what_is_before_them_on_a_side_stream():
    stream = torch.cuda.Stream() if ON_GPU else None
    tensors = normals(0, 1, 2, LENGTH, 16)
    expected = values_and_gradients(*(tensor * 2 for tensor in tensors))
    late = [torch.zeros_like(tensor) for tensor in tensors]
    if ON_GPU:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream) if ON_GPU else nullcontext():
        if ON_GPU:
            torch.cuda._sleep(10**8)  # Kernels on another stream would read zeros meanwhile.
        for place, tensor in zip(late, tensors):
            place.copy_(tensor * 2)
        results = values_and_gradients(*late)
    if ON_GPU:
        stream.synchronize()
    assert_same(results, expected)


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_second_gpu_that_is_not_the_current_one():
    first, second = ("cuda:0", "cuda:1") if ON_GPU else ("cpu", "cpu")
    expected = values_and_gradients(*normals(0, 1, 2, LENGTH, 16, device=first))
    results = values_and_gradients(*normals(0, 1, 2, LENGTH, 16, device=second))
    assert all(result.device == torch.device(second) for result in results)
    assert_same([result.to(first) for result in results], expected)
