"""Which checkpoint a run goes on from, and which configurations are the same run."""

import os
import random

import pytest
import torch
import yaml
from support.checkpoints import (
    FakeState,
    ThreadRanks,
    random_tensors,
    run_config,
    save_arguments,
    small_config,
    zeros_like,
)

from moe_llm.checkpoint import digests
from moe_llm.checkpoint.digests import DamagedCheckpoint
from moe_llm.checkpoint.manifest import read_manifest
from moe_llm.checkpoint.resume import check_same_run, find_resumable
from moe_llm.checkpoint.safetensors_io import TensorFiles
from moe_llm.checkpoint.state import load_checkpoint, save_checkpoint
from moe_llm.config import dump_config
from moe_llm.errors import UserError

CONFIG = small_config()


def silent(sentence):
    raise AssertionError(f"reported: {sentence}")


def save_steps(root, *steps):
    tensors = random_tensors(CONFIG)
    return [
        save_checkpoint(
            root, FakeState(tensors), **save_arguments(CONFIG, step=step, dtype="bf16", max_shard_size="2KB")
        )
        for step in steps
    ]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_newest_is_found(tmp_path):
    assert find_resumable(tmp_path / "none", report=silent) is None
    paths = save_steps(tmp_path, 1, 2, 3)
    (tmp_path / ".tmp-step-00000004").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert find_resumable(tmp_path, report=silent) == paths[-1]


def test_a_run_that_went_back_goes_on_from_what_it_saved_last(tmp_path):
    paths = save_steps(tmp_path, 10, 30, 20)
    assert find_resumable(tmp_path, report=silent) == paths[-1]


