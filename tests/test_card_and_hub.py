"""Every checkpoint has a model card that huggingface_hub reads; what is pushed holds no trainer state and no local path."""

import fnmatch
import json

import pytest
import yaml
from huggingface_hub import ModelCard
from support import runs
from support.checkpoints import small_config
from support.families import CASES, MIXTRAL
from transformers import GptOssConfig

from moe_llm import hub
from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main
from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.card import model_card


@pytest.fixture(scope="module")
def checkpoint(finished_run):
    return finished_run / "checkpoints/step-00000006"


def test_the_card_is_read_by_the_hubs_library_and_says_what_the_run_was(checkpoint, finished_run):
    card = ModelCard.load(checkpoint / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "unknown",
        "transformers",
        "text-generation",
    )
    last = runs.records(finished_run)[-1]
    for words in (
        "MixtralForCausalLM with 4 experts",
        "router: mixtral, 2 of 4 experts a token",
        "trained from scratch",
        "text.txt: ",
        "6 steps, 4 blocks of 32 tokens a step, fp32",
        f"validation loss, nats per token: {last['val_loss']:.4f}",
        "4.57 and 5, without remote code",
    ):
        assert words in card.text, words


def test_cards_of_other_routers_name_the_versions_and_the_code_that_they_need():
    model = ModelConfig(vocab_size=64, router={"type": "top_p"})
    assert "transformers 5.17 or newer, with `trust_remote_code=True`" in model_card(model)


def test_cards_say_where_transformers_4_computes_otherwise():
    cards = {name: model_card(hf.from_transformers_config(config.to_dict())) for name, config in CASES.items()}
    newer = {name for name, text in cards.items() if "- transformers 5, without remote code: 4.57 reads it too" in text}
    assert newer == {"qwen2-windows", "gpt-oss-no-bias", "deepseek2-groups"}  # compared with 4.57.6
    assert all("- transformers, 4.57 and 5, without remote code" in cards[name] for name in cards.keys() - newer)


def test_where_transformers_4_scales_positions_by_default_it_is_told_not_to():
    config = GptOssConfig(**MIXTRAL, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    model = hf.from_transformers_config(config.to_dict())
    content = hf.to_transformers_config(model, dtype="fp32", bos_token_id=None, eos_token_id=None)
    assert content["rope_scaling"] is None
    assert hf.from_transformers_config(content) == model


def test_a_base_with_a_name_on_the_hub_and_a_licence_are_metadata_and_paths_are_not(tmp_path):
    run = {
        "model": {"init_from": "mistralai/Mixtral-8x7B-v0.1"},
        "checkpoint": {"license": "apache-2.0"},
        "data": {"sources": [{"type": "files", "path": f"{tmp_path}/a/b.jsonl"}], "sequence_length": 8},
        "train": {"max_steps": None, "max_tokens": 1000, "global_batch_size": 2, "precision": "bf16"},
        "optim": {"name": "adamw", "lr": 1e-3, "schedule": "wsd", "weight_decay": 0.1},
    }
    text = model_card(ModelConfig(vocab_size=64), run=run)
    assert "base_model: mistralai/Mixtral-8x7B-v0.1" in text
    assert "license: apache-2.0" in text
    assert "- b.jsonl" in text
    run["model"]["init_from"] = str(tmp_path)
    text = model_card(ModelConfig(vocab_size=64), run=run)
    assert "base_model" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("finetune", "line", "absent"),
    [
        ({"trainable": "all", "lora": {"rank": 4, "targets": ["attention", "experts"]}},
         "- low-rank adapters of rank 4 in attention, experts, merged into the weights", "trained parts"),
        ({"trainable": "experts", "experts": [1, 3], "lora": {"rank": None}, "quantize_frozen": "nf4"},
         "- trained parts: experts\n- trained experts of each layer: 1, 3\n- frozen experts held in nf4", "low-rank"),
        ({"trainable": ["a", "b"]}, "- trained parts: a, b", "frozen"),
    ],
)  # fmt: skip
def test_the_card_says_what_was_trained_and_by_which_loss(finetune, line, absent):
    run = {
        "finetune": finetune,
        "preference": {"loss": "ipo", "beta": 0.25},
        "distill": {"teachers": [{"path": "me/teacher"}, {"path": "/models/other"}]},
        "data": {"sources": [{"type": "files", "path": "p.jsonl", "content": "preference"}], "sequence_length": 8},
        "train": {"max_steps": 3, "max_tokens": None, "global_batch_size": 2, "precision": "bf16"},
        "optim": {"name": "adamw", "lr": 1e-3, "schedule": "wsd", "weight_decay": 0.1},
    }
    text = model_card(ModelConfig(vocab_size=64), run=run)
    assert line in text
    assert absent not in text
    assert "- pairs of a chosen and a rejected answer, by ipo with beta 0.25" in text
    assert "- p.jsonl (preference)" in text
    assert "- teachers of the distillation: me/teacher, 1 without a name on a hub" in text
    run["data"]["sources"][0]["content"] = "chat"
    assert "rejected" not in model_card(ModelConfig(vocab_size=64), run=run)


