"""Test every way to ask torch for attention's derivatives up to the second order, and that the third is refused."""

import pytest
import torch
import torch.nn.functional as F
from support.processes import printed
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.testing import seeded_normal

SHAPES = {"query": (2, 4, 6, 8), "key": (2, 2, 7, 8), "value": (2, 2, 7, 5), "mask": (4, 6, 7), "sinks": (4,)}
X = [seeded_normal(i, shape, torch.float64) for i, shape in enumerate(SHAPES.values())]
T = [seeded_normal(10 + i, shape, torch.float64) for i, shape in enumerate(SHAPES.values())]
WEIGHTS = seeded_normal(20, (2, 4, 6, 5), torch.float64), seeded_normal(21, (2, 4, 6), torch.float64)
OPTIONS = {
    "softcap and dropout": {"softcap": 3.0, "dropout_p": 0.2, "seed": 5},
    "window and slopes": {"causal": True, "window": (3, 1), "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
}


class Problem:
    """Attention of the tensors X on a backend, and a loss that is of no low degree in its outputs."""

    def __init__(self, backend: str, dtype: torch.dtype, options: dict) -> None:
        self.x, self.t = (tuple(tensor.to(dtype) for tensor in tensors) for tensors in (X, T))
        self.backend, self.options = backend, options

    def attend(self, query, key, value, mask, sinks):
        return fastlm.attention(
            query, key, value, mask=mask, sinks=sinks, return_lse=True, backend=self.backend, **self.options
        )

    def loss(self, *x):
        return sum((out.square() * weight.to(out.dtype)).sum() for out, weight in zip(self.attend(*x), WEIGHTS))

    def of(self, place: int):
        """Return the loss as a function of one tensor."""
        return lambda tensor: self.loss(*self.x[:place], tensor, *self.x[place + 1 :])

    def of_vector(self, vector):
        """Return the loss as a function of one query (8,), which all queries are."""
        return self.loss(vector.expand(SHAPES["query"]), *self.x[1:])

    def leaves(self):
        return tuple(tensor.clone().requires_grad_() for tensor in self.x)

    def duals(self, x):
        return map(forward_ad.make_dual, x, self.t)


ALL = tuple(range(5))


def double_backward(p):
    x = p.leaves()
    grads = torch.autograd.grad(p.loss(*x), x, create_graph=True)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(grads, p.t)), x)


def dual(p):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(p.loss(*p.duals(p.x))))


def reverse_over_dual(p):
    x = p.leaves()
    with forward_ad.dual_level():
        return torch.autograd.grad(forward_ad.unpack_dual(p.loss(*p.duals(x))).tangent, x)


def dual_over_reverse(p):
    x = p.leaves()
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(p.loss(*p.duals(x)), x)]


def linearized(p):
    outputs, of_tangents = linearize(p.attend, *p.x)
    return outputs, of_tangents(*p.t)


def vmapped_jvp(p):
    stacked = [torch.stack([x, 2 * x]) for x in (p.x[0], p.t[0])]
    return vmap(lambda query, tangent: jvp(p.of(0), (query,), (tangent,)))(*stacked)


def gradient_penalty_of_examples(p):
    """Return the gradient of each example's squared gradient."""

    def penalty(query, key, value):
        return grad(lambda q: p.attend(q[None], key[None], value[None], *p.x[3:])[0].square().sum())(query).square().sum()

    return vmap(grad(penalty, argnums=(0, 1, 2)))(*p.x[:3])


def checkpointed(p):
    x = p.leaves()
    loss = checkpoint(p.loss, *x, use_reentrant=False)
    grads = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(grads, p.t)), x)


