"""From a configuration to the callbacks of its run, and their states in checkpoints."""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import entry_points
from typing import Any

from moe_llm.config import Config
from moe_llm.config.schema import CallbackConfig
from moe_llm.errors import UserError
from moe_llm.threads import may_be_chosen
from moe_llm.train.callbacks.base import Callback

GROUP = "moe_llm.callbacks"


_OWN: list[tuple[str, str, Callable[[Config], bool]]] = [
    ("watchdog", "WatchdogCallback", lambda config: True),
    ("console", "ConsoleCallback", lambda config: config.logging.console != "off"),
    ("recorder", "Recorder", lambda config: True),
    ("shared_cores", "SharedCores", lambda config: may_be_chosen() and not config.train.deterministic),
    ("alternating_updates", "AlternatingUpdates", lambda config: config.train.adversarial.router_every is not None),
    ("expert_sources", "ExpertSources", lambda config: config.finetune.expert_sources is not None),
    ("preference", "PreferenceTuning", lambda config: config.data.has_preference),
    ("meta_learning", "MetaLearning", lambda config: config.train.meta.method is not None),
    ("distillation", "Distillation", lambda config: bool(config.distill.teachers)),
    ("adversarial", "AdversarialTraining", lambda config: config.train.adversarial.epsilon is not None),
    ("task_evaluation", "TaskEvaluation", lambda config: bool(config.evaluate.tasks)),
    ("expert_placement", "ExpertPlacementCallback", lambda config: config.parallel.placement == "dynamic"),
    ("ema", "WeightAverage", lambda config: config.checkpoint.ema.decay is not None),
    ("router_guard", "RouterGuardCallback", lambda config: config.finetune.router_guard.action != "off"),
    ("push_to_hub", "PushToHub", lambda config: config.checkpoint.push_to_hub is not None),
    ("early_stopping", "EarlyStopping", lambda config: config.train.early_stopping.patience is not None),
]
"""The package's own: module and class, in the order in which they are called, and whether a configuration wants them."""


def build_callbacks(config: Config) -> dict[str, Callback]:
    """The callbacks of a run by the labels under which their states are saved, in the order in which they are called.

    Raises:
        UserError: a name or path that leads to no `Callback`, arguments that it does not take, or a configuration that
            one of them refuses.
    """
    callbacks = (
        own_callbacks(config) | _of_the_user(config) | {"step_guard": _load("step_guard", "StepGuardCallback")()}
    )
    for callback in callbacks.values():
        callback.validate(config)
    return callbacks


def own_callbacks(config: Config, only: Collection[str] | None = None) -> dict[str, Callback]:
    """Those features of the package that a configuration asks for; of a feature that is off, nothing is imported."""
    wanted = [(name, kind) for name, kind, asked in _OWN if asked(config) and (only is None or name in only)]
    return {name: _load(name, kind)() for name, kind in wanted}


def _load(name: str, kind: str) -> type[Callback]:
    found: type[Callback] = getattr(importlib.import_module(f"moe_llm.train.callbacks.{name}"), kind)
    return found


def _of_the_user(config: Config) -> dict[str, Callback]:
    callbacks: dict[str, Callback] = {}
    for index, given in enumerate(config.train.callbacks):
        key = f"train.callbacks.{index}"
        kind = _by_name(given.name, key) if given.name is not None else _by_path(str(given.path), key)
        label = str(given.name or given.path)
        count = sum(other.split("#")[0] == label for other in callbacks)
        callbacks[f"{label}#{count + 1}" if count else label] = _construct(kind, given, key)
    return callbacks


def _by_name(name: str, key: str) -> type[Callback]:
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in known:
        there = f"one of {', '.join(sorted(known))}" if known else "none is installed"
        raise UserError(f"{key}.name={name} is no callback that a package registers under {GROUP} ({there}): use path")
    try:
        return _checked(known[name].load(), f"{key}.name={name}")
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}.name={name} cannot be imported ({error}): mend or reinstall its package") from error


def _by_path(path: str, key: str) -> type[Callback]:
    module, _, attribute = path.rpartition(".")
    if not module:
        raise UserError(f"{key}.path={path} names no module: write package.module.Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{key}.path={path} cannot be imported ({error}): install its package, or add its folder to PYTHONPATH"
        ) from error
    return _checked(found, f"{key}.path={path}")


def _checked(found: Any, given: str) -> type[Callback]:
    if isinstance(found, type) and issubclass(found, Callback):
        return found
    raise UserError(f"{given} is no callback: derive a class from moe_llm.train.callbacks.Callback and name that")


def _construct(kind: type[Callback], given: CallbackConfig, key: str) -> Callback:
    try:
        inspect.signature(kind).bind(**given.args)
    except TypeError as error:
        raise UserError(f"{key}.args: {kind.__name__} takes other arguments ({error}): it is {_call(kind)}") from error
    return kind(**given.args)


def _call(kind: type[Callback]) -> str:
    return f"{kind.__name__}{inspect.signature(kind)}"


def collect_states(callbacks: Mapping[str, Callback]) -> dict[str, dict[str, Any]]:
    """The state of every callback that has one.

    Raises:
        UserError: one that JSON would not give back as it is.
    """
    states = {}
    for label, callback in _with_state(callbacks).items():
        state = callback.state_dict()
        if not isinstance(state, dict) or not _is_plain(state):
            raise UserError(
                f"the state of callback {label} cannot be saved: state_dict must return None, bool, int, float, str, "
                "lists, and dictionaries with text for keys, of exactly these types"
            )
        states[label] = state
    return states


def _with_state(callbacks: Mapping[str, Callback]) -> dict[str, Callback]:
    default = Callback.state_dict
    return {label: callback for label, callback in callbacks.items() if type(callback).state_dict is not default}


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str and _is_plain(inner) for key, inner in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def restore_states(
    callbacks: Mapping[str, Callback], states: Mapping[str, dict[str, Any]], say: Callable[[str], None]
) -> None:
    """Give callbacks the states of a checkpoint; `say` is told of those that have none there, or are no more."""
    known = _with_state(callbacks)
    for label, callback in known.items():
        if label in states:
            callback.load_state_dict(states[label])
        else:
            say(f"the checkpoint has no state of callback {label}: it starts without one")
    for label in states.keys() - known.keys():
        say(f"the checkpoint has the state of callback {label}, which train.callbacks does not list: it is left out")
