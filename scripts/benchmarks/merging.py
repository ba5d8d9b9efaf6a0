"""Several models into one, measured: soups and ensembles, task vectors, and experts in another order.

    python scripts/benchmarks/merging.py                # pretrains the quickstart's model if it is not there
    python scripts/benchmarks/merging.py --tokens 8000 --seeds 0 --rates 1e-3 3e-4 --max-bytes 60000    # in miniature

Soups: the base, pretrained on the source text of Python's standard library, is fine-tuned on prose (docstrings of
packages which this one depends on) with several seeds and rates. Single models, their uniform and greedy soups and the
mean of their distributions are compared by loss on held-out prose and by the parameters that each token passes; so is a
student of that mean, which begins, reads and ends as the best single one does but for its teachers.

Tasks: one of these and a model fine-tuned on other code (the same packages' source): task vectors added and negated,
TIES and DARE, on both held-out texts.

Order: the base merged with a copy of itself whose experts lie in another order, with alignment and without.

The text is split by document: eight of ten for training, one to choose by (the greedy soup, the best single model) and
one to judge. Runs are kept in --work and resumed. Results: JSON and tables in Markdown, in --out.
"""

import argparse
import ast
import importlib.util
import json
import math
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main as moe_llm
from moe_llm.data.loader import load_evaluation
from moe_llm.data.packing import IGNORED, model_inputs
from moe_llm.data.tokenizer import load_tokenizer
from moe_llm.evaluation.evaluate import evaluate_files
from moe_llm.merge.recipe import parse_recipe
from moe_llm.merge.run import merge_recipe
from moe_llm.merge.soup import greedy_soup

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "numpy", "datasets", "pydantic")
SHORTEST = 200  # characters: shorter docstrings are signatures and one-liners rather than prose
DENSITY = 0.5  # of TIES and DARE
PARTS = ("train", "choose", "judge")


def documents(package: str) -> Iterator[tuple[str, str]]:
    """(prose, code) of a package's modules: their longer docstrings, and their source; nothing is imported."""
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or ():
        for file in sorted(Path(folder).rglob("*.py")):
            try:
                source = file.read_text(encoding="utf-8")
                tree = ast.parse(source)
            except (SyntaxError, UnicodeDecodeError):  # templates, and tests of parsers
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
            yield "\n\n".join(dict.fromkeys(doc for doc in found if doc and len(doc) >= SHORTEST)), source


