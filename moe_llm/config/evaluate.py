"""The evaluate section of a run."""

from pydantic import Field, model_validator

from moe_llm.config.base import HomePath, Section, invalid


class EvaluateConfig(Section):
    """What is measured on held-out text, and when."""

    every_steps: int | None = Field(None, ge=1, description="null: at the end only")
    max_blocks: int | None = Field(None, ge=1, description="validation blocks used; null: all")
    ema: bool = Field(
        False, description="also measure the average of `checkpoint.ema`: ema_val_loss and ema_val_bits_per_byte"
    )
    tasks: list[str] = Field(
        [],
        description="tasks of lm_eval that are measured too, such as hellaswag; needs `pip install 'moe_llm[tasks]'`",
    )
    tasks_path: HomePath | None = Field(None, min_length=1, description="a directory of task files of your own")
    tasks_limit: int | None = Field(None, ge=1, description="documents of each task; null: all")
    sample_prompt: str | None = Field(None, description="text continued and printed at the end of a run")
    sample_tokens: int = Field(128, ge=1, description="tokens of that sample")

    @model_validator(mode="after")
    def _tasks_settings_apply(self):
        for name in ("tasks_path", "tasks_limit"):
            if getattr(self, name) is not None and not self.tasks:
                invalid(name, getattr(self, name), "applies to no task", "set evaluate.tasks, or remove it")
        return self
