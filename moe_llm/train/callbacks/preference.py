"""Preference tuning in a run: the model's argument for a batch of pairs, and the reference's log-probabilities.

The reference is the model that the run starts from. It is not kept: what it says of every answer is computed once, before
the first step, and stored in the run directory.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from moe_llm.config import Config
from moe_llm.data.blocks import ValidationBlocks
from moe_llm.data.files import replace_file
from moe_llm.data.hashes import stamp_of
from moe_llm.data.loader import Data
from moe_llm.data.packing import Batch, model_inputs
from moe_llm.data.pairs import PackedPairs
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime
from moe_llm.errors import UserError
from moe_llm.evaluation.evaluate import preference_inputs
from moe_llm.finetune.init_from import load_origin
from moe_llm.locks import tell
from moe_llm.train.build import restore
from moe_llm.train.callbacks.base import Callback, TrainingRun

FILE = "reference.safetensors"


class PreferenceTuning(Callback):
    """Gives each forward pass its pairs, with what the reference says of them."""

    def extra_inputs(self, run: TrainingRun, batch: Batch) -> dict[str, Any]:
        return preference_inputs(run.config, batch)


def prepare_reference(
    config: Config, engine: Engine, runtime: Runtime, data: Data, run_dir: Path, source: Path | None
) -> None:
    """Give pairs what the reference says of them, from the run directory or from the base; the engine is as it was then.
    Before a loader reads them. Collective.

    Args:
        source: the checkpoint that the engine's weights are from; None: they are the base's.
    """
    if not config.preference.needs_reference:
        return
    base = _fingerprint(config) if runtime.is_main else ""
    if recall_reference(data, run_dir, runtime, base if source is None else None):
        return
    if source is not None:
        load_origin(engine, config.model)
        without_adapters(engine)
    remember_reference(config, engine, runtime, data, run_dir, base)
    if source is not None:
        restore(engine, source, hashes=False)


def recall_reference(data: Data, run_dir: Path, runtime: Runtime, base: str | None = None) -> bool:
    """Take the reference's log-probabilities from the run directory; false if they are not there, or are of other data or of
    another model than `base`. Collective.

    Args:
        base: a fingerprint; None: any, since a run that is resumed keeps the reference that it began with.
    """
    parts = _parts(data)
    found = _read(run_dir / FILE, parts, base) if runtime.is_main else None
    found = runtime.gather(found)[0]
    for name, part in parts.items() if found is not None else ():
        part.reference = found[name]
    return found is not None


@torch.no_grad()
def remember_reference(
    config: Config, engine: Engine, runtime: Runtime, data: Data, run_dir: Path, base: str = ""
) -> None:
    """Take the model as it is for the reference, and write down what it says of every answer. Collective."""
    parts, width = _parts(data), config.train.micro_batch_size
    engine.model.eval()
    for part in parts.values():
        own: list[tuple[np.ndarray, np.ndarray]] = []
        mine = list(range(len(part)))[runtime.rank :: runtime.world_size]  # as `batches` shares them out
        batches = (
            ValidationBlocks([part]).batches(micro_batch_size=width, rank=runtime.rank, world_size=runtime.world_size)
            if len(part)
            else ()
        )
        for i, batch in enumerate(batches):
            tell(f"reference, batch {i + 1} of {len(batches)}")
            batch = batch.to(runtime.device)
            output = engine.forward(**model_inputs(batch), **preference_inputs(config, batch))
            assert output.preference is not None, "asked for just now"
            logp_BD = output.preference.logp_BD.float().cpu().numpy()
            for row, block in enumerate(mine[i * width : (i + 1) * width]):
                documents = part.documents_of(block)
                own.append((documents, logp_BD[row, : len(documents)]))
        reference = np.zeros(part.text.documents, np.float32)
        for documents, logp in (found for of_rank in runtime.gather(own) for found in of_rank):
            reference[documents] = logp
        part.reference = reference
    engine.model.train()
    if runtime.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        arrays = {name: part.reference for name, part in parts.items() if part.reference is not None}
        replace_file(run_dir / FILE, save(arrays, {"pairs": f"{_digest(parts)} {base}"}))
    runtime.barrier()


def without_adapters(engine: Engine) -> None:
    """Make adapters add nothing, so that the engine's model is the base. Collective."""
    for entry in engine.entries():
        if entry.adapter and "lora_B" in entry.name:
            engine.write(entry.name, "weight", torch.zeros_like(engine.read(entry.name, "weight")))


def _parts(data: Data) -> dict[str, PackedPairs]:
    found = [("train", data.train.sources), ("validation", data.validation.sources)]
    return {
        f"{kind}.{i}": part for kind, parts in found for i, part in enumerate(parts) if isinstance(part, PackedPairs)
    }


def _digest(parts: dict[str, PackedPairs]) -> str:
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(repr((name, part.text.digest, part.sequence_length, part.dropped, part.truncated)).encode())
    return digest.hexdigest()


def _fingerprint(config: Config) -> str:
    """By which a base is told apart from another one, or from what was in its place before; nothing of it is read."""
    assert config.model.init_from is not None, "losses with a reference have a base"
    directory, digest = Path(config.model.init_from).resolve(), hashlib.sha256()
    for file in sorted(path for path in directory.glob("*") if path.suffix in (".safetensors", ".json")):
        digest.update(repr((str(file), *stamp_of(file))).encode())
    return digest.hexdigest()


def _read(file: Path, parts: dict[str, PackedPairs], base: str | None) -> dict[str, np.ndarray] | None:
    from safetensors import safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, "np") as content:
            pairs, _, found = (content.metadata() or {}).get("pairs", "").partition(" ")
        if pairs != _digest(parts) or (base is not None and found != base):
            return None
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"file {file} is damaged ({error}): delete it, and it is made from model.init_from") from error
