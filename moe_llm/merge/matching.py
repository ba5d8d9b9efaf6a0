"""What expert matching has found, as files beside a merge: the similarities as JSON and as a picture."""

from pathlib import Path

from moe_llm.checkpoint.manifest import write_json
from moe_llm.merge.align import Match

NAME = "expert_matching"


def write_matching(matches: list[Match], directory: Path) -> None:
    """`expert_matching.json`, and the same as a matrix a layer in `expert_matching.png`."""
    rows = [
        {
            "reference": match.reference,
            "layer": match.layer,
            "other": match.other,
            "other_layer": match.other_layer,
            "matched_with": match.order_E.tolist(),
            "similarity": [[round(value, 6) for value in row] for row in match.similarity_EE.tolist()],
        }
        for match in matches
    ]
    write_json(directory / f"{NAME}.json", {"matches": rows})
    _picture(matches, directory / f"{NAME}.png")


def _picture(matches: list[Match], path: Path) -> None:
    """Rows: the reference's experts; columns: the other's; a cross where two are matched."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(4, len(matches))
    down = -(-len(matches) // across)
    figure, grid = pyplot.subplots(down, across, figsize=(3 * across, 3.3 * down), layout="constrained", squeeze=False)
    low = min(match.similarity_EE.min().item() for match in matches)
    high = max(match.similarity_EE.max().item() for match in matches)
    images = []
    for axes, match in zip(grid.flat, matches, strict=False):
        images.append(axes.imshow(match.similarity_EE.numpy(), cmap="viridis", vmin=low, vmax=high))
        axes.plot(match.order_E.numpy(), range(len(match.order_E)), "x", color="red", linestyle="none")
        axes.set_title(f"{_short(match.other)}, layer {match.other_layer}", fontsize=8)
        axes.set(xlabel="its expert", ylabel=f"expert of {_short(match.reference)}, layer {match.layer}")
        axes.xaxis.label.set_fontsize(7)
        axes.yaxis.label.set_fontsize(7)
    for axes in list(grid.flat)[len(matches) :]:
        axes.set_visible(False)
    figure.colorbar(images[0], ax=grid, label="similarity", shrink=0.8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _short(model: str) -> str:
    """What tells models apart: of a checkpoint the run, of another directory or hub name its last part."""
    path = Path(model)
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name
