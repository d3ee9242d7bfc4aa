"""What a new user would try first, in an environment where only torch and the wheel are installed: python smoke.py 2.13.0"""

import importlib
import importlib.util
import sys

import torch
import torch.nn.functional as F

import fastlm
from fastlm.ops.torch_op import may_bypass_dispatcher


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def attention() -> None:
    """Compare with torch in float64: its float32 gradient of the first causal row misses 0 by 1e-5."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 100, 32, requires_grad=True) for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = fastlm.scaled_dot_product_attention(*inputs, is_causal=True)
    expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    close(out, expected.float())
    grads = torch.autograd.grad(out.square().sum(), inputs)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.square().sum(), exact)):
        close(grad, expected_grad.float())


def latent() -> None:
    mu, logvar = (torch.randn(8, 20, requires_grad=True) for _ in range(2))
    calls = [fastlm.reparameterize_with_kl(mu, logvar, seed=7, backend=backend) for backend in ("cpu", "reference")]
    for ours, theirs in zip(*calls):
        close(ours, theirs)
    for ours, theirs in zip(*(torch.autograd.grad(z.sum() + kl.sum(), (mu, logvar)) for z, kl in calls)):
        close(ours, theirs)


def compiled() -> None:
    """torch traces the ops without looking into them (no compiler is needed for that)."""
    x = torch.randn(1, 2, 40, 16)
    traced = torch.compile(lambda q: fastlm.attention(q, q, q, causal=True, backend="cpu"), backend="eager", fullgraph=True)
    close(traced(x), fastlm.attention(x, x, x, causal=True))


def fast_path() -> None:
    """Check that plain tensors have, under this torch, the dispatch keys with which a call may bypass the dispatcher."""
    assert may_bypass_dispatcher(torch.ones(1), torch.nn.Parameter(torch.ones(1)))
    with torch.inference_mode():
        assert may_bypass_dispatcher(torch.ones(1))


def cuda_module() -> None:
    """If the wheel has it, it loads where there is no driver, and says so."""
    if importlib.util.find_spec("fastlm._cuda"):
        module = importlib.import_module("fastlm._cuda")
        print(f"fastlm._cuda: {module.why_not() or 'this GPU can run it'}")


def main() -> None:
    wanted = sys.argv[1]
    assert torch.__version__.split("+")[0] == wanted, f"torch {torch.__version__} is here, not {wanted}"
    assert "site-packages" in fastlm.__file__, fastlm.__file__
    backends = fastlm.backends()
    assert backends["cpu"].startswith("available"), backends
    for step in (attention, latent, compiled, fast_path, cuda_module):
        step()
    print(f"fastlm works under torch {torch.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
