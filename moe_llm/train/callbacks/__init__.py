"""Callbacks of users: what they derive from (`base`), and how a configuration names them (`registry`)."""

from moe_llm.train.callbacks.base import Callback, TrainingRun

__all__ = ["Callback", "TrainingRun"]
