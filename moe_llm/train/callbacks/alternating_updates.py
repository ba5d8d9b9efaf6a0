"""Routers and the rest, trained in alternating steps (`train.adversarial.router_every`)."""

from moe_llm.config import Config
from moe_llm.errors import UserError
from moe_llm.families.hf import is_router
from moe_llm.finetune.selection import trained_names
from moe_llm.train.callbacks.base import Callback, TrainingRun


class AlternatingUpdates(Callback):
    """Says before each step which parameters it updates; the engine leaves the others as they are."""

    def validate(self, config: Config) -> None:
        """Refuse an alternation of which one part would train nothing: it is frozen, or the run is too short."""
        every = config.train.adversarial.router_every
        assert every is not None, "this callback belongs to runs that alternate"
        routers = [is_router(name) for name in trained_names(config)]
        if all(routers) or not any(routers):
            kind = "nothing but" if all(routers) else "no"
            raise UserError(
                f"train.adversarial.router_every={every} takes turns between routers and the rest, and this run trains "
                f"{kind} routers (finetune.trainable={config.finetune.trainable!r}): train both, or remove it"
            )
        if every > config.max_steps:
            raise UserError(
                f"train.adversarial.router_every={every} leaves no step of {config.max_steps} to the routers: lower it"
            )

    def on_step_begin(self, run: TrainingRun) -> None:
        run.update_phase = run.config.train.adversarial.turn(run.position.updates)
        run.engine.set_phase(run.update_phase)
