"""A run that begins with a checkpoint: whatever its layout, each rank reads its own; frozen bytes come out as they went
in, and bad checkpoints are refused in one sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.training import MODEL, config, train_steps

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.checkpoint.safetensors_io import TensorFiles
from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.finetune.init_from import check_origin, complete
from moe_llm.model.init import init_weights

EXPERT = ".experts."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base(directory, dtype: str = "fp32", shard: str = "5GB"):
    model = MoEForCausalLM(ModelConfig(**MODEL))
    init_weights(model, 11)
    model.save_pretrained(directory, dtype=dtype, max_shard_size=shard)
    return directory


def stored(directory) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {dtype: base(root / dtype, dtype) for dtype in DTYPES}


def sections(directory, micro: int, precision: str = "fp32", **more) -> dict:
    train = {
        "max_steps": 100,
        "micro_batch_size": micro,
        "global_batch_size": 8,
        "precision": precision,
        "device": "cpu",
    }
    return {
        "model": {**MODEL, "init_from": str(directory)},
        "finetune": {"trainable": "experts"},
        "train": train,
        **more,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["fp32", "bf16"])
@pytest.mark.parametrize("export", ["fp32", "bf16"])
def test_frozen_bytes_survive_training_export_and_resuming(tmp_path, bases, precision, source, export):
    cfg = config(4, 2, 1, optimizer="adamw", **sections(bases[source], 4, precision, checkpoint={"dtype": export}))
    first = train_steps(cfg, 1, save=str(tmp_path / "a"))
    again = train_steps(cfg, 1, source=first["saved"], first=1, save=str(tmp_path / "b"))
    before = stored(bases[source])
    for saved in (first["saved"], again["saved"]):
        after = stored(type(tmp_path)(saved))
        for name, tensor in before.items():
            if EXPERT in name:
                assert after[name].dtype == DTYPES[export]
                assert not torch.equal(after[name].float(), tensor.float()), name
            else:
                assert after[name].dtype == tensor.dtype, name
                assert torch.equal(after[name], tensor), name


def test_some_experts_in_another_dtype_than_the_others_load_in_transformers(tmp_path, bases):
    changes = {"finetune": {"trainable": "experts", "experts": [2]}}
    cfg = config(4, 2, 1, optimizer="adamw", **(sections(bases["bf16"], 4) | changes))
    first = train_steps(cfg, 1, save=str(tmp_path / "a"))
    saved = train_steps(cfg, 1, source=first["saved"], first=1, save=str(tmp_path / "b"))["saved"]
    before, after = stored(bases["bf16"]), stored(type(tmp_path)(saved))
    assert {name for name in before if not torch.equal(before[name].float(), after[name].float())} == {
        name for name in before if ".experts.2." in name
    }
    files = TensorFiles(type(tmp_path)(saved) / "trainer", "optimizer")
    assert {name.split(".experts.")[1][0] for name in files.names()} == {"2"}
    from transformers import AutoModelForCausalLM

    theirs = dict(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).named_parameters())
    ours = MoEForCausalLM.from_pretrained(saved)
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(theirs[name].float(), parameter), name


def _on_ranks(stage: int, directory: str, save: str) -> dict:
    """Some steps; with the bytes read of the checkpoint that it begins with, of experts and of the rest."""
    read, count = TensorFiles.read_span, {"experts": 0, "rest": 0}

    def counted(self, name, start, elements):
        tensor = read(self, name, start, elements)
        if str(self.directory) == directory and not counted.over:
            count["experts" if EXPERT in name else "rest"] += tensor.nbytes
        return tensor

    counted.over = False
    TensorFiles.read_span = counted
    try:
        cfg = config(2, 2, 2, ep=2, stage=stage, **sections(directory, 2))
        train_steps(cfg, 0)
        counted.over = True
        return train_steps(cfg, 3, save=save) | {"read": count}
    finally:
        TensorFiles.read_span = read


def test_experts_under_expert_parallelism_and_zero(two_ranks, tmp_path, bases):
    """Issue's first demand: every non-expert tensor byte-identical, every expert changed, equal to one process; and
    each rank has read half of the experts."""
    directory = bases["fp32"]
    alone = train_steps(config(4, 2, 1, **sections(directory, 4)), 3, save=str(tmp_path / "alone"))
    before, expected = stored(directory), stored(type(tmp_path)(alone["saved"]))
    sizes = {
        what: sum(t.nbytes for n, t in before.items() if (EXPERT in n) == (what == "experts"))
        for what in ("experts", "rest")
    }
    for stage in (1, 2, 3):
        found = two_ranks.run(_on_ranks, stage, str(directory), str(tmp_path / f"zero{stage}"))
        after = stored(type(tmp_path)(found[0]["saved"]))
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            same = after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
            assert same == (EXPERT not in name), name
            apart = (after[name] - expected[name]).abs().max() / expected[name].abs().max()
            assert apart < 1e-5, name
        for rank in found:
            # what is frozen may be read twice: once for the model, once to see that it has it exactly
            assert sizes["experts"] / 2 == rank["read"]["experts"]
            assert rank["read"]["rest"] <= 2 * sizes["rest"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """As transformers saves it, in shards, in bf16."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {k: v for k, v in MODEL.items() if k not in ("router_z_loss_coef",)}
    model = MixtralForCausalLM(MixtralConfig(**shape, head_dim=6, rope_theta=1e6)).to(torch.bfloat16)
    directory = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(directory, max_shard_size="10KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return directory, {name: p.detach().float() for name, p in model.named_parameters()}


def test_a_checkpoint_of_transformers_in_shards(theirs):
    directory, weights = theirs
    raw = {"model": {"init_from": str(directory), "router_z_loss_coef": 0.5}}
    complete(raw)
    found = train_steps(config(4, 2, 1, model=raw["model"]), 0)["weights"]
    assert found.keys() == weights.keys()
    for name, (_, tensor) in found.items():
        assert torch.equal(tensor, weights[name]), name


def test_the_shape_and_the_tokenizer_come_from_the_checkpoint(bases):
    raw = {"model": {"init_from": str(bases["fp32"]), "router_aux_loss_coef": 0.5, "hidden_size": None}}
    complete(raw)
    model = ModelConfig(**raw["model"])
    assert model.model_copy(update={"init_from": None}) == ModelConfig(
        **{**MODEL, "router_aux_loss_coef": 0.5, "head_dim": 6}
    )
    assert raw["tokenizer"] == {"path": str(bases["fp32"])}
    other = {"model": {"init_from": str(bases["fp32"])}, "tokenizer": {"path": "elsewhere"}}
    complete(other)
    assert other["tokenizer"] == {"path": "elsewhere"}
    untouched = {"model": {"hidden_size": 8}}
    complete(untouched)
    assert untouched == {"model": {"hidden_size": 8}}
    written = json.loads((bases["fp32"] / "config.json").read_text())
    assert "init_from" not in written["moe_llm"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 32),
        ("num_key_value_heads", 4),
        ("head_dim", 8),
        ("num_experts_per_tok", 1),
        ("sliding_window", 4),
        ("rope_theta", 1e4),
    ],
)
def test_a_key_that_contradicts_is_refused(bases, key, value):
    with pytest.raises(UserError, match=rf"model\.{key}={value} contradicts model\.init_from='.*'"):
        complete({"model": {"init_from": str(bases["fp32"]), key: value}})


