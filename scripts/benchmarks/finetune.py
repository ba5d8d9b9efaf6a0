"""Fine-tuning measured: the experts alone against everything, small batches with a high rate against large with a low.

    python scripts/benchmarks/finetune.py                    # pretrains the quickstart's model if it is not there
    python scripts/benchmarks/finetune.py --parts memory       # a few minutes
    python scripts/benchmarks/finetune.py --tokens 20000 --seeds 0 --max-bytes 200000     # in miniature

Memory and time: each choice in a process of its own, on random tokens in the base's shape: seconds a step, peak memory
beyond what the process had before the model, and the bytes of gradients and optimizer state.

Quality: the base, pretrained on the source text of Python's standard library, goes on with prose that is not in it: the
docstrings of packages which this one depends on. Every cell sees the same number of tokens; a seed decides the order of
the data. Losses are those on held-out docstrings; the routers' drift from the base is measured beside them. Runs are
kept in --work and resumed: the same command goes on where it was stopped.

Results: JSON and a table in Markdown, in --out.
"""

import argparse
import ast
import gc
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from moe_llm.cli import main as moe_llm
from moe_llm.config import Config, load_config
from moe_llm.finetune.init_from import complete
from moe_llm.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "numpy", "datasets", "pydantic")
CHOICES = ("experts", "all")
# blocks a step, and the highest rate: four times fewer blocks, at a rate four times higher
BATCHES = {"small batch, high rate": (4, 2e-3), "large batch, low rate": (16, 5e-4)}
SHORTEST = 200  # characters: shorter docstrings are signatures and one-liners rather than prose


def docstrings(package: str) -> Iterator[str]:
    """The longer docstrings of a package, a module at a time, read from its files without importing it."""
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or ():
        for file in sorted(Path(folder).rglob("*.py")):
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):  # templates, and tests of parsers
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
            text = "\n\n".join(dict.fromkeys(doc for doc in found if doc and len(doc) >= SHORTEST))
            if text:
                yield text


def write_text(path: Path, max_bytes: int) -> int:
    """Prose as JSON lines, an equal share of each package at most; returns how many bytes of it there are."""
    lines, total = [], 0
    for package in PACKAGES:
        left = max_bytes // len(PACKAGES)
        for text in docstrings(package):
            if left <= 0:
                break
            lines.append(json.dumps({"text": text}))
            left -= len(text.encode())
            total += len(text.encode())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return total


