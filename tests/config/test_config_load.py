"""From YAML and overrides to a run: what is read, what is refused, and in which words."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from moe_llm.config import Config, dump_config, load, load_config
from moe_llm.config.base import fields_by_key
from moe_llm.config.load import RENAMED_KEYS, parse_yaml, validate
from moe_llm.config.routers import MixtralSettings, RouterSettings
from moe_llm.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


def minimal(**sections) -> dict:
    raw = {"data": {"sources": [{"type": "python_stdlib"}]}, "train": {"max_steps": 1}}
    return {**raw, "model": {"vocab_size": 256}, **sections}


def refusal(*overrides: str, path: Path = QUICKSTART) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=1E-3", 1e-3),
        ("optim.eps=.5", 0.5),
        ("train.max_steps=20_000", 20_000),
        ("run.seed=010", 10),
        ("run.dir=runs/a=b", "runs/a=b"),
        ("run.dir='1e5'", "1e5"),
        ("logging.wandb=off", "off"),
        ("model.head_dim=null", None),
        ("model.head_dim=", None),
        ("model.tie_word_embeddings=true", True),
        ("optim.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("evaluate.sample_prompt='def '", "def "),
        ("evaluate.sample_prompt=no", "no"),
        ("evaluate.sample_prompt=12:30", "12:30"),
        ("evaluate.sample_prompt=2026-01-02", "2026-01-02"),
        ("data.sources.0.weight=2", 2.0),
        ("model.router.type=mixtral", "mixtral"),
    ],
)
def test_override_values_are_yaml(override, value):
    key = override.partition("=")[0]
    node = load_config(QUICKSTART, [override])
    for part in key.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_a_key_that_is_a_word_of_python_is_the_same_everywhere():
    """In overrides, dumps, the schema and refusals it is `async`; only Python code spells it `async_`."""
    config = load_config(QUICKSTART, ["checkpoint.async=true"])
    assert config.checkpoint.async_ is True
    assert config.model_dump(mode="json")["checkpoint"]["async"] is True
    assert yaml.safe_load(dump_config(config))["checkpoint"]["async"] is True
    assert "async" in Config.model_json_schema()["$defs"]["CheckpointConfig"]["properties"]
    assert refusal("checkpoint.async_=true").endswith("did you mean checkpoint.async?")
    assert refusal("checkpoint.async=3").startswith("checkpoint.async=3 is refused")


def test_defaults_then_file_then_overrides_in_order(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(minimal(optim={"lr": 0.5, "eps": 0.25})))
    config = load_config(path, ["optim.lr=0.125", "optim.lr=0.0625"])
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (0.0625, 0.25, 0.1)


def test_a_whole_list_and_one_of_its_items():
    config = load_config(
        QUICKSTART,
        [
            "data.sources=[{type: files, path: x.txt}, {type: files, path: [a, b]}]",
            "data.sources.1.path=y.txt",
            "data.sources.0={type: python_stdlib}",
        ],
    )
    assert [(s.type, s.path) for s in config.data.sources] == [("python_stdlib", None), ("files", "y.txt")]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load_and_survive_a_dump(path):
    config = load_config(path)
    assert validate(parse_yaml(dump_config(config), "dump")) == config
    assert config.run.dir == f"runs/{path.stem}"
    assert config.accumulation_steps(1) >= 1


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=12) | st.from_regex(r"[-+.0-9eE_:xo]{1,6}", fullmatch=True))
def test_any_text_survives_a_dump(text):
    config = validate(minimal(run={"dir": text}))
    dumped = dump_config(config)
    assert validate(parse_yaml(dumped, "dump")) == config
    assert yaml.safe_load(dumped)["run"]["dir"] == text  # plain YAML readers see the same


@settings(max_examples=30, deadline=None)
@given(lr=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False))
def test_any_number_survives_a_dump(lr):
    config = validate(minimal(optim={"lr": lr}))
    assert validate(parse_yaml(dump_config(config), "dump")).optim.lr == lr


def sections(model: type[BaseModel] = Config, path: tuple[str, ...] = ()):
    """Every section of a configuration with the path to it; list items go by index 0."""
    yield path, model
    for name, field in fields_by_key(model).items():
        nested = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for inner in nested:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                inner = MixtralSettings if inner is RouterSettings else inner  # what it is where no type is given
                index = ("0",) if inner in nested[1:] else ()
                yield from sections(inner, (*path, name, *index))


EMPTY = {
    ("data", "validation_sources", "0"),
    ("data", "stages", "0"),
    ("distill", "teachers", "0"),
    ("train", "callbacks", "0"),
}  # lists without a first item
SECTIONS = [(path, model) for path, model in sections() if path[:3] not in EMPTY]


@pytest.mark.parametrize(("path", "model"), SECTIONS, ids=lambda v: ".".join(v) if isinstance(v, tuple) else "")
def test_unknown_keys_are_refused_in_every_section(path, model):
    key = ".".join([*path, "zzqx"])
    assert refusal(f"{key}=1") == (f"unknown configuration key {key}: known here: {', '.join(fields_by_key(model))}")


@pytest.mark.parametrize(("path", "model"), SECTIONS, ids=lambda v: ".".join(v) if isinstance(v, tuple) else "")
def test_a_misspelt_key_gets_the_right_one(path, model):
    for name in fields_by_key(model):
        wrong = ".".join([*path, f"{name}q"])
        assert refusal(f"{wrong}=1").endswith(f"did you mean {'.'.join([*path, name])}?")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "optim.lr"),
        ("max_steps", "train.max_steps"),
        ("train.lr", "optim.lr"),
        ("model.expert_paralel_size", "parallel.expert_parallel_size"),
        ("optm.lr", "optim"),
        ("model.hiden_size", "model.hidden_size"),
    ],
)
def test_a_key_in_the_wrong_place_gets_the_right_one(wrong, right):
    assert refusal(f"{wrong}=1") == f"unknown configuration key {_refused(wrong)}: did you mean {right}?"


def _refused(key: str) -> str:
    return "optm" if key.startswith("optm.") else key


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.hidden_size=250"], ["model.hidden_size=250", "num_attention_heads=6", "head_dim"]),
        (["model.head_dim=5"], ["model.head_dim=5", "even"]),
        (
            ["model.num_key_value_heads=4"],
            ["model.num_key_value_heads=4", "num_attention_heads=6", "divisor"],
        ),
        (
            ["model.num_experts_per_tok=9"],
            ["model.num_experts_per_tok=9", "num_local_experts=8", "at most 8"],
        ),
        (["model.vocab_size=null"], ["model.vocab_size=null", "tokenizer.path"]),
        (["data.sources.0.type=files"], ["data.sources.0.path=null", "files", "name the data"]),
        (["data.sources.0.path=x"], ["data.sources.0.path=x", "python_stdlib", "type: files"]),
        (["data.sources=[{type: hub, path: [a, b]}]"], ["data.sources.0.path", "one source for each"]),
        (
            ["data.sources=[{type: python_stdlib, weight: 1}, {type: python_stdlib}]"],
            ["data.sources.1.weight=null", "every source a weight, or none"],
        ),
        (["data.sources=[]"], ["data.sources=[]", "at least 1 item"]),
        (["data.sequence_length=2048"], ["data.sequence_length=2048", "model.max_position_embeddings=1024"]),
        (["optim.betas=[0.9, 1.0]"], ["optim.betas=[0.9, 1.0]", "[0, 1)"]),
        (["optim.betas=[0.9]"], ["optim.betas=[0.9]", "one value more"]),
        (["optim.betas=[0.9, 0.9, 0.9]"], ["optim.betas=[0.9, 0.9, 0.9]", "at most 2"]),
        (["optim.lr=0"], ["optim.lr=0", "greater than 0"]),
        (["optim.lr=.nan"], ["optim.lr=NaN", "finite"]),
        (["optim.lr=.inf"], ["optim.lr=Infinity", "finite"]),
        (["optim.lr=fast"], ["optim.lr=fast", "a valid number"]),
        (["train.max_steps=1.5"], ["train.max_steps=1.5", "a valid integer"]),
        (["train.max_steps=true"], ["train.max_steps=true", "no true or false"]),
        (["optim.lr=true"], ["optim.lr=true", "no true or false"]),
        (["parallel.zero_stage=true"], ["parallel.zero_stage=true", "no true or false"]),
        (["train.max_tokens=5"], ["train.max_steps=240", "train.max_tokens=5", "exactly one"]),
        (["train.max_steps=null"], ["train.max_steps=null", "exactly one"]),
        (["train.precision=fp16"], ["train.precision=fp16", "'fp32' or 'bf16'"]),
        (["train.global_batch_size=20"], ["train.global_batch_size=20", "train.micro_batch_size=8"]),
        (["parallel.expert_parallel_size=3"], ["parallel.expert_parallel_size=3", "num_local_experts=8"]),
        (["parallel.zero_stage=0"], ["parallel.zero_stage=0", "1, 2 or 3"]),
        (["checkpoint.max_shard_size=5G"], ["checkpoint.max_shard_size=5G", "5GB"]),
        (["checkpoint.max_shard_size=0GB"], ["checkpoint.max_shard_size=0GB", "5GB"]),
        (["run.dir=2024"], ["run.dir=2024", "quotes"]),
        (["run.dir=''"], ['run.dir=""', "at least 1 character"]),
        (["checkpoint=5"], ["checkpoint=5", "every_steps, async, keep_last"]),
        (["model="], ["model=null", "hidden_size"]),
        (["data.sources=[3]"], ["data.sources.0=3", "type, path"]),
        (["data.sources=x"], ["data.sources=x", "list"]),
        (['optim.lr="a\\nb"'], ['optim.lr="a\\nb"', "number"]),
        (["optim.lr=" + "9" * 200 + "x"], ["optim.lr=999", "..."]),
        (["run={1: 2}"], ["run.1=1", "strings"]),
    ],
    ids=lambda v: v[0][:40],
)
def test_a_wrong_value_is_one_sentence_with_field_value_and_remedy(overrides, parts):
    sentence = refusal(*overrides)
    assert [part for part in parts if part not in sentence] == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_steps", "is incomplete: write section.key=value"),
        ("=3", "is incomplete: write section.key=value"),
        ("model..x=1", "is incomplete: write section.key=value"),
        ("data.sources.1.path=x", "'1' is no item of a list of 1 (counted from 0)"),
        ("data.sources.-1.path=x", "'-1' is no item of a list of 1 (counted from 0)"),
        ("data.sources.²=x", "'²' is no item of a list of 1 (counted from 0)"),
        ("model.hidden_size.x=1", "model.hidden_size is the value 192 and has no fields"),
        ("model=[1", "the value of override 'model=[1', line 1 is not valid YAML"),
        ("model={a: 1, a: 2}", "the key 'a' is given twice"),
        ("run.seed=!!int x", "is not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_sentence(override, words):
    assert words in refusal(override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no sections"),
        ("- 1", "holds no sections"),
        ("train: {max_steps: 1}", "configuration key data is missing: set it in the file, with its fields"),
        ("data: {sources: [{type: python_stdlib}]}", "configuration key train is missing"),
        (
            "data: {}\ntrain: {max_steps: 1}",
            "data.sources is missing: set it in the file, or as data.sources=",
        ),
        ("run: {dir: a}\nrun: {dir: b}", "line 2 is not valid YAML: the key 'run' is given twice"),
        ("run: [", "is not valid YAML"),
        ("run: \x00", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    sentence = refusal(path=path)
    assert words in sentence


def test_an_unreadable_file_is_one_sentence(tmp_path):
    assert "does not exist" in refusal(path=tmp_path / "none.yaml")
    assert "is a directory" in refusal(path=tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"run: {dir: \xe9}")
    assert "cannot be read" in refusal(path=latin)


def test_steps_and_accumulation_follow_from_the_sizes():
    config = load_config(QUICKSTART, ["train.max_steps=null", "train.max_tokens=4097", "train.micro_batch_size=4"])
    assert (config.tokens_per_step, config.max_steps) == (4096, 2)
    assert [config.accumulation_steps(world) for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UserError, match=r"global_batch_size=16 .* train.micro_batch_size=4 x 3 ranks = 12"):
        config.accumulation_steps(3)


def test_nothing_is_mutable_and_the_file_is_left_alone():
    before = hashlib.sha256(QUICKSTART.read_bytes()).hexdigest()
    config = load_config(QUICKSTART, ["optim.lr=1"])
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 2
    assert hashlib.sha256(QUICKSTART.read_bytes()).hexdigest() == before


def test_the_schema_describes_every_field():
    from jsonschema import Draft202012Validator

    schema = json.loads(json.dumps(Config.model_json_schema()))
    Draft202012Validator.check_schema(schema)
    parts = {"Config": schema, **schema["$defs"]}
    for section, part in parts.items():
        assert part["description"], section
        assert part["additionalProperties"] is False
        for name, field in part["properties"].items():
            assert field.get("description") or "$ref" in field, f"{section}.{name}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_schema_accepts_what_is_accepted(path):
    from jsonschema import Draft202012Validator

    raw = parse_yaml(path.read_text(), str(path))
    validator = Draft202012Validator(Config.model_json_schema())
    assert list(validator.iter_errors(raw)) == []
    raw["model"]["hiden_size"] = 1
    assert [error.validator for error in validator.iter_errors(raw)] == ["additionalProperties"]


@pytest.mark.parametrize(("section", "old"), RENAMED_KEYS)
def test_a_renamed_key_works_under_its_former_name_and_warns(section, old, caplog):
    new = RENAMED_KEYS[section, old]
    texts = {"overlong": "truncate", "trainable": "experts", "project": "tried"}
    value = (texts | {"image_every_steps": 7, "all_to_all_chunks": 3})[new]
    raw = {
        "model": {"vocab_size": 64},
        "data": {"sources": [{"type": "files", "path": "x.jsonl", "content": "chat"}]},
        "train": {"max_steps": 1},
    }
    raw[section] = {**raw.get(section, {}), old: value}
    assert getattr(getattr(validate(raw), section), new) == value
    assert f"{section}.{old} has been renamed: write {section}.{new}" in caplog.text
    raw[section][new] = value
    with pytest.raises(UserError, match="both are given"):
        validate(raw)


@pytest.mark.parametrize("key", ["run.dir", "checkpoint.resume", "evaluate.tasks_path", "parallel.nvme_path"])
def test_a_tilde_is_the_home_directory(monkeypatch, key):
    """A shell expands none behind an equals sign."""
    monkeypatch.setenv("HOME", "/home/someone")
    more = ["parallel.offload_optimizer=nvme"] if key == "parallel.nvme_path" else []
    config = load_config(QUICKSTART, [f"{key}=~/x", "evaluate.tasks=[hellaswag]", *more])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == "/home/someone/x"


def test_other_frameworks_names_of_keys_lead_to_ours():
    for theirs, ours in load._ELSEWHERE.items():
        section, key = ours.split(".")
        known = fields_by_key(Config.model_fields[section].annotation)
        assert key in known, ours
        assert theirs not in known
    assert refusal("optim.learning_rate=1e-3").endswith("did you mean optim.lr?")
    assert refusal("train.batch_size=4").endswith("did you mean train.micro_batch_size?")
