"""Low-rank adapters in checkpoints: a run's base is not in them unmerged, so it has to be there when they are read."""

from pathlib import Path
from typing import Any

from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.distributed.state import TrainedState
from moe_llm.errors import UserError
from moe_llm.families import hf


def has_adapters(state: TrainedState) -> bool:
    """Whether low-rank adapters are trained."""
    return any(entry.adapter for entry in state.entries())


def adapter_shapes(path: Path, state: TrainedState) -> dict[str, tuple[int, ...]]:
    """The shape over all ranks of every adapter, of the checkpoint's number of experts."""
    experts = hf.from_transformers_config(read_json(path / "config.json")).num_local_experts
    adapters = [entry for entry in state.entries() if entry.adapter]
    return {
        e.name: e.shape if e.first_expert is None or hf.expert_of(e.name) is not None else (experts, *e.shape[1:])
        for e in adapters
    }


def check_base(path: Path, head: dict[str, Any], state: TrainedState) -> None:
    """Refuse adapters of another base, and a checkpoint without adapters for a run with them, or the other way."""
    base = head.get("base")
    if (base is not None) != has_adapters(state):
        there, here = ("has", "has none") if base is not None else ("has no", "has them")
        raise UserError(
            f"checkpoint {path} {there} adapters, and this run {here}: set finetune.lora as it was, or begin a new run "
            "with model.init_from"
        )
    if base is not None and base != state.base_files:
        files = {*base, *state.base_files}
        changed = min(name for name in files if base.get(name) != state.base_files.get(name))
        raise UserError(
            f"the adapters of checkpoint {path} were trained on another base: file {changed} of model.init_from is not "
            "what it was: bring it back"
        )
