"""From a YAML file and dotted overrides to a validated `Config`: defaults < file < overrides."""

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from typing_extensions import TypeIs

from moe_llm.config.base import fields_by_key
from moe_llm.config.schema import Config
from moe_llm.errors import UserError

logger = logging.getLogger(__name__)

_YAML_1_2 = {
    "tag:yaml.org,2002:bool": (r"^(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:int": (r"^[-+]?\d[\d_]*$", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"^[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `off` and `no` are text, `3e-4` is a number, `010` is ten, `1:30` is text.

    A key that is given twice is refused; YAML's own rule would drop the first one unseen.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML declares it on instances and reads it from the class)
        first: [(tag, rule) for tag, rule in rules if tag not in {*_YAML_1_2, "tag:yaml.org,2002:timestamp"}]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text `_Loader`, or YAML 1.1, would take for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def represent_text(self, text: str):
        # only double quotes keep every kind of line break
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, (_pattern, _first) in _YAML_1_2.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))
_Dumper.add_representer(str, _Dumper.represent_text)


def _integer(loader: _Loader, node: yaml.Node) -> int:
    assert isinstance(node, yaml.ScalarNode)
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text; `origin` names it in the error."""
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, default=str, skipkeys=True)  # an anchor may contain itself, which this refuses
        return value
    except RecursionError:
        raise UserError(f"{origin} is nested too deeply: write it with fewer levels") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{origin}{where} is not valid YAML: {problem}") from error


def read_yaml(path: str | Path, kind: str) -> Any:
    """The value of a YAML file; `kind` says in errors what file it should have been.

    Raises:
        UserError: it is not there, cannot be read, or is no YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{kind} {str(path)!r} does not exist: give the path of a YAML file") from None
    except IsADirectoryError:
        raise UserError(f"{kind} {str(path)!r} is a directory: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {str(path)!r} cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def load_config(
    path: str | Path, overrides: Iterable[str] = (), complete: Callable[[dict], None] = lambda raw: None
) -> Config:
    """Read a run's configuration.

    Args:
        path: a YAML file.
        overrides: `section.key=value`; the value is YAML, list items go by index
            (`data.sources.0.path=x.txt`).
        complete: fills in, in place, what the user has left open, before anything is validated.

    Raises:
        UserError: one sentence that names field, value and remedy.
    """
    raw = read_yaml(path, "configuration file")
    if not isinstance(raw, dict):
        raise UserError(f"configuration file {str(path)!r} holds no sections: it needs at least data and train")
    for override in overrides:
        apply_override(raw, override)
    complete(raw)
    return validate(raw)


def apply_override(raw: dict, override: str) -> None:
    """Set one dotted key of a nested dictionary in place."""
    key, equals, value = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"override {override!r} is incomplete: write section.key=value")
    node: Any = raw
    for depth, name in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_index(node, name, where)]
        elif isinstance(node, dict):
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, (dict, list)):
            raise UserError(f"override {override!r}: {where} is the value {node!r} and has no fields")
    parsed = parse_yaml(value, f"the value of override {override!r}")
    if isinstance(node, list):
        node[_index(node, last, key)] = parsed
    else:
        node[last] = parsed


def _index(items: list, name: str, where: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise UserError(f"override {where}: {name!r} is no item of a list of {len(items)} (counted from 0)")
    return int(name)


# Keys that had another name in earlier versions: (section, old key) to the new key.
RENAMED_KEYS = {
    ("data", "over_long"): "overlong",
    ("finetune", "train"): "trainable",
    ("logging", "pictures_every_steps"): "image_every_steps",
    ("logging", "wandb_project"): "project",
    ("parallel", "exchange_chunks"): "all_to_all_chunks",
}


def with_current_names(raw: dict) -> dict:
    """The same sections with renamed keys under their present names; each is reported once, as a warning.

    Raises:
        UserError: a key is given under both names.
    """
    renamed = dict(raw)
    for (section, old), new in RENAMED_KEYS.items():
        values = renamed.get(section)
        if not isinstance(values, dict) or old not in values:
            continue
        if new in values:
            raise UserError(
                f"{section}.{old} is the former name of {section}.{new}, and both are given: remove the former"
            )
        renamed[section] = {new if key == old else key: value for key, value in values.items()}
        logger.warning("%s.%s has been renamed: write %s.%s", section, old, section, new)
    return renamed


def validate(raw: dict) -> Config:
    """Check a nested dictionary; the first error becomes one sentence."""
    if isinstance(raw, dict):
        raw = with_current_names(raw)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0])) from error


