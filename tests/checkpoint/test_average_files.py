"""The average of the weights in a checkpoint: its own directory for transformers, the same tensors at any layout."""

import os
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import (
    FakeState,
    ThreadRank,
    ThreadRanks,
    random_tensors,
    save_arguments,
    small_config,
    zeros_like,
)
from transformers import AutoModelForCausalLM

from moe_llm.checkpoint import state
from moe_llm.checkpoint.background import Background
from moe_llm.checkpoint.manifest import read_manifest, verify
from moe_llm.checkpoint.state import load_checkpoint, save_checkpoint
from moe_llm.distributed.state import EMA
from moe_llm.errors import UserError
from moe_llm.families import hf

KINDS = ("exp_avg", EMA)
CONFIG = small_config()
FROZEN = {name for name in hf.parameter_shapes(CONFIG) if hf.is_router(name) or "embed" in name or "layers.1" in name}


def save_on(world, ep, root, tensors, frozen=(), background=False, **changes):
    ranks, side = ThreadRanks(world), ThreadRanks(world)

    def save(rank):
        with ExitStack() as stack:
            behind = stack.enter_context(Background(ThreadRank(side, rank), print)) if background else None
            held = FakeState(tensors, ep, rank, ranks, frozen)
            return save_checkpoint(root, held, background=behind, **save_arguments(CONFIG, **changes))

    [path] = {path for path, error in ranks.run(save) if error is None}
    return path


def load_on(world, ep, path, empty, frozen=(), averaged=0):
    """The ranks' states."""
    ranks = ThreadRanks(world)
    states = [FakeState(empty, ep, rank, ranks, frozen, averaged) for rank in range(world)]
    assert [error for _, error in ranks.run(lambda rank: load_checkpoint(path, states[rank]))] == [None] * world
    return states


def names_in(directory, pattern):
    return [name for file in sorted(directory.glob(pattern)) for name in load_file(file)]


@pytest.mark.parametrize("frozen", [(), FROZEN], ids=["all", "frozen"])
@pytest.mark.parametrize(("dtype", "shard", "background"), [("fp32", "1KB", True), ("bf16", "5GB", False)])
@pytest.mark.parametrize(("written", "read"), [((1, 1), (4, 2)), ((4, 2), (1, 1)), ((2, 2), (2, 1))])
def test_any_layout_reads_the_average_of_any_other_and_so_does_transformers(
    tmp_path, written, read, dtype, shard, background, frozen
):
    tensors = random_tensors(CONFIG, kinds=KINDS)
    path = save_on(*written, tmp_path, tensors, frozen, background, dtype=dtype, max_shard_size=shard)
    verify(path)
    for held in load_on(*read, path, zeros_like(tensors), frozen):
        assert held.averaged == 7
        for entry in held.entries():
            if entry.trainable:
                whole = tensors[entry.name, EMA]
                expected = whole if entry.experts is None else whole[entry.experts.start : entry.experts.stop]
                assert torch.equal(held.held[entry.name, EMA], expected), entry.name
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for directory, kind in ((path, "weight"), (path / EMA, EMA)):
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
        assert not any(info.values()), info
        for name, tensor in model.state_dict().items():
            expected = tensors[name, "weight" if name in frozen else kind]
            assert torch.equal(tensor, expected.to(torch_dtype)), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("links", ["hard", "symbolic"])
def test_what_is_frozen_is_stored_once(tmp_path, monkeypatch, dtype, links):
    def one_name_a_file(*_):
        raise OSError("not on this file system")

    if links == "symbolic":
        monkeypatch.setattr(os, "link", one_name_a_file)
    path = save_on(2, 2, tmp_path, random_tensors(CONFIG, kinds=KINDS), FROZEN, dtype=dtype, max_shard_size="5GB")
    frozen = {piece.name for name in FROZEN for piece in hf.pieces(name, hf.parameter_shapes(CONFIG)[name])}
    own = {file.name for file in path.glob("model-*.safetensors")}
    assert {file.name for file in (path / EMA).glob("model-*.safetensors")} == own
    shared = {name for name in own if os.path.samefile(path / name, path / EMA / name)}
    for name in own:
        held = set(names_in(path, name))
        assert (held <= frozen) if name in shared else held.isdisjoint(frozen)
    assert frozen == {tensor for name in shared for tensor in names_in(path, name)}
    beside = names_in(path / "trainer", "optimizer*.safetensors")
    assert not any(name.partition(".")[2] in frozen for name in beside)
    assert any(name.startswith("ema.") for name in beside) == (dtype == "bf16")  # in fp32 the export says it all
    # what has its place in the plan of a save is what is written
    before = state.make_plan(FakeState(random_tensors(CONFIG, kinds=KINDS), frozen=FROZEN), torch.float32, 10**9, True)
    assert (
        before.average.nbytes
        == sum(spec.nbytes for spec in before.average.specs if spec.name not in frozen)
        < before.model.nbytes
    )


def test_the_manifest_covers_the_average(tmp_path):
    path = save_on(1, 1, tmp_path, random_tensors(CONFIG, kinds=KINDS), FROZEN)
    listed = set(read_manifest(path))
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert there - listed == {"trainer/manifest.json"}
    assert {"ema/config.json", "ema/model.safetensors.index.json"} < listed
    [file] = [name for name in listed if name.startswith("ema/model-00001")]
    content = bytearray((path / file).read_bytes())
    content[-1] ^= 1
    (path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        verify(path)


def test_before_its_first_update_there_is_none(tmp_path):
    tensors = random_tensors(CONFIG, kinds=KINDS)
    held = FakeState(tensors, averaged=0, frozen=FROZEN)
    path = save_checkpoint(tmp_path, held, **save_arguments(CONFIG))
    assert not (path / EMA).exists()
    assert (path / "model.safetensors").exists()
    [loaded] = load_on(1, 1, path, zeros_like(tensors), FROZEN, averaged=3)
    assert loaded.averaged == 0  # whatever it had, as after going back


def test_a_run_without_an_average_goes_on_from_one_with_and_the_other_way_round(tmp_path):
    tensors = random_tensors(CONFIG, kinds=KINDS)
    plain = {key: tensor for key, tensor in tensors.items() if key[1] != EMA}
    with_average = save_on(1, 1, tmp_path / "with", tensors)
    without = save_on(1, 1, tmp_path / "without", plain)
    assert not (without / EMA).exists()
    [loaded] = load_on(1, 1, with_average, zeros_like(plain))
    assert loaded.averaged == 0
    assert all(torch.equal(loaded.held[key], tensor) for key, tensor in plain.items())
    [loaded] = load_on(1, 1, without, zeros_like(tensors))
    assert loaded.averaged == 0
    assert all(torch.equal(loaded.held[key], tensor) for key, tensor in plain.items())


def test_a_background_save_without_the_average_that_the_one_before_had(tmp_path):
    """As after going back to before the average began."""
    tensors = random_tensors(CONFIG, kinds=KINDS)
    held = FakeState(tensors)
    with Background(ThreadRank(ThreadRanks(1), 0), print) as background:
        first = save_checkpoint(tmp_path, held, background=background, **save_arguments(CONFIG, step=1))
        held.make_average(0)
        second = save_checkpoint(tmp_path, held, background=background, **save_arguments(CONFIG, step=2))
    assert (first / EMA).is_dir()
    assert not (second / EMA).exists()
    verify(second)
