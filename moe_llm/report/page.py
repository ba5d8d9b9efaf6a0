"""One self-contained HTML page about some runs: it opens from disk and asks nothing of a network."""

import json
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from moe_llm.config import dump_config
from moe_llm.report.runs import Run


def page(runs: list[Run], charts: list[dict[str, Any]], loads: list[dict[str, Any]]) -> str:
    """The whole file."""
    assets = files("moe_llm.report")
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    data = json.dumps({"runs": [run.name for run in runs], "charts": charts, "loads": loads}, allow_nan=False)
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="soft">{_subtitle(runs)}</p>',
            _cards(runs[0]) if len(runs) == 1 else _legend(runs),
            _alarms(runs),
            _comparison(runs) if len(runs) > 1 else "",
            *map(_sources, runs),
            *map(_moves, runs),
            "<h2>Curves</h2>",
            '<div class="charts">',
            *map(_figure, range(len(charts)), charts),
            "</div>",
            "<h2>Expert load over time</h2>",
            _SCALE,
            *map(_load_figure, range(len(runs)), runs, loads),
            "<h2>What was run</h2>",
            *map(_facts, runs),
            *map(_config, runs),
            "<footer>From metrics.jsonl, config.yaml and facts.json of the run directory, by moe-llm report.</footer>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} · moe-llm report</title>\n<style>\n{assets.joinpath('report.css').read_text('utf-8')}"
        f'</style></head>\n<body>\n{body}\n<div id="tip" role="status"></div>\n'
        f'<script type="application/json" id="data">{data.replace("</", "<" + chr(92) + "/")}</script>\n'
        f"<script>\n{assets.joinpath('report.js').read_text('utf-8')}</script>\n</body></html>\n"
    )


_SCALE = '<div class="scale">no tokens <div></div> twice an even share and more</div>'


