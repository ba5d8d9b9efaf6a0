"""What Python programs call, in the place of the command line: `moe_llm.load_config`, `moe_llm.train` and the others.

A function here does what the command of its name does, raises `UserError` where that ends with exit code 2, and
`TrainingFailure` where it ends with 1. What it needs is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from moe_llm.config import Config


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A run's configuration, from a YAML file.

    Args:
        path: the file. With `model.init_from`, keys of the model that it leaves open come from that checkpoint.
        overrides: `section.key=value`, as on the command line.

    Raises:
        UserError: one sentence that names field, value and remedy.
    """
    from moe_llm.config import load_config
    from moe_llm.finetune.init_from import complete

    return load_config(path, overrides, complete)


def train(config: Config) -> Path:
    """Train as configured, from the newest sound checkpoint of `run.dir` if there is one.

    Returns:
        The newest checkpoint, a directory that transformers loads.

    Raises:
        UserError: bad input, found before any training and before anything is overwritten.
        TrainingFailure: training cannot continue, for example because the loss is not finite.
        Stopped: a signal has ended the run early; what it had trained is saved, and calling again resumes it.
    """
    from moe_llm.train.run import train

    return train(config)


def evaluate(
    checkpoint: str | Path,
    files: str | list[str],
    *,
    batch_size: int = 8,
    sequence_length: int | None = None,
    max_blocks: int | None = None,
    chat: bool = False,
) -> dict[str, float]:
    """Loss (nats per token), perplexity and bits per byte of a checkpoint on text.

    Args:
        checkpoint: a checkpoint directory.
        files: a path or glob of text, jsonl or parquet files, or a list of them.
        batch_size: blocks that pass through the model at once.
        sequence_length: tokens of a block; None: the model's longest, at most 4096.
        max_blocks: blocks in all; None: all of the text.
        chat: the files hold conversations, and the assistant's turns alone are scored.

    Raises:
        UserError: no checkpoint there, or no text.
    """
    from moe_llm.evaluation.evaluate import evaluate_files

    return evaluate_files(
        checkpoint, files, batch_size=batch_size, sequence_length=sequence_length, max_blocks=max_blocks, chat=chat
    )


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> str:
    """The prompt and its continuation by a checkpoint.

    Args:
        checkpoint: a checkpoint directory.
        prompt: the text to continue.
        max_new_tokens: at most as many.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens with this total probability.
        seed: of the sampling.
        say: receives a sentence where generation routes otherwise than training did; None: stderr.

    Raises:
        UserError: no checkpoint there, a damaged one, or a prompt longer than the model's positions.
    """
    from moe_llm.inference.generate import generate

    return generate(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        say=say,
    )
