"""The logging section of a run."""

from typing import Literal

from pydantic import Field

from moe_llm.config.alarms import AlarmsConfig
from moe_llm.config.base import Section


class LoggingConfig(Section):
    """What is shown and recorded."""

    every_steps: int = Field(1, ge=1, description="a line in metrics.jsonl every so many steps")
    console: Literal["auto", "bar", "plain", "off"] = Field(
        "auto", description="auto: a progress bar on a terminal, plain lines elsewhere"
    )
    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="Weights & Biases; WANDB_MODE, WANDB_NAME and WANDB_RUN_ID count where they are set"
    )
    project: str | None = Field(
        None,
        min_length=1,
        description="the trackers' project or experiment; null: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, else moe_llm",
    )
    tensorboard: bool = Field(
        False, description="TensorBoard files in the run directory; needs `pip install tensorboard`"
    )
    mlflow: bool = Field(
        False, description="MLflow, as MLFLOW_TRACKING_URI says; needs `pip install 'moe_llm[mlflow]'`"
    )
    trackio: bool = Field(False, description="trackio, on this machine; needs `pip install 'moe_llm[trackio]'`")
    image_every_steps: int = Field(
        50, ge=1, description="wandb and tensorboard get histograms and the load as an image at most so often"
    )
    plots: bool = Field(
        True, description="draw the losses and the experts' load in the run directory's `plots` when the run ends"
    )
    alarms: AlarmsConfig = Field(AlarmsConfig(), description="when to say that experts are in trouble")
