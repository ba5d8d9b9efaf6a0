"""Low-rank adapters: they begin as nothing, are all that is trained, leave no trace but the merged weights, and are the
same in every layout and across resuming."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ci import dear
from support.ranks import fresh_accelerate
from support.training import LENGTH, MODEL, config, difference, rows, train_steps

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.checkpoint.safetensors_io import TensorFiles
from moe_llm.cli import main
from moe_llm.config import ModelConfig
from moe_llm.data.packing import model_inputs
from moe_llm.distributed import deepspeed
from moe_llm.distributed.runtime import start
from moe_llm.errors import UserError
from moe_llm.families.hf import is_expert, is_router
from moe_llm.model.adapters import factors_of, is_factor
from moe_llm.model.init import init_weights
from moe_llm.train.build import build_trained

ALL = {"rank": 3, "alpha": 5.0, "targets": ["attention", "experts", "router"]}
STEPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = MoEForCausalLM(ModelConfig(**MODEL))
    init_weights(model, 11)
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    return directory


def run(base, world: int = 1, ep: int = 1, stage: int = 1, lora: dict = ALL, precision: str = "fp32", **more):
    train = {
        "max_steps": 100,
        "micro_batch_size": 4 // world,
        "global_batch_size": 8,
        "precision": precision,
        "device": "cpu",
        "activation_checkpointing": stage == 3,
    }
    sections = {"model": {**MODEL, "init_from": str(base)}, "finetune": {"lora": lora}, "train": train, **more}
    return config(4 // world, 2, world, ep=ep, stage=stage, **{"optimizer": "adamw", **sections})


def stored(directory) -> dict[str, torch.Tensor]:
    files = sorted(Path(directory).glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def frozen(result: dict) -> dict:
    return {name: held for name, held in result["weights"].items() if not is_factor(name)}


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Three steps in one process, saved, and three more."""
    root = tmp_path_factory.mktemp("trained")
    first = train_steps(run(base), STEPS, save=str(root))
    return first, train_steps(run(base), 2 * STEPS)


def test_what_has_not_been_trained_is_the_base(base, tmp_path):
    fresh = train_steps(run(base, optimizer="sgd"), 0, save=str(tmp_path))
    before, after = stored(base), stored(fresh["saved"])
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    plain = train_steps(config(4, 2, 1, model={**MODEL, "init_from": str(base)}), 1)
    assert train_steps(run(base), 1)["losses"] == plain["losses"]


def test_adapters_alone_are_trained(base, trained):
    result, _ = trained
    before = train_steps(run(base), 0)["weights"]
    for name, (_, tensor) in result["weights"].items():
        assert torch.equal(tensor, before[name][1]) != is_factor(name), name
    assert result["gradients"].keys() == result["exp_avg"].keys() == set(filter(is_factor, before))
    assert len(result["exp_avg"]) == 2 * (4 + 2 + 1) * MODEL["num_hidden_layers"]
    adapted, after = stored(base), stored(result["saved"])
    for name, tensor in adapted.items():
        whole = any(word in name for word in ("_proj", ".w1.", ".w2.", ".w3.", ".gate."))
        assert torch.equal(after[name], tensor) != whole, name
    files = TensorFiles(Path(result["saved"]) / "trainer", "optimizer")
    assert all("lora_" in name for name in files.names())


def trained_model(cfg, source: str) -> torch.nn.Module:
    fresh_accelerate()
    engine, _ = build_trained(cfg, start(cfg), Path(source))
    return engine.model.eval()


@torch.no_grad()
def test_the_merged_checkpoint_computes_what_the_trained_model_does(base, trained):
    from transformers import AutoModelForCausalLM

    saved = trained[0]["saved"]
    batch = rows(50, 0, 4)
    inputs = model_inputs(batch) | {"return_logits": True, "targets": None}
    ours = trained_model(run(base), saved)(**inputs).logits
    theirs, report = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = theirs.eval()(batch.input_ids_BS, attention_mask=batch.attention_mask_BS.long()).logits
    real = batch.attention_mask_BS
    assert (found - ours)[real].abs().max() < 1e-5
    before = MoEForCausalLM.from_pretrained(base)(batch.input_ids_BS).logits
    assert (before - ours)[real].abs().max() > 1e-2
    assert ours.shape[1] == LENGTH


