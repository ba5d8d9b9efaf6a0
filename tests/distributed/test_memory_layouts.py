"""Activations in host memory and tiles of feed-forward layers give one process's gradients on ranks of every ZeRO stage."""

import tempfile

import pytest
from support.training import config, difference, train_steps

SAVING = [
    {"activation_checkpointing": "selective", "activation_offload": True},
    {"activation_offload": True, "tiled_mlp": 3},
    {"activation_checkpointing": "full", "tiled_mlp": 2},
]


@pytest.fixture(scope="module")
def expected() -> dict:
    return train_steps(config(4, 2, 1), 2)


# whatever is held elsewhere or not at all, by four ranks: the same numbers
FOUR_RANKS = [
    *({"train": saving} for saving in SAVING),
    {"parallel": {"offload_optimizer": "cpu"}},
    {"parallel": {"offload_optimizer": "cpu"}, "train": SAVING[0]},
    {"parallel": {"offload_optimizer": "nvme", "nvme_path": tempfile.gettempdir()}},
]


@pytest.fixture(scope="module")
def expected_of_adamw() -> dict:
    return train_steps(config(4, 2, 1, optimizer="adamw"), 3)


@pytest.mark.grid
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("keys", FOUR_RANKS)
def test_the_grid_of_four_ranks(four_ranks, expected_of_adamw, keys, ep, stage):
    found = four_ranks.run(train_steps, config(1, 2, 4, ep=ep, stage=stage, optimizer="adamw", **keys), 3)
    worst, where = difference(found, expected_of_adamw, "gradients")
    assert worst < 1e-5, where
    for per_rank in found:
        assert per_rank["losses"] == pytest.approx(expected_of_adamw["losses"], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("saving", SAVING)
def test_ranks_that_save_memory_equal_one_process(two_ranks, expected, saving, stage):
    found = two_ranks.run(train_steps, config(2, 2, 2, ep=1 + stage % 2, stage=stage, train=saving), 2)
    worst, where = difference(found, expected, "gradients")
    assert worst < 1e-5, where
    for per_rank in found:
        assert per_rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
