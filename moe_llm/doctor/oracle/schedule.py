"""The learning rate of an optimizer step, from its published formulas.

Linear warm-up (Goyal et al. 2017), cosine decay (Loshchilov and Hutter 2017, equation 5, one period), and
warmup-stable-decay with a linear decay (Hu et al. 2024).
"""

import math
from typing import Any

FORMULAS = ("cosine", "wsd", "constant")


def rate(optim: Any, step: int, steps: int) -> float:
    """The rate of step `step`, counted from 0, of `steps` in all.

    Args:
        optim: lr, schedule, warmup_steps, decay_ratio and min_lr_ratio are read.
    """
    highest, lowest, warmup = optim.lr, optim.lr * optim.min_lr_ratio, optim.warmup_steps
    if step < warmup:
        return highest * (step + 1) / warmup
    if optim.schedule == "constant":
        return highest
    if optim.schedule == "cosine":
        period = max(steps - warmup, 1)
        angle = math.pi * min(step - warmup, period) / period
        return lowest + (highest - lowest) * (1 + math.cos(angle)) / 2
    assert optim.schedule == "wsd", f"no formula for optim.schedule={optim.schedule}"
    decay = max(round(optim.decay_ratio * steps), 1)
    begin = steps - decay
    if step <= begin:
        return highest
    return highest + (lowest - highest) * min((step - begin) / decay, 1)
