"""Train Mixtral-style mixture-of-experts language models; every checkpoint is a transformers checkpoint.

`import moe_llm` loads neither torch nor transformers; the names below are resolved at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_llm.errors import Stopped, TrainingFailure, UserError

if TYPE_CHECKING:
    from moe_llm.api import evaluate, generate, load_config, train
    from moe_llm.checkpoint.pretrained import MoEForCausalLM
    from moe_llm.config import Config, ModelConfig

_LAZY = {
    "Config": "moe_llm.config",
    "ModelConfig": "moe_llm.config",
    "MoEForCausalLM": "moe_llm.checkpoint.pretrained",
    "evaluate": "moe_llm.api",
    "generate": "moe_llm.api",
    "load_config": "moe_llm.api",
}

__all__ = [
    "Config",
    "MoEForCausalLM",
    "ModelConfig",
    "Stopped",
    "TrainingFailure",
    "UserError",
    "evaluate",
    "generate",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # a package as well, which can be called: see there
        return import_module("moe_llm.train")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moe_llm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
