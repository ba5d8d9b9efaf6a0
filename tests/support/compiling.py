"""Kernels compiled for GPUs that are not there, and what the assembler says of them."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

_ROUND = {"width", "half", "vocabulary", *(f"stride_{of}" for of in ("e", "column", "depth", "b", "h", "s"))}


class Compiled(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str


def compile_for(kernel, capability: int, types: dict[str, str], constants: dict, warps: int, stages: int) -> Compiled:
    """`types` by argument: "*bf16", "i32", ...; pointers, strides and widths are taken to be multiples of 16, as those
    of real shapes are. Everything else in `constants`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in constants.items() if name not in types}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if types.get(name, "").startswith("*") or (name in types and name in _ROUND)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    done = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    usage = _resources(done.asm["cubin"])
    return Compiled(*usage, done.metadata.shared, done.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory a thread)."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def cases(dtype: str = "bf16"):
    """(name, kernel, types, constants) of each kernel at Mixtral 8x7B's sizes, products without their blocks."""
    from moe_llm.ops.triton import elementwise, products

    x, wide = f"*{dtype}", "*fp32"
    shape = {"EXPERTS": 16, "OCTAVE": 11, "PRECISION": "ieee"}
    up = {"COLUMNS": 14336, "DEPTH": 4096} | shape
    down = {"COLUMNS": 4096, "DEPTH": 14336} | shape
    rows = {"counts_ptr": "*i64", "num_rows": "i32", "num_experts": "i32"}
    routed = {"index_ptr": "*i64", "weight_ptr": wide}
    strides = dict.fromkeys(("stride_e", "stride_column", "stride_depth"), "i32")
    pointers = {"x_ptr": x, "proj_ptr": x, "gate_up_ptr": x, "h_ptr": x}
    yield "gate_up_swiglu", products._gate_up_swiglu, pointers | routed | rows, up
    for transposed in (True, False):
        unit = "stride_depth" if transposed else "stride_column"
        types = {"a_ptr": x, "proj_ptr": x, "out_ptr": x} | rows | strides
        yield (
            f"rows_product {'a W^T' if transposed else 'a W'}", products._rows_product,
            {name: kind for name, kind in types.items() if name != unit}, down | {unit: 1},
        )  # fmt: skip
    types = {"grad_ptr": x, "input_ptr": x, "out_ptr": x, "counts_ptr": "*i64", "num_experts": "i32"}
    yield "weight_gradient", products._weight_gradient, types, down
    yield (
        "swiglu_forward", elementwise._swiglu_forward,
        {"gate_up_ptr": x, "weight_ptr": wide, "out_ptr": x, "width": "i32"}, {"BLOCK": 1024},
    )  # fmt: skip
    yield (
        "swiglu_backward", elementwise._swiglu_backward,
        {"gate_up_ptr": x, "grad_ptr": x, "weight_ptr": wide, "out_ptr": x, "grad_gate_up_ptr": x,
         "grad_weight_ptr": wide, "width": "i32"}, {"BLOCK": 1024},
    )  # fmt: skip
    yield (
        "gather_sum", elementwise._gather_sum, {"x_ptr": x, "index_ptr": "*i64", "out_ptr": x, "width": "i32"},
        {"weight_ptr": None, "SUMMANDS": 2, "BLOCK": 1024},
    )  # fmt: skip
    yield (
        "norm_forward", elementwise._norm_forward,
        dict.fromkeys(("x_ptr", "delta_ptr", "weight_ptr", "total_ptr", "y_ptr"), x)
        | {"scale_ptr": wide, "width": "i32", "eps": "fp32"}, {"BLOCK": 4096},
    )  # fmt: skip
    yield (
        "norm_backward", elementwise._norm_backward,
        dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "grad_sum_ptr", "grad_x_ptr"), x)
        | {"scale_ptr": wide, "partial_ptr": wide, "rows": "i32", "width": "i32"}, {"BLOCK": 4096},
    )  # fmt: skip
    yield (
        "rotate", elementwise._rotate,
        dict.fromkeys(("x_ptr", "cos_ptr", "sin_ptr", "out_ptr"), x)
        | dict.fromkeys(("length", "heads", "half", "stride_b", "stride_h", "stride_s"), "i32"),
        {"TRANSPOSED": True, "HEADS": 32, "HALF": 64},
    )  # fmt: skip
    yield (
        "cross_entropy", elementwise._cross_entropy,
        {"logits_ptr": x, "labels_ptr": "*i64", "loss_ptr": wide, "vocabulary": "i32"},
        {"GRADIENT": True, "BLOCK": 4096},
    )  # fmt: skip


def main(capability: int) -> dict[str, dict]:
    """Each kernel with the first of its configurations that fits the device, where it has some."""
    from moe_llm.ops.triton import tuning

    limit, found = {80: 163 * 1024, 90: 227 * 1024}[capability], {}
    for name, kernel, types, constants in cases():
        is_product, stages, stage_bytes, warps = hasattr(kernel, "configs"), 3, 0, 4
        if is_product:
            tiles = 2 if name == "gate_up_swiglu" else 1
            config = next(c for c in kernel.configs if tuning.stage_bytes(c, 2, tiles) * c.num_stages <= limit)
            constants, warps, stages = constants | config.kwargs, config.num_warps, config.num_stages
            stage_bytes, kernel = tuning.stage_bytes(config, 2, tiles), kernel.fn
        elif constants.get("BLOCK", 0) >= 4096:
            warps = 8
        done = compile_for(kernel, capability, types, constants, warps, stages)
        found[name] = {
            "is_product": is_product,
            "registers": done.registers,
            "spilled_bytes": done.spilled_bytes,
            "shared_bytes": done.shared_bytes,
            "stages": stages,
            "stage_bytes": stage_bytes,
            "instructions": [i for i in ("wgmma.mma_async", "mma.sync") if i in done.ptx],
            "wide_accesses": len(re.findall(r"(?:ld|st)\.global[\w.:]*\.v[48]\.b32|v2\.b64", done.ptx)),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
