"""Speeds of accelerators and of their links, by the makers' data sheets: the one table that planner and reports read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """flops, fp32_flops: dense products per second in bf16 and fp32. node_bandwidth: bytes per second that a GPU sends to
    others of its node; network_bandwidth: to other nodes; both in one direction."""

    name: str
    flops: float
    fp32_flops: float
    node_bandwidth: float
    network_bandwidth: float


# NVIDIA A100, H100, H200 and B200 data sheets (SXM; without sparsity; NVLink's figure there counts both directions), the
# DGX A100, H100 and B200 data sheets for the network (one 200 or 400 Gb/s port for each GPU), the H100 PCIe and L40S
# data sheets (their PCIe links; a 200 Gb/s port is assumed), and AMD's Instinct MI300X data sheet (seven Infinity Fabric links of 128 GB/s in both directions) beside a
# 400 Gb/s port.
ACCELERATORS = {
    a.name: a
    for a in (
        Accelerator("a100", 312e12, 19.5e12, 300e9, 25e9),
        Accelerator("h100-pcie", 756e12, 51e12, 64e9, 25e9),
        Accelerator("h100", 989.4e12, 67e12, 450e9, 50e9),
        Accelerator("h200", 989.4e12, 67e12, 450e9, 50e9),
        Accelerator("b200", 2250e12, 75e12, 900e9, 50e9),
        Accelerator("l40s", 362e12, 91.6e12, 32e9, 25e9),
        Accelerator("mi300x", 1307e12, 163.4e12, 448e9, 50e9),
    )
}


def accelerator_of(device_name: str) -> Accelerator | None:
    """The one whose name is part of what a driver calls its device; None: it is not in the table."""
    device = device_name.lower().replace(" ", "-")
    return next((found for name, found in ACCELERATORS.items() if name in device), None)
