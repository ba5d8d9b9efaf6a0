"""DeepSpeed's private contract for expert parallelism, point by point: what fails here has moved in DeepSpeed."""

import importlib
import inspect

import pytest
import torch
from support.ranks import fresh_accelerate
from support.training import config

from moe_llm.distributed import deepspeed as contract
from moe_llm.distributed.runtime import start
from moe_llm.model.init import build_model
from moe_llm.model.moe.experts import MoELayer
from moe_llm.train.build import build_trained
from moe_llm.train.optim import build_optimizer, parameter_groups


def test_the_engine_still_finds_layers_by_class_and_hands_them_their_group():
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine._configure_distributed_model)
    assert "isinstance(module, _AutoEPMoELayer)" in source
    assert "set_deepspeed_parallelism" in source
    assert (
        list(inspect.signature(AutoEPMoELayer.set_deepspeed_parallelism).parameters)[1:]
        == list(inspect.signature(contract._EngineContract.set_deepspeed_parallelism).parameters)[1:]
    )


def test_no_collectives_are_compiled_at_a_start_and_training_would_not_call_them(two_ranks):
    assert hasattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op"), "DeepSpeed has moved it"
    assert two_ranks.run(_collectives, config(1, 1, 2)) == [(None, 2.0)] * 2


def _collectives(cfg) -> tuple[object, float]:
    """DeepSpeed's own operator, and a sum over ranks by the call that would have taken it."""
    fresh_accelerate()
    start(cfg)
    import deepspeed.comm as communication

    total = torch.ones(())
    communication.inference_all_reduce(total)
    return communication.comm.cdb.shm_comm_op, total.item()


def test_deepspeeds_own_muon_is_imported_without_torchs_compiler(two_ranks):
    assert two_ranks.run(_compiled, config(1, 1, 2)) == [(False, True)] * 2


def _compiled(cfg) -> tuple[bool, bool]:
    """Whether DeepSpeed's Muon is compiled, and whether what is compiled from here on is."""
    fresh_accelerate()
    start(cfg)
    from deepspeed.runtime.zero.muon import original_muon

    return tuple(hasattr(f, "_torchdynamo_orig_callable") for f in (original_muon.muon_update, torch.compile(abs)))


def test_expert_parameters_stand_in_groups_of_their_own():
    cfg = config(1, 1, 2, ep=2)
    model = build_model(cfg.model, 0)
    contract.adopt_layers(model, 2, 0)
    groups = contract.split_groups(parameter_groups(model, 0.1))
    for group in groups:
        experts = [not getattr(p, "allreduce", True) for p in group["params"]]
        assert all(experts) == any(experts) == bool(group.get("moe"))
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def _adopted(cfg) -> dict:
    fresh_accelerate()
    runtime = start(cfg)
    engine, _ = build_trained(cfg, runtime, None)
    layer = next(m for m in engine.model.modules() if isinstance(m, MoELayer))
    return {
        "moe": engine.engine.has_moe_layers,
        "dispatcher": type(layer.dispatcher).__name__,
        "chunks": getattr(layer.dispatcher, "chunks", None),
        "experts": next(e.experts for e in engine.entries() if e.experts is not None),
        "expert_group": torch.distributed.get_process_group_ranks(layer.ep_group),
        "optimizer": type(engine.engine.optimizer).__name__,
        "stage": engine.engine.zero_optimization_stage(),
        "micro": engine.engine.train_micro_batch_size_per_gpu(),
        "rounds": engine.engine.gradient_accumulation_steps(),
        "clip": engine.engine.gradient_clipping(),
    }


