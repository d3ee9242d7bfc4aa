"""Compute products with a Hessian by every mixture of forward and reverse mode that torch offers."""

import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hvp, vhp
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap


def dual_tangent(function, x, tangent):
    """Return the tangent of ``function(x)``, by dual tensors."""
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    return torch.zeros_like(function(x)) if dual is None else dual


def double_backward(loss, x, v):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad(gradient, x, v)[0]


def backward_of_a_tangent(loss, x, v):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(dual_tangent(loss, x, v), x)[0]


def tangent_of_a_backward(loss, x, v):
    def gradient(dual):
        return torch.autograd.grad(loss(dual), dual, create_graph=True)[0]

    return dual_tangent(gradient, x.clone().requires_grad_(), v)


# All of these are the Hessian of ``loss`` at x times v.
HESSIAN_PRODUCTS = {
    "hessian": lambda loss, x, v: hessian(loss)(x) @ v,
    "forward over forward": lambda loss, x, v: jacfwd(jacfwd(loss))(x) @ v,
    "reverse over reverse": lambda loss, x, v: jacrev(jacrev(loss))(x) @ v,
    "reverse over forward": lambda loss, x, v: jacrev(jacfwd(loss))(x) @ v,
    "jvp of grad": lambda loss, x, v: jvp(grad(loss), (x,), (v,))[1],
    "grad of jvp": lambda loss, x, v: grad(lambda x: jvp(loss, (x,), (v,))[1])(x),
    "vjp of grad": lambda loss, x, v: vjp(grad(loss), x)[1](v)[0],
    "linearize": lambda loss, x, v: linearize(grad(loss), x)[1](v),
    "vmap of jvp": lambda loss, x, v: vmap(lambda v: jvp(grad(loss), (x,), (v,))[1])(torch.stack([-v, v]))[1],
    "vmap of grad of jvp": lambda loss, x, v: vmap(lambda x: grad(lambda x: jvp(loss, (x,), (v,))[1])(x))(x[None])[0],
    "hvp": lambda loss, x, v: hvp(loss, x, v)[1],
    "vhp": lambda loss, x, v: vhp(loss, x, v)[1],
    "double backward": double_backward,
    "backward of a tangent": backward_of_a_tangent,
    "tangent of a backward": tangent_of_a_backward,
}