def test_every_file_of_a_checkpoint_is_guarded(tmp_path):
    """Each one flipped, cut, or removed: named, and the older checkpoint is used; a PATH is refused."""
    older, newest = save_steps(tmp_path, 1, 2)
    names = [*read_manifest(newest), "trainer/manifest.json"]
    assert set(names) == {str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file()}
    for i, name in enumerate(names):
        whole = (newest / name).read_bytes()
        for spoil in (
            (
                lambda f: flip(f, -2),
                lambda f: flip(f, 0),
                lambda f: os.truncate(f, f.stat().st_size // 2),
                lambda f: f.unlink(),
                lambda f: f.write_bytes(b""),
            )[i % 2 :: 2]
            if name.endswith(".safetensors")
            else (
                lambda f: flip(f, f.stat().st_size // 2),
                lambda f: os.truncate(f, f.stat().st_size // 2),
                lambda f: f.unlink(),
            )
        ):
            spoil(newest / name)
            said = []
            assert find_resumable(tmp_path, report=said.append) == older, name
            assert len(said) == 1, said
            # a damaged manifest may name any file, for it is the witness
            assert name in said[0] or name == "trainer/manifest.json", said
            state = FakeState(zeros_like(random_tensors(CONFIG)))
            with pytest.raises(UserError, match=newest.name):
                load_checkpoint(newest, state)
            assert not any(tensor.any() for tensor in state.held.values())
            (newest / name).write_bytes(whole)
    assert find_resumable(tmp_path, report=silent) == newest


def test_none_is_sound(tmp_path):
    for path in save_steps(tmp_path, 1, 2):
        (path / "config.json").unlink()
    said = []
    assert find_resumable(tmp_path, report=said.append) is None
    assert [sentence.split()[1] for sentence in said] == ["step-00000002", "step-00000001"]


def test_ranks_share_the_reading_and_agree(tmp_path):
    older, newest = save_steps(tmp_path, 1, 2)
    flip(sorted(newest.glob("model-*.safetensors"))[-1], -1)
    ranks, said = ThreadRanks(3), []
    states = [FakeState(random_tensors(CONFIG), rank=rank, ranks=ranks) for rank in range(3)]
    outcomes = ranks.run(lambda rank: find_resumable(tmp_path, report=said.append, ranks=states[rank]))
    assert outcomes == [(older, None)] * 3
    assert len(said) == 1
    outcomes = ranks.run(lambda rank: load_checkpoint(newest, states[rank]))
    assert len({str(error) for _, error in outcomes}) == 1
    assert all(isinstance(error, UserError) for _, error in outcomes)


def test_tensors_are_compared_as_they_are_read(tmp_path):
    older, newest = save_steps(tmp_path, 1, 2)
    model = sorted(newest.glob("trainer/optimizer-*.safetensors"))[0]
    flip(model, -1)
    assert find_resumable(tmp_path, report=silent, hashes=False) == newest
    with pytest.raises(DamagedCheckpoint, match=model.name):
        load_checkpoint(newest, FakeState(random_tensors(CONFIG)), hashes=False)
    assert find_resumable(tmp_path, report=silent, hashes=False, before=newest) == older
    os.truncate(model, 100)
    said = []
    assert find_resumable(tmp_path, report=said.append, hashes=False) == older
    assert "truncated" in said[0]


def test_any_flipped_bit_of_a_tensor_is_found_by_a_load_on_every_rank(tmp_path):
    tensors, rng = random_tensors(CONFIG), random.Random(0)
    path = save_checkpoint(tmp_path, FakeState(tensors), **save_arguments(CONFIG, max_shard_size="8KB"))
    for file in sorted(path.rglob("*.safetensors")):
        whole = file.read_bytes()
        flip(file, rng.randrange(-min(200, len(whole) // 2), 0))
        ranks = ThreadRanks(2)
        outcomes = ranks.run(
            lambda rank, ranks=ranks: load_checkpoint(path, FakeState(tensors, 2, rank, ranks), hashes=False)
        )
        assert all(isinstance(error, DamagedCheckpoint) and file.name in str(error) for _, error in outcomes), outcomes
        file.write_bytes(whole)


def bytes_read(monkeypatch) -> list[int]:
    """How many bytes of tensors' files come from the disk, reading by reading."""
    found, true_fill = [], digests._fill
    monkeypatch.setattr(
        digests, "_fill", lambda file, offset, view: found.append(len(view)) or true_fill(file, offset, view)
    )
    return found


def test_a_resume_reads_every_file_once(tmp_path, monkeypatch):
    config = small_config(hidden_size=64, intermediate_size=64, vocab_size=512)
    tensors = random_tensors(config)
    path = save_checkpoint(tmp_path, FakeState(tensors), **save_arguments(config))
    total = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    hashed, true_digest = [], digests.digest_file
    monkeypatch.setattr("moe_llm.checkpoint.manifest.digest_file", lambda p: hashed.append(p) or true_digest(p))
    monkeypatch.setattr(digests, "BLOCK", 1 << 12)  # those of the manifest are larger: none is compared here
    read, state = bytes_read(monkeypatch), FakeState(zeros_like(tensors))
    monkeypatch.setattr(
        digests.CheckedFile, "_read_block", lambda self, file, start, part: digests._fill(file, start, part)
    )
    assert find_resumable(tmp_path, report=silent, hashes=False) == path
    load_checkpoint(path, state, hashes=False)
    assert not [file for file in hashed if file.suffix == ".safetensors"]
    assert 0.95 * total <= sum(read) <= total
    for key, tensor in tensors.items():
        assert torch.equal(state.held[key], tensor)


@pytest.mark.parametrize("ep", [1, 2])
def test_ranks_that_keep_slices_read_slices(tmp_path, monkeypatch, ep):
    """And the slices of all of them are the tensors."""
    tensors = random_tensors(CONFIG)
    path = save_checkpoint(tmp_path, FakeState(tensors), **save_arguments(CONFIG))
    monkeypatch.setattr(FakeState, "sliced", True)
    asked, true_read = [], TensorFiles.read_span
    monkeypatch.setattr(
        TensorFiles,
        "read_span",
        lambda self, name, start, count: asked.append((name, count)) or true_read(self, name, start, count),
    )
    ranks = ThreadRanks(2)
    states = [FakeState(zeros_like(tensors), ep, rank, ranks) for rank in range(2)]
    outcomes = ranks.run(lambda rank: load_checkpoint(path, states[rank], hashes=False))
    assert [error for _, error in outcomes] == [None, None]
    whole = sum(tensor.numel() for tensor in tensors.values())
    assert sum(count for _, count in asked) <= whole, "every element is read by one rank"
    for (name, kind), tensor in tensors.items():
        held = [state.held[name, kind].flatten() for state in states]
        spans = [state.share(name, kind) for state in states]
        for part, span, state in zip(held, spans, states):
            rows = tensor if state.held[name, kind].shape == tensor.shape else tensor.chunk(2)[state.rank]
            expected = torch.zeros_like(part)
            expected[span.start : span.stop] = rows.flatten()[span.start : span.stop]
            assert torch.equal(part, expected), (name, kind)


def test_a_directory_without_trainer_state_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no training checkpoint.*trainer/manifest\.json"):
        load_checkpoint(tmp_path, FakeState(random_tensors(CONFIG)))


def test_a_load_reads_only_the_held_experts(tmp_path, monkeypatch):
    """Rank 1 of 2 sees no tensor of rank 0's experts."""
    from moe_llm.checkpoint.safetensors_io import TensorFiles

    tensors = random_tensors(CONFIG)
    path = save_checkpoint(tmp_path, FakeState(tensors), **save_arguments(CONFIG))
    read, true_read = [], TensorFiles.read
    monkeypatch.setattr(
        TensorFiles, "read", lambda self, name, rows=None: read.append(name) or true_read(self, name, rows)
    )
    state = FakeState(zeros_like(tensors), ep=2, rank=1, ranks=LoneRankOfTwo())
    load_checkpoint(path, state, hashes=False)
    experts = {name.split("experts.")[1][0] for name in read if "experts." in name}
    assert experts == {"2", "3"}
    assert torch.equal(
        state.held["model.layers.0.mlp.experts.down_proj", "exp_avg"],
        tensors["model.layers.0.mlp.experts.down_proj", "exp_avg"][2:],
    )


class LoneRankOfTwo:
    world_size = 2

    def exchange(self, rank, value):
        return [value]


@pytest.mark.parametrize(
    "override",
    [
        "train.micro_batch_size=2",
        "train.max_steps=99",
        "train.device=cpu",
        "train.activation_checkpointing=true",
        "parallel.zero_stage=3",
        "logging.every_steps=7",
        "evaluate.every_steps=3",
        "checkpoint.every_steps=2",
        "data.num_workers=3",
        "data.cache_dir=elsewhere",
        "run.dir=moved",
        "checkpoint.dtype=bf16",
    ],
)
def test_what_may_change(tmp_path, override):
    base = ["train.global_batch_size=4"]
    check_same_run(dump_config(run_config(tmp_path, *base)), run_config(tmp_path, *base, override))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.lr=0.5", "optim.lr"),
        ("run.seed=3", "run.seed"),
        ("model.hidden_size=64", "model.hidden_size"),
        ("train.global_batch_size=8", "train.global_batch_size"),
        ("train.precision=fp32", "train.precision"),
        ("data.sequence_length=77", "data.sequence_length"),
        ("tokenizer.path=t", "tokenizer.path"),
        ("optim.betas=[0.9, 0.99]", "optim.betas.1"),
        ("data.sources=[{type: files, path: x.txt}]", "data.sources.0.type"),
        ("data.validation_sources=[{type: files, path: x.txt}]", "data.validation_sources"),
        ("data.sources=[{type: python_stdlib}, {type: files, path: x.txt}]", "data.sources.1.type"),
    ],
)
def test_what_may_not_change_is_named_with_both_values(tmp_path, override, key):
    old, new = run_config(tmp_path), run_config(tmp_path, override, "run.dir=runs/mine")
    for first, second in ((old, new), (new, old)):
        with pytest.raises(UserError) as raised:
            check_same_run(dump_config(first), second)
        sentence = str(raised.value)
        assert sentence.startswith(key)
        assert "set another run.dir" in sentence
        assert "\n" not in sentence
    with pytest.raises(UserError, match=r"runs/mine"):
        check_same_run(dump_config(old), new)


def test_both_values_are_shown(tmp_path):
    with pytest.raises(UserError, match=r"optim\.lr=0\.5 differs from 0\.0003"):
        check_same_run(dump_config(run_config(tmp_path)), run_config(tmp_path, "optim.lr=0.5"))


def test_a_key_that_the_old_file_lacks_had_its_default(tmp_path):
    old = yaml.safe_load(dump_config(run_config(tmp_path)))
    del old["optim"]["weight_decay"], old["evaluate"]
    check_same_run(yaml.safe_dump(old), run_config(tmp_path))
    with pytest.raises(UserError, match=r"optim\.weight_decay=0\.2 differs from 0\.1"):
        check_same_run(yaml.safe_dump(old), run_config(tmp_path, "optim.weight_decay=0.2"))


def test_a_vocabulary_that_is_not_known_yet_is_not_compared(tmp_path):
    overrides = ["tokenizer.path=t"]
    unresolved = run_config(tmp_path, *overrides, "model.vocab_size=null")
    check_same_run(dump_config(run_config(tmp_path, *overrides)), unresolved)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "optim: {lr_schedule: x}\n", "train: {max_steps: -1}"])
def test_an_old_file_that_cannot_be_read_is_named(tmp_path, text):
    with pytest.raises(UserError, match=r"configuration saved in runs/default"):
        check_same_run(text, run_config(tmp_path))
