"""Teachers of a run (`distill`): what they say of a batch goes into the student's loss."""

from typing import TYPE_CHECKING, Any

from moe_llm.config import Config
from moe_llm.data.packing import Batch
from moe_llm.distill.teachers import check_teachers, check_vocabularies
from moe_llm.distill.teaching import Teaching, build_teaching
from moe_llm.train.callbacks.base import Callback, TrainingRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Distillation(Callback):
    """Loads the teachers, or reads what they have said of the run's blocks, and gives it to each forward pass."""

    _teach: Teaching

    def validate(self, config: Config) -> None:
        check_teachers(config)

    def validate_tokenizer(self, config: Config, tokenizer: "PreTrainedTokenizerFast") -> None:
        check_vocabularies(config, tokenizer)

    def on_setup(self, run: TrainingRun) -> None:
        steps_left = run.config.max_steps - run.position.step
        self._teach = build_teaching(
            run.config,
            run.runtime,
            run.data.train,
            run.tokenizer,
            start=run.position.samples,
            samples=steps_left * run.config.train.global_batch_size,
            say=run.say,
        )

    def extra_inputs(self, run: TrainingRun, batch: Batch) -> dict[str, Any]:
        return self._teach(batch)
