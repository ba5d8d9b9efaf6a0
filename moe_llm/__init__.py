"""Train Mixtral-style mixture-of-experts language models; every checkpoint is a transformers checkpoint.

`import moe_llm` loads neither torch nor transformers; the names below are resolved at first use.
"""

from importlib import import_module

from moe_llm.errors import UserError

_LAZY = {
    "Config": "moe_llm.config",
    "ModelConfig": "moe_llm.config",
    "load_config": "moe_llm.config",
    "MoEForCausalLM": "moe_llm.checkpoint.pretrained",
}

__all__ = ["Config", "MoEForCausalLM", "ModelConfig", "UserError", "load_config"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moe_llm' has no attribute {name!r}")