def _sentence(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    name, kind, value = ".".join(location), error["type"], _short(error["input"])
    if kind == "extra_forbidden":
        return f"unknown configuration key {name}: {_nearest(location)}"
    if kind == "unknown_key":  # of a section whose keys depend on its type
        key = error["ctx"]["key"]
        return f"unknown configuration key {name}.{key}: {_nearest([*location, key], error['ctx']['known'])}"
    if kind == "missing" and location[-1].isdecimal():
        return f"{'.'.join(location[:-1])}={value} is too short: give one value more"
    if kind == "missing":
        section = _section(location)
        how = f"with its fields ({', '.join(fields_by_key(section))})" if section else f"or as {name}=VALUE"
        return f"configuration key {name} is missing: set it in the file, {how}"
    if kind == "invalid_field":
        context = error["ctx"]
        full = ".".join([*location, context["field"]])
        return f"{full}={_short(context['value'])} {context['problem']}: {context['remedy']}"
    section = _section(location) if kind in ("model_type", "model_attributes_type") else None
    if section:
        return f"{name}={value} is not a section: give its fields ({', '.join(fields_by_key(section))})"
    return f"{name}={value} is refused: {_remedy(error)}"


def _remedy(error: Mapping[str, Any]) -> str:
    """Pydantic's message as the second half of a sentence."""
    if error["type"] == "string_type" and isinstance(error["input"], (int, float)):
        return "it must be text, in quotes that reach the YAML where it looks like a number"
    if error["type"] == "tuple_type":
        return "it must be a list, such as [0.9, 0.95]"
    text = re.sub(r"^(?!Keys)\w+ should ", "it must ", error["msg"])
    text = re.sub(r", unable to parse .*| after validation|, got a number with a fractional part", "", text)
    return text[0].lower() + text[1:]


def _short(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and value.strip()
    text = value if plain else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


# what transformers' Trainer and other frameworks call our keys
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.grad_clip",
    "clip_grad": "optim.grad_clip",
    "lr_scheduler_type": "optim.schedule",
    "adam_epsilon": "optim.eps",
    "batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "num_train_epochs": "train.max_steps",
    "epochs": "train.max_steps",
    "steps": "train.max_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "mixed_precision": "train.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    "torch_compile": "train.compile",
    "output_dir": "run.dir",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "checkpoint.resume",
    "eval_steps": "evaluate.every_steps",
    "logging_steps": "logging.every_steps",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "block_size": "data.sequence_length",
    "num_experts": "model.num_local_experts",
    "n_experts": "model.num_local_experts",
    "top_k": "model.num_experts_per_tok",
    "num_layers": "model.num_hidden_layers",
    "n_layer": "model.num_hidden_layers",
    "ep_size": "parallel.expert_parallel_size",
}


def _nearest(location: list[str], siblings: list[str] | None = None) -> str:
    """What the user may have meant by an unknown key: a near name beside it, or a name elsewhere."""
    *parents, wrong = location
    if siblings is None:
        siblings = list(fields_by_key(_section(parents) or Config))
    elsewhere = {
        key: f"{section}.{key}"
        for section, field in Config.model_fields.items()
        if _is_section(field.annotation)
        for key in fields_by_key(field.annotation)
        if parents != [section]
    }
    if wrong in elsewhere:
        return f"did you mean {elsewhere[wrong]}?"
    if wrong in _ELSEWHERE:
        return f"did you mean {_ELSEWHERE[wrong]}?"
    beside = {key: ".".join([*parents, key]) for key in siblings}
    for names, cutoff in ((beside, 0.8), (elsewhere, 0.8), (beside, 0.5)):
        if near := difflib.get_close_matches(wrong, names, n=1, cutoff=cutoff):
            return f"did you mean {names[near[0]]}?"
    return f"known here: {', '.join(siblings)}"


def _section(location: list[str]) -> type[BaseModel] | None:
    """The section that a location leads to; None where it leads to a value or a list."""
    model: type[BaseModel] | None = Config
    nested: list = []
    for part in location:
        if model is not None and part in fields_by_key(model):
            annotation = fields_by_key(model)[part].annotation
            nested = [annotation, *get_args(annotation)]
            model = annotation if _is_section(annotation) else None
        elif part.isdecimal():
            model = next((t for t in nested if _is_section(t)), None)
        else:
            return None
    return model


def _is_section(annotation: Any) -> TypeIs[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; reading it back gives the same run."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
