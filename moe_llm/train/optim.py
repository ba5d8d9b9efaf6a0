"""The optimizer's parameter groups and the learning-rate schedule."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from moe_llm.config import Config
from moe_llm.config.optim import ADAMW_TENSORS, BF16_ADAMW, MUON_TENSORS, OPTIMIZERS, OptimConfig
from moe_llm.errors import UserError
from moe_llm.families.hf import is_expert, is_router


def parameter_groups(model: nn.Module, weight_decay: float, optimizer: str = "adamw") -> list[dict]:
    """Matrices decay, vectors (norms and biases, those of stacked experts too) do not; frozen parameters are in no
    group. optimizer: `optim.name`; for Muon the matrices that it updates are in groups marked `muon`, and for
    AdamW with moments of 8 bits those whose moments have 32 are in groups whose `packed` is false."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decaying = {name for name, p in trained.items() if p.dim() > 1 and not name.endswith("_bias")}
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": [trained[name] for name in trained if name in decaying]},
        {"name": "vectors", "params": [trained[name] for name in trained if name not in decaying]},
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = weight_decay, 0.0
    if optimizer == "muon":
        groups = _groups_of_muon(model, groups)
    elif optimizer == "adamw_8bit":
        groups = _embeddings_apart(model, groups)
    return [group for group in groups if group["params"]]


def _embeddings_apart(model: nn.Module, groups: list[dict]) -> list[dict]:
    """The groups, with embeddings in one of their own: most of their rows have no gradient in a step, and a second moment
    that 8 bits round to zero would then magnify the first one (Dettmers et al. 2022, section 2.3, keeps 32 bits too)."""
    names = {p: name for name, p in model.named_parameters()}
    embeddings = {p for p in names if "embed_tokens" in names[p]}
    rest = [{**group, "params": [p for p in group["params"] if p not in embeddings]} for group in groups]
    apart = [
        {**group, "params": [p for p in group["params"] if p in embeddings], "name": "embeddings", "packed": False}
        for group in groups
    ]
    return rest + apart


def _groups_of_muon(model: nn.Module, groups: list[dict]) -> list[dict]:
    """The groups cut into what Muon updates and the rest: embeddings, the output layer, routers and vectors, as its
    authors advise. A stacked parameter is one matrix an expert, or two where it holds a gate above an up projection."""
    names = {p: name for name, p in model.named_parameters()}
    cut: dict[str, dict] = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            parts = _matrices_in_rows(name, parameter) if group["name"] == "matrices" else 0
            kinds = MUON_TENSORS if parts else ADAMW_TENSORS
            label = group["name"] + ("_of_muon" if parts else "") + ("_in_two" if parts == 2 else "")
            new = {**group, "params": [], "name": label, "muon": parts, "kinds": kinds}
            cut.setdefault(label, new)["params"].append(parameter)
    return list(cut.values())


def _matrices_in_rows(name: str, parameter: nn.Parameter) -> int:
    """Matrices that lie above each other in a parameter (of one expert) that Muon updates; 0: AdamW does."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if "embed_tokens" in name or "lm_head" in name or is_router(name) or min(shape[-2:]) == 1:
        return 0
    return 2 if name.endswith(".experts.gate_up_proj") else 1


def groups_by_part(model: nn.Module, groups: list[dict], config: Config) -> list[dict]:
    """Parameter groups cut further where parts of the model have rates of their own (`optim.lr_multipliers`), where
    routers take turns (`train.adversarial.router_every`), or only some of the experts are trained (`finetune.experts`):
    engines then decay the rows of these alone."""
    rates, names = config.optim.lr_multipliers, {p: name for name, p in model.named_parameters()}
    some, in_turns = config.finetune.experts is not None, config.train.adversarial.router_every is not None
    cut: dict[str, dict] = {}
    for group in groups:
        for parameter in group["params"]:
            experts = is_expert(names[parameter])
            rate = rates.experts if experts else rates.router if is_router(names[parameter]) else rates.rest
            name = group["name"] + (f"_times_{rate:g}" if rate != 1 else "") + ("_of_some_experts" * (some and experts))
            routers = in_turns and is_router(names[parameter])
            name += "_of_routers" * routers
            part = cut.setdefault(name, {**group, "params": [], "name": name, "lr_multiplier": rate})
            part |= {"routers": routers} if in_turns else {}
            part["params"].append(parameter)
            if some and experts:
                part |= {"row_weight_decay": group["weight_decay"], "weight_decay": 0.0}
    return list(cut.values())


def check_library(config: OptimConfig) -> None:
    """Refuse an optimizer whose library is not installed."""
    entry = OPTIMIZERS[config.name]
    if entry.library is not None and importlib.util.find_spec(entry.library) is None:
        raise UserError(
            f"optim.name={config.name} needs the package {entry.library}, which is not installed: "
            f"pip install 'moe_llm[{entry.extra}]', or use optim.name=adamw"
        )


def build_optimizer(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` names in the table of optimizers, on these groups.

    Raises:
        UserError: its library is not installed.
    """
    check_library(config)
    entry = OPTIMIZERS[config.name] if config.master_weights == "fp32" else BF16_ADAMW
    module, _, name = entry.factory.partition(":")
    kind = getattr(importlib.import_module(module), name)
    if any("routers" in group for group in groups):
        kind = type(f"{name}InTurns", (_InTurns, kind), {})
    arguments = {key: getattr(config, key) for key in entry.takes} | entry.arguments
    optimizer = kind(groups, lr=config.lr, **arguments)
    if entry.switches:
        optimizer.train()
    return optimizer


class _InTurns(torch.optim.Optimizer):
    """A step leaves out the groups that are `idle`: their weights do not decay, and their moments stay as they are."""

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("idle")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups
