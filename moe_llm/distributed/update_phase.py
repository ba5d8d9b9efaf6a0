"""Routers and the rest, trained in turns (`train.adversarial.router_every`).

What is idle gets no gradient, so that neither the norm nor its bound knows of it, and the optimizer leaves out its
groups, so that it does not decay and its moments stay as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_llm.config.adversarial import AdversarialConfig, UpdatePhase
from moe_llm.distributed.adamw_8bit import AdamW8bit


class UpdatePhases:
    """The part of an engine that knows whose turn it is. Groups of parameters say whether they are `routers`, and the
    optimizer leaves out those that are `idle`."""

    kinds: tuple[str, ...]
    starts_as_weight: tuple[str, ...]
    _allocate: Callable[[Tensor], Tensor]  # room for what is kept of a weight: fp32, of its shape
    _phase: UpdatePhase = "all"

    def _set_up_phases(self, settings: AdversarialConfig, groups: list[dict]) -> None:
        self._phase_settings = settings
        for group in groups:
            if "routers" in group:
                for parameter in group["params"]:
                    parameter.register_hook(self._clear_if_idle(group["routers"]))

    def set_phase(self, turn: UpdatePhase) -> None:
        self._phase = turn

    def _idle(self, routers: bool) -> bool:
        return self._phase == ("rest" if routers else "routers")

    def _clear_if_idle(self, routers: bool) -> Callable[[Tensor], Tensor]:
        return lambda gradient: torch.zeros_like(gradient) if self._idle(routers) else gradient

    def _mark_idle(self, groups: list[dict]) -> None:
        for group in groups:
            if "routers" in group:
                group["idle"] = self._idle(group["routers"])

    def _fill_optimizer_state(
        self, optimizer: torch.optim.Optimizer, parameters: list[tuple[Tensor, dict]], steps: int
    ) -> None:
        """The tensors that the optimizer has of parameters (each with its group) after so many updates, with the values
        that they begin with."""
        for parameter, group in parameters if self.kinds else ():
            state, own = optimizer.state[parameter], self._phase_settings.updates_of(group.get("routers", False), steps)
            if isinstance(optimizer, AdamW8bit):
                optimizer.begin(parameter, group, own)
                continue
            # a fused optimizer counts on the device
            state["step"] = torch.tensor(float(own), device=parameter.device)
            for kind in group.get("kinds", self.kinds):
                if kind not in state:
                    state[kind] = self._allocate(parameter)
                state[kind].copy_(parameter.detach()) if kind in self.starts_as_weight else state[kind].zero_()
