"""Draw the pictures of the documentation that follow from the code: docs/images/architecture.svg and plan.svg.

python scripts/pictures.py
"""

import subprocess
import sys
import tomllib
from json import loads
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

matplotlib.use("svg")
ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "moe_llm", "font.size": 10}
PLAN = ("configs/mixtral_8x7b.yaml", "--gpus", "64", "--gpu-memory", "80GiB")
# The path of a token through a training step; all other parts of the package stand beside it.
STEP = {
    "config": "the run's YAML",
    "data": "text becomes blocks of tokens",
    "model": "attention, router, experts",
    "distributed": "experts over ranks, DeepSpeed",
    "train": "trainer and callbacks",
    "checkpoint": "a directory of transformers",
}


def layers() -> list[str]:
    """The packages from the command line down, as import-linter holds them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = project["tool"]["importlinter"]["contracts"]
    return [layer.replace("moe_llm.", "").replace(" | ", ", ") for layer in contract["layers"]]


def architecture() -> Any:
    """Left: the order of imports. Right: what a training step passes through."""
    names = layers()
    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(names) + 1), layout="constrained")
    axes.set(xlim=(0, 10), ylim=(-0.6, len(names) + 0.8))
    axes.axis("off")
    axes.text(1.8, len(names) + 0.2, "each imports only from those below it", ha="center", style="italic")
    axes.text(7.2, len(names) + 0.2, "a training step", ha="center", style="italic")
    style = {"boxstyle": "round,pad=0.25", "linewidth": 0.8}
    for i, name in enumerate(names):
        used = name in STEP
        axes.text(
            1.8, len(names) - 1 - i, name, ha="center", va="center",
            bbox=style | {"facecolor": "#cfe2f3" if used else "#f4f4f4", "edgecolor": "#555555"},
        )  # fmt: skip
    space = (len(names) - 1) / (len(STEP) - 1)
    for i, (name, text) in enumerate(STEP.items()):
        y = len(names) - 1 - i * space
        axes.text(
            7.2, y, f"{name}: {text}", ha="center", va="center",
            bbox=style | {"facecolor": "#cfe2f3", "edgecolor": "#555555"},
        )  # fmt: skip
        if i:
            arrow = {"arrowstyle": "->", "color": "#555555"}
            axes.annotate("", (7.2, y + 0.55), (7.2, y + space - 0.55), arrowprops=arrow)
    return figure


def plan() -> Any:
    """Memory by part of the best layout for Mixtral 8x7B, by `moe-llm plan`."""
    command = [sys.executable, "-m", "moe_llm.cli", "plan", *PLAN, "--json"]
    best = loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)["best"]
    parts = {name: value for name, value in best["memory"].items() if name not in ("total", "when") and value}
    figure, axes = pyplot.subplots(figsize=(8, 2.2), layout="constrained")
    left = 0.0
    for name, value in parts.items():
        size = value / 2**30
        axes.barh([0], [size], left=left, label=f"{name.replace('_', ' ')} {size:.1f}")
        left += size
    axes.axvline(80, color="black", linewidth=1)
    axes.text(80, 0.45, "80 GiB ", ha="right")
    axes.set(xlim=(0, 84), yticks=[], xlabel=f"GiB of one of 64 GPUs; in all {left:.1f}")
    axes.set_title("moe-llm plan " + " ".join(PLAN), fontsize=9)
    axes.legend(ncols=len(parts), fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    return figure


PICTURES = {"architecture.svg": architecture, "plan.svg": plan}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        figure = draw()
        figure.patch.set_facecolor("white")  # readable on the dark site too
        figure.savefig(IMAGES / name, metadata={"Date": None})
        pyplot.close(figure)
