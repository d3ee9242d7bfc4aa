"""Estimate how long a layer's attention takes on several ranks. A model, not a measurement: all ranks are as fast.

Computation takes its operations over the processor's rate; a transfer the link's latency and its bytes over the bandwidth, in
both directions at once. Transfers take nothing away from the computation beside them.
"""

import math
from dataclasses import replace

from context_parallel.layer import Layer
from context_parallel.links import FREE, Link, Processor
from context_parallel.traffic import NOTHING, AllToAll, Ring, Traffic

FIRST, LAST = 10, 26  # Crossovers are looked for among sequences of 2^10 to 2^26 rows.
TOLERABLE = 0.1  # An exchange that nothing hides counts as cheap up to this share of the computation.


def transfer_seconds(traffic: Traffic, link: Link, messages: int = 1) -> float:
    return 0.0 if traffic == NOTHING else messages * link.latency + max(traffic) / link.bandwidth


def pass_seconds(plan: AllToAll | Ring, backward: bool, link: Link, processor: Processor) -> float:
    """Return the time until the last rank has finished a pass."""
    return (_ring_seconds if isinstance(plan, Ring) else _all_to_all_seconds)(plan, backward, link, processor)


def seconds(plan: AllToAll | Ring, link: Link, processor: Processor) -> float:
    """Return the time of a forward and backward."""
    return sum(pass_seconds(plan, backward, link, processor) for backward in (False, True))


def exposed_seconds(plan: AllToAll | Ring, link: Link, processor: Processor) -> float:
    """Return by how much a forward and backward takes longer than with a link that takes no time."""
    return seconds(plan, link, processor) - seconds(plan, FREE, processor)


def exposed_share(plan: AllToAll | Ring, link: Link, processor: Processor) -> float:
    """Return the exposed time as a share of the computation's: what one process would take, divided by the ranks."""
    return exposed_seconds(plan, link, processor) / (one_process_seconds(plan.layer, processor) / plan.ranks)


def one_process_seconds(layer: Layer, processor: Processor) -> float:
    return seconds(AllToAll(layer, 1), FREE, processor)


def _all_to_all_seconds(plan: AllToAll, backward: bool, link: Link, processor: Processor) -> float:
    """Exchange, compute, exchange: nothing runs beside anything else, and all wait for the slowest."""
    ranks, (first, last) = range(plan.ranks), plan.messages(backward)
    before = max(transfer_seconds(plan.before(rank, backward), link, first) for rank in ranks)
    after = max(transfer_seconds(plan.after(rank, backward), link, last) for rank in ranks)
    return before + max(plan.flops(rank, backward) for rank in ranks) / processor.flops + after


class _Links:
    """The links of all ranks, each busy with one transfer in a direction at a time."""

    def __init__(self, link: Link, ranks: int):
        self.link, self.sends_from, self.receives_from = link, [0.0] * ranks, [0.0] * ranks

    def carry(self, source: int, target: int, size: int, ready: float) -> float:
        """Send so many bytes as soon as they are ready and both links are free. Return when they have arrived."""
        start = max(ready, self.sends_from[source], self.receives_from[target])
        end = start + transfer_seconds(Traffic(size, size), self.link)
        self.sends_from[source] = self.receives_from[target] = end
        return end


def _ring_seconds(plan: Ring, backward: bool, link: Link, processor: Processor) -> float:
    """Follow the steps of all ranks.

    The keys of a step may travel once both ranks have ended the step before the last. In the backward the dk and dv of a step
    may travel once both have ended it, and both wait for them before they go on from the next step.
    """
    ranks, links, (first, last) = range(plan.ranks), _Links(link, plan.ranks), plan.messages(backward)
    before = max(transfer_seconds(plan.before(rank, backward), link, first) for rank in ranks)
    after = max(transfer_seconds(plan.after(rank, backward), link, last) for rank in ranks)

    def visible(step: int) -> list[tuple[int, int]]:
        """Return (owner, rank) where the rank sees another's keys in this step."""
        pairs = [((rank - step) % plan.ranks, rank) for rank in ranks if 0 < step < plan.ranks]
        return [(owner, rank) for owner, rank in pairs if plan.scores[rank][owner]]

    nothing = [0.0] * plan.ranks
    free, arrived, returned = nothing, nothing, nothing  # of each rank
    for step in ranks:
        coming = list(nothing)
        for owner, rank in visible(step + 1):
            coming[rank] = links.carry(owner, rank, plan.key_bytes(owner, rank), max(free[owner], free[rank]))
        begin = map(max, free, arrived)
        end = [start + plan.step_flops(rank, step, backward) / processor.flops for rank, start in enumerate(begin)]
        free, arrived, returned = list(map(max, end, returned)), coming, list(nothing)
        for owner, rank in visible(step) if backward else ():
            home = links.carry(rank, owner, plan.key_bytes(owner, rank), max(end[owner], end[rank]))
            returned[rank], returned[owner] = max(returned[rank], home), max(returned[owner], home)
    return before + max(*free, *returned) + after


def crossover(plan: AllToAll | Ring, link: Link, processor: Processor) -> int | None:
    """Return the shortest sequence, of the powers of two, whose exposed time is at most TOLERABLE of the computation's."""
    for n in range(FIRST, LAST + 1):
        longer = replace(plan, layer=replace(plan.layer, sequence=1 << n))
        if exposed_share(longer, link, processor) <= TOLERABLE:
            return 1 << n
    return None


def rows_that_hide(layer: Layer, backward: bool, link: Link, processor: Processor) -> int:
    """Return how many rows a rank must have for a step of the ring to compute, with all keys seen, as long as keys travel."""
    pairs = 2 if backward else 1  # keys and values; in the backward their gradients, too
    flops_of_row_squared = layer.flops(1, layer.query_heads, backward)
    bytes_of_row = pairs * 2 * layer.row_bytes(layer.key_heads)
    # Solve flops_of_row_squared n^2 / rate = latency + bytes_of_row n / bandwidth for n.
    a, b, c = flops_of_row_squared / processor.flops, bytes_of_row / link.bandwidth, pairs * link.latency
    return math.ceil((b + math.sqrt(b * b + 4 * a * c)) / (2 * a))
