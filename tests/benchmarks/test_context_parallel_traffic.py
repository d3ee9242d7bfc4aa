"""Hold the bytes of the cost model to what fastlm.distributed sends, counted where it calls torch.distributed."""

import pytest
import torch
import torch.distributed as dist
from context_parallel.layer import Layer
from context_parallel.traffic import METHODS, Traffic
from support.ranks import run

import fastlm.distributed

LAYERS = {
    "full": Layer(48, 4, 4, 8, itemsize=4),
    "causal": Layer(48, 4, 4, 8, itemsize=4, causal=True),
    "grouped": Layer(48, 8, 2, 8, batch=2, itemsize=2, causal=True),
    "uneven heads": Layer(48, 6, 6, 8, itemsize=4),
    "narrow window": Layer(48, 4, 4, 8, itemsize=4, causal=True, window=(5, None)),
    "wide window": Layer(48, 4, 4, 8, itemsize=4, causal=True, window=(20, None)),
}
DTYPES = {4: torch.float32, 2: torch.bfloat16}


class Counter:
    """Count the bytes that the calls of torch.distributed send to other ranks and receive from them."""

    def __init__(self):
        self.sent, self.received = 0, 0
        self.exchange, self.send_and_receive = dist.all_to_all_single, dist.batch_isend_irecv
        dist.all_to_all_single, dist.batch_isend_irecv = self.all_to_all_single, self.batch_isend_irecv

    def all_to_all_single(self, output, input, output_sizes, input_sizes, group=None):
        rank = dist.get_rank()
        self.sent += (sum(input_sizes) - input_sizes[rank]) * input.itemsize
        self.received += (sum(output_sizes) - output_sizes[rank]) * output.itemsize
        return self.exchange(output, input, output_sizes, input_sizes, group=group)

    def batch_isend_irecv(self, operations):
        self.sent += sum(each.tensor.nbytes for each in operations if each.op is dist.isend)
        self.received += sum(each.tensor.nbytes for each in operations if each.op is dist.irecv)
        return self.send_and_receive(operations)

    def take(self) -> tuple[int, int]:
        """Return what was counted since the last time."""
        found, self.sent, self.received = (self.sent, self.received), 0, 0
        return found


def count(rank: int, world: int, layer: Layer, method: str) -> list[tuple[int, int]]:
    """Return what this rank sends and receives in a forward, and in a backward."""
    rows, dtype, counter = layer.sequence // world, DTYPES[layer.itemsize], Counter()
    heads = layer.query_heads, layer.key_heads, layer.key_heads
    tensors = [torch.ones(layer.batch, number, rows, layer.head_dim, dtype=dtype, requires_grad=True) for number in heads]
    out = fastlm.distributed.attention(*tensors, method=method, causal=layer.causal, window=layer.window)
    forward = counter.take()
    out.sum().backward()
    return [forward, counter.take()]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_bytes_are_those_that_are_sent(layer, method, ranks):
    plan = METHODS[method](layer, ranks)
    for rank, counted in enumerate(run(count, ranks, layer, method)):
        assert list(map(Traffic._make, counted)) == [plan.traffic(rank, backward) for backward in (False, True)]
