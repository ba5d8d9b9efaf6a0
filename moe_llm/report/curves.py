"""What a report draws, as plain lists: curves over steps, and the experts' load over time."""

import math
import statistics
from typing import Any

from moe_llm.report.runs import Run, grouped, means

_POINTS, _CELLS = 400, 16_000


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """title, note, unit, log (axis) and series of each chart; a series has run (index), kind (line, dots), x, y and,
    for a range over layers, low and high. Charts without anything to show are left out."""
    drawn = [
        _chart(
            "Loss",
            "cross-entropy on training text (line) and on held-out text (dots)",
            "nats per token",
            False,
            [curve for i, run in enumerate(runs) for curve in (_line(i, run, _value("lm_loss")), _dots(i, run))],
        ),
        _chart(
            "Router entropy",
            "share of ln E, the entropy of a router that is undecided; mean and range over layers",
            "of ln E",
            False,
            [_layers(i, run, _entropy(run)) for i, run in enumerate(runs)],
        ),
        _chart(
            "Variation of the load",
            "standard deviation over mean of an expert's tokens; 0 is even; mean and range over layers",
            "",
            False,
            [_layers(i, run, _per_layer("load_cv")) for i, run in enumerate(runs)],
        ),
        _chart(
            "Dead experts",
            "experts of all layers without one token since the record before",
            "experts",
            False,
            [_line(i, run, _dead) for i, run in enumerate(runs)],
        ),
        _chart(
            "Dropped choices",
            "choices that no expert had room for; mean and range over layers",
            "of choices",
            False,
            [_layers(i, run, _per_layer("dropped_share")) for i, run in enumerate(runs)],
        ),
        _chart(
            "Gradient norm",
            "over all parameters, before clipping",
            "",
            True,
            [_line(i, run, _value("grad_norm")) for i, run in enumerate(runs)],
        ),
        _chart(
            "Gradient norms of experts",
            "over the median of the layer: largest of each layer; mean and range over layers",
            "of median",
            True,
            [_layers(i, run, _outliers) for i, run in enumerate(runs)],
        ),
        _chart(
            "Throughput",
            "without evaluating and saving",
            "tokens/s",
            False,
            [_line(i, run, _value("tokens_per_second")) for i, run in enumerate(runs)],
        ),
    ]
    shown = [chart for chart in drawn if chart["series"]]
    return [c for c in shown if c["title"] != "Dropped choices" or any(max(s["y"]) > 0 for s in c["series"])]


def load_over_time(run: Run) -> dict[str, Any]:
    """steps: the last of each column; loads: layer by column by expert, as multiples of an even share."""
    counts = run.last["moe"]["tokens_per_expert"]
    cells = len(counts) * len(counts[0])
    groups = grouped(run.records, max(12, min(72, _CELLS // cells)))
    loads = []
    for layer in range(len(counts)):
        columns = []
        for group in groups:
            summed = [sum(column) for column in zip(*(r["moe"]["tokens_per_expert"][layer] for r in group))]
            columns.append([round(count * len(summed) / max(1, sum(summed)), 3) for count in summed])
        loads.append(columns)
    return {"steps": [group[-1]["step"] for group in groups], "loads": loads}


def _chart(title: str, note: str, unit: str, log: bool, series: list[dict]) -> dict[str, Any]:
    kept = [curve for curve in series if curve["x"]]
    return {"title": title, "note": note, "unit": unit, "log": log, "series": kept}


def _value(key: str):
    return lambda record: record.get(key)


def _dead(record: dict) -> int:
    return sum(len(layer) for layer in record["moe"]["dead_experts"])


def _per_layer(key: str):
    return lambda record: record["moe"].get(key) or []


def _entropy(run: Run):
    undecided = math.log(max(2, run.config.model.num_local_experts))
    return lambda record: [value / undecided for value in record["moe"]["router_entropy"] if value is not None]


def _outliers(record: dict) -> list[float]:
    """Of each layer: the expert's ratio that is farthest from the layer's median, upwards."""
    found = []
    for layer in record["moe"].get("expert_grad_norm") or []:
        known = [norm for norm in layer if norm is not None]
        if known and (median := statistics.median(known)) > 0:
            found.append(max(known) / median)
    return found


def _line(index: int, run: Run, value) -> dict[str, Any]:
    x, y = [], []
    for group in grouped(run.records, _POINTS):
        mean = means([value(record) for record in group])
        if mean is not None:
            x.append(group[-1]["step"])
            y.append(_short(mean))
    return {"run": index, "kind": "line", "x": x, "y": y}


def _dots(index: int, run: Run) -> dict[str, Any]:
    measured = run.validation()
    return {
        "run": index,
        "kind": "dots",
        "x": [r["step"] for r in measured],
        "y": [_short(r["val_loss"]) for r in measured],
    }


def _layers(index: int, run: Run, values) -> dict[str, Any]:
    curve: dict[str, Any] = {"run": index, "kind": "line", "x": [], "y": [], "low": [], "high": []}
    for group in grouped(run.records, _POINTS):
        by_layer = [means(list(column)) for column in zip(*filter(None, map(values, group)))]
        layers = [mean for mean in by_layer if mean is not None]
        if layers:
            curve["x"].append(group[-1]["step"])
            middle = sum(layers) / len(layers)
            for key, value in (("y", middle), ("low", min(layers)), ("high", max(layers))):
                curve[key].append(_short(value))
    return curve


def _short(value: float) -> float:
    return float(f"{value:.5g}")
