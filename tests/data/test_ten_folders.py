"""train, evaluate, generate, inspect, merge, ensemble and generate-dataset read the same ids from each kind of folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import ModelConfig, SourceConfig
from moe_llm.config.load import validate
from moe_llm.data.documents import begins_with_bos, vocabulary_size
from moe_llm.data.shards import cached_tokens
from moe_llm.data.split import HoldOut
from moe_llm.data.tokenizer import build_tokenizer, end_token_ids, load_tokenizer, save_tokenizer
from moe_llm.distill.answers import AnswerOptions, write_answers
from moe_llm.ensemble.run import generate_command
from moe_llm.evaluation.evaluate import evaluate_files
from moe_llm.inference.generate import generate
from moe_llm.inspect.inspect import Settings, inspect_checkpoint
from moe_llm.merge.run import merge
from moe_llm.model.init import init_weights

TEXT = "the router sends  tokens\n\tto experts, naïve 12 "
SIZES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_local_experts": 2,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip


def write(folder: Path, name: str, content) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def change(folder: Path, **values) -> None:
    write(folder, "tokenizer_config.json", json.loads((folder / "tokenizer_config.json").read_text()) | values)


def whole(origin, folder: Path) -> None:
    save_tokenizer(origin, folder)


def bare(origin, folder: Path) -> None:
    shutil.copy(Path(origin.name_or_path) / "tokenizer.model", folder)


def bare_with_files(origin, folder: Path) -> None:
    bare(origin, folder)
    write(folder, "added_tokens.json", {"<|im_start|>": 330, "<|im_end|>": 331})
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    write(folder, "tokenizer_config.json", {"chat_template": "{{ messages }}", "tokenizer_class": "LlamaTokenizer"})


def bare_with_a_gap(origin, folder: Path) -> None:
    bare(origin, folder)
    spec = {"content": "<|far|>", "special": True}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": {"340": spec}, "eos_token": "<|far|>"})


def named_class(origin, folder: Path) -> None:
    whole(origin, folder)
    change(folder, tokenizer_class="LlamaTokenizer")


def beside_tekken(origin, folder: Path) -> None:
    import mistral_common

    whole(origin, folder)
    [tekken] = Path(mistral_common.__file__).parent.glob("data/tekken_240718.json")
    (folder / "tekken.json").symlink_to(tekken)


def named_templates(origin, folder: Path) -> None:
    whole(origin, folder)
    write(folder, "chat_template.jinja", "{{ messages }}")
    write(folder, "additional_chat_templates/tool_use.jinja", "{{ tools }}")


def listed_templates(origin, folder: Path) -> None:
    bare(origin, folder)
    listed = [{"name": name, "template": "{{ messages }}"} for name in ("default", "rag")]
    write(folder, "tokenizer_config.json", {"chat_template": listed})


def flags_against_the_file(origin, folder: Path) -> None:
    whole(origin, folder)
    change(folder, add_bos_token=False, add_eos_token=True)


def holes(origin, folder: Path) -> None:
    whole(origin, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["<|far|>"] = 400
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 400, "content": "<|far|>", "special": True, **flags})
    write(folder, "tokenizer.json", content)


def byte_level(origin, folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "th", "the"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    whole(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"), folder)


def unnamed_bos(origin, folder: Path) -> None:
    """What the post-processor puts before a text has no name in any file."""
    whole(origin, folder)
    given = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder, "tokenizer_config.json", {name: value for name, value in given.items() if name != "bos_token"})
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


FOLDERS = [
    whole, bare, bare_with_files, bare_with_a_gap, named_class, beside_tekken, named_templates, listed_templates,
    flags_against_the_file, holes, byte_level, unnamed_bos,
]  # fmt: skip


@pytest.fixture
def read(monkeypatch):
    """Rows of ids that embeddings are asked for, in order."""
    rows: list[list[int]] = []
    original = torch.nn.functional.embedding

    def recorded(ids, *args, **kwargs):
        rows.extend(ids.reshape(-1, ids.shape[-1]).tolist())
        return original(ids, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", recorded)
    return rows


@pytest.mark.parametrize("kind", FOLDERS, ids=lambda kind: kind.__name__)
def test_every_command_reads_the_same_ids(tokenizer, kind, tmp_path, read):
    given = tmp_path / "given"
    given.mkdir()
    kind(tokenizer, given)
    loaded = load_tokenizer(given)
    (tmp_path / "text.txt").write_text(TEXT)
    text, folder = str(tmp_path / "text.txt"), tmp_path / "checkpoint"
    ids = loaded.encode(TEXT, add_special_tokens=False)
    if kind is not byte_level:
        import sentencepiece

        model = str(Path(tokenizer.name_or_path) / "tokenizer.model")
        assert ids == sentencepiece.SentencePieceProcessor(model_file=model).encode(TEXT)
    begin = [loaded.bos_token_id] if begins_with_bos(loaded) else []
    assert bool(begin) == (kind not in (byte_level, flags_against_the_file))
    document = [*(begin or [loaded.eos_token_id]), *ids, loaded.eos_token_id]

    raw = {
        "data": {"sources": [{"type": "files", "path": text}], "cache_dir": str(tmp_path / "cache")},
        "tokenizer": {"path": str(given)},
        "train": {"max_steps": 1},
    }
    run = build_tokenizer(validate(raw), tmp_path / "run/tokenizer")
    source = SourceConfig(type="files", path=text)
    trained = cached_tokens(source, "s", HoldOut(), run, cache_dir=str(tmp_path / "cache"))["train"]
    assert trained.tokens_N.tolist() == document, "train"

    model = MoEForCausalLM(ModelConfig(**SIZES, vocab_size=vocabulary_size(loaded)))
    init_weights(model, 0)
    model.save_pretrained(folder, run)
    assert AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False) == ids, "transformers"

    def of(command, *arguments, **options) -> list[list[int]]:
        read.clear()
        command(*arguments, **options)
        return [row[: len(document)] for row in read]

    out = tmp_path / "merged"
    recipe = {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1}}]}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    merge(tmp_path / "merge.yaml", out, say=lambda sentence: None)
    for checkpoint in (folder, out):
        assert document[:-1] in [row[: len(document) - 1] for row in of(evaluate_files, checkpoint, text)], "evaluate"
        prompt = of(generate, checkpoint, TEXT, max_new_tokens=1, temperature=0)[0]
        assert prompt == begin + ids, "generate"
        assert end_token_ids(load_tokenizer(checkpoint)) == end_token_ids(loaded)
    inspected = of(inspect_checkpoint, folder, [text], Settings(removal_rows=0))
    assert document in inspected, "inspect"
    (tmp_path / "ensemble.yaml").write_text(yaml.safe_dump({"method": "linear", "members": [
        {"model": str(folder), "weight": 0.5}, {"model": str(out), "weight": 0.5}]}))  # fmt: skip
    said = of(generate_command, tmp_path / "ensemble.yaml", TEXT, max_new_tokens=1, temperature=0, say=print)
    assert said[0] == begin + ids, "ensemble"
    options = AnswerOptions(max_new_tokens=2, beams=1, continued=8)
    taught = of(write_answers, folder, text, tmp_path / "rows.jsonl", options)
    assert taught[0] == document[:9], "generate-dataset"
