"""How much of an accelerator's and its links' speed a run reaches, and what a machine's memory and links give.

The makers' figures are in `moe_llm.ops.accelerators`.
"""

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
# Of a machine's NVMe drives together, read and written by turns: one drive on four lanes of PCIe 4.0 (8e9 by the standard).
# Assumed, not measured.
NVME_BANDWIDTH = 5e9
