"""What acts on a run beside the training step itself: one file for each feature, on the hooks of `base.Callback`."""

from moe_llm.train.callbacks.base import Callback, TrainingRun

__all__ = ["Callback", "TrainingRun"]
