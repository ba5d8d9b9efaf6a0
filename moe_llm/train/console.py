"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere."""

import sys
from typing import Any

from moe_llm.config import Config


def duration(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def summary(record: dict[str, Any]) -> str:
    """The scalars of a record, as one line."""
    parts = [f"loss {record['loss']:.4f}"]
    parts += [word for word in ("skipped", "spike") if record.get(word)]
    if "val_loss" in record:
        parts.append(f"val {record['val_loss']:.4f}")
    if "router_drift" in record:
        parts.append(f"router kl {max(record['router_drift']['kl']):.2g}")
    moe = record["moe"]
    balance = sum(moe["load_cv"]) / len(moe["load_cv"])
    dead = sum(len(layer) for layer in moe["dead_experts"])
    parts.append(f"load cv {balance:.2f}" + (f", {dead} dead" if dead else ""))
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    return " · ".join(parts)


class Console:
    """`update` after each logged step, `say` for sentences; only the main rank has one."""

    def __init__(self, config: Config, first_step: int):
        mode = config.logging.console
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "plain"
        self.mode = mode
        self.total = config.max_steps
        self._bar = None
        if mode == "bar":
            self._open_bar(first_step)

    def _open_bar(self, first_step: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TextColumn("·"), TimeRemainingColumn(), TextColumn("left"),
            console=RichConsole(stderr=True), speed_estimate_period=120,
        )
        self._task = self._bar.add_task("", total=self.total, completed=first_step, status="starting")
        self._bar.start()

    def update(self, record: dict[str, Any], seconds_left: float) -> None:
        line = summary(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], status=line)
        elif self.mode == "plain":
            step = f"step {record['step']:>{len(str(self.total))}}/{self.total}"
            print(f"{step} · {line} · {duration(seconds_left)} left", file=sys.stderr, flush=True)

    def say(self, sentence: str) -> None:
        if self._bar is not None:
            self._bar.console.print(sentence, markup=False, highlight=False)
        elif self.mode != "off":
            print(sentence, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
