"""The same records for wandb and TensorBoard: scalars, histograms, and the experts' load as an image."""

import secrets
from pathlib import Path
from typing import Any

import numpy as np

from moe_llm.config import Config
from moe_llm.errors import UserError

_PER_LAYER = ("load_cv", "router_entropy", "dropped_share", "experts_per_token")
_CELL = 12  # pixels a side
# no tokens, an even share, twice that and more
_COLOURS = np.array([(47, 102, 144), (241, 238, 233), (196, 87, 42)], dtype=float)


def check_trackers(config: Config) -> None:
    """Refuse what is not installed."""
    if not config.logging.tensorboard:
        return
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            "logging.tensorboard=true needs the package tensorboard: pip install tensorboard, or set it to false"
        ) from error


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by name; those of layers apart."""
    found = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    moe = record.get("moe", {})
    for name in _PER_LAYER:
        found |= {f"moe/{name}/layer_{i}": value for i, value in enumerate(moe.get(name, []))}
    for name, values in record.get("router_drift", {}).items():
        found |= {f"router_drift/{name}/layer_{i}": value for i, value in enumerate(values)}
    found["moe/dead_experts"] = sum(len(dead) for dead in moe.get("dead_experts", []))
    found["alarms"] = len(record.get("alarms", []))
    return found


def distributions(moe: dict[str, Any]) -> dict[str, np.ndarray]:
    """Over the experts of each layer: the load in even shares, and the norm of the gradient where there is one."""
    found = {f"moe/load/layer_{i}": load_E for i, load_E in enumerate(_even_shares(moe["tokens_per_expert"]))}
    for i, layer in enumerate(moe.get("expert_grad_norm", [])):
        found[f"moe/expert_grad_norm/layer_{i}"] = np.array([norm for norm in layer if norm is not None])
    return found


def load_image(counts_LE: list[list[int]]) -> np.ndarray:
    """(height, width, 3), uint8: layers down, experts across; blue below an even share, orange above."""
    place = np.clip(_even_shares(counts_LE), 0, 2)[..., None]
    low, even, high = _COLOURS
    colour = np.where(place < 1, low + (even - low) * place, even + (high - even) * (place - 1))
    return colour.round().astype(np.uint8).repeat(_CELL, axis=0).repeat(_CELL, axis=1)


def _even_shares(counts_LE: list[list[int]]) -> np.ndarray:
    counts = np.array(counts_LE, dtype=float)
    return counts / np.maximum(counts.mean(-1, keepdims=True), 1e-12)


class _Tracker:
    """Says when pictures are due: at the first record, and at the first one in each stretch of so many steps."""

    def __init__(self, every: int):
        self._every, self._stretch = every, -1

    def _pictures_due(self, step: int) -> bool:
        before, self._stretch = self._stretch, step // self._every
        return self._stretch > before


class Wandb(_Tracker):
    """A wandb run, in the run directory, under one id across resumes."""

    def __init__(self, config: Config, run_dir: Path):
        import wandb

        super().__init__(config.logging.image_every_steps)
        identity = run_dir / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        self._wandb = wandb
        self._run = wandb.init(
            project=config.logging.wandb_project,
            dir=run_dir,
            mode=config.logging.wandb,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            name=run_dir.name,
            config=config.model_dump(mode="json"),
        )

    def rewind(self, step: int) -> None:
        """wandb keeps what it was told, and leaves out steps until they are new to it."""

    def write(self, record: dict[str, Any]) -> None:
        told: dict[str, Any] = scalars(record)
        if self._pictures_due(record["step"]):
            told |= {name: self._wandb.Histogram(values) for name, values in distributions(record["moe"]).items()}
            told["moe/load"] = self._wandb.Image(load_image(record["moe"]["tokens_per_expert"]))
        self._run.log(told, step=record["step"])

    def close(self) -> None:
        self._run.finish()


class TensorBoard(_Tracker):
    """Event files in tensorboard/ of the run directory; a run that goes on hides what was written after its step."""

    def __init__(self, config: Config, run_dir: Path, step: int):
        super().__init__(config.logging.image_every_steps)
        self._directory = run_dir / "tensorboard"
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Hide what was written after a step, which the run has gone back to."""
        self.close()
        self._stretch = -1
        self._open(step)

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)
        for alarm in record.get("alarms", []):
            self._writer.add_text("alarms", alarm["sentence"], step)
        if self._pictures_due(step):
            for name, values in distributions(record["moe"]).items():
                self._writer.add_histogram(name, values, step)
            self._writer.add_image("moe/load", load_image(record["moe"]["tokens_per_expert"]), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
