"""An inspection as text, and as files."""

import json
import os
from pathlib import Path
from typing import Any

from moe_llm.errors import UserError

_FEWEST_UNITS = 3  # of each source: of five units in all, no p is below 0.1


def format_report(report: dict[str, Any]) -> str:
    """The main numbers, layer by layer."""
    lines = [
        f"{source['name']}: {source['tokens']:,} tokens, loss {source['loss']:.4f}" for source in report["sources"]
    ]
    found, repeated, removal = report["specialisation"], report["repetition"], report["removal"]
    if found is not None:
        lines.append(
            f"specialisation by source: {found['mean_bits']:.5f} bits, by chance {found['mean_chance_bits']:.5f} "
            f"({found['permutations']} permutations of {found['units']} documents or pieces: "
            f"p = {found['overall_p_value']:.3g})"
        )
    if found is None:
        lines.append("bits and p compare sources of text, and here is one: name a second with --data")
    elif found["units"] < _FEWEST_UNITS * len(report["sources"]):
        lines.append("too few documents to tell bits from chance: give more of each source, or raise --max-tokens")
    if removal is None:
        lines.append("the dearest expert is not looked for with --removal-rows 0")
    lines += [
        f"repeated by the next token, by chance: first choice {repeated['chance_first']:.1%}, first or second "
        f"{repeated['chance_first_or_second']:.1%}",
        "",
        f"{'layer':>5} {'busiest':>8} {'bits':>9} {'p':>7} {'first':>7} {'1st/2nd':>8} {'dearest expert':>15}",
    ]
    for layer, (block, load) in enumerate(zip(report["blocks"], report["load"], strict=True)):
        bits, p = ("-", "-") if found is None else (f"{found['bits'][layer]:.5f}", f"{found['p_value'][layer]:.3f}")
        dearest = "-"
        if removal is not None:
            cost = removal["cost"][layer]
            dearest = f"{max(range(len(cost)), key=cost.__getitem__)} ({max(cost):+.4f})"
        lines.append(
            f"{block:>5} {max(load):>8.1%} {bits:>9} {p:>7} {repeated['first'][layer]:>7.1%} "
            f"{repeated['first_or_second'][layer]:>8.1%} {dearest:>15}"
        )
    return "\n".join(lines)


def check_out(directory: str) -> None:
    """Refuse a directory that cannot be written, before any work."""
    path = Path(directory).absolute()
    parent = next(p for p in [path, *path.parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {directory!r} cannot be written: name a directory that you may write to")


def write_report(report: dict[str, Any], directory: str) -> Path:
    """inspect.json, plots/*.png and inspect.html; returns the page's path."""
    from moe_llm.inspect.page import page
    from moe_llm.inspect.plots import write_plots

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inspect.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    plots = write_plots(report, folder / "plots")
    path = folder / "inspect.html"
    path.write_text(page(report, plots), encoding="utf-8")
    return path
