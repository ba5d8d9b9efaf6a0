"""The same records for every tracker: scalars under grouped names, histograms, and the experts' load as an image.

train/...   what a step has measured: train/loss, train/lr, train/tokens_per_second
eval/...    what an evaluation has measured: eval/loss, eval/bits_per_byte, eval/ema_loss
moe/...     routing, by layer
"""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import ValidationError

from moe_llm.config import Config
from moe_llm.errors import UserError

_PER_LAYER = ("load_cv", "router_entropy", "dropped_share", "experts_per_token")
_CELL = 12  # pixels a side
# no tokens, an even share, twice that and more
_COLOURS = np.array([(47, 102, 144), (241, 238, 233), (196, 87, 42)], dtype=float)
_PROJECT = "moe_llm"
_NEEDS = {  # key: (package, what installs it)
    "tensorboard": ("tensorboard", "tensorboard"),
    "mlflow": ("mlflow", "'moe_llm[mlflow]'"),
    "trackio": ("trackio", "'moe_llm[trackio]'"),
}


class Tracker(Protocol):
    """Where records go, on the main rank."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record of metrics.jsonl."""

    def rewind(self, step: int) -> None:
        """The run has gone back to a step."""

    def close(self) -> None: ...


def check_trackers(config: Config) -> None:
    """Refuse what is not installed, settings in the environment that wandb cannot read, and wandb online without a login.

    Raises:
        UserError: it names the package, the variable, or how to log in.
    """
    for key, (module, package) in _NEEDS.items():
        if getattr(config.logging, key) and find_spec(module) is None:
            raise UserError(f"logging.{key}=true needs the package {module}: pip install {package}, or set it to false")
    if config.logging.wandb == "off":
        return
    import wandb

    _check_wandb_settings(wandb, config.logging.project)
    if wandb_mode(config) not in ("online", "run", "shared"):
        return
    # other ranks may be on machines on which no one has logged in
    if os.environ.get("RANK", "0") != "0":
        return
    with _as_user_error(wandb, "the login (WANDB_API_KEY, or ~/.netrc)", "use logging.wandb=offline"):
        there = wandb.login(prompt=sys.stdin.isatty(), verify=False)
    if not there:
        raise UserError(
            "logging.wandb=online needs a login: run `wandb login`, set WANDB_API_KEY, or use logging.wandb=offline"
        )


def _check_wandb_settings(wandb: Any, project: str | None) -> None:
    """Have wandb read its variables and our project's name: it tells of them in many lines, and at times only when the run
    begins."""
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith("WANDB_")}
    for name, value in given.items():
        shown = name if name == "WANDB_API_KEY" else f"{name}={value}"
        with _as_user_error(wandb, f"{shown} in the environment", f"unset {name}"):
            wandb.Settings().update_from_env_vars({name: value})
    if project is not None:
        with _as_user_error(wandb, f"logging.project={project}", "leave it out"):
            wandb.Settings(project=project)


@contextmanager
def _as_user_error(wandb: Any, what: str, otherwise: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, wandb.Error) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise UserError(f"{what} cannot be read by wandb ({reason}): correct it, or {otherwise}") from error


def wandb_mode(config: Config) -> Any:
    """WANDB_MODE where it is set, else `logging.wandb`, which alone says whether there is a wandb run."""
    return os.environ.get("WANDB_MODE") or config.logging.wandb


def build_trackers(config: Config, run_dir: Path, step: int) -> list[Tracker]:
    """Those of `logging`, for a run that has finished `step` steps."""
    trackers: list[Tracker] = []
    if config.logging.wandb != "off":
        trackers.append(Wandb(config, run_dir))
    if config.logging.tensorboard:
        trackers.append(TensorBoard(config, run_dir, step))
    if config.logging.mlflow:
        trackers.append(_mlflow(config, run_dir))
    if config.logging.trackio:
        trackers.append(_trackio(config, run_dir))
    return trackers


