"""A low-rank adapter in PEFT's files: adapter_model.safetensors and adapter_config.json.

Linear layers have factors under their own names. Stacked experts, and routers, are parameters to PEFT: they go through its
`target_parameters`, where the factors of all experts of a layer lie in one matrix. Dimensions: r rank, I columns, O rows,
E experts.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_llm.checkpoint.manifest import write_json
from moe_llm.data.files import errors_of_rust, publish

STACKED = ("gate_up_proj", "down_proj")
EXPERTS = re.compile(rf"(.*\.mlp\.experts)\.({'|'.join(STACKED)})")
_ORDER = ("mlp.gate.weight", *(f"mlp.experts.{name}" for name in STACKED))


@dataclass
class PeftAdapter:
    """factors: A (r, I) and B (O, r) by the name of the weight in transformers; of experts (E, r, I) and (E, O, r). whole:
    tensors that are stored as they are. alpha: what products of A and B are multiplied by, times the rank; None: the rank.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    def write(self, out: Path, base: str) -> None:
        """base: the directory or repository that is adapted."""
        with publish(out, "output") as temporary, errors_of_rust():
            save_file(self._tensors(), temporary / "adapter_model.safetensors", metadata={"format": "pt"})
            write_json(temporary / "adapter_config.json", self._configuration(base))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"base_model.model.{name}": tensor for name, tensor in self.whole.items()}
        for name, (a, b) in self.factors.items():
            prefix = name.removesuffix(".weight")
            if match := EXPERTS.fullmatch(name):
                # PEFT wraps a module once for each of its parameters, and the first is innermost
                both = {f"{match[1]}.{leaf}" for leaf in STACKED} <= self.factors.keys()
                prefix = f"{match[1]}.base_layer" if both and match[2] == STACKED[0] else match[1]
                a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            tensors[f"base_model.model.{prefix}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{prefix}.lora_B.weight"] = b.contiguous()
        return tensors

    @property
    def _parameters(self) -> list[str]:
        """Those that are none of a linear layer, in PEFT's words and in the order in which it shall wrap them."""
        names = {".".join(name.split(".")[3:]) for name in self.factors if is_parameter(name)}
        return sorted(names, key=_ORDER.index)

    def _configuration(self, base: str) -> dict[str, Any]:
        ranks = {_module(name): a.shape[-2] for name, (a, _) in self.factors.items()}
        modules = {_module(name).rpartition(".")[2] for name in self.factors if not is_parameter(name)}
        rank = max(ranks.values(), default=1)
        other = {module: found for module, found in ranks.items() if found != rank}
        alpha = rank if self.alpha is None else self.alpha
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "target_modules": sorted(modules),
            "target_parameters": self._parameters or None,
            "modules_to_save": sorted({_module(name).rpartition(".")[2] for name in self.whole}) or None,
            "r": rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "rank_pattern": other,
            "alpha_pattern": other,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "fan_in_fan_out": False,
            "inference_mode": True,
        }


def is_parameter(name: str) -> bool:
    """Whether a weight is one of PEFT's `target_parameters`."""
    return name.endswith(".mlp.gate.weight") or EXPERTS.fullmatch(name) is not None


def _module(name: str) -> str:
    match = EXPERTS.fullmatch(name)
    return match[1] if match else name.removesuffix(".weight")


def filled(x_rI: Tensor, rank: int) -> Tensor:
    """With rows of zeros up to the rank: PEFT's parameters have one rank."""
    return torch.cat([x_rI, x_rI.new_zeros(rank - len(x_rI), x_rI.shape[1])])
