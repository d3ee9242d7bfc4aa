"""List links between ranks, processors and models, by published figures. What a link reaches in practice is less."""

from typing import NamedTuple

from context_parallel.layer import Layer


class Link(NamedTuple):
    """A link of each rank to all others, which carries as much in the other direction at the same time."""

    name: str
    bandwidth: float  # bytes per second in one direction
    latency: float  # seconds that a message takes at least


# Latencies are those by which NCCL chooses its algorithms (NVIDIA/nccl, src/graph/tuning.cc, ring, Simple): 8.4 µs of a launch,
# and 3.4 µs over NVLink, 5.7 µs over PCIe, 14 µs over a network.
_NVLINK, _PCIE, _NETWORK = 11.8e-6, 14.1e-6, 22.4e-6

ETHERNET_10 = Link("Ethernet 10 Gb/s", 1.25e9, _NETWORK)  # IEEE 802.3.
LINKS = (
    Link("NVLink 5", 900e9, _NVLINK),  # NVIDIA B200: 18 links of 50 GB/s in each direction.
    Link("NVLink 4", 450e9, _NVLINK),  # NVIDIA H100 SXM: 18 links of 25 GB/s in each direction.
    Link("NVLink 3", 300e9, _NVLINK),  # NVIDIA A100: 12 links of 25 GB/s in each direction.
    Link("PCIe 5 x16", 63.0e9, _PCIE),  # PCI-SIG: 32 GT/s, 16 lanes, 128 bits in 130.
    Link("PCIe 4 x16", 31.5e9, _PCIE),  # PCI-SIG: 16 GT/s, 16 lanes, 128 bits in 130.
    Link("InfiniBand NDR", 50e9, _NETWORK),  # InfiniBand Trade Association: 4 lanes, 400 Gb/s.
    Link("InfiniBand HDR", 25e9, _NETWORK),  # InfiniBand Trade Association: 4 lanes, 200 Gb/s.
    Link("Ethernet 100 Gb/s", 12.5e9, _NETWORK),  # IEEE 802.3.
    ETHERNET_10,
)
FREE = Link("none", float("inf"), 0.0)  # a link that takes no time


class Processor(NamedTuple):
    """What computes on each rank."""

    name: str
    flops: float  # floating-point operations of attention per second


# FlashAttention-3's paper has 740 TFLOP/s at best in the forward and about 550 in the backward, of a peak of 989.
# A faster kernel needs a longer sequence to hide a transfer.
H100 = Processor("H100 SXM, bfloat16", 600e12)
# About what both threads of the machine of benchmarks/RESULTS.md reach in forward and backward, by AVX-512.
CPU = Processor("two CPU cores, float32", 150e9)

# One layer's attention: query heads, key heads, head_dim, as their configurations have it.
MODELS = {"Llama-3-8B": (32, 8, 128), "Llama-3-70B": (64, 8, 128), "GPT-2": (12, 12, 64)}


def layer_of(model: str, sequence: int, causal: bool = True) -> Layer:
    return Layer(sequence, *MODELS[model], causal=causal)
