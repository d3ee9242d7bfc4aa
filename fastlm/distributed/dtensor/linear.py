"""Run linear on DTensors: weights column-wise, row-wise or replicated, and input sharded along any dimension."""

import torch
from torch.distributed.tensor import DTensor

from ...ops.linear.call import TENSORS, LinearCall
from .plan import SUMMED, Plan, mesh_of


def run_linear(run, call: LinearCall) -> DTensor:
    """Run a call of linear with DTensors; ``run`` runs one of local tensors.

    Weights (N, K) that are sharded along N give an output that is sharded there; input and weights that are sharded along K
    give parts of sums, a Partial output. Where weights are replicated, the output is sharded as the input is.
    """
    input, weight, bias, backend = call
    rows = [f"rows {dim}" for dim in range(input.dim() - 1)]
    of_input, of_weight, of_output = (*rows, SUMMED), ("columns", SUMMED), (*rows, "columns")
    plan = Plan.choose(mesh_of(call[:TENSORS]), [(weight, of_weight), (input, of_input)])
    local_bias = plan.local(bias, ("columns",))
    if local_bias is not None and not _adds_bias(plan):
        local_bias = local_bias.masked_fill(torch.ones_like(local_bias, dtype=torch.bool), 0.0)  # with a gradient: zeros
    local = LinearCall(plan.local(input, of_input), plan.local(weight, of_weight), local_bias, backend)
    sizes = dict(zip(of_output, (*input.shape[:-1], weight.shape[0])))
    return plan.whole(run(local), of_output, sizes)


def _adds_bias(plan: Plan) -> bool:
    """Tell whether this rank is the one to add the bias, of those whose outputs are added up."""
    return all(coordinate == 0 for coordinate, axis in zip(plan.mesh.get_coordinate(), plan.axes) if axis == SUMMED)
