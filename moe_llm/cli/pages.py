"""Which page of the documentation helps with an error: by the configuration key that it names, else by the command."""

import re

# The first key that a sentence begins with counts.
PAGES_OF_KEYS = {
    "model.router": "guides/routers.md",
    "model.architecture": "guides/families.md",
    "model.rope_parameters": "guides/long-sequences.md",
    "model.init_from": "guides/fine-tuning.md",
    "model.balance_over": "guides/balance-over-a-step.md",
    "data": "guides/prepare-data.md",
    "tokenizer": "getting-started/your-data.md",
    "parallel.offload_optimizer": "guides/memory-on-one-node.md",
    "parallel.sequence_parallel_size": "guides/long-sequences.md",
    "parallel": "guides/several-ranks.md",
    "optim": "guides/optimizers.md",
    "train.callbacks": "guides/custom-callback.md",
    "train.adversarial": "guides/adversarial.md",
    "finetune.lora": "guides/low-rank-adapters.md",
    "finetune": "guides/fine-tuning.md",
    "distill": "guides/distillation.md",
    "preference": "guides/preference-tuning.md",
    "checkpoint.push_to_hub": "guides/hub.md",
    "checkpoint": "guides/long-runs.md",
    "evaluate.tasks": "guides/task-evaluation.md",
    "logging": "guides/monitoring.md",
    "model": "configuration.md",
    "train": "configuration.md",
    "evaluate": "configuration.md",
    "run": "reference/run-directory.md",
}
PAGES_OF_COMMANDS = {
    "prepare": "guides/prepare-data.md",
    "tokenizer": "getting-started/your-data.md",
    "upcycle": "guides/upcycling.md",
    "generate-dataset": "guides/distillation.md",
    "inspect": "guides/planning-and-inspecting.md",
    "plan": "guides/planning-and-inspecting.md",
    "diff": "guides/fine-tuning.md",
    "report": "guides/monitoring.md",
    "push": "guides/hub.md",
    "merge": "guides/merging.md",
    "extract-lora": "guides/merging.md",
    "ensemble": "guides/ensembles.md",
    "doctor": "guides/doctor.md",
    "verify": "developer/checkpoints.md",
}
_KEY = re.compile(r"(?<![\w.])(?:" + "|".join(map(re.escape, PAGES_OF_KEYS)) + r")(?=\.\w|[=\[])")


def page_for(sentence: str, command: str) -> str | None:
    """The page, as a path in the repository; None where there is none.

    Args:
        sentence: the error.
        command: the name of the command that failed.
    """
    keys = sorted((match[0] for match in _KEY.finditer(sentence)), key=sentence.index)
    page = PAGES_OF_KEYS[keys[0]] if keys else PAGES_OF_COMMANDS.get(command)
    return page and f"docs/{page}"