def grouped(name: str) -> str:
    """The name of a record's number in trackers: train/loss of loss, eval/loss of val_loss."""
    if name in ("step", "tokens"):
        return name
    for prefix, kept in (("ema_val_", "ema_"), ("val_", "")):
        if name.startswith(prefix):
            return f"eval/{kept}{name.removeprefix(prefix)}"
    return f"train/{name}"


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by name; those of layers apart."""
    found = {grouped(key): value for key, value in record.items() if isinstance(value, (int, float))}
    for source, read in record.get("sources", {}).items():
        found |= {f"data/{name}/{source}": value for name, value in read.items()}
    found |= {f"eval/loss/{source}": loss for source, loss in record.get("val_loss_by_source", {}).items()}
    moe = record.get("moe", {})
    for name in _PER_LAYER:
        found |= {f"moe/{name}/layer_{i}": value for i, value in enumerate(moe.get(name, []))}
    for name, values in record.get("router_drift", {}).items():
        found |= {f"moe/router_drift/{name}/layer_{i}": value for i, value in enumerate(values)}
    found["moe/dead_experts"] = sum(len(dead) for dead in moe.get("dead_experts", []))
    found["moe/alarms"] = len(record.get("alarms", []))
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
    """A wandb run, in the run directory unless WANDB_DIR is set, under one id across resumes."""

    def __init__(self, config: Config, run_dir: Path):
        import wandb

        super().__init__(config.logging.image_every_steps)
        mode = wandb_mode(config)
        try:
            self._run = wandb.init(
                # where the configuration leaves it open, what wandb reads from the environment counts
                project=config.logging.project or os.environ.get("WANDB_PROJECT") or _PROJECT,
                dir=os.environ.get("WANDB_DIR") or run_dir,
                mode=mode,
                id=os.environ.get("WANDB_RUN_ID") or _identity(run_dir / "wandb_id"),
                resume="allow",
                name=os.environ.get("WANDB_NAME") or run_dir.name,
                config=config.model_dump(mode="json"),
            )
        except wandb.Error as error:
            raise UserError(
                f"logging.wandb={mode} cannot start a run ({str(error).splitlines()[0]}): log in again, look at the "
                "network, or use logging.wandb=offline"
            ) from error
        self._wandb = wandb
        self._run.define_metric("*", step_metric="step")

    def rewind(self, step: int) -> None:
        """wandb keeps what it was told, and leaves out steps until they are new to it."""

    def write(self, record: dict[str, Any]) -> None:
        told: dict[str, Any] = scalars(record)
        if self._pictures_due(record["step"]):
            told |= {name: self._wandb.Histogram(list(values)) for name, values in distributions(record["moe"]).items()}
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
            self._writer.add_text("moe/alarms", alarm["sentence"], step)
        if self._pictures_due(step):
            for name, values in distributions(record["moe"]).items():
                self._writer.add_histogram(name, values, step)
            self._writer.add_image("moe/load", load_image(record["moe"]["tokens_per_expert"]), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Accelerated:
    """A tracker of accelerate's: scalars alone."""

    def __init__(self, config: Config, tracker: Any, *, new: bool):
        self._tracker = tracker
        tracker.start()
        if new:
            tracker.store_init_configuration(_flat(config.model_dump(mode="json")))

    def rewind(self, step: int) -> None:
        """These keep what they were told; the newest value of a step is the one that counts."""

    def write(self, record: dict[str, Any]) -> None:
        told = scalars(record)
        self._tracker.log(told, step=told.pop("step"))

    def close(self) -> None:
        self._tracker.finish()


def _mlflow(config: Config, run_dir: Path) -> Accelerated:
    """Under one run across resumes. MLflow reads where to from MLFLOW_TRACKING_URI."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    known = run_dir / "mlflow_run_id"
    before = known.read_text(encoding="utf-8") if known.exists() else None
    try:
        if before is not None:
            mlflow.get_run(before)
    except mlflow.exceptions.MlflowException:
        before = None  # it has been deleted, or was told to another server
    tracker = MLflowTracker(config.logging.project or _PROJECT, run_id=before, run_name=run_dir.name)
    accelerated = Accelerated(config, tracker, new=before is None)
    known.write_text(tracker.tracker.info.run_id, encoding="utf-8")
    return accelerated


def _trackio(config: Config, run_dir: Path) -> Accelerated:
    """Under one name across resumes. trackio reads where to from TRACKIO_DIR and TRACKIO_SPACE_ID."""
    from accelerate.tracking import TrackioTracker

    known = run_dir / "trackio_id"
    new, name = not known.exists(), f"{run_dir.name}-{_identity(known)}"
    tracker = TrackioTracker(config.logging.project or _PROJECT, name=name, resume="allow", embed=False)
    return Accelerated(config, tracker, new=new)


def _identity(path: Path) -> str:
    """Eight hexadecimal digits that a file keeps; drawn where there is none."""
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found