MIXTURES = {
    "jvp": lambda p: jvp(p.attend, p.x, p.t),
    "gradient of a jvp": lambda p: grad(lambda *x: jvp(p.loss, x, p.t)[1], ALL)(*p.x),
    "jvp of a gradient": lambda p: jvp(grad(p.loss, ALL), p.x, p.t),
    "vjp of a gradient": lambda p: vjp(grad(p.loss, ALL), *p.x)[1](p.t),
    "jacfwd": lambda p: jacfwd(lambda value: p.attend(*p.x[:2], value, *p.x[3:]))(p.x[2]),
    "jacrev": lambda p: jacrev(lambda key: p.attend(p.x[0], key, *p.x[2:]))(p.x[1]),
    "hessian of the sinks": lambda p: hessian(p.of(4))(p.x[4]),
    "hessian of a vector": lambda p: hessian(p.of_vector)(p.x[0][0, 0, 0]),
    "jacrev of jacrev": lambda p: jacrev(jacrev(p.of_vector))(p.x[0][0, 0, 0]),
    "linearize": linearized,
    "double backward": double_backward,
    "dual tensors": dual,
    "backward of dual tensors": reverse_over_dual,
    "dual tensors through a backward": dual_over_reverse,
    "vmap of a jvp": vmapped_jvp,
    "jvp of a vmap": lambda p: jvp(lambda q: vmap(p.of(0))(torch.stack([q, 2 * q])), (p.x[0],), (p.t[0],)),
    "gradient of a jvp of a vmap": lambda p: grad(lambda q: jvp(vmap(p.of(0)), (q[None],), (p.t[0][None],))[1].sum())(p.x[0]),
    "vmap of double backward": gradient_penalty_of_examples,
    "hvp": lambda p: torch.autograd.functional.hvp(p.loss, p.x, p.t),
    "vhp": lambda p: torch.autograd.functional.vhp(p.loss, p.x, p.t),
    "functional.jvp": lambda p: torch.autograd.functional.jvp(p.attend, p.x, p.t),
    "functional.hessian": lambda p: torch.autograd.functional.hessian(p.of(4), p.x[4]),
    "checkpoint": checkpointed,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_each_mixture_of_second_order(mixture, options, widest_isa):
    golden = tree_leaves(mixture(Problem("reference", torch.float64, options)))
    results = tree_leaves(mixture(Problem("cpu", torch.float32, options)))
    for result, expected in zip(results, golden, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def nested(*transforms):
    """Return the composition of transforms of a function of one tensor, the innermost last."""

    def transformed(function):
        for transform in reversed(transforms):
            function = transform(function)
        return function

    return transformed


def slope(function):
    return lambda x: grad(lambda y: function(y).sum())(x)


def rate(function):
    return lambda x: jvp(function, (x,), (torch.ones_like(x),))[1]


THIRD = {
    "grad of grad of grad": nested(slope, slope, slope),
    "jvp of grad of grad": nested(rate, slope, slope),
    "grad of jvp of grad": nested(slope, rate, slope),
    "grad of grad of jvp": nested(slope, slope, rate),
    "jvp of jvp": nested(rate, rate),
    "jvp of jvp of grad": nested(rate, rate, slope),
    "jvp of jvp of vmap": nested(rate, rate, lambda function: lambda x: vmap(function)(x[None])),
    "jvp of vmap of jvp": nested(rate, lambda function: lambda x: vmap(function)(x[None]), rate),
    "jacfwd of jacfwd": nested(jacfwd, jacfwd),
}


@pytest.mark.parametrize("order", THIRD.values(), ids=THIRD)
def test_what_there_is_not_raises(order, widest_isa):
    problem = Problem("cpu", torch.float32, {})
    with pytest.raises(RuntimeError, match="no derivatives of this order.*reference|no forward mode over forward mode"):
        order(problem.of(4))(problem.x[4])


def test_a_third_backward_raises(widest_isa):
    problem = Problem("cpu", torch.float32, {})
    x = problem.x[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.of(0)(x), x, create_graph=True)
    (gradient,) = torch.autograd.grad(gradient.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivatives of this order.*reference"):
        gradient.sum().backward()


def test_tangents_of_third_order_that_a_dual_level_computes_are_nan(widest_isa):
    problem = Problem("cpu", torch.float32, {})
    x = problem.leaves()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(problem.loss(*problem.duals(x))).tangent
        gradient = torch.autograd.grad(tangent, x[0])[0]
        assert gradient.isfinite().all() and forward_ad.unpack_dual(gradient).tangent.isnan().all()


def test_tangents_that_do_not_fit_get_an_error(widest_isa):
    problem = Problem("cpu", torch.float32, {})
    with pytest.raises(RuntimeError, match="different size"):
        jvp(problem.of(0), (problem.x[0],), (problem.t[0][..., :-1],))
    with pytest.raises(ValueError, match="query's tangent does not fit"):
        jvp(problem.of(0), (problem.x[0],), (problem.t[0].double(),))


def test_slopes_have_no_tangent(widest_isa):
    problem = Problem("cpu", torch.float32, {})
    slopes = torch.ones(4)

    def attend(slopes):
        return fastlm.attention(*problem.x[:3], alibi_slopes=slopes)

    with pytest.raises(ValueError, match="alibi_slopes get no gradient"):
        jvp(attend, (slopes,), (slopes,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="alibi_slopes get no gradient"):
        attend(forward_ad.make_dual(slopes, slopes))


# ---- what people need it for ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer's block on `fastlm.nn.MultiheadAttention`, or on torch's with plain attention."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(16), attention(16, 4, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        y = self.norm(x)
        return x + self.mlp(F.gelu(x + self.attention(y, y, y, need_weights=False)[0]))


@pytest.fixture(params=["fastlm.nn", "replace", "use"])
def both(request, widest_isa):
    """Make a block on fastlm, and the same one of torch in float64, with attention whose derivatives torch has all."""
    torch.manual_seed(0)
    plain = Block(nn.MultiheadAttention)
    fused = Block(fastlm.nn.MultiheadAttention if request.param == "fastlm.nn" else nn.MultiheadAttention)
    fused.load_state_dict(plain.state_dict())
    if request.param == "replace":
        fastlm.replace(fused)
    return fused, plain.double(), request.param == "use"


def close_in_both(both, compute):
    fused, plain, in_block = both
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = compute(plain, torch.float64)
    if in_block:
        with fastlm.use() as report:
            results = compute(fused, torch.float32)
        assert report.routed
    else:
        results = compute(fused, torch.float32)
    for result, golden in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        torch.testing.assert_close(result.double(), golden, rtol=1e-4, atol=1e-4 * golden.abs().max().item())


def test_the_loss_of_meanflow(both):
    """Geng et al., "Mean Flows for One-step Generative Modeling" (2025): a JVP in the loss, without a gradient through it."""

    def compute(block, dtype):
        noise, data = (seeded_normal(i, (2, 5, 16), dtype) for i in (1, 2))
        velocity, t = noise - data, torch.tensor(0.7, dtype=dtype)

        def mean_velocity(z, t):
            return block(z * (1 + t))

        u, rate = jvp(mean_velocity, (data + t * velocity, t), (velocity, torch.ones_like(t)))
        loss = (u - (velocity - t * rate).detach()).square().mean()
        return loss, torch.autograd.grad(loss, list(block.parameters()), allow_unused=True, materialize_grads=True)

    close_in_both(both, compute)


def test_a_gradient_penalty(both):
    """Gulrajani et al., "Improved Training of Wasserstein GANs" (2017): a critic's gradient for its input has norm 1."""

    def compute(block, dtype):
        x = seeded_normal(3, (2, 5, 16), dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        return penalty, torch.autograd.grad(penalty, list(block.parameters()), allow_unused=True, materialize_grads=True)

    close_in_both(both, compute)


@pytest.mark.parametrize("way", ["forward over reverse", "double backward"])
def test_a_hessian_vector_product_of_the_parameters(both, way):
    """Pearlmutter, "Fast Exact Multiplication by the Hessian" (1994)."""

    def compute(block, dtype):
        parameters = {name: p.detach() for name, p in block.named_parameters()}
        directions = {name: seeded_normal(i, p.shape, dtype) for i, (name, p) in enumerate(parameters.items())}
        x = seeded_normal(5, (2, 5, 16), dtype)

        def loss(parameters):
            return functional_call(block, parameters, x).pow(4).mean()

        if way == "forward over reverse":
            return jvp(grad(loss), (parameters,), (directions,))[1]
        return grad(lambda p: sum((g * directions[name]).sum() for name, g in grad(loss)(p).items()))(parameters)

    close_in_both(both, compute)


MEASURED = """
import resource, torch, fastlm
from torch.func import jvp
q, k, v, t = (torch.randn(1, 2, {length}, 32) for _ in range(4))

def grown(derive):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    derive()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024

def penalty():
    x = q.clone().requires_grad_()
    gradient, = torch.autograd.grad(fastlm.attention(x, k, v, causal=True).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()

fastlm.attention(q, k, v)
forward_mode = grown(lambda: jvp(lambda q: fastlm.attention(q, k, v, causal=True), (q,), (t,)))
print(forward_mode, grown(penalty))
"""


def test_the_memory_is_linear_in_the_length(widest_isa):
    """Measure two heads, whose scores would take 512 MiB."""
    length = 8192
    for megabytes in map(int, printed(MEASURED.format(length=length)).split()):
        assert megabytes < 64
