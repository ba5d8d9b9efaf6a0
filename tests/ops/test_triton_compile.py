"""The kernels compile for GPUs that need not be there: by the tensor cores, within registers and shared memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize(("capability", "products"), [(90, "wgmma.mma_async"), (80, "mma.sync")])
def test_products_use_tensor_cores_and_no_accumulator_spills(tmp_path, capability, products):
    # in a process of its own: in this one, kernels may have been imported for the interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
                    "TRITON_CACHE_DIR": str(tmp_path)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "support.compiling", str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {"gate_up_swiglu", "weight_gradient", "cross_entropy"} < set(found)
    for name, kernel in found.items():
        # beside the megabytes that a tile reads, 256 threads' few words are nothing; a spilled accumulator is 256 bytes
        # and more
        assert kernel["spilled_bytes"] < 256, (name, kernel)
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], (name, kernel)
        if kernel["is_product"]:
            assert products in kernel["instructions"], (name, kernel)
            # loads run ahead of the products by all stages but one
            assert kernel["shared_bytes"] >= kernel["stage_bytes"] * (kernel["stages"] - 1), (name, kernel)
        elif name != "rotate":
            assert kernel["wide_accesses"] > 0, (name, kernel)
