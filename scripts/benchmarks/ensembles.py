"""Ensembles measured: fitted weights against the best single model, and a negative model against its source.

    python scripts/benchmarks/ensembles.py                   # pretrains the quickstart's model if it is not there
    python scripts/benchmarks/ensembles.py --tokens 2000 --blocks 4 --samples 2 --max-bytes 20000     # in miniature

Two sources: code (Python's standard library, which the base was pretrained on) and prose (docstrings of packages, which
are not in it). The base goes on with each of them for the same number of tokens; of both texts, files are held out from
training, half of them to fit weights on and half to measure on.

Mixture: losses of the two models, of their uniform mixture and of fitted linear and log-linear ones, on held-out text
of both sources together and on each alone. Predicted: a fitted mixture beats the better model on both together.

Negative: the base with the model of one source as DExperts' negative, at several strengths: losses on both sources, and
the loss that this source's model has on text that the ensemble writes, beside the core's loss on it, since sharper
distributions write what all models find likelier. Predicted: the ensemble's loss on this source, and the negative
model's on what it writes, relative to the core's, rise with the strength.

Results: JSON and a table in Markdown, in --out.
"""

import argparse
import json
import platform
import sys
import sysconfig
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
from finetune import PACKAGES, docstrings, moe_llm_or_exit

from moe_llm.ensemble.ensemble import Ensemble
from moe_llm.ensemble.evaluate import evaluate
from moe_llm.ensemble.fit import fit
from moe_llm.ensemble.processor import generate
from moe_llm.ensemble.recipe import parse_recipe

ROOT = Path(__file__).parents[2]
SOURCES = ("code", "prose")
STRENGTHS = (0.0, 0.25, 0.5, 1.0)
HELD_OUT = 10  # every so many-th document, by turns for fitting and for measuring
DOCUMENT = 4_000  # characters
PROMPTS = {"code": "def ", "prose": "The "}


def documents(source: str) -> Iterator[str]:
    """Pieces of a source's text, a few kilobytes each."""
    if source == "prose":
        texts = (text for package in PACKAGES for text in docstrings(package))
    else:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    for text in texts:
        for start in range(0, len(text), DOCUMENT):
            yield text[start : start + DOCUMENT]


