"""`moe-llm report RUN [RUN...]`: what some runs have recorded, as a page and as pictures."""

import os
from pathlib import Path
from typing import Any

from moe_llm.atomic import write_atomically
from moe_llm.errors import UserError
from moe_llm.report.curves import charts, load_over_time
from moe_llm.report.page import page
from moe_llm.report.runs import Run, load_runs


def report(directories: list[str], out: str | None = None) -> list[Path]:
    """Write the page, to `out` or report.html of the first run directory, and beside it the same plots as PNG.

    Returns: the page, then the pictures.

    Raises:
        UserError: a run that cannot be read, or a page that cannot be written.
    """
    runs = load_runs(directories)
    path = Path(out) if out is not None else runs[0].directory / "report.html"
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK) or path.is_dir():
        raise UserError(f"--out {str(path)!r} cannot be written: name a file in a directory that you may write to")
    drawn, loads = charts(runs), [load_over_time(run) for run in runs]
    write_atomically(path, page(runs, drawn, loads))
    return [path, *_pictures(path.with_name(path.stem + "_plots"), runs, drawn, loads)]


def _pictures(directory: Path, runs: list[Run], drawn: list[dict[str, Any]], loads: list[dict[str, Any]]) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directory.mkdir(exist_ok=True)
    written = []

    def save(figure, name: str) -> None:
        written.append(directory / f"{name}.png")
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)

    for chart in drawn:
        figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
        for curve in chart["series"]:
            colour, label = f"C{curve['run']}", runs[curve["run"]].name
            if curve["kind"] == "dots":
                axes.plot(curve["x"], curve["y"], "o", color=colour, label=f"{label}, held-out")
                continue
            axes.plot(curve["x"], curve["y"], lw=1, color=colour, label=label)
            if "low" in curve:
                axes.fill_between(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.15, lw=0)
        axes.set(xlabel="optimizer step", ylabel=chart["unit"], title=chart["title"])
        if chart["log"]:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        save(figure, chart["title"].lower().replace(" ", "_"))
    for i, (run, load) in enumerate(zip(runs, loads)):
        figure, axes = plt.subplots(
            figsize=(7, 0.12 * sum(len(x[0]) for x in load["loads"]) + 1.4), layout="constrained"
        )
        rows = [[column[expert] for column in layer] for layer in load["loads"] for expert in range(len(layer[0]))]
        experts = len(load["loads"][0][0])
        image = axes.imshow(
            rows,
            aspect="auto",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            interpolation="nearest",
            extent=(1, load["steps"][-1] + 1, len(rows), 0),
        )
        axes.set(
            xlabel="optimizer step",
            title=f"{run.name}: load, as multiples of an even share",
            yticks=[experts * (layer + 0.5) for layer in range(len(load["loads"]))],
            yticklabels=[f"layer {layer}" for layer in range(len(load["loads"]))],
        )
        for layer in range(1, len(load["loads"])):
            axes.axhline(experts * layer, color="white", lw=1)
        figure.colorbar(image)
        save(figure, "expert_load" if len(runs) == 1 else f"expert_load_{i + 1}")
    return written
