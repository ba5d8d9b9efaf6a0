"""Training checkpoints: the same tensors back at any layout, and a transformers checkpoint besides."""

import json
import os
import threading
import weakref

import pytest
import torch
from safetensors import safe_open
from support.checkpoints import (
    FakeState,
    ThreadRanks,
    random_tensors,
    save_arguments,
    small_config,
    zeros_like,
)
from transformers import AutoModelForCausalLM

from moe_llm.checkpoint import state
from moe_llm.checkpoint.safetensors_io import ShardWriter
from moe_llm.checkpoint.state import load_checkpoint, read_trainer_state, save_checkpoint
from moe_llm.errors import UserError
from moe_llm.families import hf


def save_on(world, ep, root, tensors, config, **changes):
    ranks = ThreadRanks(world)
    outcomes = ranks.run(
        lambda rank: save_checkpoint(root, FakeState(tensors, ep, rank, ranks), **save_arguments(config, **changes))
    )
    assert [error for _, error in outcomes] == [None] * world
    paths = {path for path, _ in outcomes}
    assert len(paths) == 1
    return paths.pop()


def load_on(world, ep, path, empty):
    """The whole tensors, put together from all ranks."""
    ranks = ThreadRanks(world)
    states = [FakeState(empty, ep, rank, ranks) for rank in range(world)]
    outcomes = ranks.run(lambda rank: load_checkpoint(path, states[rank]))
    assert [error for _, error in outcomes] == [None] * world
    for key in empty:
        for group in range(world // ep):
            held = [state.held[key] for state in states[group * ep : (group + 1) * ep]]
            yield key, torch.cat(held) if hf.is_expert(key[0]) else held[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (2, 2)),
        ((2, 2), (4, 4)),
        ((4, 2), (1, 1)),
        ((4, 4), (2, 1)),
        ((2, 1), (4, 2)),
    ],
)
def test_every_layout_reads_what_any_other_wrote(tmp_path, written, read, dtype, tied):
    config = small_config(tie_word_embeddings=tied)
    tensors = random_tensors(config)
    path = save_on(*written, tmp_path, tensors, config, dtype=dtype)
    for key, tensor in load_on(*read, path, zeros_like(tensors)):
        assert torch.equal(tensor, tensors[key]), key


@pytest.mark.parametrize("shard", ["5GB", "1KB"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (4, 2)])
@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_transformers_loads_a_step_directory(tmp_path, world, ep, dtype, torch_dtype, shard):
    config = small_config()
    tensors = random_tensors(config)
    path = save_on(world, ep, tmp_path, tensors, config, dtype=dtype, max_shard_size=shard)
    assert (path / "model.safetensors").exists() == (world == 1 and shard == "5GB")
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    state = model.state_dict()
    assert set(state) == set(hf.parameter_shapes(config))
    for name, tensor in state.items():
        assert tensor.dtype == torch_dtype
        assert torch.equal(tensor, tensors[name, "weight"].to(torch_dtype)), name


def test_shards_stay_below_the_size_asked_for(tmp_path):
    config = small_config()
    path = save_on(2, 2, tmp_path, random_tensors(config), config, max_shard_size="2KB")
    for stem in ("model", "trainer/optimizer"):
        index = json.loads((path / f"{stem}.safetensors.index.json").read_text())
        total = 0
        for file in set(index["weight_map"].values()):
            with safe_open(path / stem.rpartition("/")[0] / file, "pt") as opened:
                sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
                assert opened.metadata() == {"format": "pt"}
            assert sum(sizes) <= 2000 or len(sizes) == 1
            total += sum(sizes)
        assert total == index["metadata"]["total_size"]


def test_all_ranks_write_at_once(tmp_path):
    """Each rank's own experts are in its own files: no file holds experts of two ranks."""
    config = small_config()
    path = save_on(2, 2, tmp_path, random_tensors(config), config)
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    files = {
        half: {f for n, f in weight_map.items() if any(f"experts.{e}." in n for e in half)} for half in ((0, 1), (2, 3))
    }
    assert all(files.values())
    assert not files[0, 1] & files[2, 3]


def test_trainer_state_comes_back_exactly(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    given = {"samples": 12345678901234, "loss": 0.1 + 0.2, "rng": "AAEC", "nested": {"a": [1, 2.5, None]}}
    path = save_on(1, 1, tmp_path, tensors, config, trainer_state=given)
    assert load_checkpoint(path, FakeState(zeros_like(tensors))) == given
    assert read_trainer_state(path) == given
    assert json.loads((path / "trainer/state.json").read_text())["step"] == 100


def test_frozen_parameters_have_no_optimizer_tensors(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    frozen = {"model.embed_tokens.weight", "model.layers.0.mlp.experts.down_proj"}
    path = save_checkpoint(tmp_path, FakeState(tensors, frozen=frozen), **save_arguments(config))
    with safe_open(path / "trainer/optimizer.safetensors", "pt") as opened:
        assert "exp_avg.model.embed_tokens.weight" not in opened.keys()  # noqa: SIM118
    state = FakeState(zeros_like(tensors), frozen=frozen)
    load_checkpoint(path, state)
    for (name, kind), tensor in state.held.items():
        expected = tensors[name, kind] if kind == "weight" or name not in frozen else torch.zeros_like(tensor)
        assert torch.equal(tensor, expected), (name, kind)
    with pytest.raises(UserError, match=r"exp_avg.*missing"):
        load_checkpoint(path, FakeState(zeros_like(tensors)))


def test_an_optimizer_without_tensors(tmp_path):
    config = small_config()
    tensors = random_tensors(config, kinds=())
    path = save_checkpoint(tmp_path, FakeState(tensors), **save_arguments(config))
    assert sorted(p.name for p in (path / "trainer").iterdir()) == [
        "config.yaml",
        "manifest.json",
        "state.json",
    ]
    state = FakeState(zeros_like(tensors))
    load_checkpoint(path, state)
    assert all(torch.equal(state.held[key], tensor) for key, tensor in tensors.items())
    with pytest.raises(UserError, match=r"optim\.name"):
        load_checkpoint(path, FakeState(random_tensors(config)))


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 16}, {"num_hidden_layers": 3}, {"num_local_experts": 2}, {"tie_word_embeddings": True}],
)
def test_another_architecture_is_refused_and_nothing_changes(tmp_path, change):
    config = small_config()
    path = save_checkpoint(tmp_path, FakeState(random_tensors(config)), **save_arguments(config))
    state = FakeState(zeros_like(random_tensors(small_config(**change))))
    with pytest.raises(UserError, match="set model as it was"):
        load_checkpoint(path, state)
    assert not any(tensor.any() for tensor in state.held.values())


