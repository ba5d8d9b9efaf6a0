"""What a base says of tokens stays when it is tuned: its answers, where it stops, its rows, its tokenizer's class."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import runs
from support.ranks import fresh_accelerate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moe_llm.cli import main
from moe_llm.config import Config
from moe_llm.data.documents import vocabulary_size
from moe_llm.data.tokenizer import build_tokenizer, load_tokenizer, save_tokenizer
from moe_llm.evaluation.evaluate import evaluate_files
from moe_llm.inference.generate import generate

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
FEW = {"num_experts": 4, "num_experts_per_tok": 2}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "text.txt", lines=40)


@pytest.fixture(scope="module")
def sentencepiece(text, tmp_path_factory):
    root = tmp_path_factory.mktemp("sentencepiece")
    raw = {
        "model": {"vocab_size": 300},
        "data": {"sources": [{"type": "files", "path": str(text)}], "cache_dir": str(root / "cache")},
        "train": {"max_steps": 1},
    }
    return build_tokenizer(Config.model_validate(raw), root / "tokenizer")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE as Qwen's: no bos, ChatML's tokens added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    directory = tmp_path_factory.mktemp("byte") / "tokenizer"
    save_tokenizer(made, directory)
    return load_tokenizer(directory)


def write_base(directory, config, tokenizer, generation: dict | None):
    config.bos_token_id = tokenizer.bos_token_id
    torch.manual_seed(1)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def tune(base, text, directory, *more: str) -> list[str]:
    fresh_accelerate()
    given = {
        "model.init_from": base, "data.sources.0.path": text, "data.sources.0.type": "files", "run.dir": directory,
        "data.sources.0.document": "line", "data.cache_dir": directory.parent / "cache", "data.sequence_length": 16,
        "train.max_steps": 1, "train.global_batch_size": 1, "train.precision": "fp32", "train.device": "cpu",
        "optim.lr": 1e-8, "optim.weight_decay": 0, "evaluate.max_blocks": 1, "logging.console": "plain",
    }  # fmt: skip
    file = directory.parent / "config.yaml"
    file.write_text("data: {sources: [{type: files, path: x}]}\ntrain: {max_steps: 1}\n")
    return ["train", str(file), *(f"{key}={value}" for key, value in given.items()), *more]


def transformers_says(directory) -> tuple[list, list]:
    """The likeliest continuation by transformers, and where it stops."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    ids = model.generate(**tokenizer("abcd efg", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    return ids.tolist(), model.generation_config.eos_token_id


BASES = {
    "a list of ends and sampling defaults": (
        lambda rows: MixtralConfig(vocab_size=rows, intermediate_size=16, num_local_experts=4, **SIZES),
        "sentencepiece", {"eos_token_id": [2, 7], "temperature": 0.3, "top_p": 0.5, "do_sample": True},
    ),
    "ends in config.json alone": (
        lambda rows: MixtralConfig(
            vocab_size=rows, intermediate_size=16, num_local_experts=4, eos_token_id=[2, 9], **SIZES
        ),
        "sentencepiece", None,
    ),
    "padded rows": (
        lambda rows: MixtralConfig(vocab_size=rows + 84, intermediate_size=16, num_local_experts=4, **SIZES),
        "sentencepiece", {"eos_token_id": 2},
    ),
    "byte-level without bos": (
        lambda rows: Qwen3MoeConfig(vocab_size=rows, moe_intermediate_size=8, head_dim=8, **FEW, **SIZES),
        "byte_level", {"eos_token_id": [258, 256], "repetition_penalty": 1.1},
    ),
    "a head with ends by default": (
        lambda rows: Qwen2MoeConfig(
            vocab_size=rows, moe_intermediate_size=8, shared_expert_intermediate_size=8, eos_token_id=256, **FEW, **SIZES
        ),
        "byte_level", None,
    ),
    "norms over the projection": (
        lambda rows: OlmoeConfig(vocab_size=rows, intermediate_size=8, eos_token_id=256, **FEW, **SIZES),
        "byte_level", {"eos_token_id": 256},
    ),
}  # fmt: skip


DEAR = ("padded rows", "a head with ends by default", "norms over the projection")


