"""Pictures of a run, from its metrics.jsonl."""

from pathlib import Path

from moe_llm.train.metrics import read_metrics


def plot_run(run_dir: Path) -> list[Path]:
    """Write plots/loss.png (training and validation) and plots/expert_load.png (share of tokens, layer by expert)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run_dir / "metrics.jsonl")
    directory = run_dir / "plots"
    directory.mkdir(exist_ok=True)
    if not records:
        return []

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([r["step"] for r in records], [r["lm_loss"] for r in records], lw=0.8, label="training")
    measured = [r for r in records if r.get("val_loss") is not None]
    axes.plot([r["step"] for r in measured], [r["val_loss"] for r in measured], "o-", label="validation")
    axes.set(xlabel="optimizer step", ylabel="cross-entropy, nats per token", title=str(run_dir))
    axes.grid(alpha=0.3)
    axes.legend()
    loss_path = directory / "loss.png"
    figure.savefig(loss_path, dpi=120)
    plt.close(figure)

    counts = records[-1]["moe"]["tokens_per_expert"]
    share = [[count / max(1, sum(layer)) for count in layer] for layer in counts]
    figure, axes = plt.subplots(figsize=(5, 0.3 * len(share) + 2), layout="constrained")
    image = axes.imshow(share, aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, label="share of routed tokens")
    axes.set(xlabel="expert", ylabel="layer with experts", title=f"expert load at step {records[-1]['step']}")
    load_path = directory / "expert_load.png"
    figure.savefig(load_path, dpi=120)
    plt.close(figure)
    return [loss_path, load_path]
