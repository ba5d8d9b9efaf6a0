"""Commands and snippets of README and guides: parsed by the real parsers, validated, or run at toy size."""

import ast
import re
import shlex
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from support import runs

import moe_llm
from moe_llm.cli import main
from moe_llm.cli.registry import parse
from moe_llm.config import Config

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    # tutorials are run whole, see test_tutorials.py; the Python API shows signatures
    if page.parent.name != "tutorials" and page.name != "python-api.md"
]
# Commands that cannot run here; what they name is still looked at.
OUTSIDE = {
    "pip": "needs a package index",
    "docker": "needs a Docker engine; tests/test_repository.py looks at the files",
    "sbatch": "needs a Slurm cluster",
    "hf": "needs an account at the hub",
    "transformers": "serves until it is stopped, and needs packages of its own",
    "vllm": "needs a GPU",
    "source": "is the shell's own",
    "echo": "is the shell's own",
}
LAUNCHERS = ("accelerate", "torchrun", "deepspeed")
LOCAL = ("my_router", "my_callbacks")  # modules that a page lets its reader write
OTHERS = ("datatrove",)  # tools that run before ours, in environments of their own


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{' '.join(self.text.split())[:40]}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        for match in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            if match[1] in languages:
                found.append(Block(str(page.relative_to(ROOT)), match[1], match[2]))
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block, without redirections and variables before it."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for words in _split(shlex.split(line, comments=True)):
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def _split(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return [part[: next((i for i, word in enumerate(part) if word in (">", ">>")), len(part))] for part in parts]


COMMANDS = [(block, words) for block in blocks("bash") for words in commands(block)]


def check_configuration(words: list[str], checkpoint: Path) -> None:
    """The arguments of `train` and its like parse, and a configuration that is shipped takes the overrides."""
    args = parse(words)
    assert callable(args.handler)
    if "config" in args and "overrides" in args and (ROOT / args.config).is_file():
        based = [word for word in args.overrides if word.startswith("model.init_from=")]
        overrides = [word for word in args.overrides if word not in based]
        if based:
            overrides += [f"model.init_from={checkpoint}", "data.sequence_length=64"]
        if "distill" in args.config:
            return  # teachers are checkpoints that the page's reader has trained
        moe_llm.load_config(ROOT / args.config, overrides)


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=lambda value: str(value) if isinstance(value, Block) else "")
def test_commands_are_ones_that_there_are(block, words, finished_run):
    program, checkpoint = words[0], finished_run / "checkpoints/latest"
    if program == "moe-llm":
        check_configuration(words[1:], checkpoint)
    elif program in LAUNCHERS:
        at = words.index("scripts/train.py")
        check_configuration(["train", *words[at + 1 :]], checkpoint)
        named = [word for word in words[:at] if word.endswith(".yaml")]
        assert [name for name in named if not (ROOT / name).is_file()] == []
    elif program in ("bash", "python"):
        assert (ROOT / words[1]).is_file()
    else:
        assert program in OUTSIDE, f"{block.page}: what is {program}?"


def test_there_are_commands_to_look_at():
    assert len(COMMANDS) > 40
    programs = {words[0] for _, words in COMMANDS}
    assert "moe-llm" in programs
    assert sorted(set(OUTSIDE) - programs) == []


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_imports_what_there_is(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] not in (*LOCAL, *OTHERS):
            module = import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name in LOCAL or import_module(alias.name)


HEADS = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8}
BASE = {
    "run": {"dir": "runs/x"},
    "model": {**runs.MODEL, "num_local_experts": 8, "max_position_embeddings": 1 << 18, **HEADS},
    "data": {"sources": [{"type": "python_stdlib"}], "sequence_length": 64},
    "optim": {"lr": 1e-3},
    "train": {"max_steps": 100000, "micro_batch_size": 1, "global_batch_size": 4},
}


def completed(content: dict, checkpoint: Path) -> dict:
    """The sections of a fragment over those of a small configuration."""
    merged = dict(BASE)
    for section, values in content.items():
        merged[section] = {**BASE.get(section, {}), **values}
    model = content.get("model", {})
    if "init_from" in model:
        merged["model"] = {**model, "init_from": str(checkpoint)}
        merged["data"]["sequence_length"] = min(merged["data"]["sequence_length"], 64)
    elif "architecture" in model:
        merged["model"] = {"vocab_size": 320, **model}
    return merged


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_what_its_reader_takes(block, finished_run, tmp_path):
    content = yaml.safe_load(block.text)
    path = tmp_path / "snippet.yaml"
    if set(content) <= set(Config.model_fields):
        path.write_text(yaml.safe_dump(completed(content, finished_run / "checkpoints/latest")))
        moe_llm.load_config(path)
        return
    path.write_text(yaml.safe_dump(content))
    if "merge_method" in content or "recalibrate" in content:
        from moe_llm.merge.recipe import load_recipe as load_merge

        if "merge_method" not in content:
            path.write_text(yaml.safe_dump({"merge_method": "linear", "models": MODELS, **content}))
        load_merge(path)
    else:
        from moe_llm.ensemble.recipe import load_recipe as load_ensemble

        load_ensemble(path)


MODELS = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "b")]


@pytest.fixture(scope="module")
def clone(finished_run, corpus, tmp_path_factory) -> Path:
    """A directory like a clone in which the quickstart has been trained, tiny."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", root / "configs")
    runs.copy_run(finished_run, root / "runs/quickstart")
    for folder in ("texts", "more"):
        (root / folder).mkdir()
        shutil.copy(corpus, root / folder / "a.txt")
    raw = runs.sections(root / "texts/a.txt", root / "cache", root / "runs/mine", train={"max_steps": 1})
    runs.write_yaml(root / "my.yaml", raw | {"checkpoint": {"every_steps": 1}})
    return root


NOT_RUN = {"doctor": "trains on four ranks; tests/doctor has it"}
# a shipped configuration's sizes are for more than these texts
TOY = ["train.max_steps=1", "train.global_batch_size=2", "data.sequence_length=32", "checkpoint.every_steps=1"]
README_COMMANDS = [words for block, words in COMMANDS if block.page == "README.md" and words[0] == "moe-llm"]


@pytest.mark.parametrize("words", README_COMMANDS, ids=lambda words: words[1])
def test_the_readmes_commands_run(words, clone, monkeypatch, capsys):
    if words[1] in NOT_RUN:
        return
    monkeypatch.chdir(clone)
    toy = TOY if words[1] == "train" and words[2].startswith("configs/") else []
    assert main([*words[1:], *toy]) == 0
    assert capsys.readouterr().out


def test_the_readmes_python_runs(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    [block] = [block for block in blocks("python") if block.page == "README.md"]
    exec(compile(block.text, "README.md", "exec"), {})
    assert "def" in capsys.readouterr().out
