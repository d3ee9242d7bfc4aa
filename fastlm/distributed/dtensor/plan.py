"""Choose how a call is spread over a mesh, and convert its tensors: DTensor to this rank's tensor, and results back."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ...ops.noise import seed_tensor

# The axis of a call that each dimension of a tensor lies along. A dimension without one is not sharded.
Axes = Sequence[str | None]

REPLICATE, PARTIAL = Replicate(), Partial()
SUMMED = "summed"  # The axis whose shards make results that have to be added up.


def mesh_of(tensors: Iterable[Tensor | None]) -> DeviceMesh:
    """Return the mesh that all DTensors of a call must share."""
    meshes = [tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)]
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError(f"all DTensors of a call must be on one mesh; got {' and '.join(map(str, dict.fromkeys(meshes)))}")
    return meshes[0]


def sharded_dim(tensor: Tensor, mesh_dim: int) -> int | None:
    """Return the dimension of a DTensor that a dimension of the mesh shards, or None."""
    placement = tensor.placements[mesh_dim] if isinstance(tensor, DTensor) else None
    return placement.dim if type(placement) is Shard else None


def part_of(size: int, counts: Sequence[int], coordinates: Sequence[int]) -> range:
    """Return which of ``size`` elements a rank has that are cut into counts[0] parts, each of these into counts[1], ..."""
    start = 0
    for count, coordinate in zip(counts, coordinates):
        longest = -(-size // count)
        first = min(longest * coordinate, size)
        start, size = start + first, min(longest, size - first)
    return range(start, start + size)


class _Arrived(torch.autograd.Function):
    """Wait for a tensor that is still on its way. Its own ``wait`` would cut it off from its gradient."""

    @staticmethod
    def forward(ctx, tensor: collectives.AsyncCollectiveTensor) -> Tensor:
        return tensor.wait()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Plan(NamedTuple):
    """Hold how a call is spread: for each dimension of the mesh the axis that it shards, None where its ranks do the same."""

    mesh: DeviceMesh
    axes: tuple[str | None, ...]

    @classmethod
    def choose(cls, mesh: DeviceMesh, tensors: Sequence[tuple[Tensor, Axes]]) -> "Plan":
        """Shard along the axes that the tensors are sharded along; where they disagree, the first one decides."""
        chosen = []
        for mesh_dim in range(mesh.ndim):
            dims = ((sharded_dim(tensor, mesh_dim), axes) for tensor, axes in tensors)
            found = (axes[dim] for dim, axes in dims if dim is not None and axes[dim] is not None)
            chosen.append(next(found, None))
        return cls(mesh, tuple(chosen))

    def placements(self, axes: Axes, without: Placement = REPLICATE) -> tuple[Placement, ...]:
        """Return the placements of a tensor with those axes. ``without`` is its placement where it has not the axis."""
        return tuple(REPLICATE if a is None else Shard(axes.index(a)) if a in axes else without for a in self.axes)

    def local(self, tensor: Tensor | None, axes: Axes) -> Tensor | None:
        """Return this rank's part of an input, whose gradient comes back to the placements that the input has.

        What is not sharded along an axis of the call gets a part of its gradient on each rank, to be added up.
        """
        if tensor is None:
            return None
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, [REPLICATE] * self.mesh.ndim, run_check=False)
        placements, of_gradient = self.placements(axes), self.placements(axes, PARTIAL)
        if tensor.placements != placements or of_gradient != placements:  # Its backward is what adds up the gradient.
            tensor = tensor.redistribute(self.mesh, placements)
        local = tensor.to_local(grad_placements=of_gradient)
        return _Arrived.apply(local) if isinstance(local, collectives.AsyncCollectiveTensor) else local

    def whole(self, local: Tensor, axes: Axes, sizes: dict[str, int]) -> DTensor:
        """Return the DTensor of a result, of which this rank has a part, or a part of the sum.

        ``sizes`` are those of the axes; memory is ordered as that of ``local``.
        """
        shape = [sizes[axis] if axis and axis in self.axes else size for axis, size in zip(axes, local.shape)]
        stride, length = [0] * len(shape), 1
        for dim in sorted(range(len(shape)), key=lambda d: (local.stride(d), -d)):
            stride[dim], length = length, length * max(shape[dim], 1)
        placements = self.placements(axes, PARTIAL)
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=Size(shape), stride=tuple(stride))

    def counts(self, axis: str) -> tuple[int, ...]:
        """Return into how many parts the axis is cut, by each dimension of the mesh that shards it."""
        return tuple(self.mesh.size(i) for i, a in enumerate(self.axes) if a == axis)

    def mine(self, axis: str, size: int) -> range:
        """Return which indices along an axis of that size this rank has."""
        own = self.mesh.get_coordinate()
        return part_of(size, self.counts(axis), [own[i] for i, a in enumerate(self.axes) if a == axis])


def agreed_seed(mesh: DeviceMesh, like: Tensor) -> Tensor:
    """Draw a seed on every rank, so that their generators stay in step, and return that of the mesh's first rank."""
    seed = seed_tensor(None, like)
    for mesh_dim in range(mesh.ndim):
        seed = collectives.wait_tensor(collectives.broadcast(seed, 0, (mesh, mesh_dim)))
    return seed
