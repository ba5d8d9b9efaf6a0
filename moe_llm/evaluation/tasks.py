"""Tasks of the Language Model Evaluation Harness (`lm_eval`): of a checkpoint, and of a run while it trains.

The harness forms requests, batches and metrics; here is what its models for transformers are given. `lm_eval` is imported
inside functions: it is an extra.
"""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_llm.checkpoint.folder import check_checkpoint_directory
from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime
from moe_llm.errors import UserError
from moe_llm.families.architectures import OWN


def check_tasks(tasks: Sequence[str], path: str | None, where: str) -> None:
    """Refuse tasks that are not there, before any work.

    Args:
        path: a directory of the user's own task files. where: what names the tasks, for errors.

    Raises:
        UserError: the harness is not installed, or does not know a task.
    """
    if find_spec("lm_eval") is None:
        raise UserError(f"{where} needs the package lm_eval: pip install 'moe_llm[tasks]'")
    if path is not None and not Path(path).is_dir():
        raise UserError(f"{where}: {path} is no directory of task files: name one")
    known = _manager(path)
    for task in tasks:
        if not known.match_tasks([task]):
            raise UserError(
                f"{where}: lm_eval knows no task {task}: run `lm_eval ls tasks`, or give the folder of its file"
            )


def evaluate_tasks(
    checkpoint: str | Path,
    tasks: Sequence[str],
    *,
    path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
) -> dict[str, float]:
    """Metrics of a checkpoint by `TASK/METRIC`, as `lm_eval --model hf` computes them.

    Args:
        path: a directory of the user's own task files. num_fewshot: examples before each question; None: as the task
            says. limit: documents of each task. chat: put requests into the chat template.

    Raises:
        UserError: no checkpoint, no harness, or no such task.
    """
    check_checkpoint_directory(checkpoint)
    check_tasks(tasks, path, "--tasks")
    own = read_json(Path(checkpoint) / "config.json").get("model_type") == OWN.model_type
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = {"batch_size": batch_size, "device": device, "trust_remote_code": own}
    model = HFLM(pretrained=str(checkpoint), **arguments)
    return _metrics(model, tasks, path, num_fewshot=num_fewshot, limit=limit, apply_chat_template=chat)


@torch.no_grad()
def evaluate_tasks_of_engine(
    engine: Engine,
    runtime: Runtime,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    heartbeat: Callable[[str], None] = lambda phase: None,
) -> dict[str, float]:
    """The same of the weights that are being trained; the ranks share each batch. Collective."""
    from lm_eval.models.huggingface import HFLM
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = engine.model.config
    # the harness reads its length and kind; it computes nothing
    stand_in = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=settings.resolved_vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, num_local_experts=1, num_experts_per_tok=1,
            max_position_embeddings=settings.max_position_embeddings,
        )
    )  # fmt: skip

    class InTraining(HFLM):
        """The harness's model for transformers, computed by the engine."""

        @property
        def device(self) -> torch.device:
            return runtime.device

        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            heartbeat("tasks")
            rows, ranks = len(inps), runtime.world_size
            share = -(-rows // ranks)
            padded_BS = inps.repeat(-(-share * ranks // rows), 1)[: share * ranks]  # as many rows on every rank
            mine_BS = padded_BS[runtime.rank * share : (runtime.rank + 1) * share].to(runtime.device)
            output = engine.forward(input_ids=mine_BS)
            assert output.logits is not None, "no targets were given"
            logits_BSV = output.logits.float()
            if ranks == 1:
                return logits_BSV
            whole = logits_BSV.new_empty(share * ranks, *logits_BSV.shape[1:])
            torch.distributed.all_gather_into_tensor(whole, logits_BSV.contiguous())
            return whole[:rows]

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
            """Greedily, each token from the whole text before it."""
            from lm_eval.models.utils import stop_sequences_criteria

            criteria = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
            while context.shape[1] < max_length:
                next_B1 = self._model_call(context)[:, -1].argmax(-1, keepdim=True)
                context = torch.cat([context, next_B1.to(context)], 1)
                if all(criterion(context, None).all() for criterion in criteria):
                    break
            return context

    engine.model.eval()
    model = InTraining(pretrained=stand_in, tokenizer=tokenizer, batch_size=batch_size)
    found = _metrics(model, tasks, path, limit=limit)
    engine.model.train()
    return found


def _manager(path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=path)


def _metrics(model: Any, tasks: Sequence[str], path: str | None, **options: Any) -> dict[str, float]:
    import lm_eval

    before = os.environ.get("TOKENIZERS_PARALLELISM")
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=_manager(path), bootstrap_iters=0, log_samples=False, **options
    )
    if before is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = before
    assert found is not None, "this process has rank 0 for the harness"
    return {
        f"{task}/{name.removesuffix(',none').replace(',', '/')}": float(value)
        for task, measured in found["results"].items()
        for name, value in measured.items()
        if isinstance(value, int | float) and "_stderr" not in name and name not in ("sample_len", "alias")
    }