def test_experts_only_tuning_keeps_every_end(byte_level, text, tmp_path):
    make, _, generation = BASES["byte-level without bos"]
    base = write_base(tmp_path / "base", make(vocabulary_size(byte_level)), byte_level, generation)
    assert main(tune(base, text, tmp_path / "run", "finetune.trainable=experts")) == 0
    written = json.loads((tmp_path / "run/checkpoints/latest/generation_config.json").read_text())
    assert {key: written[key] for key in generation} == generation


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.grid if k in DEAR else ()) for k in BASES])
def test_one_step_at_no_rate_answers_and_stops_as_the_base(kind, request, text, tmp_path):
    make, name, generation = BASES[kind]
    tokenizer = request.getfixturevalue(name)
    base = write_base(tmp_path / "base", make(vocabulary_size(tokenizer)), tokenizer, generation)
    assert main(tune(base, text, tmp_path / "run")) == 0
    tuned = tmp_path / "run/checkpoints/latest"
    assert transformers_says(tuned) == transformers_says(base)
    assert transformers_says(base)[1] == (generation or json.loads((base / "config.json").read_text()))["eos_token_id"]
    for given in generation or {}:
        assert json.loads((tuned / "generation_config.json").read_text())[given] == generation[given]
    answers = [generate(folder, "abcd efg", max_new_tokens=6, temperature=0) for folder in (base, tuned)]
    assert answers[0] == answers[1]
    losses = [evaluate_files(folder, str(text), max_blocks=1)["loss"] for folder in (base, tuned)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_ends_can_be_configured(byte_level, text, tmp_path, capsys):
    make, _, generation = BASES["byte-level without bos"]
    base = write_base(tmp_path / "base", make(vocabulary_size(byte_level)), byte_level, generation)
    assert main(tune(base, text, tmp_path / "run", "tokenizer.end_tokens=[<|im_end|>]")) == 0
    written = json.loads((tmp_path / "run/checkpoints/latest/generation_config.json").read_text())
    assert (written["eos_token_id"], written["repetition_penalty"]) == ([258], 1.1)
    assert main(tune(base, text, tmp_path / "other", "tokenizer.end_tokens=[<|im|>]")) == 2
    assert "tokenizer.end_tokens: '<|im|>' is no token" in capsys.readouterr().err


# More tokens than rows


def with_two_more(tokenizer, directory):
    made = load_tokenizer(tokenizer.name_or_path)
    made.add_special_tokens({"additional_special_tokens": ["<|one|>", "<|two|>"]})
    save_tokenizer(made, directory)
    return directory


@pytest.fixture(scope="module")
def short(sentencepiece, tmp_path_factory):
    """A base whose tokenizer has two tokens more than it has rows."""
    directory = tmp_path_factory.mktemp("short") / "base"
    config = MixtralConfig(vocab_size=300, intermediate_size=16, num_local_experts=4, **SIZES)
    write_base(directory, config, sentencepiece, {"eos_token_id": 2})
    return with_two_more(sentencepiece, directory)


def test_missing_rows_are_offered_a_remedy_that_works(short, text, tmp_path, capsys):
    assert main(tune(short, text, tmp_path / "run")) == 2
    assert "set model.resize_embeddings=true" in capsys.readouterr().err
    assert main(tune(short, text, tmp_path / "run", "model.resize_embeddings=true")) == 0
    told = "".join(capsys.readouterr())
    assert "the 300 rows of the embedding and the head become 302, each new one the mean" in told
    before, after = (
        load_file(short / "model.safetensors"),
        load_file(tmp_path / "run/checkpoints/latest/model.safetensors"),
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == (302, 16)
        torch.testing.assert_close(after[name][:300], before[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(after[name][300:], before[name].mean(0).expand(2, -1), atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "run/checkpoints/latest/config.json").read_text())["vocab_size"] == 302
    assert main(tune(short, text, tmp_path / "run", "model.resize_embeddings=true", "train.max_steps=2")) == 0
    assert "resuming from" in "".join(capsys.readouterr())


@pytest.mark.grid
def test_rows_may_be_padded_further_but_not_cut(short, text, tmp_path, capsys):
    assert main(tune(short, text, tmp_path / "run", "model.resize_embeddings=true", "model.vocab_size=320")) == 0
    assert load_file(tmp_path / "run/checkpoints/latest/model.safetensors")["lm_head.weight"].shape == (320, 16)
    assert main(tune(short, text, tmp_path / "less", "model.resize_embeddings=true", "model.vocab_size=299")) == 2
    assert "model.vocab_size=299 contradicts model.init_from" in capsys.readouterr().err


@pytest.mark.grid
def test_new_rows_of_frozen_embeddings_and_under_adapters(short, text, tmp_path):
    more = ["model.resize_embeddings=true", "optim.lr=1e-2"]
    for run, part in (("frozen", "finetune.trainable=experts"), ("adapted", "finetune.lora={rank: 2}")):
        assert main(tune(short, text, tmp_path / run, *more, part)) == 0
        after = load_file(tmp_path / run / "checkpoints/latest/model.safetensors")["model.embed_tokens.weight"]
        before = load_file(short / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(after[:300], before)
        torch.testing.assert_close(after[300:], before.mean(0).expand(2, -1), atol=1e-6, rtol=0)


def test_a_token_beyond_the_rows_is_a_sentence_in_every_command(short, tmp_path, capsys):
    assert main(["generate", str(short), "--prompt", "abcd", "--max-new-tokens", "1"]) == 0
    assert main(["generate", str(short), "--prompt", "a<|two|>"]) == 2
    assert "'<|two|>' with the id 301, and the model has 300 rows" in capsys.readouterr().err
    (tmp_path / "rendered.txt").write_text("a<|two|>b\n")
    files = ["--data", str(tmp_path / "rendered.txt")]
    assert main(["evaluate", str(short), *files, "--parse-special-tokens"]) == 2
    assert "with the id 301" in capsys.readouterr().err
    assert main(["evaluate", str(short), *files]) == 0


def test_resizing_without_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"applies to model\.init_from"):
        Config.model_validate({"model": {"resize_embeddings": True, "vocab_size": 9},
                               "data": {"sources": [{"type": "python_stdlib"}]}, "train": {"max_steps": 1}})  # fmt: skip
