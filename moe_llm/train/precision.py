"""Which precision a run computes in where its configuration does not say."""

from collections.abc import Callable

import torch

from moe_llm.config import Config
from moe_llm.ops import native

# what multiplies bf16 on x86; without any of them torch takes bf16 apart into fp32 and back, an order of magnitude slower
_BF16_UNITS = {"avx512_bf16", "amx_bf16"}


def settle_precision(config: Config, say: Callable[[str], None]) -> Config:
    """The configuration with `train.precision` decided: fp32 where none is given and a CPU that emulates bf16 computes.

    A bf16 that was asked for stays, and a sentence says what it costs there.
    """
    if config.train.precision != "bf16" or not _emulates_bf16(config):
        return config
    if "precision" in config.train.model_fields_set or config.parallel.gradient_dtype == "bf16":
        say(
            "this processor emulates bf16, which is slower by an order of magnitude: train.precision=fp32 is faster here"
        )
        return config
    say("this processor emulates bf16: train.precision is fp32, since the configuration names none")
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})


def _emulates_bf16(config: Config) -> bool:
    if config.train.device != "cpu" and torch.cuda.is_available():
        return False
    known = native.instructions()
    return bool(known) and not known & _BF16_UNITS