def count(number: float) -> str:
    """1234567 -> 1.23 M."""
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}" if number / size < 999.5 else f"{number / size:.0f} {letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """In the two largest units that it has."""
    rest = round(seconds)
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if rest >= size or parts or unit == "s":
            parts.append(f"{rest // size} {unit}")
            rest %= size
    return " ".join(parts[:2])


def _subtitle(runs: list[Run]) -> str:
    if len(runs) > 1:
        return "compared, from what each has recorded"
    run = runs[0]
    model, ended = run.config.model, run.last["step"] >= run.config.max_steps
    state = "finished" if ended else f"{run.last['step']:,} of {run.config.max_steps:,} steps"
    return (
        f"{model.num_hidden_layers} layers, {model.num_experts_per_tok} of {model.num_local_experts} experts a token, "
        f"{run.config.train.precision} · {state}"
    )


def _summary(run: Run) -> dict[str, str]:
    """Label: figure, the same labels for each run."""
    last, model, seconds = run.last, run.config.model, run.seconds
    measured = run.validation()
    speed = last["tokens"] / seconds if seconds else 0.0
    rate = speed * run.flops_per_token
    return {
        "validation loss": f"{measured[-1]['val_loss']:.4f}" if measured else "not measured",
        "bits per byte": _bits(measured),
        "training loss, last record": "not a number" if last.get("lm_loss") is None else f"{last['lm_loss']:.4f}",
        "parameters": count(model.num_params()),
        "active per token": count(model.num_params(active=True)),
        "steps": f"{last['step']:,}",
        "training tokens": count(last["tokens"]),
        "training FLOPs": count(last["tokens"] * run.flops_per_token),
        "training time": duration(seconds),
        "tokens per second": f"{speed:,.0f}",
        "FLOP/s": count(rate),
        "share of the hardware's limit": f"{rate / run.peak:.1%}" if run.peak else "not known",
        "alarms": str(sum(len(record.get("alarms", [])) for record in run.records)),
    }


def _bits(measured: list[dict[str, Any]]) -> str:
    """Of the last evaluation; runs on pairs of answers measure none."""
    found = measured[-1].get("val_bits_per_byte") if measured else None
    return "not measured" if found is None else f"{found:.4f}"


def _cards(run: Run) -> str:
    cards = "".join(
        f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in _summary(run).items()
    )
    return f'<div class="cards">{cards}</div>'


def _legend(runs: list[Run]) -> str:
    items = "".join(f"<li>{_swatch(i)}{escape(run.name)}</li>" for i, run in enumerate(runs))
    return f'<ul class="legend">{items}</ul>'


def _swatch(index: int) -> str:
    return f'<i style="background:var(--run-{index % 6})"></i>'


def _comparison(runs: list[Run]) -> str:
    head = "".join(f'<th class="number">{_swatch(i)}{escape(run.name)}</th>' for i, run in enumerate(runs))
    summaries = [_summary(run) for run in runs]
    rows = [(label, [summary[label] for summary in summaries]) for label in summaries[0]]
    flat = [_flat(run.config.model_dump(mode="json")) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    differing = [
        (key, [json.dumps(values.get(key)) for values in flat])
        for key in keys
        if key != "run.dir" and len({json.dumps(values.get(key)) for values in flat}) > 1
    ]
    told = _table(head, rows)
    settings = _table(head, differing) if differing else '<p class="soft">The configurations are the same.</p>'
    return (
        f'<h2>Side by side</h2><div class="panel scroll">{told}</div>'
        f'<h2>Settings that differ</h2><div class="panel scroll">{settings}</div>'
    )


def _table(head: str, rows: list[tuple[str, list[str]]]) -> str:
    lines = "".join(
        f"<tr><th>{escape(label)}</th>" + "".join(f'<td class="number">{escape(v)}</td>' for v in values) + "</tr>"
        for label, values in rows
    )
    return f"<table><tr><th></th>{head}</tr>{lines}</table>"


def _sources(run: Run) -> str:
    """Of each source what has been read, its held-out loss, and what packing has done to it; nothing for older runs."""
    read, measured = run.last.get("sources"), run.validation()
    if not read:
        return ""
    losses = measured[-1].get("val_loss_by_source", {}) if measured else {}
    packed = {part["name"]: part for part in run.facts.get("data", []) if part["split"] == "train"}
    labels = ("tokens", "epochs", "held-out loss", "padding", "documents cut")
    rows = []
    for name in dict.fromkeys([*read, *losses]):
        had, part = read.get(name, {}), packed.get(name, {})
        cut = part["cut"] / max(part["documents"], 1) if "cut" in part else None
        rows.append(
            (
                name,
                [
                    count(had["tokens"]) if had else "",
                    f"{had['epochs']:.2f}" if had else "",
                    f"{losses[name]:.4f}" if losses.get(name) is not None else "",
                    f"{part['padding']:.1%}" if "padding" in part else "",
                    f"{cut:.1%}" if cut is not None else "",
                ],
            )
        )
    head = "".join(f'<th class="number">{label}</th>' for label in labels)
    return f'<h2>What was read: {escape(run.name)}</h2><div class="panel scroll">{_table(head, rows)}</div>'


def _moves(run: Run) -> str:
    """Each time that experts changed ranks, and what the busiest rank had before and after."""
    moves = [(record["step"], record["placement"]) for record in run.records if "placement" in record]
    if not moves:
        return ""
    rows = [
        (
            f"step {step:,}",
            [str(move["experts_moved"]), f"{move['busiest_before']:.2f}", f"{move['busiest_after']:.2f}"],
        )
        for step, move in moves
    ]
    labels = ("experts moved", "busiest rank before, times an even share", "after")
    head = "".join(f'<th class="number">{label}</th>' for label in labels)
    return f'<h2>Experts that moved: {escape(run.name)}</h2><div class="panel scroll">{_table(head, rows)}</div>'


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{path}.{name}".lstrip(".")).items()}
    return {path: value}


def _alarms(runs: list[Run]) -> str:
    told = [
        f'<div class="panel alarm"><b>{escape(run.name)}, step {record["step"]:,}</b><br>'
        f"{escape(alarm['sentence'])}</div>"
        for run in runs
        for record in run.records
        for alarm in record.get("alarms", [])
    ]
    if not told:
        return ""
    hidden = f"<details><summary>{len(told) - 6} more</summary>{''.join(told[6:])}</details>" if len(told) > 6 else ""
    return "<h2>Alarms</h2>" + "".join(told[:6]) + hidden


def _figure(index: int, chart: dict[str, Any]) -> str:
    unit = f", {chart['unit']}" if chart["unit"] not in chart["title"] else ""
    return (
        f'<figure id="chart-{index}"><figcaption><h3>{escape(chart["title"])}{escape(unit)}</h3>'
        f'<p class="note">{escape(chart["note"])}</p></figcaption></figure>'
    )


def _load_figure(index: int, run: Run, load: dict[str, Any]) -> str:
    layers = "".join(
        f'<div><p class="note">layer {run.config.model.moe_layers[i]}</p><div id="load-{index}-{i}"></div></div>'
        for i in range(len(load["loads"]))
    )
    return (
        f'<figure class="wide"><figcaption><h3>{escape(run.name)}</h3><p class="note">share of the tokens of each '
        f'expert (down), over the steps (across)</p></figcaption><div class="layers">{layers}</div></figure>'
    )


def _facts(run: Run) -> str:
    rows: list[tuple[str, str]] = []
    config = run.config
    for part in run.facts.get("data", []):
        rows.append(
            (
                f"{part['name']}, {part['split']}",
                f"{part['documents']:,} documents, {part['tokens']:,} tokens, {part['bytes']:,} bytes",
            )
        )
    rows.append(("tokens a step", f"{config.tokens_per_step:,}"))
    for start in run.facts.get("starts", []):
        peak = start["peak_flops_per_second"]
        limit = "peak rate not known" if peak is None else f"peak {count(peak)}FLOP/s"
        ranks = "1 rank" if start["ranks"] == 1 else f"{start['ranks']} ranks"
        versions = ", ".join(f"{name} {number}" for name, number in start["versions"].items())
        told = f"{start['time']}, {ranks}, {start['device']}, {limit}; {versions}"
        rows.append((f"from step {start['step']:,}", told))
    if not run.facts:
        rows.append(("hardware and data", "not recorded by this run (it has no facts.json)"))
    rows += [(f"parameters: {name}", f"{number:,}") for name, number in config.model.parameter_counts().items()]
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return f'<h3>{escape(run.name)}</h3><div class="panel scroll"><table>{body}</table></div>'


def _config(run: Run) -> str:
    text = yaml.safe_dump(yaml.safe_load(dump_config(run.config)), sort_keys=False, default_flow_style=None, width=100)
    return f"<details><summary>configuration of {escape(run.name)}</summary><pre>{escape(text)}</pre></details>"
