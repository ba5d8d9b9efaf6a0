"""The one table of makers' speeds."""

import pytest

from moe_llm.ops.accelerators import ACCELERATORS, accelerator_of


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X OAM", "mi300x"),
    ],
)
def test_a_device_is_found_by_what_its_driver_calls_it(device, name):
    assert accelerator_of(device) is ACCELERATORS[name]


def test_an_unknown_device_has_no_peak():
    assert accelerator_of("NVIDIA GeForce GTX 1080") is None


def test_a_product_in_bf16_is_no_slower_than_in_fp32():
    assert all(each.flops > each.fp32_flops for each in ACCELERATORS.values())
