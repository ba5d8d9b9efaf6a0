"""facts.json of a run: what its report needs beside the configuration and the records."""

import json
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moe_llm.atomic import write_atomically
from moe_llm.config import Config
from moe_llm.data.loader import Data
from moe_llm.distributed import deep_ep
from moe_llm.distributed.runtime import Runtime
from moe_llm.model.flops import train_flops_per_token
from moe_llm.ops import compiled, liger, native
from moe_llm.ops.accelerators import accelerator_of
from moe_llm.ops.attention import variable_length_fits, variable_length_kernel
from moe_llm.ops.expert_mlp import choose_backend
from moe_llm.ops.norm import fused_on_cuda
from moe_llm.ops.products import mm

logger = logging.getLogger(__name__)

_NATIVE, _ELEMENTWISE, _FUSED_NORM = "our own for CPUs", "torch's elementwise operations", "torch's fused"
_UNCOMPILED = "nothing"
_PACKAGES = ("moe_llm", "torch", "transformers", "deepspeed")


def gather_facts(config: Config, runtime: Runtime, data: Data, step: int) -> dict[str, Any]:
    """Sizes, text, hardware and versions of this start of a run. Collective.

    peak_flops_per_second: of all ranks together; null for a GPU whose rate is not known here.
    """
    name = _device_name(runtime.device)
    peaks = runtime.gather(_peak_rate(runtime.device, name, config.train.precision))
    model = config.model
    return {
        "parameters": model.num_params(),
        "active_parameters": model.num_params(active=True),
        "parts": model.parameter_counts(),
        "flops_per_token": train_flops_per_token(model, config.data.sequence_length),
        "data": [asdict(part) for part in data.statistics],
        "start": {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "data": [part._asdict() for part in data.fingerprint],
            "ranks": runtime.world_size,
            "device": name,
            "threads": torch.get_num_threads(),
            "kernels": _kernels(config, runtime.device),
            "peak_flops_per_second": None if None in peaks else sum(peaks),
            "versions": {package: version(package) for package in _PACKAGES} | {"python": platform.python_version()},
        },
    }


def _kernels(config: Config, device: torch.device) -> dict[str, str]:
    """What computes experts, norms, rotary embeddings, the loss and attention of documents in this run, as chosen at its start."""
    model, dtype = config.model, torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    tokens = config.train.micro_batch_size * config.data.sequence_length * model.num_experts_per_tok
    shape = tokens, model.num_local_experts, model.expert_hidden_size, model.intermediate_size
    like = torch.empty(1, dtype=dtype, device=device)
    ours = _NATIVE if native.fits(like) else _ELEMENTWISE
    norm = _FUSED_NORM if fused_on_cuda(like) else ours
    query = torch.empty(1, 1, 1, model.attention_head_dim, dtype=dtype, device=device)
    runs = f"{variable_length_kernel()}'s, of variable length" if variable_length_fits(query) else "one call a document"
    return {
        "experts": choose_backend(device, dtype, shape),
        "norm": "liger-kernel's" if liger.use("norm", like) else norm,
        "rotary": "liger-kernel's" if liger.use("rope", like) else ours,
        "loss": "liger-kernel's" if liger.use("cross_entropy", like) else ours,
        "documents": ours if native.fits(query) else runs,
        "exchange": deep_ep.chosen() if config.parallel.expert_parallel_size > 1 else "none",
        "compiled": "between products" if compiled.on else _UNCOMPILED,
    }


def unusual_kernels(kernels: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """Those of a run's kernels (`_kernels`) that are other than a run on such a device has by default."""
    cpu = device.type == "cpu"
    usual = {
        "norm": _NATIVE if cpu else _FUSED_NORM,
        "rotary": _NATIVE if cpu else _ELEMENTWISE,
        "loss": _NATIVE if cpu else _ELEMENTWISE,
        "exchange": "none" if kernels["exchange"] == "none" else deep_ep.ALL_TO_ALL,
        "compiled": _UNCOMPILED,
    }
    # what computes experts and attention of documents follows from the device
    return {part: name for part, name in kernels.items() if name != usual.get(part, name)}


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Add this start to those that went on from before it, in one step; a damaged file is kept under another name."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []
        kept = [earlier for earlier in starts if earlier["step"] < facts["start"]["step"]]
    except (ValueError, KeyError, TypeError):
        kept = []
        path.replace(path.with_name("facts.damaged.json"))
        logger.warning("%s is damaged: it is kept as facts.damaged.json, and earlier starts are not listed", path)
    content = {key: value for key, value in facts.items() if key != "start"} | {"starts": [*kept, facts["start"]]}
    write_atomically(path, json.dumps(content, indent=1))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _peak_rate(device: torch.device, name: str, precision: str) -> float | None:
    """FLOP/s of this rank's device: a data sheet's, or for a CPU the best of three products (some tens of
    milliseconds)."""
    if device.type == "cuda":
        known = accelerator_of(name)
        return None if known is None else known.flops if precision == "bf16" else known.fp32_flops
    size, dtype = 768, torch.bfloat16 if precision == "bf16" else torch.float32
    a, out = torch.ones(size, size, dtype=dtype), torch.empty(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        begin = time.perf_counter()
        mm(a, a, out=out)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
