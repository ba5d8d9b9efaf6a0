"""What was dense computes the same as a mixture, and what cannot is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main
from moe_llm.errors import UserError
from moe_llm.finetune.upcycle import Recipe, upcycle

SIZES = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
IDS = torch.randint(0, 67, (2, 20), generator=torch.Generator().manual_seed(0))


def save(directory: Path, kind: str, dtype=torch.float32, shard: str = "5GB", **changes) -> Path:
    config, model = {"mistral": (MistralConfig, MistralForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    torch.manual_seed(1)
    dense = model(config(**{**SIZES, **changes})).to(dtype)
    for parameter in dense.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)  # norms that do something
    dense.save_pretrained(directory, max_shard_size=shard)
    return directory


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(IDS).logits


def edit(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("dense") / "llama", "llama")


@pytest.mark.parametrize(
    ("kind", "dense", "recipe"),
    [
        ("mistral", {"sliding_window": 5}, Recipe(8, 2)),
        ("mistral", {"head_dim": 10, "sliding_window": None, "tie_word_embeddings": True}, Recipe(4, 1)),
        ("llama", {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, Recipe(3, 3)),
        ("llama", {"shard": "10KB"}, Recipe(4, 2, granularity=2)),
        ("mistral", {"num_key_value_heads": 4}, Recipe(5, 2, granularity=3)),
        ("llama", {"tie_word_embeddings": True}, Recipe(8, 1, granularity=4)),
    ],
)  # fmt: skip
def test_logits_are_those_of_the_dense_model(kind, dense, recipe, tmp_path):
    source = save(tmp_path / "dense", kind, **dense)
    upcycle(source, tmp_path / "out", recipe)
    expected, found = logits(source), logits(tmp_path / "out")
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5
    ours = MoEForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.config.num_local_experts == recipe.experts * recipe.granularity
    with torch.no_grad():
        assert (ours(IDS).logits - expected).abs().max() < 1e-5
    routers = [p for name, p in ours.named_parameters() if name.endswith("gate.weight")]
    assert all(len(router.unique(dim=0)) == recipe.experts for router in routers)


def test_two_steps_of_training_tell_the_experts_apart(llama, tmp_path):
    """And with them the parts of a copy, which begin with one row in the router."""
    upcycle(llama, tmp_path / "out", Recipe(4, 2, granularity=2))
    model = MoEForCausalLM.from_pretrained(tmp_path / "out").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert len(model.model.layers[0].mlp.gate.weight.unique(dim=0)) == 8
    model.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        assert (logits(tmp_path / "trained") - model.eval()(IDS).logits).abs().max() < 1e-5


def experts(directory: Path, matrix: str, layer: int = 0) -> list[torch.Tensor]:
    tensors = load_file(directory / "model.safetensors")
    prefix = f"model.layers.{layer}.block_sparse_moe.experts."
    return [tensors[f"{prefix}{e}.{matrix}.weight"] for e in range(4)]


def test_noise_is_as_large_as_asked_and_differs_between_experts(llama, tmp_path):
    upcycle(llama, tmp_path / "out", Recipe(4, 2, noise=0.1))
    dense, every = load_file(llama / "model.safetensors"), {}
    for matrix, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        old = dense[f"model.layers.0.mlp.{name}.weight"]
        noise = [expert - old for expert in experts(tmp_path / "out", matrix)]
        every[matrix] = noise[0].flatten()
        for one in noise:
            assert one.std().item() == pytest.approx(0.1 * old.std().item(), rel=0.1)
        both = torch.stack([one.flatten() for one in noise]).corrcoef()
        assert (both - torch.eye(4)).abs().max() < 0.2
    both = torch.stack(list(every.values())).corrcoef()
    assert (both - torch.eye(3)).abs().max() < 0.2, "each matrix has noise of its own"


def test_reinit_draws_the_same_units_of_all_three_matrices_anew(llama, tmp_path):
    upcycle(llama, tmp_path / "out", Recipe(4, 2, reinit=0.5))
    dense = load_file(llama / "model.safetensors")
    changed = {}
    for matrix, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        old = dense[f"model.layers.0.mlp.{name}.weight"]
        found = experts(tmp_path / "out", matrix)
        changed[matrix] = [(new != old).any(0 if matrix == "w2" else 1) for new in found]
        for new in found:
            fresh = new[new != old]
            assert (fresh.mean().item(), fresh.std().item()) == pytest.approx((0, old.std().item()), abs=0.04)
    for e in range(4):
        assert changed["w1"][e].sum() == 24
        assert torch.equal(changed["w1"][e], changed["w3"][e])
        assert torch.equal(changed["w1"][e], changed["w2"][e])
    assert not torch.equal(changed["w1"][0], changed["w1"][1])


def test_the_seed_decides_and_bf16_and_the_tokenizer_are_kept(tmp_path):
    dense = save(tmp_path / "dense", "mistral", torch.bfloat16)
    (dense / "tokenizer.json").write_text("{}")
    (dense / "chat_template.jinja").write_text("template")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(dense, tmp_path / name, Recipe(4, 2, noise=0.1, reinit=0.2, seed=seed))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert {t.dtype for t in load_file(tmp_path / "a/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "a/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "a/chat_template.jinja").read_text() == "template"


@pytest.mark.parametrize(
    ("changes", "recipe", "sentence"),
    [
        ({"model_type": "qwen2"}, {}, "model_type='qwen2' with architectures=['LlamaForCausalLM'] cannot be upcycled"),
        ({"architectures": ["LlamaForSequenceClassification"]}, {}, "cannot be upcycled"),
        ({"attention_bias": True}, {}, "attention_bias=true cannot be upcycled"),
        ({"mlp_bias": True}, {}, "mlp_bias=true cannot be upcycled"),
        ({"hidden_act": "gelu"}, {}, "hidden_act='gelu' of mixtral is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, {}, "rope_parameters.factor=None is missing, and rope_type=llama3 needs it"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, "rope_parameters.rope_type='default' contradicts 'linear'"),
        ({"quantization_config": {"bits": 4}}, {}, "quantization_config is set"),
        ({"num_hidden_layers": 3}, {}, "missing model.layers.2.input_layernorm.weight and 8 more"),
        ({"num_hidden_layers": 1}, {}, "unexpected model.layers.1.input_layernorm.weight and 8 more"),
        ({"intermediate_size": 12}, {}, "of another shape model.layers.0.mlp.down_proj.weight and 5 more"),
        ({"tie_word_embeddings": True}, {}, "a lm_head.weight that differs"),
        ({}, {"granularity": 5}, "--granularity 5 does not divide intermediate_size=48"),
        ({}, {"experts": 2, "top_k": 3}, "--num-experts-per-tok 3 is above --num-local-experts 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_upcycled_is_named(llama, changes, recipe, sentence, tmp_path):
    dense = Path(shutil.copytree(llama, tmp_path / "dense"))
    edit(dense, **changes)
    with pytest.raises(UserError) as error:
        upcycle(dense, tmp_path / "out", Recipe(**recipe))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"], "nothing is written"


def test_a_failure_while_writing_leaves_nothing(llama, tmp_path, monkeypatch):
    from moe_llm.finetune import upcycle as module

    def fail(*arguments, **named):
        raise RuntimeError("power")

    monkeypatch.setattr(module, "write_model_files", fail)
    with pytest.raises(RuntimeError, match="power"):
        upcycle(llama, tmp_path / "out", Recipe())
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_takes_every_part_of_the_recipe(llama, tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "upcycle",
        str(llama),
        str(out),
        "--num-local-experts",
        "2",
        "--num-experts-per-tok",
        "1",
        "--granularity",
        "3",
        "--noise",
        "0.1",
        "--reinit",
        "0.5",
        "--seed",
        "7",
    ]
    assert main(command) == 0
    assert f"{out}: 6 experts, 3 a token" in capsys.readouterr().out
    upcycle(llama, tmp_path / "same", Recipe(2, 1, 0.1, 0.5, 3, 7))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "same/model.safetensors").read_bytes()
    assert main(command) == 2
    assert f"OUT='{out}' exists" in capsys.readouterr().err
    assert main(["upcycle", str(tmp_path), str(tmp_path / "x")]) == 2
    assert "holds no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["-0.1", "1.5", "half"])
def test_a_share_is_a_share(share, capsys):
    with pytest.raises(SystemExit):
        main(["upcycle", "a", "b", "--reinit", share])
    assert "--reinit" in capsys.readouterr().err
