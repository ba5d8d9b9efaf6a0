"""The optimizer's parameter groups and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from moe_llm.config import Config
from moe_llm.config.schema import OptimConfig
from moe_llm.families.hf import is_expert, is_router


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors (norms and biases, those of stacked experts too) do not; frozen parameters are in no
    group."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decaying = {name for name, p in trained.items() if p.dim() > 1 and not name.endswith("_bias")}
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": [trained[name] for name in trained if name in decaying]},
        {"name": "vectors", "params": [trained[name] for name in trained if name not in decaying]},
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = weight_decay, 0.0
    return [group for group in groups if group["params"]]


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


def build_optimizer(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD without momentum."""
    in_turns = any("routers" in group for group in groups)
    if config.name == "sgd":
        return (_SGDInTurns if in_turns else torch.optim.SGD)(groups, lr=config.lr)
    kind = _AdamWInTurns if in_turns else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class _InTurns(torch.optim.Optimizer):
    """A step leaves out the groups that are `idle`: their weights do not decay, and their moments stay as they are."""

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("idle")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class _SGDInTurns(_InTurns, torch.optim.SGD):
    pass


class _AdamWInTurns(_InTurns, torch.optim.AdamW):
    pass


def optimizer_kinds(config: OptimConfig) -> tuple[str, ...]:
    """Names of the tensors that the optimizer keeps for each parameter."""
    return ("exp_avg", "exp_avg_sq") if config.name == "adamw" else ()


def learning_rate(config: Config, step: int, total: int | None = None) -> float:
    """The rate of optimizer step `step` (counted from 0): a pure function, so nothing of it needs saving.

    Linear warm-up, then: cosine down to min_lr_ratio (Loshchilov and Hutter 2017); wsd: constant, then linear down
    in the last decay_ratio of the steps (Hu et al. 2024); or constant.

    total: steps of the run, where the caller knows them.
    """
    optim, total = config.optim, total or config.max_steps
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    floor = optim.min_lr_ratio
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    elif optim.schedule == "wsd":
        decay_steps = max(1, round(optim.decay_ratio * total))
        factor = floor + (1 - floor) * min(1.0, max(0.0, (total - step) / decay_steps))
    else:
        factor = 1.0
    return optim.lr * factor