def run_config(arguments, text: Path, run_dir: Path, train: str, blocks: int, rate: float, seed: int) -> Path:
    """The file of one cell's run."""
    length = arguments.length
    steps = max(2, arguments.tokens // (blocks * length))
    content = {
        "run": {"dir": str(run_dir), "seed": seed},
        "model": {"init_from": str(arguments.base.resolve()), "router_aux_loss_coef": 0.0},
        "data": {
            "sources": [{"type": "files", "path": str(text), "format": "jsonl"}],
            "sequence_length": length,
            "validation_fraction": 0.05,
            "cache_dir": str(arguments.work.resolve() / "cache"),
        },
        "finetune": {"trainable": train, "router_guard": {"action": "log"}},
        "optim": {"lr": rate, "schedule": "cosine", "warmup_steps": max(1, steps // 20), "weight_decay": 0.1},
        "train": {
            "max_steps": steps,
            "micro_batch_size": min(4, blocks),
            "global_batch_size": blocks,
            "precision": arguments.precision,
        },
        "checkpoint": {"keep_last": 1},
        "evaluate": {"every_steps": max(1, steps // 10), "max_blocks": arguments.blocks},
        "logging": {"every_steps": max(1, steps // 10), "console": "off"},
    }
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path


def quality(arguments) -> list[dict]:
    """A row for each cell: losses by seed, and how far the routers have moved."""
    text = arguments.work / "docstrings.jsonl"
    if not text.exists():
        print(f"{write_text(text, arguments.max_bytes):,} bytes of docstrings")
    rows = []
    for train in CHOICES:
        for name, (blocks, rate) in BATCHES.items():
            row = {"train": train, "recipe": name, "blocks": blocks, "rate": rate, "seeds": {}}
            for seed in arguments.seeds:
                run_dir = arguments.work / f"{train}-{blocks}-{seed}"
                start = time.perf_counter()
                moe_llm_or_exit("train", str(run_config(arguments, text, run_dir, train, blocks, rate, seed)))
                measured = [r for r in read_metrics(run_dir / "metrics.jsonl") if r.get("val_loss") is not None]
                row["seeds"][seed] = {
                    "first": measured[0]["val_loss"],
                    "last": measured[-1]["val_loss"],
                    "best": min(r["val_loss"] for r in measured),
                    "bits_per_byte": measured[-1]["val_bits_per_byte"],
                    "router_kl": max(measured[-1]["router_drift"]["kl"]),
                    "router_agreement": min(measured[-1]["router_drift"]["agreement"]),
                    "seconds": time.perf_counter() - start,
                }
                print(f"{train}, {name}, seed {seed}: validation loss {measured[-1]['val_loss']:.4f}", flush=True)
            rows.append(row)
    return rows


def base_loss(arguments, text: Path) -> float:
    """The base's loss on the same held-out blocks, before any step."""
    from moe_llm.checkpoint.pretrained import MoEForCausalLM
    from moe_llm.data.loader import load_data
    from moe_llm.data.packing import model_inputs
    from moe_llm.data.tokenizer import load_tokenizer

    train, (blocks, rate) = CHOICES[0], next(iter(BATCHES.values()))
    path = run_config(arguments, text, arguments.work / "base", train, blocks, rate, 0)
    config = load_config(path, [], complete)
    validation = load_data(config, load_tokenizer(arguments.base), show_progress=False).validation
    model, total = MoEForCausalLM.from_pretrained(arguments.base).eval(), 0.0
    with torch.no_grad():
        for batch in validation.batches(micro_batch_size=4):
            total += model(**model_inputs(batch)).loss_sum.item()
    return total / validation.num_targets


def moe_llm_or_exit(*words: str) -> None:
    code = moe_llm(list(words))
    if code:
        raise SystemExit(code)


def measure(arguments: str) -> None:
    """In a process of its own: seconds of each step, peak memory, and what gradients and optimizer state take."""
    from moe_llm.data.packing import Batch, model_inputs
    from moe_llm.distributed.runtime import start
    from moe_llm.distributed.step_loss import StepLoss
    from moe_llm.train.build import build_trained

    given = json.loads(arguments)
    torch.set_num_threads(given["threads"])
    config: Config = load_config(given["config"], [], complete)
    runtime = start(config)
    before = resident()
    engine, _ = build_trained(config, runtime, None)
    generator, shape = torch.Generator().manual_seed(0), (config.train.micro_batch_size, config.data.sequence_length)
    ids = torch.randint(0, config.model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    batch = Batch(
        ids[:, :-1], ids[:, 1:], torch.arange(shape[1]).expand(shape), None, torch.ones(shape, dtype=torch.bool)
    ).to(runtime.device)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    seconds, gradients = [], 0
    for _ in range(given["steps"]):
        begin = time.perf_counter()
        losses = StepLoss(config.model, runtime, [batch])(engine.forward(**model_inputs(batch)))
        engine.backward(losses.total, last=True)
        gradients = sum(p.grad.nbytes for group in engine.optimizer.param_groups for p in group["params"])
        engine.step(1e-5)
        seconds.append(time.perf_counter() - begin)
    trained = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    state = sum(
        engine_state.nbytes
        for tensors in engine.optimizer.state.values()
        for name, engine_state in tensors.items()
        if name in engine.kinds
    )
    print(
        json.dumps(
            {
                "seconds": statistics.median(seconds[1:]),
                "peak": resident("VmHWM") - before,
                "parameters": sum(p.nbytes for p in engine.model.parameters()),
                "gradients": gradients,
                "optimizer_state": state,
                "optimizer_state_of_frozen": state - 4 * len(engine.kinds) * trained,  # fp32
            }
        )
    )


def resident(field: str = "VmRSS") -> int:
    """Bytes, as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def memory(arguments) -> list[dict]:
    """A row for each choice of what is trained."""
    text = arguments.work / "docstrings.jsonl"
    if not text.exists():
        write_text(text, arguments.max_bytes)
    rows = []
    for train in CHOICES:
        config = run_config(arguments, text, arguments.work / f"memory-{train}", train, 4, 1e-4, 0)
        given = {"config": str(config), "steps": arguments.rounds, "threads": arguments.threads}
        done = subprocess.run(
            [sys.executable, __file__, "--measure", json.dumps(given)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        rows.append({"train": train, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    return rows


def as_markdown(results: dict) -> str:
    """Both tables."""
    told = []
    if results.get("memory"):
        told += [
            "| trained | seconds a step | peak | gradients | optimizer state | of it for frozen tensors |",
            "|---|---|---|---|---|---|",
        ]
        told += [
            f"| `{r['train']}` | {r['seconds']:.3f} | "
            + " | ".join(f"{r[key] / 2**20:.1f} MiB" for key in ("peak", "gradients", "optimizer_state"))
            + f" | {r['optimizer_state_of_frozen']} B |"
            for r in results["memory"]
        ]
    if results.get("quality"):
        told += ["", f"Base: {results['base_loss']:.4f} nats per token on the same held-out blocks.", ""]
        told += [
            "| trained | recipe | blocks a step, rate | validation loss, by seed | mean | deviation | router KL |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in results["quality"]:
            cells = list(row["seeds"].values())
            losses = [cell["last"] for cell in cells]
            deviation = statistics.stdev(losses) if len(losses) > 1 else math.nan
            told.append(
                f"| `{row['train']}` | {row['recipe']} | {row['blocks']}, {row['rate']:g} | "
                f"{', '.join(f'{loss:.4f}' for loss in losses)} | {statistics.mean(losses):.4f} | {deviation:.4f} | "
                f"{statistics.mean(cell['router_kl'] for cell in cells):.4f} |"
            )
    return "\n".join(told).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart/checkpoints/latest")
    parser.add_argument("--parts", nargs="+", choices=["memory", "quality"], default=["memory", "quality"])
    parser.add_argument("--tokens", type=int, default=500_000, help="training tokens of each cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--blocks", type=int, default=64, help="validation blocks")
    parser.add_argument("--max-bytes", type=int, default=6_000_000, help="of docstrings")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=8, help="steps timed, the first left out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=ROOT / "runs/finetune_benchmark")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure)
    torch.set_num_threads(arguments.threads)
    if not (arguments.base / "config.json").is_file():
        moe_llm_or_exit("train", str(ROOT / "configs/quickstart.yaml"), f"run.dir={arguments.base.parents[1]}")
    arguments.work.mkdir(parents=True, exist_ok=True)
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
            "precision": arguments.precision,
        }
    }
    if "memory" in arguments.parts:
        results["memory"] = memory(arguments)
    if "quality" in arguments.parts:
        results["quality"] = quality(arguments)
        results["base_loss"] = base_loss(arguments, arguments.work / "docstrings.jsonl")
    table = as_markdown(results)
    print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"finetune-{results['environment']['date']}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    main()
