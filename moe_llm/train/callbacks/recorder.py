"""Records of a run: metrics.jsonl, facts.json, trackers, and the alarms that records raise."""

from typing import TYPE_CHECKING, Any

from moe_llm.config import Config
from moe_llm.train.callbacks.alarms import Alarms
from moe_llm.train.callbacks.base import Callback
from moe_llm.train.facts import write_facts
from moe_llm.train.metrics import MetricsFile, read_metrics
from moe_llm.train.trackers import Tracker, build_trackers, check_trackers

if TYPE_CHECKING:
    from moe_llm.train.trainer import Trainer


class Recorder(Callback):
    """Writes every record to every place that the configuration names, with its alarms; on the main rank alone."""

    def __init__(self) -> None:
        self._sinks: list[Tracker | MetricsFile] = []

    def validate(self, config: Config) -> None:
        check_trackers(config)

    def on_train_begin(self, run: "Trainer") -> None:
        if not run.runtime.is_main:
            return
        config, step = run.config, run.position.step
        self._sinks.append(MetricsFile(run.run_dir / "metrics.jsonl", step))
        self._sinks += build_trackers(config, run.run_dir, step)
        if run.facts is not None and step < config.max_steps:  # a start that trains nothing is none to report
            write_facts(run.run_dir / "facts.json", run.facts)
        self._replay(run)

    def _replay(self, run: "Trainer") -> None:
        """Bring the alarms to where the records end, so that none is raised twice."""
        self._alarms = Alarms(run.config)
        self._alarms.replay(read_metrics(run.run_dir / "metrics.jsonl"))

    def on_record(self, run: "Trainer", record: dict[str, Any]) -> None:
        if not self._sinks:
            return
        alarms = self._alarms.look(record)
        if alarms:
            record = record | {"alarms": [alarm.record() for alarm in alarms]}
        for sink in self._sinks:
            sink.write(record)
        for alarm in alarms:
            run.say(f"alarm at step {record['step']}: {alarm.sentence}")

    def on_rollback(self, run: "Trainer") -> None:
        for sink in self._sinks:
            sink.rewind(run.position.step)
        if self._sinks:
            self._replay(run)

    def on_close(self, run: "Trainer") -> None:
        for sink in self._sinks:
            sink.close()