def write_texts(work: Path, max_bytes: int) -> dict[tuple[str, str], Path]:
    """Training, fitting and measuring text of each source, as JSON lines of equal size for both sources."""
    paths = {}
    for source in SOURCES:
        lines: dict[str, list[str]] = {"train": [], "fit": [], "measure": []}
        left = max_bytes
        for n, text in enumerate(documents(source)):
            part = {0: "fit", HELD_OUT // 2: "measure"}.get(n % HELD_OUT, "train")
            lines[part].append(json.dumps({"text": text}))
            left -= len(text.encode())
            if left <= 0 and all(lines.values()):
                break
        for part, found in lines.items():
            paths[source, part] = work / f"{source}-{part}.jsonl"
            paths[source, part].write_text("\n".join(found) + "\n", encoding="utf-8")
    return paths


def tuned(arguments, source: str, text: Path) -> Path:
    """The base after going on with one source; resumed where it was stopped."""
    steps = max(2, arguments.tokens // (16 * arguments.length))
    run_dir = arguments.work.resolve() / source
    content = {
        "run": {"dir": str(run_dir)},
        "model": {"init_from": str(arguments.base.resolve())},
        "data": {"sources": [{"type": "files", "path": str(text.resolve()), "format": "jsonl"}],
                 "sequence_length": arguments.length, "validation_fraction": 0.02,
                 "cache_dir": str(arguments.work.resolve() / "cache")},
        "optim": {"lr": 5e-4, "schedule": "cosine", "warmup_steps": max(1, steps // 20)},
        "train": {"max_steps": steps, "micro_batch_size": 4, "global_batch_size": 16, "precision": "fp32"},
        "checkpoint": {"keep_last": 1},
        "logging": {"console": "off"},
    }  # fmt: skip
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    moe_llm_or_exit("train", str(path))
    return run_dir / "checkpoints/latest"


def losses(ensemble: Ensemble, arguments, texts: dict) -> dict[str, float]:
    """Nats a token on measuring text: of each source, and of both together."""
    named = {source: [str(texts[source, "measure"])] for source in SOURCES}
    named["both"] = [path for paths in named.values() for path in paths]
    return {name: evaluate(ensemble, paths, max_blocks=arguments.blocks)["loss"] for name, paths in named.items()}


def mixture(arguments, models: dict[str, Path], texts: dict) -> list[dict]:
    """A row for each single model and each way of mixing them."""
    members = [{"model": str(models[source])} for source in SOURCES]
    data = [str(texts[source, "fit"]) for source in SOURCES]
    rows = []
    for source, member in zip(SOURCES, members):
        alone = Ensemble(parse_recipe({"method": "linear", "members": [member]}))
        rows.append({"model": f"{source} alone", "weights": [1.0], **losses(alone, arguments, texts)})
    uniform = Ensemble(parse_recipe({"method": "linear", "members": members}))
    rows.append({"model": "uniform mixture", "weights": [0.5, 0.5], **losses(uniform, arguments, texts)})
    for method in ("linear", "log_linear"):
        ensemble = Ensemble(parse_recipe({"method": method, "members": members, "weights": "fit"}))
        found = fit(ensemble, data, max_blocks=arguments.blocks)
        rows.append({"model": f"fitted {method}", "weights": found.recipe.shares, "fitted_on_tokens": found.tokens,
                     **losses(ensemble, arguments, texts)})  # fmt: skip
        print(f"{rows[-1]['model']}: {rows[-1]['both']:.4f} on both", flush=True)
    return rows


def written_losses(ensemble: Ensemble, judges: dict[str, Ensemble], arguments) -> dict[str, float]:
    """Losses of models on samples that an ensemble writes, nats per token."""
    texts = []
    for seed in range(arguments.samples):
        torch.manual_seed(seed)
        prompt = PROMPTS[SOURCES[seed % len(SOURCES)]]
        inputs = ensemble.main.tokenizer(prompt, return_tensors="pt")
        ids = generate(ensemble, inputs, do_sample=True, top_p=0.95, max_new_tokens=arguments.sample_tokens,
                       pad_token_id=ensemble.main.tokenizer.eos_token_id)[0]  # fmt: skip
        texts.append(json.dumps({"text": ensemble.main.tokenizer.decode(ids, skip_special_tokens=True)}))
    path = arguments.work / "samples.jsonl"
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return {name: evaluate(judge, [str(path)])["loss"] for name, judge in judges.items()}


def negative(arguments, models: dict[str, Path], texts: dict) -> list[dict]:
    """A row for each negative model and strength."""
    rows = []
    for source in SOURCES:
        judges = {
            name: Ensemble(parse_recipe({"method": "linear", "members": [{"model": str(model)}]}))
            for name, model in {"by_negative": models[source], "by_core": arguments.base}.items()
        }
        members = [{"model": str(arguments.base), "role": "core"}, {"model": str(models[source]), "role": "negative"}]
        for strength in STRENGTHS:
            ensemble = Ensemble(parse_recipe({"method": "experts", "members": members, "lambda": strength}))
            found = losses(ensemble, arguments, texts)
            found["written"] = written_losses(ensemble, judges, arguments)
            found["away"] = found["written"]["by_negative"] - found["written"]["by_core"]
            rows.append({"negative": source, "lambda": strength, **found})
            print(f"without {source}, lambda {strength}: its model {found['away']:+.4f} to the core", flush=True)
    return rows


def as_markdown(results: dict) -> str:
    """Both tables."""
    told = ["| model | weights (code, prose) | both | code | prose |", "|---|---|---|---|---|"]
    for row in results["mixture"]:
        weights = ", ".join(f"{weight:.3f}" for weight in row["weights"])
        told.append(f"| {row['model']} | {weights} | {row['both']:.4f} | {row['code']:.4f} | {row['prose']:.4f} |")
    told += [
        "",
        "| negative | lambda | code | prose | its samples, by the negative model | by the core | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["negative"]:
        told.append(
            f"| {row['negative']} | {row['lambda']:g} | {row['code']:.4f} | {row['prose']:.4f} | "
            f"{row['written']['by_negative']:.4f} | {row['written']['by_core']:.4f} | {row['away']:+.4f} |"
        )
    return "\n".join(told) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart/checkpoints/latest")
    parser.add_argument("--tokens", type=int, default=500_000, help="training tokens of each model")
    parser.add_argument("--length", type=int, default=256, help="tokens a block in training")
    parser.add_argument("--blocks", type=int, default=64, help="blocks to fit on, and to measure on")
    parser.add_argument("--max-bytes", type=int, default=3_000_000, help="of each source")
    parser.add_argument("--samples", type=int, default=32, help="texts that each ensemble writes")
    parser.add_argument("--sample-tokens", type=int, default=64, help="tokens of each")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/ensembles_benchmark")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not (arguments.base / "config.json").is_file():
        moe_llm_or_exit("train", str(ROOT / "configs/quickstart.yaml"), f"run.dir={arguments.base.parents[1]}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    texts = write_texts(arguments.work, arguments.max_bytes)
    models = {source: tuned(arguments, source, texts[source, "train"]) for source in SOURCES}
    results = {
        "environment": {
            "date": date.today().isoformat(), "command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
            "python": platform.python_version(), "processor": platform.machine(), "tokens": arguments.tokens,
        },
        "mixture": mixture(arguments, models, texts),
        "negative": negative(arguments, models, texts),
    }  # fmt: skip
    table = as_markdown(results)
    print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"ensembles-{results['environment']['date']}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    main()