def write_texts(work: Path, max_bytes: int) -> dict[str, dict[str, Path]]:
    """kind -> part -> a file of JSON lines, an equal share of each package in it at most."""
    files = {kind: {part: work / f"{kind}-{part}.jsonl" for part in PARTS} for kind in ("prose", "code")}
    if all(file.is_file() for parts in files.values() for file in parts.values()):
        return files
    lines = {kind: {part: [] for part in PARTS} for kind in files}
    share = max_bytes // len(PACKAGES)
    for package in PACKAGES:
        left, seen = dict.fromkeys(files, share), dict.fromkeys(files, 0)
        for texts in documents(package):
            for kind, text in zip(files, texts, strict=True):
                text = text[: share // 20]  # so that each part of the split has documents, however small it is
                if text and left[kind] > 0:
                    part = {8: "choose", 9: "judge"}.get(seen[kind] % 10, "train")
                    lines[kind][part].append(json.dumps({"text": text}))
                    left[kind] -= len(text.encode())
                    seen[kind] += 1
            if max(left.values()) <= 0:
                break
    for kind, parts in files.items():
        for part, file in parts.items():
            file.write_text("\n".join(lines[kind][part]) + "\n", encoding="utf-8")
    return files


def fine_tune(arguments, name: str, text: Path, rate: float, seed: int, teachers: Sequence[Path] = ()) -> Path:
    """The checkpoint of a run of that name, which is made or gone on with; with teachers, it learns half from the
    text and half from the mean of their distributions."""
    run_dir = arguments.work / name
    steps = max(2, arguments.tokens // (arguments.batch * arguments.length))
    content = {
        "run": {"dir": str(run_dir), "seed": seed},
        "model": {"init_from": str(arguments.base.resolve())},
        "data": {
            "sources": [{"type": "files", "path": str(text)}],
            "sequence_length": arguments.length,
            "validation_fraction": 0.05,
            "cache_dir": str(arguments.work.resolve() / "cache"),
        },
        "optim": {"lr": rate, "warmup_steps": max(1, steps // 20)},
        "train": {
            "max_steps": steps,
            "micro_batch_size": min(4, arguments.batch),
            "global_batch_size": arguments.batch,
            "precision": "fp32",
        },
        "checkpoint": {"keep_last": 1},
        "evaluate": {"max_blocks": 4},
        "logging": {"every_steps": max(1, steps // 10), "console": "off"},
    }
    if teachers:
        content["distill"] = {"teachers": [{"path": str(teacher)} for teacher in teachers], "alpha": 0.5}
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    if moe_llm(["train", str(path)]):
        raise SystemExit(1)
    return (run_dir / "checkpoints/latest").resolve()


def named(rate: float, seed: int) -> str:
    return f"rate {rate:g}, seed {seed}"


def merged(arguments, name: str, recipe: dict) -> Path:
    """The merge of that name, made anew."""
    out = arguments.work / "merged" / name
    shutil.rmtree(out, ignore_errors=True)
    merge_recipe(parse_recipe(recipe), out, say=lambda sentence: None)
    return out


def loss(arguments, model: Path, text: Path) -> float:
    found = evaluate_files(
        model, str(text), batch_size=4, sequence_length=arguments.length, max_blocks=arguments.blocks
    )
    return found["loss"]


@torch.no_grad()
def ensemble_loss(arguments, models: list[Path], text: Path) -> float:
    """Of the mean of the models' next-token distributions, on the blocks of `loss`."""
    blocks = load_evaluation(
        str(text), load_tokenizer(models[0]), sequence_length=arguments.length, max_blocks=arguments.blocks
    )
    told = []
    for directory in models:
        model, own = MoEForCausalLM.from_pretrained(directory), []
        for batch in blocks.batches(micro_batch_size=4):
            logits = model(**{**model_inputs(batch), "return_logits": True}).logits.float()
            real = batch.labels_BS != IGNORED
            own.append(logits.log_softmax(-1)[real].gather(-1, batch.labels_BS[real][:, None])[:, 0])
        told.append(torch.cat(own))
    return -(torch.stack(told).logsumexp(0) - math.log(len(models))).mean().item()


def soups(arguments, texts: dict[str, Path]) -> tuple[list[dict], dict[str, Path]]:
    """A row for each way to use several fine-tunes of one base, and the fine-tunes."""
    tuned = {
        named(rate, seed): fine_tune(arguments, f"prose-{rate:g}-{seed}", texts["train"], rate, seed)
        for rate in arguments.rates
        for seed in arguments.seeds
    }
    rows = [{"what": "base", "models": 1, "loss": loss(arguments, arguments.base, texts["judge"])}]
    rows += [
        {"what": name, "models": 1, "loss": loss(arguments, model, texts["judge"])} for name, model in tuned.items()
    ]
    chosen = min(tuned, key=lambda name: loss(arguments, tuned[name], texts["choose"]))
    rows.append(
        {
            "what": f"best single: {chosen}",
            "models": 1,
            "loss": next(row["loss"] for row in rows if row["what"] == chosen),
        }
    )
    models = [{"model": str(model)} for model in tuned.values()]
    weighted = [{**model, "parameters": {"weight": 1.0}} for model in models]
    uniform = merged(arguments, "uniform", {"merge_method": "linear", "models": weighted})
    rows.append({"what": "uniform soup", "models": 1, "loss": loss(arguments, uniform, texts["judge"])})
    greedy = arguments.work / "merged/greedy"
    shutil.rmtree(greedy, ignore_errors=True)
    recipe = {
        "merge_method": "greedy_soup",
        "models": models,
        "data": [str(texts["choose"])],
        "max_blocks": arguments.blocks,
        "batch_size": 4,
    }
    kept = sum(decision.kept for decision in greedy_soup(parse_recipe(recipe), greedy, say=lambda sentence: None))
    rows.append({"what": f"greedy soup of {kept}", "models": 1, "loss": loss(arguments, greedy, texts["judge"])})
    rows.append(
        {
            "what": f"ensemble of {len(tuned)}",
            "models": len(tuned),
            "loss": ensemble_loss(arguments, list(tuned.values()), texts["judge"]),
        }
    )
    rate, seed = next((r, s) for r in arguments.rates for s in arguments.seeds if named(r, s) == chosen)
    student = fine_tune(arguments, "prose-student", texts["train"], rate, seed, list(tuned.values()))
    rows.append(
        {"what": f"student of that ensemble: {chosen}", "models": 1, "loss": loss(arguments, student, texts["judge"])}
    )
    active = MoEForCausalLM.from_pretrained(arguments.base).config.num_params(active=True)
    return [{**row, "active_parameters": active * row["models"]} for row in rows], tuned


def tasks(arguments, texts: dict[str, dict[str, Path]], prose: Path) -> list[dict]:
    """A row for each merge of a model tuned on prose with one tuned on code."""
    rate, seed = arguments.rates[0], arguments.seeds[0]
    code, base = fine_tune(arguments, f"code-{rate:g}-{seed}", texts["code"]["train"], rate, seed), arguments.base

    def recipe(method: str, weights: dict[Path, float], **more: float) -> dict:
        models = [{"model": str(m), "parameters": {"weight": w, **more}} for m, w in weights.items()]
        return {"merge_method": method, "models": models, "base_model": str(base), "parameters": {"normalize": False}}

    both, sparse = {prose: 1.0, code: 1.0}, {"density": DENSITY}
    models = {
        "base": base,
        "tuned on prose": prose,
        "tuned on code": code,
        "average of the two (task vectors added at half)": merged(
            arguments, "average", {"merge_method": "linear", "models": recipe("linear", both)["models"]}
        ),
        **{
            name: merged(arguments, name.replace(" ", "_"), content)
            for name, content in {
                "task vectors added": recipe("task_arithmetic", both),
                "prose negated": recipe("task_arithmetic", {prose: -1.0}),
                "code negated": recipe("task_arithmetic", {code: -1.0}),
                "TIES": recipe("ties", both, **sparse),
                "DARE linear": recipe("dare_linear", both, **sparse),
                "DARE TIES": recipe("dare_ties", both, **sparse),
            }.items()
        },
    }
    return [
        {"what": name, **{kind: loss(arguments, model, texts[kind]["judge"]) for kind in texts}}
        for name, model in models.items()
    ]


def reordered(source: Path, out: Path) -> Path:
    """The same function with the experts of each layer in another order."""
    model, generator = MoEForCausalLM.from_pretrained(source), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            # turned by one first, so that no expert of few stays by chance where it was
            order = torch.randperm(model.config.num_local_experts, generator=generator).roll(1)
            for parameter in (layer.mlp.gate.weight, *layer.mlp.experts.parameters()):
                parameter.copy_(parameter[order].clone())
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out, load_tokenizer(source))
    return out


def orders(arguments, text: Path) -> list[dict]:
    """The base, and its average with a copy in another order: the loss, and how far the weights are from the base's."""
    copy = reordered(arguments.base, arguments.work / "reordered")
    base, rows = MoEForCausalLM.from_pretrained(arguments.base), []
    models = {"base": arguments.base, "its copy in another order": copy}
    for align in ("weights", "none"):
        models[f"average of the two, align_experts: {align}"] = merged(
            arguments,
            f"aligned-{align}",
            {
                "merge_method": "linear",
                "align_experts": align,
                "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in (arguments.base, copy)],
            },
        )
    for name, directory in models.items():
        other = dict(MoEForCausalLM.from_pretrained(directory).named_parameters())
        far = max((other[key] - p).abs().max().item() for key, p in base.named_parameters())
        rows.append({"what": name, "loss": loss(arguments, directory, text), "largest_difference": far})
    return rows


def as_markdown(results: dict) -> str:
    """The three tables."""
    told = ["| model | active parameters a token | loss on held-out prose |", "|---|---|---|"]
    told += [f"| {r['what']} | {r['active_parameters']:,} | {r['loss']:.4f} |" for r in results["soups"]]
    told += ["", "| model | loss on held-out prose | on held-out code |", "|---|---|---|"]
    told += [f"| {r['what']} | {r['prose']:.4f} | {r['code']:.4f} |" for r in results["tasks"]]
    told += ["", "| model | loss on held-out code | largest difference from the base's weights |", "|---|---|---|"]
    told += [f"| {r['what']} | {r['loss']:.4f} | {r['largest_difference']:.3g} |" for r in results["orders"]]
    return "\n".join(told) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart/checkpoints/latest")
    parser.add_argument("--tokens", type=int, default=200_000, help="training tokens of each fine-tuned model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-4])
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--blocks", type=int, default=64, help="blocks that choose, and that judge")
    parser.add_argument("--max-bytes", type=int, default=6_000_000, help="of prose, and of code")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=ROOT / "runs/merging_benchmark")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not (arguments.base / "config.json").is_file() and moe_llm(
        ["train", str(ROOT / "configs/quickstart.yaml"), f"run.dir={arguments.base.parents[1]}"]
    ):
        raise SystemExit(1)
    (arguments.work / "merged").mkdir(parents=True, exist_ok=True)
    texts = write_texts(arguments.work, arguments.max_bytes)
    results: dict = {
        "environment": {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
            "threads": arguments.threads,
            "packages": {name: version(name) for name in PACKAGES},
            "tokens": arguments.tokens,
            "density": DENSITY,
        }
    }
    results["soups"], tuned = soups(arguments, texts["prose"])
    results["tasks"] = tasks(arguments, texts, next(iter(tuned.values())))
    results["orders"] = orders(arguments, texts["code"]["judge"])
    table = as_markdown(results)
    print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"merging-{results['environment']['date']}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    main()
