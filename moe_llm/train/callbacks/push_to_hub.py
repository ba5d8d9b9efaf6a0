"""`checkpoint.push_to_hub`: the run's last checkpoint goes to a hub when the run is complete."""

import os

from moe_llm.config import Config
from moe_llm.errors import UserError
from moe_llm.hub import check_hub, push
from moe_llm.train.callbacks.base import Callback, TrainingRun


class PushToHub(Callback):
    """Uploads from the main rank; what the hub refuses is reported and ends nothing, as the checkpoint is on the disk."""

    def validate(self, config: Config) -> None:
        if os.environ.get("RANK", "0") == "0":  # nobody need have logged in where other ranks are
            check_hub(str(config.checkpoint.push_to_hub), "checkpoint.push_to_hub")

    def on_train_end(self, run: TrainingRun) -> None:
        if not run.runtime.is_main or not run.saved or run.saved_step != run.position.step or not run.complete:
            return
        try:
            address = push(run.saved[-1], str(run.config.checkpoint.push_to_hub), private=True, say=run.say)
            run.say(f"pushed to {address}")
        except UserError as error:
            run.say(f"not pushed: {error} (moe-llm push {run.saved[-1]} {run.config.checkpoint.push_to_hub})")