def test_what_is_made_of_several_models_names_those_that_a_hub_knows(tmp_path):
    text = model_card("LlamaForCausalLM", made="merged: ties", sources=["a/b", "c/d", "a/b", str(tmp_path)])
    metadata, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(metadata)["base_model"] == ["a/b", "c/d"]
    assert body.startswith("\n# LlamaForCausalLM\n")
    assert "- merged: ties\n- a/b\n- c/d\n- a checkpoint that has no name on a hub" in body


def test_the_card_of_an_upcycled_model_says_how_it_was_made(tmp_path):
    dense = MoEForCausalLM(small_config(num_local_experts=1, num_experts_per_tok=1))
    dense.save_pretrained(tmp_path / "dense")
    assert (
        main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "out"), "--num-local-experts", "4", "--noise", "0.1"])
        == 0
    )
    text = (tmp_path / "out/README.md").read_text()
    assert "4 copies of its feed-forward layers, with noise of 0.1 deviations" in text
    assert "a checkpoint that has no name on a hub" in text
    assert str(tmp_path) not in text


@pytest.fixture
def uploads(monkeypatch):
    """What would have been uploaded: (repository, relative paths)."""
    sent: list[tuple[str, dict[str, bytes]]] = []

    class Api:
        def create_repo(self, repository, private, exist_ok):
            assert exist_ok
            return f"https://hub/{repository}"

        def upload_folder(self, *, folder_path, repo_id, ignore_patterns, commit_message):
            names = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
            kept = [n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in ignore_patterns)]
            sent.append((repo_id, {name: (folder_path / name).read_bytes() for name in kept}))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return sent


def test_push_uploads_what_loads_and_nothing_of_the_training(checkpoint, finished_run, uploads, capsys):
    assert main(["push", str(checkpoint), "me/tiny"]) == 0
    [(repository, files)] = uploads
    assert repository == "me/tiny"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert not [name for name in files if name.startswith("trainer")]
    assert not [name for name, content in files.items() if str(finished_run.parent).encode() in content]
    assert "https://hub/me/tiny" in capsys.readouterr().out


def test_what_a_merge_says_of_its_sources_paths_stays_here(uploads, tmp_path):
    from merge.merge_fakes import make_model, merged, model_list, save

    paths = [save(make_model(seed=seed), tmp_path / f"m{seed}") for seed in (0, 1)]
    recipe = {"merge_method": "linear", "models": model_list(*paths, weight=0.5), "align_experts": "weights"}
    merged(recipe, tmp_path / "out")
    assert main(["push", str(tmp_path / "out"), "me/merged"]) == 0
    [(_, files)] = uploads
    assert {"config.json", "expert_matching.png", "README.md"} <= files.keys()
    card = files["README.md"].decode()
    assert "merged: linear" in card
    assert "2 checkpoints that have no names on a hub" in card
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


@pytest.fixture
def adapter(tmp_path):
    """As PEFT writes it, over a base on this machine."""
    from merge.merge_fakes import make_model, save

    base, tuned = (str(save(make_model(seed=seed), tmp_path / f"m{seed}")) for seed in (0, 1))
    assert main(["extract-lora", base, tuned, str(tmp_path / "adapter"), "--rank", "2"]) == 0
    return tmp_path / "adapter"


def test_an_adapter_is_pushed_for_peft_under_its_bases_name_on_the_hub(uploads, adapter, tmp_path):
    before = runs.fingerprint(adapter)
    assert main(["push", str(adapter), "me/adapter", "--base", "me/base"]) == 0
    [(repository, files)] = uploads
    assert repository == "me/adapter"
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("me/base", "peft")
    settings = json.loads(files["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "me/base"
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert runs.fingerprint(adapter) == before


def test_an_adapter_of_a_directory_and_a_base_of_a_checkpoint_are_refused(uploads, adapter, checkpoint, capsys):
    assert main(["push", str(adapter), "me/adapter"]) == 2
    assert "which is no repository: name that of its base by --base OWNER/NAME" in capsys.readouterr().err
    assert main(["push", str(checkpoint), "me/x", "--base", "me/base"]) == 2
    assert "--base=me/base is for adapters" in capsys.readouterr().err
    assert main(["push", str(adapter), "me/adapter", "--base", "no name"]) == 2
    assert "--base=no name is no name of a repository" in capsys.readouterr().err
    assert uploads == []


def test_a_complete_run_is_pushed_and_one_that_goes_on_is_not(make_config, uploads):
    path = make_config(checkpoint={"every_steps": 1, "push_to_hub": "me/run"}, train={"max_steps": 2, "device": "cpu"})
    assert main(["train", str(path)]) == 0
    assert [repository for repository, _ in uploads] == ["me/run"]


def test_without_a_login_or_with_a_bad_name_it_is_refused_before_training(make_config, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["train", str(make_config(checkpoint={"push_to_hub": "me/run"}))]) == 2
    assert "needs a login: run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="write it as OWNER/NAME"):
        hub.check_hub("a/b/c", "REPO")
