"""`evaluate.tasks`: tasks of lm_eval at each evaluation; their metrics go into its record."""

from typing import Any

from moe_llm.config import Config
from moe_llm.evaluation.tasks import check_tasks, evaluate_tasks_of_engine
from moe_llm.train.callbacks.base import Callback, TrainingRun


class TaskEvaluation(Callback):
    """Metrics by `val_TASK/METRIC`, which trackers show as eval/TASK/METRIC."""

    def validate(self, config: Config) -> None:
        check_tasks(config.evaluate.tasks, config.evaluate.tasks_path, "evaluate.tasks")

    def on_evaluate(self, run: TrainingRun, metrics: dict[str, Any]) -> None:
        settings = run.config.evaluate
        found = evaluate_tasks_of_engine(
            run.engine,
            run.runtime,
            run.tokenizer,
            settings.tasks,
            path=settings.tasks_path,
            limit=settings.tasks_limit,
            batch_size=run.config.train.micro_batch_size * run.runtime.world_size,
            heartbeat=run.heartbeat,
        )
        metrics |= {f"val_{name}": value for name, value in found.items()}
