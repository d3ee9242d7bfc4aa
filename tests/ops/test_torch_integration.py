"""Test the ops with the rest of torch: opcheck, checkpoints, autocast, fork, threads, autograd's own rules, saving modules."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.processes import in_a_forked_child, printed
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.testing import seeded_normal


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, because these tests are about the op."""


def normals(*shape, seed=1, dtype=torch.float32):
    return seeded_normal(seed, shape, dtype)


# ---- the ops as torch.library sees them -------------------------------------------------------------------------------------

INF = float("inf")
# (mu, logvar, prior_mu, prior_logvar, seed), (with_kl, event_dims, free_bits, low, high, num_samples,
# temperature, first, sample_stride)
OP_CALLS = {
    "plain": ((normals(3, 5), normals(3, 5), None, None, torch.tensor(1)), (True, 1, 0.0, -INF, INF, None, 1.0, 0, None)),
    "samples": ((normals(3, 5), normals(3, 5), None, None, torch.tensor(1)), (True, 1, 0.0, -INF, INF, 4, 1.0, 0, None)),
    "one sample": ((normals(3, 5), normals(3, 5), None, None, torch.tensor(1)), (True, 1, 0.0, -INF, INF, 1, 1.0, 0, None)),
    "no seed": ((normals(3, 5), normals(3, 5), None, None, None), (True, 2, 0.0, -INF, INF, None, 1.0, 0, None)),
    "no kl": ((normals(3, 5), normals(3, 5), None, None, torch.tensor(1)), (False, 0, 0.0, -INF, INF, None, 0.5, 0, None)),
    "prior": (
        (normals(3, 5), normals(3, 5), normals(5), normals(3, 1), torch.tensor(1)),
        (True, 1, 0.1, -1.0, 1.0, None, 1.0, 0, None),
    ),
    "mixed dtypes": (
        (*(normals(3, 5, dtype=torch.bfloat16) for _ in range(2)), normals(5), normals(5).double(), torch.arange(3)),
        (True, 0, 0.0, -INF, INF, 2, 1.0, 0, None),
    ),
    "strided": (
        (*normals(3, 10).chunk(2, 1), None, normals(5, 3).T, torch.arange(3)),
        (True, 1, 0.0, -INF, INF, None, 1.0, 0, None),
    ),
    "empty": ((normals(0, 5), normals(0, 5), normals(5), None, torch.tensor(1)), (True, 1, 0.0, -INF, INF, None, 1.0, 0, None)),
    "one number": ((normals(), normals(), None, normals(), torch.tensor(1)), (True, 0, 0.0, -INF, INF, None, 1.0, 0, None)),
    "a part": ((normals(3, 5), normals(3, 5), None, None, torch.tensor(1)), (True, 1, 0.0, -INF, INF, 4, 1.0, 35, 70)),
}


@pytest.mark.parametrize("call", OP_CALLS)
def test_the_forward_op_passes_opcheck(call):
    inputs, options = OP_CALLS[call]
    torch.library.opcheck(torch.ops.fastlm.reparameterize.default, (*inputs, *options))


@pytest.mark.parametrize("call", OP_CALLS)
def test_the_backward_op_passes_opcheck(call):
    inputs, options = OP_CALLS[call]
    z, kl = torch.ops.fastlm.reparameterize(*inputs, *options)
    gradients = (None if inputs[4] is None else torch.ones_like(z), torch.ones_like(kl) if options[0] else None)
    needed = tuple(prior is not None for prior in inputs[2:4])
    torch.library.opcheck(torch.ops.fastlm.reparameterize_backward.default, (*gradients, *needed, *inputs, *options))


