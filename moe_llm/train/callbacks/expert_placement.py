"""Experts exchange ranks every n steps, by the loads of the steps since the last time: `parallel.placement: dynamic`."""

from pathlib import Path

from torch import Tensor

from moe_llm.config import Config
from moe_llm.distributed.placement import ExpertPlacement, Placement
from moe_llm.errors import UserError
from moe_llm.model.moe.routing import RoutingStatistics
from moe_llm.train.callbacks.base import Callback, TrainingRun


class ExpertPlacementCallback(Callback):
    """Counts rows, plans and moves. Experts are at home while a checkpoint is copied, and go back afterwards, so that
    checkpoints are those of a static placement, and a run that is killed in the middle of a move has lost nothing but the
    steps since its last checkpoint."""

    placement: ExpertPlacement
    load_LE: Tensor | None = None
    _away: list[Placement] | None = None

    def validate(self, config: Config) -> None:
        model, size = config.model, config.parallel.expert_parallel_size
        refused = (
            (size == 1, "has no ranks between which experts could move: raise parallel.expert_parallel_size"),
            (
                model.num_local_experts == size,
                f"has one expert on each of parallel.expert_parallel_size={size} ranks, so that exchanging them evens out "
                "nothing: lower that, or use static",
            ),
            (model.router.merges, f"moves rows, and model.router.type={model.router.type} mixes weights: use static"),
            (model.expert_sizes is not None, "moves experts of one shape, and model.expert_sizes is set: use static"),
            (
                model.expert_activations is not None,
                "moves experts of one form, and model.expert_activations is set: use static",
            ),
            (config.finetune.experts is not None, "does not go with finetune.experts: use static"),
        )
        for is_so, why in refused:
            if is_so:
                raise UserError(f"parallel.placement=dynamic {why}")

    def on_setup(self, run: TrainingRun) -> None:
        self.placement = ExpertPlacement(run.engine)

    def on_step_end(self, run: TrainingRun) -> None:
        """Loads are of all ranks, so every rank plans alike."""
        routing: RoutingStatistics | None = run.window.step_routing
        if routing is not None:
            counts_LE = routing.tokens_per_expert_E.detach()
            self.load_LE = counts_LE if self.load_LE is None else self.load_LE + counts_LE
        if run.position.step % run.config.parallel.placement_every_steps or self.load_LE is None:
            return
        before = self.placement.busiest(self.load_LE)
        run.heartbeat("moving experts")
        moved = self.placement.move(self.placement.plan(self.load_LE))
        after, self.load_LE = self.placement.busiest(self.load_LE), None
        if moved:
            run.window.remarks["placement"] = {"experts_moved": moved, "busiest_before": before, "busiest_after": after}
            run.window.restart_clock()

    def on_save_begin(self, run: TrainingRun) -> None:
        self._away = self.placement.placements.copy()
        self.placement.go_home()

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        if self._away is not None and run.position.step < run.config.max_steps:
            self.placement.move(self._away)
        self._away = None

    def on_rollback(self, run: TrainingRun) -> None:
        self.placement.forget()
        self.load_LE = None
