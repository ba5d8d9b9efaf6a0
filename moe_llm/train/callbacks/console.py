"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

from moe_llm.config import Config
from moe_llm.train.callbacks.base import Callback, TrainingRun

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def summary(record: dict[str, Any], limit: float | None = None) -> str:
    """The scalars of a record, as one line; the limit is the hardware's, in tokens a second."""
    parts = [f"loss {record['loss']:.4f}"]
    parts += [word for word in ("skipped", "spike") if record.get(word)]
    if "distill_loss" in record:
        parts.append(f"distill {record['distill_loss']:.4f}")
    if "val_loss" in record:
        parts.append(f"val {record['val_loss']:.4f}")
    if "router_drift" in record:
        parts.append(f"router kl {max(record['router_drift']['kl']):.2g}")
    moe = record["moe"]
    balance = sum(moe["load_cv"]) / len(moe["load_cv"])
    dead = sum(len(layer) for layer in moe["dead_experts"])
    parts.append(f"load cv {balance:.2f}" + (f", {dead} dead" if dead else ""))
    speed = f"{record['tokens_per_second']:,.0f} tokens/s"
    if record.get("fill", 1.0) < 0.995:
        speed += f" in blocks {record['fill']:.0%} full"
    parts.append(speed if limit is None else f"{speed} ({record['tokens_per_second'] / limit:.0%} of the limit)")
    return " · ".join(parts)


def load_map(
    counts_LE: list[list[int]], columns: int, rows: int = 8, blocks: Sequence[int] | None = None
) -> list[tuple[str, str]]:
    """The experts' load, layer by expert, as (text, colour) pieces: blocks as high as the load, half at an even share.

    Layers and experts beyond `rows` and `columns` are folded: each place shows the load among them that is farthest
    from even.

    Args:
        blocks: the decoder's number of each layer that has experts; None: all have.
    """
    numbers = range(len(counts_LE)) if blocks is None else blocks
    share_LE = [[count * len(layer) / max(1, sum(layer)) for count in layer] for layer in counts_LE]
    pieces = []
    for first, layers in _folds(share_LE, rows):
        last = first + len(layers) - 1
        name = f"layer {numbers[first]}" + (f"-{numbers[last]}" if last > first else "")
        pieces.append((f"\n{name:<14}", "dim"))
        for _, experts in _folds(list(zip(*layers)), columns):
            load = max((load for column in experts for load in column), key=lambda load: abs(load - 1))
            pieces.append((BLOCKS[min(8, round(4 * load))], _colour(load)))
    return pieces


BLOCKS = "·▁▂▃▄▅▆▇█"


def _colour(load: float) -> str:
    return "red" if load < 0.25 or load > 2.5 else "yellow" if load < 0.5 or load > 1.75 else "green"


def _folds(items: list, places: int) -> list[tuple[int, list]]:
    """(index of the first, items) of at most so many runs of about equal length."""
    size = -(-len(items) // places)
    return [(i, items[i : i + size]) for i in range(0, len(items), size)]


class Console:
    """`update` after each logged step, `say` for sentences; only the main rank has one."""

    def __init__(self, config: Config, first_step: int, limit: float | None = None):
        self._limit = limit
        self._measured: dict[str, float] = {}
        mode = config.logging.console
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "plain"
        self.mode = mode
        self.total = config.max_steps
        self._blocks = config.model.moe_layers
        self._bar: Any = None  # rich's, where there is one
        if mode == "bar":
            self._open_bar(first_step)

    def _open_bar(self, first_step: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        below = self._below = [Text()]

        class BarAndMap(Progress):
            def get_renderables(self):
                yield self.make_tasks_table(self.tasks)
                yield below[0]

        self._bar = BarAndMap(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=RichConsole(stderr=True),
            speed_estimate_period=120,
        )
        self._task = self._bar.add_task("", total=self.total, completed=first_step, status="starting")
        self._bar.start()

    def update(self, record: dict[str, Any], seconds_left: float) -> None:
        # the newest validation loss stays in sight
        self._measured |= {key: record[key] for key in ("val_loss",) if key in record}
        line = summary(self._measured | record if self._bar is not None else record, self._limit)
        if self._bar is not None:
            self._show_map(record["moe"]["tokens_per_expert"])
            self._bar.update(self._task, completed=record["step"], status=line)
        elif self.mode == "plain":
            step = f"step {record['step']:>{len(str(self.total))}}/{self.total}"
            logger.info(f"{step} · {line} · {duration(seconds_left)} left")

    def _show_map(self, counts_LE: list[list[int]]) -> None:
        pieces = load_map(counts_LE, columns=max(8, self._bar.console.width - 16), blocks=self._blocks)
        from rich.text import Text

        text = Text("expert load, layer by expert (half a block is an even share)", "dim")
        for piece, colour in pieces:
            text.append(piece, colour)
        self._below[0] = text  # a whole one: the bar is drawn by a thread of its own

    def say(self, sentence: str) -> None:
        if self._bar is not None:
            self._bar.console.print(sentence, markup=False, highlight=False)
        elif self.mode != "off":
            logger.info(sentence)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ConsoleCallback(Callback):
    """Shows records and sentences on the main rank."""

    _console: Console | None = None

    def on_setup(self, run: TrainingRun) -> None:
        if run.runtime.is_main:
            self._console = Console(run.config, run.position.step, rate_limit(run.facts, run.config))

    def on_record(self, run: TrainingRun, record: dict[str, Any]) -> None:
        if self._console is not None:
            tokens_left = (run.config.max_steps - record["step"]) * run.config.tokens_per_step * record["fill"]
            self._console.update(record, tokens_left / record["tokens_per_second"])

    def on_message(self, run: TrainingRun, sentence: str) -> None:
        if self._console is not None:
            self._console.say(sentence)

    def on_close(self, run: TrainingRun) -> None:
        if self._console is not None:
            self._console.close()


def rate_limit(facts: dict[str, Any] | None, config: Config) -> float | None:
    """Tokens a second at the hardware's peak rate; None where that, or how many experts a token has, is not known."""
    peak = None if facts is None else facts["start"]["peak_flops_per_second"]
    return None if facts is None or peak is None or not config.model.router.even else peak / facts["flops_per_token"]