@pytest.mark.parametrize(("ep", "stage", "chunks"), [(2, 1, "auto"), (4, 2, 3), (1, 2, "auto"), (2, 3, "auto")])
def test_engine_gets_our_settings_and_neighbours_share_the_experts(four_ranks, ep, stage, chunks):
    cfg = config(3, 2, 4, ep=ep, stage=stage, parallel={"all_to_all_chunks": chunks})
    for rank, found in enumerate(four_ranks.run(_adopted, cfg)):
        first = rank // ep * ep
        assert found["moe"]
        assert found["dispatcher"] == ("AllToAllDispatcher" if ep > 1 else "LocalDispatcher")
        assert found["chunks"] == ((1 if chunks == "auto" else chunks) if ep > 1 else None)
        assert found["experts"] == range(rank % ep * (4 // ep), (rank % ep + 1) * (4 // ep))
        assert found["expert_group"] == list(range(first, first + ep))
        assert (found["stage"], found["micro"], found["rounds"], found["clip"]) == (stage, 3, 2, 0.5)


def _state_of_late_groups(cfg) -> bool:
    """Whether all of this rank's slices of parameters know their moments after one step, without our help."""
    fresh_accelerate()
    engine, _ = build_trained(cfg, start(cfg), None)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    engine.backward(engine.forward(input_ids=tokens, labels=tokens).loss, last=True)
    engine.step(1e-3)
    slices = [p._hp_mapping for p in engine.model.parameters() if p._hp_mapping is not None]
    return all("exp_avg" in piece.get_optim_state_keys() for piece in slices)


def test_upstream_still_links_optimizer_state_too_early(two_ranks):
    """If this fails, DeepSpeed has mended it, and `link_optimizer_state` may go."""
    cfg = config(1, 1, 2, ep=2, optimizer="adamw")
    assert two_ranks.run(_state_of_late_groups, cfg) == [False, False]


def _weights_move(cfg) -> list[str]:
    fresh_accelerate()
    engine, _ = build_trained(cfg, start(cfg), None)
    before = {e.name: engine.read(e.name, "weight").clone() for e in engine.entries()}
    tokens = torch.arange(32).view(2, 16)
    engine.backward(engine.forward(input_ids=tokens, labels=tokens).loss, last=True)
    engine.step(1e-2)
    return [e.name for e in engine.entries() if torch.equal(before[e.name], engine.read(e.name, "weight"))]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_parameter_moves_experts_included(two_ranks, stage):
    """DeepSpeed #8354: experts silently not trained when the optimizer does not know them."""
    for unmoved in two_ranks.run(_weights_move, config(2, 1, 2, ep=2, stage=stage)):
        assert unmoved == []


def test_optimizer_steps_on_what_the_engine_holds():
    cfg = config(1, 1, 1)
    model = build_model(cfg.model, 0)
    optimizer = build_optimizer(parameter_groups(model, 0.1), cfg.optim)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_bucket_sizes_overlap_and_communication_dtype_reach_the_engine():
    from moe_llm.distributed.deepspeed import engine_config

    def found(**parallel):
        return engine_config(config(2, 1, 2, train={"precision": "bf16"}, parallel={"zero_stage": 2, **parallel}), 2)

    zero = found()["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (5_000_000, 5_000_000), "follows the model"
    assert zero["overlap_comm"] is torch.cuda.is_available()
    assert found()["communication_data_type"] == "fp32"
    cfg = config(2, 1, 2)
    unknown = cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab_size": None})})
    assert engine_config(unknown, 2)["zero_optimization"]["reduce_bucket_size"] == 5_000_000, (
        "before the tokenizer is read"
    )
    zero = found(reduce_bucket_size=123, overlap_comm=True)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["overlap_comm"]) == (123, True)
    assert found(communication_dtype="bf16")["communication_data_type"] == "bf16"
    assert "offload_optimizer" not in zero
    assert found(offload_optimizer="cpu")["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_where_experts_alone_are_trained_the_norm_of_all_else_is_zero():
    """In bf16 under ZeRO-1, DeepSpeed stacks the norms of no gradient at all, which torch refuses."""
    from deepspeed.runtime import bf16_optimizer

    from moe_llm.distributed.deepspeed import _allow_experts_alone

    _allow_experts_alone()
    _allow_experts_alone()  # it may be called again
    assert float(bf16_optimizer.get_global_norm_of_tensors(input_tensors=[], mpu=None, norm_type=2)) == 0.0
    some = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert float(bf16_optimizer.get_global_norm_of_tensors(input_tensors=some, mpu=None, norm_type=2)) == 5.0
