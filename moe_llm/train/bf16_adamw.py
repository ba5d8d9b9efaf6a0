"""AdamW that updates bf16 weights without fp32 copies of them.

A weight of 8 significant bits loses updates that are below half of its last bit: with a rate of 1e-4 nearly all of them.
Two remedies: rounding by chance, so that the expected value is the exact one (Gupta et al. 2015, "Deep Learning with Limited
Numerical Precision"), or a second bf16 tensor that takes what rounding has left over (Kahan summation; Zamirai et al. 2020,
"Revisiting BFloat16 Training").
"""

from typing import Any

import torch
from torch import Tensor

from moe_llm.distributed.state import COMPENSATION, split

_CHUNK = 2**22  # elements that are in fp32 at once


class BF16AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with fp32 moments. Where a weight's state has `COMPENSATION`, as the engine
    decides, weight and compensation together are what is updated; else the weight is rounded by chance, with torch's
    default generator, which the training loop seeds in every step."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the training loop computes gradients itself"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: dict) -> None:
        state = self.state[weight]
        if "step" not in state:
            state["step"] = torch.zeros((), device=weight.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(weight, dtype=torch.float32)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        left_over = state.get(COMPENSATION)
        assert weight.grad is not None, "those without one are left out"
        flat = [t.view(-1) for t in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])]
        for begin in range(0, weight.numel(), _CHUNK):
            low, gradient, first, second = (t[begin : begin + _CHUNK] for t in flat)
            compensation = None if left_over is None else left_over.view(-1)[begin : begin + _CHUNK]
            wide = low.float() if compensation is None else low.float() + compensation
            torch._fused_adamw_(
                [wide], [gradient.float()], [first], [second], [], [state["step"]],
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip
            if compensation is None:
                low.copy_(stochastically_rounded(wide))
            else:
                high, rest = split(wide)
                low.copy_(high)
                compensation.copy_(rest)


def stochastically_rounded(wide: Tensor) -> Tensor:
    """Of the two bf16 numbers around each fp32 one, either by a chance that makes the expected value the fp32 one."""
    noise = torch.randint(0, 2**16, wide.shape, dtype=torch.int32, device=wide.device)
    return ((wide.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()
