"""Damaged checkpoints are refused by a resume, or what it restores is what was saved, to the last bit."""

import shutil

import pytest
import torch
from support.checkpoints import FakeState, random_tensors, save_arguments, small_config, zeros_like
from support.damage import damage

from moe_llm.checkpoint.resume import find_resumable
from moe_llm.checkpoint.state import load_checkpoint, save_checkpoint
from moe_llm.errors import UserError

CONFIG = small_config()


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 200), marks=pytest.mark.grid)])
@pytest.mark.parametrize("hashes", [False, True], ids=["as it is read", "beforehand"])
def test_a_damaged_checkpoint_restores_nothing_else_than_what_was_saved(tmp_path, seeds, hashes):
    tensors = random_tensors(CONFIG)
    saved = save_arguments(CONFIG, max_shard_size="8KB")
    good = save_checkpoint(tmp_path / "good", FakeState(tensors), **saved)
    other = save_checkpoint(tmp_path / "other", FakeState(random_tensors(CONFIG, 5)), **saved)
    refused = 0
    for seed in seeds:
        root = tmp_path / "damaged"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(good.parent, root, symlinks=True)
        what, state = damage(root / good.name, other, seed), FakeState(zeros_like(tensors))
        try:
            found = find_resumable(root, report=lambda sentence: None, hashes=hashes)
            if found is None:
                refused += 1
                continue
            load_checkpoint(found, state, hashes=False)
        except UserError:
            refused += 1
            continue
        for key, tensor in tensors.items():
            assert torch.equal(state.held[key], tensor), (what, key)
    assert refused > len(seeds) // 2
