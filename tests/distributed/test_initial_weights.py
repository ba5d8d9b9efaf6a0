"""A run begins with the same weights however it is laid out."""

import pytest
import torch
from support.training import MODEL, config, train_steps


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


def _largest_and_held_at_the_start(cfg) -> tuple[int, int]:
    """Bytes of tensors, at the most and at the end, of building model, engine and optimizer."""
    from support.ranks import fresh_accelerate
    from torch.profiler import ProfilerActivity, profile

    from moe_llm.distributed.runtime import start
    from moe_llm.train.build import build_trained

    fresh_accelerate()
    runtime = start(cfg)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        engine, _ = build_trained(cfg, runtime, None)
        assert engine.engine is not None
        largest = held = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    return largest, held


@pytest.mark.parametrize(("ep", "adapters"), [(1, {}), (2, {}), (2, {"rank": 2, "targets": ["attention", "experts"]})])
def test_under_zero_3_no_rank_ever_holds_the_whole_model(two_ranks, ep, adapters):
    """At the start a rank has its slices, and beyond these one parameter at a time."""
    model = {**MODEL, "num_hidden_layers": 12, "intermediate_size": 64, "hidden_size": 48}
    cfg = config(
        1, 1, 2, ep=ep, stage=3, model=model, parallel={"reduce_bucket_size": 1000}, train={"precision": "bf16"},
        finetune={"lora": adapters},
    )  # fmt: skip
    counts = cfg.model.parameter_counts()
    whole = 2 * (sum(counts.values()) - counts["experts"] * (1 - 1 / ep))
    for largest, held in two_ranks.run(_largest_and_held_at_the_start, cfg):
        assert largest < held + whole / 3, (largest, held, whole)