# ---- autograd ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [None, 4])
def test_nothing_but_the_inputs_and_the_seed_is_saved_for_backward(num_samples):
    inputs = [normals(8, 16).requires_grad_(), normals(8, 16, seed=2).requires_grad_(), normals(16).requires_grad_()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastlm.reparameterize_with_kl(*inputs[:2], prior_mu=inputs[2], num_samples=num_samples, backend="cpu")
    addresses = {t.data_ptr() for t in inputs}
    others = [t for t in saved if t.data_ptr() not in addresses]
    assert [(t.dtype, t.numel()) for t in others] == [(torch.int64, 1)]


def test_without_grad_no_graph_is_kept():
    mu = normals(3, 4).requires_grad_()
    with torch.no_grad():
        outputs = fastlm.reparameterize_with_kl(mu, mu, seed=1, backend="cpu")
    with torch.inference_mode():
        outputs += fastlm.reparameterize_with_kl(mu, mu, seed=1, backend="cpu")
    assert not any(out.requires_grad for out in outputs)


def test_an_input_changed_in_place_before_backward_is_noticed():
    mu, logvar = normals(3, 4).requires_grad_(), normals(3, 4)
    z = fastlm.reparameterize(mu, logvar, seed=1, backend="cpu")
    logvar.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_recomputes_the_same_noise(use_reentrant):
    """The call has no seed. The checkpoint restores torch's generator, and the generator gives the seed."""

    def step(mu, logvar):
        z, kl = fastlm.reparameterize_with_kl(mu.sin(), logvar.sin(), backend="cpu")
        return (z**3).sum() + kl.sum()

    def gradients(call):
        leaves = normals(8, 16).requires_grad_(), normals(8, 16, seed=2).requires_grad_()
        torch.manual_seed(4)
        call(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(step)
    results = gradients(lambda *leaves: checkpoint(step, *leaves, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


# ---- randomness -------------------------------------------------------------------------------------------------------------


def test_manual_seed_makes_calls_without_a_seed_repeatable():
    zeros = torch.zeros(4, 9)
    torch.manual_seed(3)
    first, second = fastlm.reparameterize(zeros, zeros), fastlm.reparameterize(zeros, zeros)
    torch.manual_seed(3)
    assert torch.equal(fastlm.reparameterize(zeros, zeros), first)
    assert torch.equal(fastlm.reparameterize(zeros, zeros), second)
    assert not torch.equal(first, second)


def test_a_seed_leaves_torch_s_generator_alone():
    state = torch.random.get_rng_state()
    fastlm.reparameterize_with_kl(torch.zeros(4), torch.zeros(4), seed=1)
    fastlm.gaussian_kl(torch.zeros(4), torch.zeros(4))
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- fork and threads -------------------------------------------------------------------------------------------------------

COMPUTE = """
mu, logvar = torch.randn(2, 512, 1024).requires_grad_().unbind()
gradients = torch.ones(512, 1024), torch.ones(512)
def compute():
    outputs = fastlm.reparameterize_with_kl(mu, logvar, seed=1, backend="cpu")
    return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, (mu, logvar), gradients)
"""


def test_a_forked_child_computes_the_same_bits():
    printed(in_a_forked_child(COMPUTE))


def test_several_python_threads_at_once_get_their_own_right_answers():
    def compute(seed):
        mu, logvar = normals(200, 300, seed=seed).requires_grad_(), normals(200, 300, seed=seed + 100).requires_grad_()
        z, kl = fastlm.reparameterize_with_kl(mu, logvar, seed=seed, backend="cpu")
        return z, kl, *torch.autograd.grad(kl.sum() + z.sum(), (mu, logvar))

    expected = [compute(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for results, wanted in zip(pool.map(compute, range(8)), expected):
                assert all(map(torch.equal, results, wanted))


# ---- the module -------------------------------------------------------------------------------------------------------------


def test_the_module_computes_the_latent_of_its_linear_layer():
    module, x = fastlm.nn.GaussianLatent(6, 4, free_bits=0.1, logvar_clamp=(-1.0, 1.0)), normals(2, 3, 6)
    z, kl = module(x, seed=9)
    mu, logvar = module.linear(x)[..., :4], module.linear(x)[..., 4:]
    expected = fastlm.reparameterize_with_kl(mu, logvar, free_bits=0.1, logvar_clamp=(-1.0, 1.0), seed=9)
    assert z.shape == (2, 3, 4) and kl.shape == (2, 3)
    assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])
    assert torch.equal(module.mode(x), mu)
    assert module(x, num_samples=5)[0].shape == (5, 2, 3, 4)


def test_the_module_runs_under_autocast():
    module, x = fastlm.nn.GaussianLatent(6, 4), normals(10, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, kl = module(x, seed=1)
        mu, logvar = module.linear(x).chunk(2, dim=-1)
    expected = fastlm.reparameterize_with_kl(mu, logvar, seed=1, backend="cpu")
    assert z.dtype == torch.bfloat16 and kl.dtype == torch.float32
    assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])
    (z.float().sum() + kl.sum()).backward()
    assert module.linear.weight.grad.dtype == torch.float32 and module.linear.weight.grad.isfinite().all()


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_the_module_computes_the_same(copied):
    module, x = fastlm.nn.GaussianLatent(6, 4, free_bits=0.2), normals(5, 6)
    other = copied(module)
    assert all(map(torch.equal, other(x, seed=1), module(x, seed=1)))
    assert str(other) == str(module) and other.free_bits == 0.2


def test_a_state_dict_brings_the_module_back(tmp_path):
    module, x = fastlm.nn.GaussianLatent(6, 4), normals(5, 6)
    torch.save(module.state_dict(), tmp_path / "module.pt")
    other = fastlm.nn.GaussianLatent(6, 4)
    other.load_state_dict(torch.load(tmp_path / "module.pt", weights_only=True))
    assert list(module.state_dict()) == ["linear.weight", "linear.bias"]
    assert all(map(torch.equal, other(x, seed=1), module(x, seed=1)))