@torch.no_grad()
def test_the_maths_is_pefts_for_the_experts_too(base, trained):
    """transformers' model of the base under PEFT, with `target_parameters` for what is no linear layer."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    factors = {name: tensor for name, (_, tensor) in trained[0]["weights"].items() if is_factor(name)}
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager")
    inject_adapter_in_model(
        LoraConfig(
            r=ALL["rank"],
            lora_alpha=ALL["alpha"],
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        theirs,
    )
    for path, module in theirs.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        parameter = getattr(module, "parameter_name", "weight")
        a, b = (factors[f] for f in factors_of(f"{path.replace('.base_layer', '')}.{parameter}"))
        if a.dim() == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        module.lora_A["default"].weight.copy_(a)
        module.lora_B["default"].weight.copy_(b)
    batch = rows(50, 0, 4)
    ours = trained_model(run(base), trained[0]["saved"])(
        **model_inputs(batch) | {"return_logits": True, "targets": None}
    ).logits
    found = theirs.eval()(batch.input_ids_BS, attention_mask=batch.attention_mask_BS.long()).logits
    assert (found - ours)[batch.attention_mask_BS].abs().max() < 1e-5


@pytest.mark.parametrize("targets", [ALL["targets"], ["*.down_proj"], ["*.gate_up_proj", "*.q_proj.*"]])
def test_peft_loads_the_exported_adapter_and_has_our_logits(base, trained, tmp_path, targets, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    cfg = run(base, lora={**ALL, "targets": targets})
    saved = trained[0]["saved"] if targets == ALL["targets"] else train_steps(cfg, 2, save=str(tmp_path))["saved"]
    assert main(["export-adapter", str(saved), str(tmp_path / "adapter")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of factors that it has no place for
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    batch = rows(50, 0, 4)
    with torch.no_grad():
        ours = MoEForCausalLM.from_pretrained(saved)(batch.input_ids_BS).logits
        found = theirs(batch.input_ids_BS).logits
    assert (found - ours)[batch.attention_mask_BS].abs().max() < 1e-5
    assert main(["export-adapter", str(saved), str(tmp_path / "adapter")]) == 2
    assert main(["export-adapter", str(base), str(tmp_path / "other")]) == 2
    assert "moe-llm extract-lora BASE TUNED OUT" in capsys.readouterr().err


def test_resumed_equals_uninterrupted(base, trained):
    first, straight = trained
    second = train_steps(run(base), STEPS, source=first["saved"], first=STEPS)
    assert first["losses"] + second["losses"] == straight["losses"]
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for name, (_, tensor) in straight[kind].items():
            assert torch.equal(second[kind][name][1], tensor), (kind, name)


def _ranks_gathering_all(cfg, how: dict) -> dict:
    """With every parameter shared out under ZeRO-3, not the large ones alone."""
    settings = deepspeed.engine_config

    def all_shared_out(config, world_size):
        given = settings(config, world_size)
        given["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if cfg.parallel.zero_stage == 3 else {}
        return given

    deepspeed.engine_config = all_shared_out
    try:
        return train_steps(cfg, STEPS, **how)
    finally:
        deepspeed.engine_config = settings


@pytest.mark.parametrize(
    ("stage", "ep", "chunks"), dear([(1, 2, 1), (2, 2, 2), (3, 2, 3), (3, 1, 1)], (3, 1, 1), (2, 2, 2))
)
def test_ranks_equal_one_process_and_go_on_elsewhere(two_ranks, base, trained, tmp_path, stage, ep, chunks):
    """ZeRO-3 with recomputation; rows exchanged in parts by expert and by share; both ways between layouts."""
    first, straight = trained
    cfg = run(
        base, 2, ep, stage, parallel={"all_to_all_chunks": chunks, "expert_parallel_size": ep, "zero_stage": stage}
    )
    found = two_ranks.run(_ranks_gathering_all, cfg, {"save": str(tmp_path)})
    for rank in found:
        assert rank["losses"] == pytest.approx(first["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(first["norms"], rel=1e-4)
        assert all(
            torch.equal(
                t, straight["weights"][n][1][f or 0 : (f or 0) + len(t)] if f is not None else straight["weights"][n][1]
            )
            for n, (f, t) in frozen(rank).items()
        )
    worst, where = difference(found, first, "weights")
    assert worst < 1e-3, where
    alone, merged = stored(first["saved"]), stored(found[0]["saved"])
    assert alone.keys() == merged.keys()
    assert max(((merged[n] - t).abs().max() / t.abs().max()).item() for n, t in alone.items()) < 1e-4
    after = train_steps(run(base), STEPS, source=found[0]["saved"], first=STEPS)
    assert after["losses"] == pytest.approx(straight["losses"][STEPS:], rel=1e-5)
    there = two_ranks.run(_ranks_gathering_all, cfg, {"source": first["saved"], "first": STEPS})[0]
    assert there["losses"] == pytest.approx(straight["losses"][STEPS:], rel=1e-5)


@pytest.mark.parametrize("export", ["fp32", "bf16"])
def test_bf16_goes_on_from_its_masters_and_merges_into_the_stored_base(base, tmp_path, export):
    """fp32 that training in bf16 cannot hold is merged as it is, not as it is held."""
    cfg = run(base, precision="bf16", checkpoint={"dtype": export})
    straight = train_steps(cfg, 2 * STEPS)
    first = train_steps(cfg, STEPS, save=str(tmp_path))
    second = train_steps(cfg, STEPS, source=first["saved"], first=STEPS)
    assert first["losses"] + second["losses"] == straight["losses"]
    before, after = stored(base), stored(first["saved"])
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (first["weights"][factor][1] for factor in factors_of(name))
    assert (a != a.bfloat16().float()).any()
    expected = before[name] + 5 / 3 * b @ a
    assert torch.allclose(after[name].float(), expected, atol=1e-6 if export == "fp32" else 1e-2)
    assert after[name].dtype == (torch.float32 if export == "fp32" else torch.bfloat16)
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_a_changed_base_or_a_run_without_adapters_is_found(base, trained, tmp_path):
    import shutil

    other = Path(shutil.copytree(base, tmp_path / "base"))
    moved = train_steps(run(other), STEPS, source=trained[0]["saved"], first=STEPS)  # the same one, elsewhere
    assert moved["losses"] == trained[1]["losses"][STEPS:]
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UserError, match=r"trained on another base: file model\.safetensors of model\.init_from is not"):
        train_steps(run(other), 1, source=trained[0]["saved"], first=STEPS)
    plain = config(4, 2, 1, optimizer="adamw", model={**MODEL, "init_from": str(base)})
    with pytest.raises(UserError, match=r"has adapters, and this run has none: set finetune\.lora as it was"):
        train_steps(plain, 1, source=trained[0]["saved"], first=STEPS)
    saved = train_steps(plain, 1, save=str(tmp_path / "plain"))["saved"]
    with pytest.raises(UserError, match=r"has no adapters, and this run has them: set finetune\.lora as it was"):
        train_steps(run(base), 1, source=saved, first=1)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 1.0},
        {"dropout": 0.5},
        {"rank": 2},
        {"targets": ["attention"]},
        {"targets": ["*.0.mlp.experts.down_proj"]},
    ],
)
def test_every_setting_acts(base, trained, change):
    result = train_steps(run(base, lora=ALL | change), 2)
    factors = {name for name in result["weights"] if is_factor(name)}
    assert factors
    if "targets" in change:
        word = "self_attn" if change["targets"] == ["attention"] else "layers.0.mlp.experts.down_proj"
        assert all(word in name for name in factors)
    assert result["losses"] != trained[1]["losses"][:2]


def test_alpha_is_twice_the_rank_unless_given(base):
    assert run(base, lora={"rank": 3}).finetune.lora.scale == 2.0
    assert run(base, lora={"rank": 4, "alpha": 2.0}).finetune.lora.scale == 0.5


def test_adapters_have_the_rates_of_their_parts(base):
    times = {"router": 0.5, "experts": 3.0, "rest": 0.25}
    optim = {"grad_clip": 0.0, "weight_decay": 0.5, "lr": 0.1, "schedule": "constant"}
    plain, scaled = (run(base, optimizer="sgd", optim=optim | more) for more in ({}, {"lr_multipliers": times}))
    start_, one, other = train_steps(plain, 0), train_steps(plain, 1), train_steps(scaled, 1)
    for name, (_, before) in start_["weights"].items():
        if name.endswith("_B") or ".lora_B" in name:
            rate = times["experts" if is_expert(name) else "router" if is_router(name) else "rest"]
            change, expected = other["weights"][name][1] - before, rate * (one["weights"][name][1] - before)
            assert expected.any()
            assert torch.allclose(change, expected, atol=1e-7), name
