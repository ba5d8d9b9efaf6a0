"""Every kind of tokenizer folder gives the same ids in every command, and checkpoints carry what neighbours read."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from support.ci import dear
from support.training import MODEL
from transformers import AutoTokenizer

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import ModelConfig
from moe_llm.config.load import validate
from moe_llm.data.chat_template import own_template
from moe_llm.data.documents import DocumentEncoder, vocabulary_size
from moe_llm.data.tokenizer import build_tokenizer, end_token_ids, load_tokenizer, save_tokenizer
from moe_llm.ensemble.causal_lm import read_prompt
from moe_llm.errors import UserError
from moe_llm.model.init import init_weights

TEXTS = ["hello world", " two  spaces", "naïve Ω 漢字 😀", "def f(x):\n    return x\n", "12345 3.14", ""]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def model_file() -> Path:
    """Mixtral's own sentencepiece model."""
    import mistral_common

    [file] = Path(mistral_common.__file__).parent.glob("data/tokenizer.model.v1")
    return file


@pytest.fixture
def bare(tmp_path, model_file) -> Path:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(model_file, folder / "tokenizer.model")
    return folder


def sentencepiece_ids(file: Path, text: str) -> list[int]:
    return sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(text)


def settings(folder: Path, name: str, content) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_a_folder_with_tokenizer_model_alone_has_sentencepieces_ids(bare):
    tokenizer = load_tokenizer(bare)
    for text in TEXTS:
        assert DocumentEncoder(tokenizer).encode([text])[0][1:-1].tolist() == sentencepiece_ids(
            bare / "tokenizer.model", text
        )
        if text:
            assert read_prompt(tokenizer, text)["input_ids"][0, 1:].tolist() == sentencepiece_ids(
                bare / "tokenizer.model", text
            )
    assert DocumentEncoder(tokenizer).encode(["hello world"])[0].tolist() == [1, 6312, 28709, 1526, 2]


def test_what_stands_beside_the_model_is_kept(bare, tmp_path):
    settings(bare, "added_tokens.json", {"<|im_end|>": 32001, "<|im_start|>": 32000})
    settings(bare, "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}, "pad_token": "</s>"})
    settings(bare, "tokenizer_config.json", {"chat_template": TEMPLATE, "model_max_length": 77, "unk_token": "<unk>"})
    for tokenizer in (load_tokenizer(bare), _through_a_run(bare, tmp_path)):
        assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<|im_end|>", 32001, 32002)
        assert (tokenizer.pad_token, tokenizer.model_max_length, own_template(tokenizer)) == ("</s>", 77, TEMPLATE)
        ids = tokenizer("<|im_start|>hello world<|im_end|>", add_special_tokens=False)["input_ids"]
        assert (ids[0], ids[-1], len(ids) > 3) == (32000, 32001, True)


def _through_a_run(folder: Path, tmp_path: Path):
    raw = {
        "data": {"sources": [{"type": "python_stdlib"}], "cache_dir": str(tmp_path / "cache")},
        "tokenizer": {"path": str(folder)},
        "train": {"max_steps": 1},
    }
    return build_tokenizer(validate(raw), tmp_path / "run/tokenizer")


def test_an_added_token_behind_a_gap_has_its_own_id(bare, tmp_path):
    settings(bare, "added_tokens.json", {"<|im_end|>": 32007})
    for tokenizer in (load_tokenizer(bare), _through_a_run(bare, tmp_path)):
        assert tokenizer.encode("hello world<|im_end|>", add_special_tokens=False) == [6312, 28709, 1526, 32007]
        assert (vocabulary_size(tokenizer), len(tokenizer)) == (32008, 32001)
        assert tokenizer.decode([32007]) == "<|im_end|>"


@pytest.mark.parametrize(("token", "number"), [("<|im_end|>", 17), ("<s>", 32000)])
def test_an_added_token_in_the_place_of_another_is_refused_by_its_name(bare, token, number):
    settings(bare, "added_tokens.json", {token: number})
    with pytest.raises(UserError, match=rf"the added token '{re.escape(token)}' has the id {number}, at which"):
        load_tokenizer(bare)


@pytest.mark.parametrize("name", dear(["LlamaTokenizer", "GPT2Tokenizer"], "LlamaTokenizer"))
def test_the_class_of_the_base_stays_where_it_reads_the_same_ids(bare, tmp_path, name):
    base = tmp_path / "base"
    save_tokenizer(load_tokenizer(bare), base)
    file = base / "tokenizer_config.json"
    more = {"tokenizer_class": name, "legacy": True, "add_eos_token": True}
    settings(base, file.name, json.loads(file.read_text()) | more)
    tokenizer = _through_a_run(base, tmp_path)
    MoEForCausalLM(ModelConfig(**{**MODEL, "vocab_size": 32000})).save_pretrained(tmp_path / "out", tokenizer)
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    named = AutoTokenizer.from_pretrained(base)
    kept = all(
        named.encode(t, add_special_tokens=False) == tokenizer.encode(t, add_special_tokens=False) for t in TEXTS
    )
    assert written["tokenizer_class"] == (name if kept else "PreTrainedTokenizerFast")
    assert (written["legacy"], written["add_eos_token"]) == (True, True)
    served, trained = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    for text in TEXTS:
        assert served.encode(text, add_special_tokens=False) == trained.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["folder of templates", "list in tokenizer_config.json"])
