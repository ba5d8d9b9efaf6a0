"""Experts that change ranks, so that loads even out (after SmartMoE, Zhai et al. 2023, "Offline-Online Expert Placement").

Which expert lies in which slot of a layer's ranks is a permutation; tokens are sent to slots, and weights, optimizer
tensors and averages move with their expert. What is computed stays the same, row by row. Checkpoints know parameters by
expert, so experts go home before one is written.
Dimensions: L layers, E experts, R ranks that share them, P = E / R slots of a rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_llm.distributed.dispatch import AllToAllDispatcher
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.placement_plan import Placement, busiest_over_even, plan_placement
from moe_llm.distributed.state import EMA
from moe_llm.model.moe.experts import Experts, MoELayer


class ExpertPlacement:
    """Where the experts of an engine's layers are, and their moves. All methods are collective.

    placements: of each layer, the expert in each slot.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.layers: list[tuple[str, MoELayer]] = [
            (name, module) for name, module in engine.model.named_modules() if isinstance(module, MoELayer)
        ]
        self.dispatchers: list[AllToAllDispatcher] = []
        for _, layer in self.layers:
            assert isinstance(layer.dispatcher, AllToAllDispatcher), "experts move between ranks that share them"
            self.dispatchers.append(layer.dispatcher)
        self.home: Placement = list(range(engine.model.config.num_local_experts))
        self.placements = [self.home for _ in self.layers]

    def busiest(self, load_LE: Tensor) -> float:
        """Rows of the busiest rank over those of an even share, the mean over the layers."""
        found = []
        for load_E, placement, dispatcher in zip(load_LE.tolist(), self.placements, self.dispatchers):
            found.append(busiest_over_even(load_E, placement, dispatcher.size))
        return sum(found) / len(found)

    def plan(self, load_LE: Tensor) -> list[Placement]:
        """Of each layer, for loads that are the same on every rank."""
        return [
            plan_placement(load_E, placement, dispatcher.size)
            for load_E, placement, dispatcher in zip(load_LE.tolist(), self.placements, self.dispatchers)
        ]

    def move(self, placements: list[Placement]) -> int:
        """Bring every layer's experts into these slots; returns how many have changed rank."""
        moved = 0
        entries = {entry.name: entry for entry in self.engine.entries() if entry.experts is not None}
        averages = (EMA,) if self.engine.averaged else ()
        for i, (name, layer) in enumerate(self.layers):
            before, after = self.placements[i], placements[i]
            if before == after:
                continue
            dispatcher = self.dispatchers[i]
            for entry in entries.values():
                if entry.name.startswith(f"{name}.experts."):
                    own = entry.kinds_among(self.engine.kinds)
                    for kind in ("weight", *own, *(averages if entry.trainable else ())):
                        held = self.engine.read(entry.name, kind)
                        self.engine.write(entry.name, kind, _exchange(held, before, after, dispatcher))
            self._settle(layer, dispatcher, after)
            self.placements[i] = after
            size = len(after) // dispatcher.size
            moved += sum(before.index(e) // size != slot // size for slot, e in enumerate(after))
        return moved

    def go_home(self) -> None:
        """Every expert where it was at the start, as checkpoints have them."""
        self.move([self.home for _ in self.layers])

    def forget(self) -> None:
        """The weights have been set anew, as if experts were at home."""
        for (_, layer), dispatcher in zip(self.layers, self.dispatchers):
            self._settle(layer, dispatcher, self.home)
        self.placements = [self.home for _ in self.layers]

    def _settle(self, layer: MoELayer, dispatcher: AllToAllDispatcher, placement: Placement) -> None:
        size = len(placement) // dispatcher.size
        at_home = placement == self.home
        experts = layer.experts
        assert isinstance(experts, Experts), "the configuration refuses to move experts of different widths"
        own = placement[dispatcher.rank * size : (dispatcher.rank + 1) * size]
        experts.held = None if at_home else own
        dispatcher.expert_of_slot = None if at_home else placement


def _exchange(held_PX: Tensor, before: Placement, after: Placement, dispatcher: AllToAllDispatcher) -> Tensor:
    """The rows of this rank's slots under `after`, from what each rank holds under `before`."""
    size, rank, ranks = len(held_PX), dispatcher.rank, dispatcher.size
    slot_of = {expert: slot for slot, expert in enumerate(before)}
    # an expert travels to the rank of its new slot; what goes from one rank to another is in the order of new slots
    leaving = [
        [slot_of[e] % size for e in after[to * size : (to + 1) * size] if slot_of[e] // size == rank]
        for to in range(ranks)
    ]
    arriving = [
        [slot for slot, e in enumerate(after[rank * size : (rank + 1) * size]) if slot_of[e] // size == origin]
        for origin in range(ranks)
    ]
    device = (
        "cpu" if dist.get_backend(dispatcher.group) == "gloo" else torch.device("cuda", torch.cuda.current_device())
    )
    sent = held_PX.to(device)[[row for rows in leaving for row in rows]].contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(
        received, sent, [len(r) for r in arriving], [len(r) for r in leaving], group=dispatcher.group
    )
    result_PX = torch.empty_like(received)
    result_PX[[slot for slots in arriving for slot in slots]] = received
    return result_PX.to(held_PX.device)
