"""Speeds of accelerators and links, and how much of them a run reaches.

Peaks are the makers' own, for dense bf16 products; links count one direction.
"""

from dataclasses import dataclass

# Shares of a peak that are assumed, not measured here. Products: Mixtral-sized matrices and everything between them;
# published dense training runs report 38 to 43% of the peak over the whole step (Llama Team 2024, "The Llama 3 Herd
# of Models", table 4), exchanges included, which are counted by themselves here. Links: collectives do not reach the
# wire's speed (nccl-tests' bus bandwidth of large messages is 70 to 90% of it).
MFU, LINK_EFFICIENCY = 0.40, 0.70
# Of a GPU's memory: what the CUDA context, cuBLAS and NCCL hold, and what the caching allocator loses to fragments.
# Assumed, not measured.
RESERVED_BYTES, FRAGMENTS = 2 * 2**30, 0.05

# Bytes per second of a machine's memory that its ranks share while they update offloaded optimizer tensors (two sockets
# of eight channels of DDR5-4800 are 614e9 by the makers' figures; a third of it is assumed), and of one GPU's PCIe 5.0
# x16 link (64e9 by the standard). Assumed, not measured.
HOST_BANDWIDTH, PCIE_BANDWIDTH = 200e9, 64e9


@dataclass(frozen=True)
class Accelerator:
    """flops: dense bf16, a second. node_bandwidth: bytes a second that a GPU sends to others of its node;
    network_bandwidth: to other nodes."""

    name: str
    flops: float
    node_bandwidth: float
    network_bandwidth: float


# NVIDIA A100, H100, H200 and B200 data sheets (SXM; bf16 without sparsity; NVLink's figure there counts both
# directions), the DGX A100, H100 and B200 data sheets for the network (one 200 or 400 Gb/s port for each GPU), and
# AMD's Instinct MI300X data sheet (bf16 without sparsity; seven Infinity Fabric links of 128 GB/s in both directions)
# beside a 400 Gb/s port.
ACCELERATORS = {
    a.name: a
    for a in (
        Accelerator("a100", 312e12, 300e9, 25e9),
        Accelerator("h100", 989.4e12, 450e9, 50e9),
        Accelerator("h200", 989.4e12, 450e9, 50e9),
        Accelerator("b200", 2250e12, 900e9, 50e9),
        Accelerator("mi300x", 1307e12, 448e9, 50e9),
    )
}