def test_several_named_templates_stay_in_every_checkpoint(bare, tmp_path, kind):
    if kind == "folder of templates":
        (bare / "chat_template.jinja").write_text(TEMPLATE)
        (bare / "additional_chat_templates").mkdir()
        (bare / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    else:
        named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}]
        settings(bare, "tokenizer_config.json", {"chat_template": named})
    tokenizer = _through_a_run(bare, tmp_path)
    assert own_template(tokenizer) == TEMPLATE
    model = MoEForCausalLM(ModelConfig(**{**MODEL, "vocab_size": 32000}))
    model.save_pretrained(tmp_path / "out", tokenizer)
    again = load_tokenizer(tmp_path / "out")
    assert again.chat_template == {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (bare / "tokenizer.model").read_bytes()


def test_tekken_beside_tokenizer_json_is_no_obstacle(bare, tmp_path):
    save_tokenizer(load_tokenizer(bare), tmp_path / "both")
    import mistral_common

    [tekken] = Path(mistral_common.__file__).parent.glob("data/tekken_240911.json")
    shutil.copy(tekken, tmp_path / "both/tekken.json")
    assert load_tokenizer(tmp_path / "both").encode("hello world", add_special_tokens=False) == [6312, 28709, 1526]


def test_the_class_is_one_that_transformers_4_knows(bare, tmp_path):
    save_tokenizer(load_tokenizer(bare), tmp_path / "out")
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(tmp_path / "out").encode("hello world") == load_tokenizer(bare).encode("hello world")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ bos_token }}{% for m in messages %} [INST] {{ m.content }} [/INST]{% endfor %}", True),
        ("{% for m in messages %}User: {{ m.content }}{% endfor %}", False),  # its beginning gets a space everywhere
        (None, False),
    ],
)
def test_llama_cpps_converter_is_told_that_no_space_follows_a_special_token(bare, tmp_path, template, told):
    tokenizer = load_tokenizer(bare)
    tokenizer.chat_template = template
    save_tokenizer(tokenizer, tmp_path / "out")
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert written.get("add_prefix_space", "absent") == (False if told else "absent")
    served = AutoTokenizer.from_pretrained(tmp_path / "out")  # to transformers it changes nothing
    for text in [*TEXTS, "<s> [INST] hi [/INST] yes</s> no"]:
        assert served(text)["input_ids"] == tokenizer(text)["input_ids"]
    save_tokenizer(load_tokenizer(tmp_path / "out"), tmp_path / "again")
    again = json.loads((tmp_path / "again/tokenizer_config.json").read_text())
    assert again.get("add_prefix_space", "absent") == written.get("add_prefix_space", "absent")


