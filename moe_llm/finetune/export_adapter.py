"""The adapter of a run with `finetune.lora`, in PEFT's files, out of one of its checkpoints: nothing is factorised again."""

from pathlib import Path

import torch
from torch import Tensor

from moe_llm.checkpoint.plan import MASTER
from moe_llm.checkpoint.safetensors_io import TensorFiles
from moe_llm.config import Config
from moe_llm.config.load import load_config
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.architectures import MISTRAL, architecture_of
from moe_llm.finetune.targets import adapted_names, adapter_shapes
from moe_llm.merge.peft_files import PeftAdapter
from moe_llm.merge.write import check_output
from moe_llm.model.adapters import factors_of

_CONFIG = "trainer/config.yaml"


def export_adapter(checkpoint: str | Path, out: str | Path) -> int:
    """Write `out/adapter_model.safetensors` and `out/adapter_config.json`, fp32.

    Returns:
        The number of weights that are adapted.

    Raises:
        UserError: no checkpoint of such a run, a layout that PEFT has no factors for, or an output that is in the way.
    """
    directory, out = Path(checkpoint), Path(out)
    check_output(out)
    if not (directory / _CONFIG).is_file():
        raise UserError(
            f"{checkpoint} has no {_CONFIG}: give a checkpoint as training wrote it, runs/NAME/checkpoints/step-..., or "
            "use moe-llm extract-lora BASE TUNED OUT"
        )
    config = load_config(directory / _CONFIG)
    lora = config.finetune.lora
    if lora.rank is None or config.model.init_from is None:
        raise UserError(
            f"{checkpoint} is of a run without adapters (finetune.lora.rank is null): use moe-llm extract-lora BASE "
            "TUNED OUT"
        )
    names = adapted_names(config)
    _check_layout(config, names)
    files, shapes = TensorFiles(directory / "trainer", "optimizer"), adapter_shapes(config)
    adapter = PeftAdapter(alpha=lora.scale * lora.rank)
    for name in names:
        a, b = (_read(files, factor, shapes[factor]) for factor in factors_of(name))
        if architecture_of(config.model) is MISTRAL and hf.is_expert(name):
            adapter.factors |= _of_the_only_expert(name, a[0], b[0])
        else:
            adapter.factors[name] = a, b
    base = Path(config.model.init_from)
    adapter.write(out, str(base.resolve()) if base.exists() else config.model.init_from)
    return len(adapter.factors)


def _check_layout(config: Config, names: list[str]) -> None:
    family, experts = architecture_of(config.model), [name for name in names if hf.is_expert(name)]
    apart = [name for name in names if hf.expert_of(name) is not None]
    if experts and (family.stacked or apart):
        why = "differ in size" if apart else f"are stored another way in {family.architecture}"
        raise UserError(
            f"the experts of this model {why}, and PEFT has no factors for {experts[0]}: use the checkpoint, into which "
            "the adapters are merged"
        )


def _read(files: TensorFiles, factor: str, shape: tuple[int, ...]) -> Tensor:
    """A factor, of all experts."""
    whole = torch.empty(shape)
    for piece in hf.pieces(factor, shape):
        whole[piece.index] = files.read(f"{MASTER}.{piece.name}")
    return whole


def _of_the_only_expert(name: str, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of a dense model's feed-forward layer, whose projections are linear layers of their own; gate above up."""
    layer = name.partition(".experts.")[0]
    if name.endswith("down_proj"):
        return {f"{layer}.down_proj.weight": (a, b)}
    gate, up = b.chunk(2)
    return {f"{layer}.gate_proj.weight": (a, gate), f"{layer}.up_proj.weight": (a.clone(), up)}
