"""Test the GPU kernels on inputs that lie anywhere: misaligned, expanded, with gaps, and beyond 2**31 elements.

Where there is no GPU, these tests are rehearsed in Triton's interpreter, the large ones with few elements.
"""

from collections.abc import Callable

import pytest
import torch
from support import cuda_host
from support.oracle import Oracle
from support.triton_interpreter import DEVICE, ON_GPU

import fastlm
from fastlm.testing import seeded_normal

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = pytest.mark.gpu

QKV = ("query", "key", "value")
TRITON = {"backend": "triton", "device": DEVICE}
LENGTH = 300 if ON_GPU else 40  # Where tiles are copied by descriptor, it is longer than one.

# ---- where tensors lie ------------------------------------------------------------------------------------------------------


def at_offset(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """Return the tensor so many elements behind an aligned address."""
    whole = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
    return whole[offset:].view(tensor.shape).copy_(tensor)


def with_gaps(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the tensor with so many columns of something else behind each row."""
    return torch.nn.functional.pad(tensor, (0, columns), value=float("nan"))[..., : tensor.shape[-1]]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one element off": lambda tensor: at_offset(tensor, 1),
    "8 bytes off": lambda tensor: at_offset(tensor, 4),
    "rows of odd lengths": lambda tensor: with_gaps(tensor, 3),
    "every other row": lambda tensor: tensor.repeat_interleave(2, dim=2)[:, :, ::2],
    "heads inside rows": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "one head for all": lambda tensor: tensor[:, :1].expand_as(tensor),
    "one sequence for all": lambda tensor: tensor[:1].expand_as(tensor),
    "one row for all": lambda tensor: tensor[:, :, :1].expand_as(tensor),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 20] if ON_GPU else [16])
def test_attention_on_any_layout(layout, head_dim):
    shape = (2, 2, LENGTH, head_dim)
    call = {name: LAYOUTS[layout](seeded_normal(i, shape, torch.float16)) for i, name in enumerate(QKV)}
    Oracle(fastlm.attention, {**call, "causal": True, "return_lse": True}, QKV, set()).check(**TRITON)


@pytest.mark.parametrize("layout", ["one element off", "rows of odd lengths", "heads inside rows"])
def test_decoding_from_caches_of_any_layout(layout):
    shapes = {"query": (2, 4, 2, 16), "key_cache": (2, 2, 64, 16), "value_cache": (2, 2, 64, 16)}
    call = {name: LAYOUTS[layout](seeded_normal(i, shape, torch.float16)) for i, (name, shape) in enumerate(shapes.items())}
    seqlens = torch.tensor([64, 9], dtype=torch.int32)
    Oracle(fastlm.kvcache_attention, {**call, "cache_seqlens": seqlens}, (), set()).check(**TRITON)


# ---- more than 2**31 elements -----------------------------------------------------------------------------------------------

ELEMENTS = 2**31 + 2**20 if ON_GPU else 2**13  # Offsets to the last of them do not fit into 32 bits.


def large(rows_of: tuple[int, ...], dtype=torch.float16) -> torch.Tensor:
    """Return zeros (n, *rows_of), ELEMENTS in all, or skip the test where the GPU has no memory for eight such tensors."""
    row = torch.Size(rows_of).numel()
    if ON_GPU and torch.cuda.mem_get_info()[0] < 8 * ELEMENTS * dtype.itemsize:
        pytest.skip(f"needs {8 * ELEMENTS * dtype.itemsize >> 30} GiB of the GPU's memory")
    return torch.zeros((ELEMENTS // row, *rows_of), dtype=dtype, device=DEVICE)


@pytest.fixture
def unpoisoned():
    """Leave fresh memory as it is, because filling it with NaN would take as long as the kernels, and free it afterwards."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.cuda.empty_cache()


LARGE = pytest.mark.usefixtures("unpoisoned")


@LARGE
def test_more_queries_than_32_bits_count_elements_of():
    """Compare the last queries, and their gradients, with those of a call of them alone."""
    query, some = large((64,))[None, None], 64  # Whole tiles of the interpreter, whose sums depend on a row's place in one.
    query[:, :, -some:] = seeded_normal(1, (1, 1, some, 64), torch.float16)
    key, value = (seeded_normal(i, (1, 1, 33, 64), torch.float16).to(DEVICE) for i in (2, 3))
    results = []
    for part in (query, query[:, :, -some:]):
        part = part.detach().requires_grad_()
        out = fastlm.attention(part, key, value, backend="triton")
        grad_out = torch.zeros_like(out)
        grad_out[:, :, -some:] = seeded_normal(4, (1, 1, some, 64), torch.float16)
        (gradient,) = torch.autograd.grad(out, part, grad_out)
        results.append((out.detach()[:, :, -some:].clone(), gradient[:, :, -some:].clone()))
        del out, grad_out, gradient
    for actual, expected in zip(*results):
        assert torch.equal(actual, expected)


@LARGE
def test_more_keys_in_all_heads_than_32_bits_count_elements_of():
    """Compare the last head's keys, and their gradients, with those of a call of it alone."""
    key = large((64, 64))[None]  # (1, heads, 64, 64): many heads of few keys
    key[:, -1] = seeded_normal(1, key.shape[2:], torch.float16)
    query = seeded_normal(2, (1, 1, 9, 64), torch.float16).to(DEVICE)
    results = []
    for part in (key, key[:, -1:]):
        part = part.detach().requires_grad_()
        heads = part.shape[1]
        out = fastlm.attention(query.expand(1, heads, 9, 64), part, part, backend="triton")
        (gradient,) = torch.autograd.grad(out[:, -1].float().square().sum(), part)
        results.append((out.detach()[:, -1].clone(), gradient[:, -1].clone()))
        del out, gradient
    for actual, expected in zip(*results):
        assert torch.equal(actual, expected)


@LARGE
def test_a_cache_of_more_elements_than_32_bits_count():
    cache = large((1, 64, 64))
    cache[-1] = seeded_normal(1, (1, 64, 64), torch.float16)
    batch = len(cache)
    query = seeded_normal(2, (1, 2, 1, 64), torch.float16).to(DEVICE).expand(batch, 2, 1, 64)
    lengths = torch.full((batch,), 50, dtype=torch.int32, device=DEVICE)
    whole = fastlm.kvcache_attention(query, cache, cache, lengths, backend="triton")
    alone = fastlm.kvcache_attention(query[-1:], cache[-1:], cache[-1:], lengths[-1:], backend="triton")
    assert torch.equal(whole[-1:], alone)


@LARGE
def test_a_latent_of_more_elements_than_32_bits_count():
    """With a seed for each example, the last example is the same as alone."""
    mu = large((1 << 10,))
    mu[-1] = seeded_normal(1, mu.shape[1:], torch.float16)
    seeds = torch.arange(len(mu), device=DEVICE)
    with cuda_host.use():
        if ON_GPU and not fastlm.backends()["cuda"].startswith("available"):
            pytest.skip(fastlm.backends()["cuda"])
        z, kl = fastlm.reparameterize_with_kl(mu, mu, seed=seeds, backend="cuda")
        alone = fastlm.reparameterize_with_kl(mu[-1:], mu[-1:], seed=seeds[-1:], backend="cuda")
    assert torch.equal(z[-1:], alone[0]) and torch.equal(kl[-1:], alone[1])
