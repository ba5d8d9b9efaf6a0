"""The model card of a checkpoint, README.md: what the model is, what it was made from, and what loads it.

It names no directory of the machine that trained it. This file needs no torch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_llm.config import ModelConfig
from moe_llm.families.architectures import MISTRAL, architecture_of

CARD = "README.md"
_LOSSES = {
    "loss": "training loss",
    "lm_loss": "language-model loss",
    "val_loss": "validation loss, nats per token",
    "val_bits_per_byte": "validation bits per byte",
    "val_accuracy": "share of held-out pairs whose chosen answer is ahead",
}


def model_card(
    model: ModelConfig | str,
    *,
    run: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    made: str = "",
    sources: Sequence[str] = (),
) -> str:
    """The text of a card: YAML metadata, then Markdown.

    Args:
        model: or the class in transformers of a dense model that has no configuration here. run: the run's configuration as nested dictionaries. provenance: as in `read_provenance`. record: of metrics.jsonl,
            with the losses of the saved step. made: how a checkpoint that no run has trained came about. sources: the
            models that it is made of, by name or directory.
    """
    run = run if run is not None and "train" in run else {}
    bases = _hub_names([run.get("model", {}).get("init_from")] if run else sources)
    license = run.get("checkpoint", {}).get("license") or "unknown"
    dense = isinstance(model, str) or architecture_of(model) is MISTRAL
    metadata: dict[str, Any] = {
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe_llm"],
    }
    if not isinstance(model, str) and not dense:
        metadata["tags"] = ["moe", "mixture-of-experts", "moe_llm", f"router-{model.router.type}"]
    metadata |= {"base_model": bases[0] if len(bases) == 1 else bases} if bases else {}
    parts = [
        *_opening(model, dense, "made" if made else "trained"),
        *_section("Loading", [_loading(model)]),
        *_section("Base", _base(run, made, sources, bases)),
        *_section("Data", _data(run, provenance or {})),
        *_section("Training", _training(run)),
        *_section(
            "Losses",
            [f"{label}: {record[name]:.4f}" for name, label in _LOSSES.items() if _is(record, name)] if record else [],
        ),
        "## Licence",
        f"{license}" if license != "unknown" else "Not stated; that of the base and of the data apply.",
    ]
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def adapter_card(content: Mapping[str, Any], base: str) -> str:
    """The card of an adapter in PEFT's files; content: of its adapter_config.json. base: its model's repository."""
    metadata = {"base_model": base, "library_name": "peft", "license": "unknown", "tags": ["lora", "moe_llm"]}
    parts = [*(content.get("target_modules") or []), *(content.get("target_parameters") or [])]
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    lines = [f"rank {content.get('r')}, alpha {content.get('lora_alpha'):g}", f"adapted: {_listed(sorted(parts))}"]
    return (
        f"---\n{head}---\n\n# Low-rank adapter of {base}\n\nTrained with moe_llm; PEFT loads it over its base.\n\n"
        + "".join(f"- {line}\n" for line in lines)
    )


def _opening(model: ModelConfig | str, dense: bool, verb: str) -> list[str]:
    if isinstance(model, str):
        return [f"# {model}", f"A dense language model, {verb} with moe_llm."]
    name, total, active = architecture_of(model).architecture, model.num_params(), model.num_params(active=True)
    if dense:
        return [f"# {name}", f"A dense language model of {total:,} parameters, {verb} with moe_llm."]
    return [
        f"# {name} with {model.num_local_experts} experts",
        f"A mixture-of-experts language model of {total:,} parameters, about {active:,} of which work on a token, {verb} with moe_llm.",
        *_section("Routing", _routing(model)),
    ]


def newest_record(metrics: Path, step: int) -> dict[str, Any]:
    """The record of a step with the newest evaluation before it; empty where there is none."""
    found: dict[str, Any] = {}
    if not metrics.is_file():
        return found
    for line in metrics.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step:
                found |= {name: value for name, value in record.items() if name in _LOSSES and value is not None}
        except (ValueError, KeyError, TypeError):
            continue  # cut short, or damaged: the card is a convenience, and no reason not to save
    return found


def _is(record: Mapping[str, Any], name: str) -> bool:
    return isinstance(record.get(name), int | float)


def _section(title: str, lines: Iterable[str]) -> list[str]:
    listed = [f"- {line}" for line in lines]
    return [f"## {title}", "\n".join(listed)] if listed else []


def _routing(model: ModelConfig) -> list[str]:
    losses = {"balance loss": model.router_aux_loss_coef, "z-loss": model.router_z_loss_coef}
    weighed = ", ".join(f"{coefficient:g} x {name}" for name, coefficient in losses.items() if coefficient)
    return [
        f"router: {model.router.type}, {model.num_experts_per_tok} of {model.num_local_experts} experts a token",
        f"layers: {model.num_hidden_layers}, expert width {model.intermediate_size}, hidden size {model.hidden_size}",
        f"losses of the router in training: {weighed or 'none of the two that Mixtral has'}",
    ]


def _loading(model: ModelConfig | str) -> str:
    if isinstance(model, str):
        return "transformers, 4.57 and 5, without remote code"
    family = architecture_of(model)
    if family.code:
        return "transformers 5.17 or newer, with `trust_remote_code=True`: the modelling code is beside the weights"
    if not family.native:
        return "moe_llm alone"
    if part := family.newer(model):
        return f"transformers 5, without remote code: 4.57 reads it too, but computes otherwise ({part})"
    return "transformers, 4.57 and 5, without remote code"


def hub_name(name: Any) -> str | None:
    """A name that a hub would know; None for a directory of this machine."""
    if not isinstance(name, str) or name.count("/") > 1 or name.startswith((".", "~", "/")) or Path(name).exists():
        return None
    return name


def _hub_names(names: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(name for name in map(hub_name, names) if name))


def _base(run: Mapping[str, Any], made: str, sources: Sequence[str], bases: Sequence[str]) -> list[str]:
    if run and run.get("model", {}).get("init_from") is None:
        return ["trained from scratch"]
    unnamed = 1 if run and not bases else len(dict.fromkeys(source for source in sources if hub_name(source) is None))
    there = {0: [], 1: ["a checkpoint that has no name on a hub"]}
    return [
        *filter(None, [made]),
        *bases,
        *there.get(unnamed, [f"{unnamed} checkpoints that have no names on a hub"]),
    ]


def _data(run: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    counted = {
        f"{source}": f"{documents:,} documents, {tokens:,} tokens, SHA-256 {digest[:12]}"
        for source, split, documents, tokens, digest in provenance.get("data", [])
        if split == "train"
    }
    lines = []
    for i, source in enumerate(run.get("data", {}).get("sources", [])):
        path = source.get("path")
        names = [path] if isinstance(path, str) else path or [source["type"]]
        shown = ", ".join(name if source["type"] == "hub" and hub_name(name) else Path(name).name for name in names)
        kind = source.get("content", "text")
        shown = shown if kind == "text" else f"{shown} ({kind})"
        lines.append(": ".join(filter(None, [shown, counted.get(f"data.sources.{i}", "")])))
    return lines


def _training(run: Mapping[str, Any]) -> list[str]:
    if not run:
        return []
    data, train, optim = run["data"], run["train"], run["optim"]
    length = f"{train['max_steps']:,} steps" if train["max_steps"] else f"{train['max_tokens']:,} tokens"
    return [
        f"{length}, {train['global_batch_size']} blocks of {data['sequence_length']} tokens a step, {train['precision']}",
        f"{optim['name']}, learning rate {optim['lr']:g}, {optim['schedule']}, weight decay {optim['weight_decay']:g}",
        *_trained_parts(run.get("finetune", {})),
        *_preference(run),
        *_teachers(run.get("distill") or {}),
    ]


def _teachers(distill: Mapping[str, Any]) -> list[str]:
    teachers = [teacher["path"] for teacher in distill.get("teachers") or []]
    named = _hub_names(teachers)
    unnamed = len(teachers) - len([teacher for teacher in teachers if hub_name(teacher)])
    told = [*named, *([f"{unnamed} without a name on a hub"] if unnamed else [])]
    return [f"teachers of the distillation: {_listed(told)}"] if told else []


def _trained_parts(tuned: Mapping[str, Any]) -> list[str]:
    lora = tuned.get("lora") or {}
    if lora.get("rank"):
        lines = [f"low-rank adapters of rank {lora['rank']} in {_listed(lora['targets'])}, merged into the weights"]
    elif tuned.get("trainable"):
        lines = [f"trained parts: {_listed(tuned['trainable'])}"]
        lines += [f"trained experts of each layer: {_listed(tuned['experts'])}"] if tuned.get("experts") else []
    else:
        lines = []
    bits = tuned.get("quantize_frozen")
    return lines + ([f"frozen experts held in {bits}, whose values the weights here have"] if bits else [])


def _preference(run: Mapping[str, Any]) -> list[str]:
    if not any(source.get("content") == "preference" for source in run["data"].get("sources", [])):
        return []
    settings = run.get("preference", {})
    return [f"pairs of a chosen and a rejected answer, by {settings.get('loss')} with beta {settings.get('beta'):g}"]


def _listed(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else str(values)
