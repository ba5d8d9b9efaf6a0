"""A run begins with the same weights however it is laid out."""

import pytest
import torch
from support.training import config, train_steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_begin_as_one_process_does(two_ranks, precision, stage):
    train = {"max_steps": 1, "micro_batch_size": 1, "global_batch_size": 2, "precision": precision, "device": "cpu"}
    alone = train_steps(config(1, 2, 1, train=train), 0)["weights"]
    for per_rank in two_ranks.run(train_steps, config(1, 1, 2, ep=2, stage=stage, train=train), 0):
        for name, (first, tensor) in per_rank["weights"].items():
            whole = alone[name][1]
            mine = whole if first is None else whole[first : first + len(tensor)]
            assert torch.equal(tensor, mine), name