GENERATION = {"eos_token_id": [2, 17], "repetition_penalty": 5.0, "temperature": 0.3, "do_sample": True}


def test_end_tokens_and_sampling_defaults_stay_as_the_base_had_them(bare, tmp_path):
    settings(bare, "generation_config.json", GENERATION)
    tokenizer = _through_a_run(bare, tmp_path)
    assert end_token_ids(tokenizer) == [2, 17]
    model = MoEForCausalLM(ModelConfig(**{**MODEL, "vocab_size": 32000}))
    model.save_pretrained(tmp_path / "out", tokenizer)
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert {key: written[key] for key in GENERATION} == GENERATION
    assert end_token_ids(load_tokenizer(tmp_path / "out")) == [2, 17]


def test_a_penalty_of_the_folder_does_not_act_on_the_likeliest_token(bare, tmp_path):
    from moe_llm.inference.generate import generate

    settings(bare, "generation_config.json", {"eos_token_id": [2, 17], "repetition_penalty": 50.0})
    model = MoEForCausalLM(ModelConfig(**{**MODEL, "vocab_size": 32000}))
    init_weights(model, 0)
    model.save_pretrained(tmp_path / "with", load_tokenizer(bare))
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    settings(tmp_path / "without", "generation_config.json", {"eos_token_id": [2, 17]})
    texts = [generate(tmp_path / n, "hello", max_new_tokens=6, temperature=0) for n in ("with", "without")]
    assert texts[0] == texts[1]


def test_a_turn_that_ends_in_its_own_token_ends_generation(bare, tmp_path):
    settings(bare, "added_tokens.json", {"<|end|>": 32000})
    config = {"chat_template": TEMPLATE, "added_tokens_decoder": {"32000": {"content": "<|end|>", "special": True}}}
    settings(bare, "tokenizer_config.json", config)
    tokenizer = _through_a_run(bare, tmp_path)
    model = MoEForCausalLM(ModelConfig(**{**MODEL, "vocab_size": 32001}))
    model.save_pretrained(tmp_path / "out", tokenizer)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [2, 32000]


@pytest.mark.parametrize("flags", [{}, {"add_eos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("converted", [False, True])
def test_prompts_begin_once_and_do_not_end(bare, tmp_path, flags, converted):
    folder = bare
    if converted:
        folder = tmp_path / "converted"
        save_tokenizer(load_tokenizer(bare), folder)
    file = folder / "tokenizer_config.json"
    settings(folder, file.name, (json.loads(file.read_text()) if file.exists() else {}) | flags)
    tokenizer = load_tokenizer(folder)
    begin = [] if flags.get("add_bos_token") is False else [1]
    assert read_prompt(tokenizer, "hello world")["input_ids"].tolist() == [[*begin, 6312, 28709, 1526]]
    rendered = read_prompt(tokenizer, "<s>hello world")["input_ids"][0].tolist()
    assert rendered.count(1) == 1
    assert np.array_equal(read_prompt(tokenizer, "hello</s>")["input_ids"][0, -1:].numpy(), [2])


def test_a_tokenizer_beside_modelling_code_is_read_and_written_again(tokenizer, tmp_path):
    """As `tokenizer.path` and `model.init_from` do with a checkpoint of our own class."""
    save_tokenizer(tokenizer, tmp_path / "there")
    (tmp_path / "there/config.json").write_text('{"model_type": "moe_llm", "auto_map": {"AutoConfig": "x.Y"}}')
    found = load_tokenizer(tmp_path / "there")
    (tmp_path / "here").mkdir()
    save_tokenizer(found, tmp_path / "here")
    assert load_tokenizer(tmp_path / "here").get_vocab() == tokenizer.get_vocab()