def _without(tensors: dict) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]


def _misshapen(tensors: dict) -> None:
    tensors["model.norm.weight"] = torch.ones(7)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without, r"missing model\.layers\.1\.\S*experts\.3\.w2\.weight"),
        (_misshapen, r"model\.norm\.weight \[7\] instead of \[24\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, damage, words):
    directory = base(tmp_path / "bad")
    tensors = load_file(directory / "model.safetensors")
    damage(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=words):
        check_origin(config(4, 2, 1, **sections(directory, 4)))


def test_another_architecture_or_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"model_type='llama' is no family .* mixtral, qwen2_moe"):
        complete({"model": {"init_from": str(tmp_path)}})
    with pytest.raises(UserError, match=r"model\.init_from='nowhere' does not exist"):
        complete({"model": {"init_from": "nowhere"}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("router_aux_loss_coef", 0.5),
        ("router_z_loss_coef", 0.7),
        ("router_jitter_noise", 0.3),
        ("expert_dropout", 0.4),
    ],
)
def test_losses_and_noise_are_the_runs_own(bases, key, value):
    """Whatever those of the base were; and they act."""
    raw = {"model": {"init_from": str(bases["fp32"]), key: value}}
    complete(raw)
    model = ModelConfig(**raw["model"])
    assert getattr(model, key) == value != MODEL.get(key, 0.0)
    assert model.model_copy(update={key: MODEL.get(key, 0.0), "init_from": None}) == ModelConfig(
        **{**MODEL, "head_dim": 6}
    )
    given = sections(bases["fp32"], 4)
    plain = train_steps(config(4, 2, 1, **given), 1)["weights"]
    other = train_steps(config(4, 2, 1, **given | {"model": raw["model"]}), 1)["weights"]
    changed = [name for name in plain if not torch.equal(plain[name][1], other[name][1])]
    assert changed
    assert all(EXPERT in name for name in changed)


@pytest.mark.parametrize("finetune", [{"trainable": "experts"}, {"lora": {"rank": 2, "targets": ["experts"]}}])
def test_frozen_routers_that_would_never_have_thresholds_are_refused(tmp_path, bases, finetune):
    """They would stay zero, and evaluation would send every token to every expert."""

    def run(directory, **changes):
        model = {**MODEL, "init_from": str(directory), "router": {"type": "expert_choice"}}
        return config(4, 2, 1, **{**sections(directory, 4), "model": model, "finetune": {**finetune, **changes}})

    with pytest.raises(UserError, match=r"threshold, which is not in model.init_from=.* train routers too"):
        check_origin(run(bases["fp32"]))
    if "train" in finetune:
        check_origin(run(bases["fp32"], train="all"))
        with pytest.raises(UserError, match="threshold, which is set only while routers are trained"):
            check_origin(config(4, 2, 1, model={"router": {"type": "expert_choice"}}, finetune=finetune))
    model = MoEForCausalLM(ModelConfig(**{**MODEL, "router": {"type": "expert_choice"}}))
    init_weights(model, 11)
    model.save_pretrained(tmp_path / "thresholds")
    check_origin(run(tmp_path / "thresholds"))
