"""fastlm's attention in what torch.compile compiles: a pass of inductor's, which finds attention that is spelled out.

    from fastlm.integrations.inductor import fuse_attention

    model = torch.compile(model, options={"pre_grad_custom_pass": fuse_attention})

It takes the chains that `fastlm.use` finds in eager code, on CPUs: a product of queries and transposed keys, scaling, biases,
masks, softmax, dropout, and the product with the values become one op, with its gradient. Chains stay inductor's where a size
is symbolic (after calls of two shapes, unless ``dynamic=False``), where something else uses the scores or weights, inside
torch.utils.checkpoint and torch.func, and where they are small. Dropout draws fastlm's noise, which `torch.manual_seed`
repeats. Calls of ``F.scaled_dot_product_attention`` are no chains: compile inside ``with fastlm.use():`` for these.
"""

import functools
import hashlib
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..nn.handwritten import graph
from ..ops.attention import batched


class _FuseAttention(CustomGraphPass):
    """Replace hand-written attention in dynamo's graph, before autograd sees it."""

    def __call__(self, fx_graph: torch.fx.Graph) -> None:
        graph.fuse(fx_graph)

    def uuid(self) -> tuple:
        """Return what the result depends on, for inductor's caches."""
        return _sources(), torch.__version__, graph.LEAST, graph.LEAST_FILLED, batched.DEFAULT


@functools.cache
def _sources() -> str:
    """Return a hash of what makes fastlm's part of a graph."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted((*package.glob("nn/handwritten/*.py"), *package.glob("ops/**/*.py"), *package.glob("reference/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


fuse_attention = _FuseAttention()
