"""The members' checkpoints, each loaded once, and what a token of each costs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_llm.checkpoint.export import DTYPES
from moe_llm.data.tokenizer import load_tokenizer
from moe_llm.ensemble.causal_lm import generate_plainly, load_causal_lm
from moe_llm.ensemble.recipe import Member
from moe_llm.errors import UserError
from moe_llm.merge.models import find

_EXPERTS = re.compile(r"(^|\.)experts\.")


@dataclass(frozen=True, eq=False)
class Model:
    """A causal LM of transformers in evaluation mode, and its tokenizer.

    name: as the recipe gives it. active: parameters that one token passes through.
    """

    name: str
    model: Any
    tokenizer: Any
    active: int

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def longest(self) -> int | None:
        """Positions that the model is meant for; None where its configuration does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def caches(self) -> bool:
        """Whether it may keep keys and values; a model that cannot says so in its configuration."""
        return getattr(self.model.config, "use_cache", None) is not False

    @property
    def rows(self) -> int:
        """Of its embedding: tokens that it can read."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def width(self) -> int:
        """Of its logits."""
        return self.model.get_output_embeddings().weight.shape[0]


def load_models(members: Sequence[Member]) -> list[Model]:
    """The model of each member; members of one checkpoint, device and dtype share it.

    Raises:
        UserError: a member that is no checkpoint, cannot be loaded, or a device that is not there; all members are
            looked for before the first is loaded.
    """
    keys = [(find(m.model).resolve(), _device(m.device, f"members.{i}"), m.dtype) for i, m in enumerate(members)]
    loaded: dict[tuple, Model] = {}
    for member, key in zip(members, keys):
        if key not in loaded:
            directory, device, dtype = key
            tokenizer = load_tokenizer(directory)
            model = load_causal_lm(directory, DTYPES[dtype] if dtype else "auto").to(device)
            generate_plainly(model, tokenizer)
            loaded[key] = Model(member.model, model, tokenizer, active_parameters(model))
    return [loaded[key] for key in keys]


def active_parameters(model: Any) -> int:
    """Parameters that one token passes through: all, but of the routed experts only those that it is sent to."""
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((found for name in names if (found := getattr(config, name, None))), None)
    taken = getattr(config, "num_experts_per_tok", None)
    total = sum(parameter.numel() for parameter in model.parameters())
    if not experts or not taken:
        return total
    routed = sum(p.numel() for name, p in model.named_parameters() if _EXPERTS.search(name))
    return total - routed + routed * taken // experts


def default_device() -> torch.device:
    """The first GPU, or the CPU without one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _device(name: str | None, field: str) -> torch.device:
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field}.device={name!r} cannot be used ({reason}): give cpu or a GPU that is here") from error
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
