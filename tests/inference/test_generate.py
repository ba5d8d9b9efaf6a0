"""generate: a text or a user's turn is continued as transformers does it, whatever the rotary embeddings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from moe_llm.cli import main
from moe_llm.config import Config
from moe_llm.data.tokenizer import build_tokenizer, save_tokenizer
from moe_llm.inference.generate import generate

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    (root / "text.txt").write_text("the router sends tokens to experts, and they answer.\n" * 40)
    raw = {
        "model": {"vocab_size": 290},
        "data": {"sources": [{"type": "files", "path": str(root / "text.txt")}], "cache_dir": str(root / "cache")},
        "train": {"max_steps": 1},
    }
    tokenizer = build_tokenizer(Config.model_validate(raw), root / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=292, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    save_tokenizer(tokenizer, root / "model")
    (root / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 291]}))
    return root / "model"


def test_a_turn_is_answered_by_the_template(checkpoint, capsys):
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    turns = [{"role": "user", "content": "the router"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0]
    expected = tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)
    given = ["generate", str(checkpoint), "--prompt", "the router", "--max-new-tokens", "6", "--temperature", "0"]
    assert main([*given, "--chat"]) == 0
    answer = capsys.readouterr().out
    assert answer.strip() == expected.strip()
    assert main(given) == 0
    assert capsys.readouterr().out.startswith("the router")


def test_chat_without_a_template_is_a_sentence(checkpoint, tmp_path, capsys):
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert main(["generate", str(bare), "--prompt", "a", "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["yarn", "dynamic", "linear"])
def test_scaled_rotary_embeddings_generate_though_the_width_of_a_head_is_null(checkpoint, tmp_path, kind, key):
    scaled = shutil.copytree(checkpoint, tmp_path / "scaled")
    content = json.loads((scaled / "config.json").read_text())
    for name in ("rope_scaling", "rope_parameters"):
        content.pop(name, None)
    rope = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    content |= {"head_dim": None, "rope_theta": 1e4, key: rope}
    (scaled / "config.json").write_text(json.dumps(content))
    assert generate(scaled, "the router", max_new_tokens=4, temperature=0).startswith("the router")


def test_scaling_that_says_too_little_is_a_sentence(checkpoint, tmp_path, capsys):
    scaled = shutil.copytree(checkpoint, tmp_path / "scaled")
    content = json.loads((scaled / "config.json").read_text()) | {"rope_parameters": {"rope_type": "yarn"}}
    (scaled / "config.json").write_text(json.dumps(content))
    assert main(["generate", str(scaled), "--prompt", "a"]) == 2
    assert "yarn" in capsys.readouterr().err


_LONGROPE = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
        _LONGROPE | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_beyond_the_trained_length_generate_is_transformers_and_evaluate_agrees_or_refuses(
    checkpoint, tmp_path, capsys, rope
):
    """Scaling that this package has no frequencies for is refused by evaluate, and generated by transformers."""
    scaled = Path(shutil.copytree(checkpoint, tmp_path / "scaled"))
    content = json.loads((scaled / "config.json").read_text())
    content = {key: value for key, value in content.items() if not key.startswith("rope_")}
    content |= {"rope_theta": 1e4, "rope_parameters": rope | {"rope_theta": 1e4}, "max_position_embeddings": 64}
    (scaled / "config.json").write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text("the router sends tokens to experts " * 20)
    code = main(["evaluate", str(scaled), "--data", str(tmp_path / "text.txt"), "--json"])
    out, err = capsys.readouterr()
    if rope["rope_type"] == "longrope":
        assert code == 2
        assert err.count("moe-llm: error: ") == 1
        assert "longrope" in err
    else:
        assert code == 0
        assert json.loads(out)["loss"] > 0
    code = main(["generate", str(scaled), "--prompt", "the router", "--max-new-tokens", "40", "--temperature", "0"])
    out, err = capsys.readouterr()
    assert code == 0, err
    # transformers' own classes fail where the width of a head is null
    (scaled / "config.json").write_text(json.dumps(content | {"head_dim": 8}))
    tokenizer, model = AutoTokenizer.from_pretrained(scaled), AutoModelForCausalLM.from_pretrained(scaled)
    prompt = tokenizer("the router", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert out.strip() == tokenizer.decode(ids[0], skip_special_tokens=True).strip()
