"""Compare a call on DTensors with the same call in one process. Each rank does both."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_plain, seeded_normal

Placements = dict[str, Sequence[Placement]]  # of a call's tensors, by name; those without any are replicated


def replicated(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return a tensor that every rank has as a DTensor."""
    return distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)


def distributed(tensors: dict[str, Tensor], mesh: DeviceMesh, placements: Placements) -> dict[str, DTensor]:
    """Return tensors that every rank has as DTensors."""
    return {
        name: distribute_tensor(tensor, mesh, placements.get(name, [Replicate()] * mesh.ndim), src_data_rank=None)
        for name, tensor in tensors.items()
    }


def flat(outputs) -> list[Tensor]:
    """Return the tensors in a function's result, which may be a tensor, None, or tuples of such."""
    if isinstance(outputs, tuple):
        return [tensor for output in outputs for tensor in flat(output)]
    return [] if outputs is None else [outputs]


def results_of(function: Callable, tensors: dict[str, Tensor], options: dict) -> dict[str, Tensor]:
    """Return the outputs of ``function(**tensors, **options)``, and the gradients of the tensors that have one.

    The outputs' gradients are normals, the same on all ranks.
    """
    leaves = {n: t.detach().requires_grad_(t.is_floating_point() and n != "alibi_slopes") for n, t in tensors.items()}
    outputs = flat(function(**leaves, **options))
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs:
        return results
    gradients = [seeded_normal(100 + i, output.shape, torch.float32).to(output.dtype) for i, output in enumerate(outputs)]
    gradients = [replicated(g, o.device_mesh) if isinstance(o, DTensor) else g for g, o in zip(gradients, outputs)]
    found = torch.autograd.grad(outputs, list(wanted.values()), gradients)
    return results | {f"gradient of {name}": gradient for name, gradient in zip(wanted, found)}


def assert_as_one_process(
    function: Callable,
    mesh: DeviceMesh,
    tensors: dict[str, Tensor],
    placements: Placements,
    exact: Iterable[str] = (),
    **options,
) -> dict[str, DTensor]:
    """Assert that a call on DTensors gives what one process gives: equal bits for the results in ``exact``, else by the rule.

    The rule is that of errors (fastlm/testing.py), with one process in the place of plain PyTorch. Gradients are placed as the
    tensors are that they belong to. Return the results.
    """
    whole = results_of(function, tensors, options)
    double = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    golden = results_of(function, double, {name: value for name, value in options.items() if name != "backend"})
    given = distributed(tensors, mesh, placements)
    results = results_of(function, given, options)
    assert results.keys() == whole.keys()
    for name, result in results.items():
        what = f"{name} with {placements} and {options}"
        assert isinstance(result, DTensor), what
        if name.startswith("gradient of "):
            own = given[name.removeprefix("gradient of ")]
            reduced = tuple(Replicate() if placement.is_partial() else placement for placement in own.placements)
            assert result.placements == reduced, f"{what}: placed as {result.placements}"
        actual, expected = result.full_tensor(), whole[name]
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
        if name in exact:
            assert torch.equal(actual.nan_to_num(), expected.nan_to_num()), what
        elif actual.is_floating_point():
            factor = GRADIENT_FACTOR if name.startswith("gradient") else VALUE_FACTOR
            assert_as_good_as_plain(actual, expected, golden[name].to(torch.float64), factor, what)
        else:
            assert torch.equal(actual, expected), what
    return results
