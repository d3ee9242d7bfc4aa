"""Take attention's derivatives of second order, by fastlm and by its peers, for the sections of attention.py."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlm import attention

Call = Callable[[], tuple[Tensor, ...]]


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tangent: Tensor,
    key_tangent: Tensor,
    value_tangent: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention's output and its tangent."""
    return _jvp(partial(attention, backend=backend), query, key, value, query_tangent, key_tangent, value_tangent)


def attention_gradient_penalty(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, backend: str | None = None
) -> tuple[Tensor, ...]:
    """Return the gradients, for query, key and value, of half the squares of the gradients that ``grad_out`` gives them."""
    return _penalty(partial(attention, backend=backend), query, key, value, grad_out)


def _jvp(attend: Callable, query, key, value, *tangents: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(attend, (query, key, value), tangents)


def _penalty(attend: Callable, query, key, value, grad_out: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    gradients = torch.autograd.grad(attend(*leaves), leaves, grad_out, create_graph=True)
    return torch.autograd.grad(gradients, leaves, [gradient.detach() for gradient in gradients])


def _eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT / math.sqrt(query.shape[3]), dim=-1) @ value


def _sdpa_math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the only backend that has these derivatives
        return F.scaled_dot_product_attention(query, key, value)


def _by(derive: Callable, attend: Callable) -> Callable[..., Call]:
    """Return a peer that derives another attention."""
    return lambda **arguments: partial(derive, attend, *arguments.values())


def _jax_jvp(**arguments: Tensor) -> Call:
    """Compile jax.jvp of jax.nn.dot_product_attention, which takes (B, L, H, D), by XLA."""
    import jax

    arrays = [jax.dlpack.from_dlpack(t.transpose(1, 2).contiguous()) for t in arguments.values()]
    derive = jax.jit(lambda *both: jax.jvp(jax.nn.dot_product_attention, both[:3], both[3:]))
    return lambda: tuple(torch.from_dlpack(out.block_until_ready()).transpose(1, 2) for out in derive(*arrays))


PEERS = {
    "attention_jvp": {"SDPA math": _by(_jvp, _sdpa_math), "eager": _by(_jvp, _eager), "JAX": _jax_jvp},
    "attention_gradient_penalty": {"SDPA math": _by(_penalty, _sdpa_math), "eager": _by(_penalty, _eager)},
}
