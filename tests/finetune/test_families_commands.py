"""Every command takes every family, from a directory that transformers saved."""

import copy
import json
import shutil

import pytest
import torch
from support import runs
from support.families import CASES
from transformers import AutoModelForCausalLM

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main

FAMILIES = [
    "deepseek2",
    "gpt-oss",
    *(
        pytest.param(name, marks=pytest.mark.grid)
        for name in ("mixtral-dynamic", "qwen2-windows", "qwen3-sparse-step", "olmoe", "glm4", "deepseek3")
    ),
]


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """A text, and a checkpoint of this package, for its tokenizer."""
    root = tmp_path_factory.mktemp("tokenized")
    text = runs.write_text(root / "text.txt")
    raw = runs.sections(text, root / "cache", root / "run", train={"max_steps": 1}, logging={"console": "off"})
    assert main(["train", str(runs.write_yaml(root / "base.yaml", raw))]) == 0
    return text, root / "run/checkpoints/latest"


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tokenized, tmp_path_factory):
    """Two directories of one family that transformers saved: the second has other weights, and its experts elsewhere."""
    text, origin = tokenized
    content, root = json.loads((origin / "config.json").read_text()), tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("a", "b")):
        config = copy.deepcopy(CASES[request.param])
        config.vocab_size = content["vocab_size"]
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        for file in origin.glob("*token*"):
            shutil.copy(file, root / name)
    return text, root


def run_file(base, directory, **changes):
    text, root = base
    sections = {
        "data": {"sequence_length": 16},
        "model": {"init_from": str(root / "a"), "router_aux_loss_coef": 0.01},
        "train": {"max_steps": 2},
        "checkpoint": {"every_steps": 2},
        "evaluate": {"every_steps": 1, "max_blocks": 2},
        "logging": {"console": "off"},
    }
    raw = runs.sections(text, root / "cache", directory / "run", **sections)
    raw["model"] = sections["model"]
    for name, values in changes.items():
        raw[name] = {**raw.get(name, {}), **values}
    return str(runs.write_yaml(directory / "run.yaml", raw))


def test_trained_evaluated_generated_and_compared(base, tmp_path, capsys):
    file = run_file(base, tmp_path, finetune={"router_guard": {"action": "log"}})
    assert main(["params", file]) == 0
    assert main(["train", file]) == 0
    saved = str(tmp_path / "run/checkpoints/latest")
    theirs = AutoModelForCausalLM.from_pretrained(saved, experts_implementation="eager")
    assert type(theirs) is type(AutoModelForCausalLM.from_pretrained(base[1] / "a"))
    capsys.readouterr()
    assert main(["evaluate", saved, "--data", str(base[0]), "--max-blocks", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    assert main(["generate", saved, "--prompt", "the", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip()
    ours, ids = MoEForCausalLM.from_pretrained(saved), torch.tensor([[5, 6, 7]])
    expected = theirs.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(5):
        ids = torch.cat([ids, ours(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert ids.tolist() == expected.tolist()
    assert main(["diff", str(base[1] / "a"), saved]) == 0
    few = ["--max-tokens", "100", "--removal-rows", "1"]
    assert main(["inspect", saved, "--data", str(base[0]), *few]) == 0


def test_merged_with_its_experts_aligned(base, tmp_path):
    _, root = base
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in ("a", "b")],
        "align_experts": "weights",
    }
    assert main(["merge", str(runs.write_yaml(tmp_path / "recipe.yaml", recipe)), str(tmp_path / "merged")]) == 0
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    a, b = (AutoModelForCausalLM.from_pretrained(root / name).state_dict() for name in ("a", "b"))
    for name, tensor in merged.state_dict().items():
        if ".mlp.gate" not in name and ".mlp.router" not in name and ".experts." not in name:
            torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)


def test_adapters_of_attention_and_experts_are_trained_and_merged(base, tmp_path):
    file = run_file(base, tmp_path, finetune={"lora": {"rank": 2, "targets": ["attention", "experts"]}})
    assert main(["train", file]) == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (base[1] / "a", tmp_path / "run/checkpoints/latest")
    )
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".self_attn." in name or ".experts." in name for name in changed)
    assert any(".experts." in name for name in changed)


def test_a_student_of_a_teacher_of_each_family(base, tmp_path):
    file = run_file(base, tmp_path, distill={"teachers": [{"path": str(base[1] / "b")}]}, train={"max_steps": 1})
    assert main(["train", file]) == 0


def test_two_of_a_family_answer_together(base, tmp_path, capsys):
    members = [{"model": str(base[1] / name), "weight": 0.5} for name in ("a", "b")]
    recipe = str(runs.write_yaml(tmp_path / "ensemble.yaml", {"method": "linear", "members": members}))
    assert (
        main(["generate", "--ensemble", recipe, "--prompt", "the", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    )
    assert capsys.readouterr().out.strip()