@pytest.mark.parametrize(
    ("head", "named"),
    [({"format": 99}, "format 99"), ({"format": 1, "step": 3}, "lacks masters"), ({}, "format None")],
)
def test_a_newer_format_or_a_damaged_head_is_refused(tmp_path, head, named):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/state.json").write_text(json.dumps(head))
    with pytest.raises(UserError, match=named):
        read_trainer_state(tmp_path)


def test_a_rank_that_forgets_its_experts_is_caught(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    state = FakeState(tensors)
    state._entries = [entry for entry in state.entries() if entry.name != "model.layers.1.mlp.experts.down_proj"]
    with pytest.raises(AssertionError, match=r"experts\.0\.w2"):
        save_checkpoint(tmp_path, state, **save_arguments(config))
    assert not list(tmp_path.iterdir())


def test_a_resumed_step_replaces_the_earlier_one(tmp_path):
    config = small_config()
    old, new = random_tensors(config, 0), random_tensors(config, 1)
    save_checkpoint(tmp_path, FakeState(old), **save_arguments(config))
    path = save_checkpoint(tmp_path, FakeState(new), **save_arguments(config))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints.json", "latest", "step-00000100"]
    state = FakeState(zeros_like(new))
    load_checkpoint(path, state)
    assert torch.equal(state.held["lm_head.weight", "weight"], new["lm_head.weight", "weight"])


def test_latest_and_pruning_go_by_the_order_of_saving(tmp_path):
    """A run that went back to an earlier step keeps what it writes now, not what it left behind."""
    config = small_config()
    for step in (10, 20, 30, 15, 18):
        path = save_checkpoint(
            tmp_path, FakeState(random_tensors(config)), **save_arguments(config, step=step, keep_last=2)
        )
        assert os.readlink(tmp_path / "latest") == path.name
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints.json",
        "latest",
        "step-00000015",
        "step-00000018",
    ]


class CountingState(FakeState):
    """Counts the bytes of all tensors read from it, or given to it, that are alive at once."""

    live = peak = 0

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        CountingState.live += storage.nbytes()
        CountingState.peak = max(self.peak, self.live)
        weakref.finalize(storage, CountingState._release, storage.nbytes())
        return tensor

    @staticmethod
    def _release(nbytes):
        CountingState.live -= nbytes

    def read(self, name, kind):
        return self._count(super().read(name, kind))

    def write(self, name, kind, tensor):
        super().write(name, kind, self._count(tensor))


@pytest.mark.parametrize("ahead", [0, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_few_tensors_are_in_memory_at_once(tmp_path, monkeypatch, dtype, ahead):
    """ahead: how much may have been read and not yet written, in largest tensors."""
    config = small_config(num_hidden_layers=6)
    tensors = random_tensors(config)
    largest = max(tensor.nbytes for tensor in tensors.values())
    monkeypatch.setattr(state, "_AHEAD", ahead * largest)
    monkeypatch.setattr(CountingState, "peak", 0)
    path = save_checkpoint(tmp_path, CountingState(tensors), **save_arguments(config, dtype=dtype))
    assert largest <= CountingState.peak <= (3 + ahead) * largest
    monkeypatch.setattr(CountingState, "peak", 0)
    load_checkpoint(path, CountingState(zeros_like(tensors)))
    assert largest <= CountingState.peak <= 3 * largest


@pytest.mark.parametrize("ep", [1, 2])
def test_a_rank_whose_disk_stands_still_keeps_no_other_from_writing_all_of_its_share(tmp_path, monkeypatch, ep):
    """So that slow disks take as long as the slowest, and not the sum of all."""
    config = small_config(num_hidden_layers=1)
    tensors, arguments = random_tensors(config), save_arguments(config, dtype="bf16")
    before = save_on(2, ep, tmp_path / "before", tensors, config, dtype="bf16")
    left = sum(len(safe_open(file, "pt").keys()) for file in before.rglob("*-00002-of-00002.safetensors"))
    assert left > 10
    others_are_written, true_write = threading.Event(), ShardWriter.write

    def write(writer, name, tensor):
        nonlocal left
        if "-00001-of-00002" in writer.path.name:
            assert others_are_written.wait(20), "rank 1 waits for rank 0's disk"
        true_write(writer, name, tensor)
        if "-00002-of-00002" in writer.path.name:
            left -= 1
            if not left:
                others_are_written.set()

    monkeypatch.setattr(ShardWriter, "write", write)
    ranks = ThreadRanks(2)
    outcomes = ranks.run(lambda rank: save_checkpoint(tmp_path, FakeState(tensors, ep, rank, ranks), **arguments))
    assert [error for _, error in outcomes] == [None, None]
