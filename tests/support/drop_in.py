"""Hold drop-in modules to the oracle's rule, with the original module in the place of the reference."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlm.testing import GRADIENT_FACTOR, ULPS, VALUE_FACTOR, assert_within, seeded_normal, ulp_of_largest, worst_error

Call = Callable[[nn.Module, dict], Tensor]  # call(module, inputs by name) -> output
DRAWS = 8


def assert_as_good_as_original(
    ours: nn.Module, original: nn.Module, call: Call, inputs: dict, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that ``ours`` is as good as the ``original``, both in ``dtype``: the output, and the gradients where they are on.

    Gradients are those of parameters and inputs. Golden is the original in float64 on the same numbers. As in the oracle, the
    effect on golden of an ulp more or less in each number counts, too. Small modules have few numbers, so that one problem
    shows little of the original's errors. So the worst of several problems counts: this one, and the same with all numbers
    changed by a thousandth.
    """
    eps, inputs = torch.finfo(dtype).eps, _in(dtype, inputs)
    golden = _run(_double(original), call, _in(torch.float64, inputs))
    plain, nudged = [_errors(_run(original, call, inputs), golden)], []
    for draw in range(1, DRAWS):
        other, other_inputs = _all_off(original, inputs, 1e-3, draw)
        exact = _run(_double(other), call, _in(torch.float64, other_inputs))
        plain.append(_errors(_run(other, call, other_inputs), exact))
        near, near_inputs = _all_off(_double(original), _in(torch.float64, inputs), eps, draw)
        nudged.append(_errors(_run(near, call, near_inputs), golden))
    for what, actual in _run(ours, call, inputs).items():
        assert actual.dtype == dtype
        factor = VALUE_FACTOR if what == "output" else GRADIENT_FACTOR
        slack = ulp_of_largest(golden[what], dtype) + max(error[what] for error in nudged)
        allowed = factor * max(error[what] for error in plain) + ULPS * slack
        assert_within(actual, golden[what], allowed, what)


def _run(module: nn.Module, call: Call, inputs: dict) -> dict[str, Tensor]:
    output = call(module, inputs)
    results = {"output": output.detach()}
    if torch.is_grad_enabled():
        leaves = {**dict(module.named_parameters()), **inputs}
        leaves = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
        gradient = seeded_normal(100, output.shape, torch.float32).to(output.dtype)
        gradients = torch.autograd.grad(output, list(leaves.values()), gradient, allow_unused=True)
        results |= {f"gradient of {name}": g for name, g in zip(leaves, gradients) if g is not None}
    return results


def _errors(results: dict[str, Tensor], golden: dict[str, Tensor]) -> dict[str, float]:
    assert results.keys() == golden.keys()
    return {what: worst_error(results[what], golden[what]) for what in golden}


def _double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def _in(dtype: torch.dtype, inputs: dict) -> dict:
    """Convert floating tensors to the dtype, as leaves of their own; return the rest as it is."""
    return {name: _leaf(value.to(dtype), value) if _is_floating(value) else value for name, value in inputs.items()}


def _all_off(module: nn.Module, inputs: dict, relative: float, draw: int) -> tuple[nn.Module, dict]:
    """Return a copy of the module and of the inputs, with each number off by that much, up or down at random."""

    def off(value: Tensor) -> Tensor:
        signs = seeded_normal(200 + 10 * draw + value.dim(), value.shape, torch.float64).sign()
        return (value.detach().double() * (1 + relative * signs)).to(value.dtype)

    module = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(off(parameter))
    return module, {name: _leaf(off(value), value) if _is_floating(value) else value for name, value in inputs.items()}


def _is_floating(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaf(value: Tensor, original: Tensor) -> Tensor:
    """Return a leaf that requires a gradient where the original does."""
    return value.detach().clone().requires_grad_(original.requires_grad)
