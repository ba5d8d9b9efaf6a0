"""Pictures of an inspection."""

from pathlib import Path
from typing import Any

import numpy as np


def write_plots(report: dict[str, Any], directory: Path) -> list[Path]:
    """load, sources, repetition, specialisation, removal and together, as PNG; those that there is something for."""
    import matplotlib

    matplotlib.use("Agg")

    directory.mkdir(parents=True, exist_ok=True)
    written = [_heat(directory / "load.png", report["load"], "share of choices", "viridis")]
    if len(report["sources"]) > 1:
        written += [_sources(directory / "sources.png", report), _specialisation(directory, report)]
    written.append(_repetition(directory / "repetition.png", report["repetition"]))
    if report["removal"] is not None:
        written.append(
            _heat(
                directory / "removal.png",
                report["removal"]["cost"],
                "loss added, nats per token",
                "RdBu_r",
                centred=True,
            )
        )
    if report["co_selection"] is not None:
        written.append(_together(directory / "together.png", report["co_selection"]["over_independent"]))
    return written


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


LAYER = "layer with experts"


def _count_whole(*axes: Any) -> None:
    """Layers and experts are numbered by whole numbers."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def _heat(path: Path, table_LE: list, label: str, colours: str, centred: bool = False) -> Path:
    from matplotlib import pyplot

    values = np.array(table_LE)
    figure, axes = pyplot.subplots(figsize=(6, 0.25 * len(values) + 2), layout="constrained")
    most = max(float(np.abs(values).max()), 1e-12)
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=-most if centred else 0, vmax=most)
    figure.colorbar(image, label=label)
    axes.set(xlabel="expert", ylabel=LAYER)
    _count_whole(axes.xaxis, axes.yaxis)
    return _save(figure, path)


def _sources(path: Path, report: dict[str, Any]) -> Path:
    """Each source's share of an expert over the expert's share of all, as a logarithm: 0 is no preference."""
    from matplotlib import pyplot

    share_LES, load_LE = np.array(report["by_source"]), np.array(report["load"])
    lift_LES = np.log2(np.maximum(share_LES, 1e-4) / np.maximum(load_LE, 1e-4)[..., None])
    count = share_LES.shape[2]
    figure, axes = pyplot.subplots(
        1, count, figsize=(3.2 * count + 1, 0.25 * len(load_LE) + 2), layout="constrained", squeeze=False
    )
    for index, axis in enumerate(axes[0]):
        image = axis.imshow(lift_LES[..., index], aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2)
        axis.set(xlabel="expert", ylabel=LAYER, title=Path(report["sources"][index]["name"]).name)
        _count_whole(axis.xaxis, axis.yaxis)
    figure.colorbar(image, ax=axes, label="log2 of the relative share")
    return _save(figure, path)


def _specialisation(directory: Path, report: dict[str, Any]) -> Path:
    found = report["specialisation"]
    return _lines(
        directory / "specialisation.png",
        "mutual information of source and expert, bits",
        {
            "observed": found["bits"],
            "chance, mean": found["chance_bits"],
            "chance, 95%": found["chance_95"],
            "by the token alone": found["by_tokens"],
        },
    )


def _repetition(path: Path, found: dict[str, Any]) -> Path:
    first, both = found["first"], found["first_or_second"]
    return _lines(
        path,
        "share of consecutive tokens",
        {
            "same first choice": first,
            "chance": [found["chance_first"]] * len(first),
            "common among first two": both,
            "chance, first two": [found["chance_first_or_second"]] * len(both),
        },
    )


def _lines(path: Path, label: str, series: dict[str, list[float]]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, values in series.items():
        axes.plot(range(len(values)), values, "--" if name.startswith("chance") else "o-", label=name)
    axes.set(xlabel=LAYER, ylabel=label, ylim=(0, None))
    _count_whole(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def _together(path: Path, ratio_LEE: list) -> Path:
    return _heat_square(path, np.array(ratio_LEE).mean(0))


def _heat_square(path: Path, values: np.ndarray) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    image = axes.imshow(values, cmap="RdBu_r", vmin=0, vmax=2)
    figure.colorbar(image, label="chosen together, over independent choices")
    axes.set(xlabel="expert", ylabel="expert")
    _count_whole(axes.xaxis, axes.yaxis)
    return _save(figure, path)
