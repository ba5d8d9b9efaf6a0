"""Does a student learn more from an ensemble than from the text alone? Same student, tokens and seeds.

    python scripts/experiments/distill.py                          # on the quickstart's text; about an hour on 2 cores
    python scripts/experiments/distill.py --teacher-steps 20 --steps 20 --seeds 0 1 train.global_batch_size=4

Trains `--teachers` models of CONFIG, which differ in their seed, and then, for each seed of `--seeds`, the student of
`configs/distill/word_level.yaml` several times on the same blocks in the same order: on the text alone; with the first
teacher beside it; with all of them; and, with --cached, with all of them, of which a cache names 64 successors.
Validation losses are those of the text, on the same held-out blocks; the teachers', and that of their mean of
probabilities, stand beside them. Runs are kept in --work and resumed: the same command goes on where it was stopped.

Trailing section.key=value are overrides of every run. Results: JSON and a table in Markdown, in --out.
"""

import argparse
import json
import math
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

import torch
import yaml

from moe_llm.cli import main as moe_llm
from moe_llm.config import load_config
from moe_llm.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def train(config: Path, run_dir: Path, *words: str) -> float:
    """A run's last validation loss, nats per token; a run that has ended is not repeated."""
    code = moe_llm(["train", str(config), f"run.dir={run_dir}", "logging.console=off", *words])
    if code:
        raise SystemExit(code)
    return next(r["val_loss"] for r in reversed(read_metrics(run_dir / "metrics.jsonl")) if "val_loss" in r)


def train_teachers(arguments) -> tuple[list[Path], list[float]]:
    """Checkpoints and validation losses; all with the first one's tokenizer."""
    paths, losses = [], []
    for number in range(arguments.teachers):
        run_dir = arguments.work / f"teacher-{number}"
        tokenizer = [f"tokenizer.path={paths[0]}"] if paths else []
        words = [
            f"run.seed={1000 + number}",
            f"train.max_steps={arguments.teacher_steps}",
            "evaluate.sample_prompt=null",
            *tokenizer,
            *arguments.overrides,
        ]
        losses.append(train(arguments.config, run_dir, *words))
        paths.append((run_dir / "checkpoints/latest").resolve())
        print(f"teacher {number}: validation loss {losses[-1]:.4f}", flush=True)
    return paths, losses


def students(arguments, teachers: list[Path]) -> dict[str, dict]:
    """Name -> the distillation section."""
    every = [{"path": str(path)} for path in teachers]
    how = {"alpha": arguments.alpha, "temperature": arguments.temperature, "divergence": arguments.divergence}
    return {
        "text alone": {},
        "one teacher": {"teachers": every[:1], **how},
        f"ensemble of {len(every)}": {"teachers": every, **how},
        **(
            {f"ensemble of {len(every)}, 64 successors": {"teachers": every, "cache_top_k": 64, **how}}
            if arguments.cached
            else {}
        ),
    }


def train_students(arguments, teachers: list[Path]) -> list[dict]:
    """A row for each way to learn."""
    base, rows = yaml.safe_load(arguments.student.read_text(encoding="utf-8")), []
    for number, (name, distill) in enumerate(students(arguments, teachers).items()):
        raw = {**base, "distill": distill, "tokenizer": {"path": str(teachers[0])}}
        config = arguments.work / f"student-{number}.yaml"
        config.write_text(yaml.safe_dump(raw), encoding="utf-8")
        losses = {}
        for seed in arguments.seeds:
            losses[seed] = train(
                config,
                arguments.work / f"student-{number}-{seed}",
                f"run.seed={seed}",
                f"train.max_steps={arguments.steps}",
                "evaluate.sample_prompt=null",
                *arguments.overrides,
            )
            print(f"{name}, seed {seed}: validation loss {losses[seed]:.4f}", flush=True)
        rows.append({"learns from": name, "losses": losses})
    return rows


@torch.no_grad()
def ensemble_loss(arguments, teachers: list[Path]) -> float:
    """Of the teachers' mean of probabilities, on the students' held-out blocks."""
    from moe_llm.data.loader import load_data
    from moe_llm.data.packing import IGNORED
    from moe_llm.data.tokenizer import load_tokenizer, resolve_vocab
    from moe_llm.distill.teachers import load_ensemble

    tokenizer = load_tokenizer(teachers[0])
    given = load_config(arguments.work / "student-2.yaml", [*arguments.overrides, "distill.temperature=1"])
    config = resolve_vocab(given, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ensemble, validation = load_ensemble(config, device), load_data(config, tokenizer, show_progress=False).validation
    total = 0.0
    for batch in validation.batches(micro_batch_size=config.train.micro_batch_size):
        labels_N, hidden = batch.labels_BS[batch.labels_BS != IGNORED].to(device), ensemble.hidden(batch)
        for start in range(0, len(labels_N), 512):
            rows_N = labels_N[start : start + 512]
            log_p_NV = ensemble.log_p(hidden, start, start + len(rows_N), device)
            total -= log_p_NV.gather(1, rows_N[:, None]).double().sum().item()
    return total / validation.num_targets


def as_markdown(results: dict) -> str:
    """One table, and in a sentence what the ensemble gives over the text alone, by seed."""
    told = ["| learns from | validation loss, by seed | mean | deviation |", "|---|---|---|---|"]
    for row in results["students"]:
        losses = list(row["losses"].values())
        deviation = statistics.stdev(losses) if len(losses) > 1 else math.nan
        told.append(
            f"| {row['learns from']} | {', '.join(f'{loss:.4f}' for loss in losses)} "
            f"| {statistics.mean(losses):.4f} | {deviation:.4f} |"
        )
    text, ensemble = (results["students"][i]["losses"] for i in (0, 2))
    gains = [text[seed] - ensemble[seed] for seed in text]
    told += [
        "",
        f"Teachers: {', '.join(f'{loss:.4f}' for loss in results['teachers'])}; their mean of probabilities: "
        f"{results['ensemble']:.4f}. The ensemble's student is below the text's by "
        f"{statistics.mean(gains):+.4f} nats per token ({', '.join(f'{gain:+.4f}' for gain in gains)} by seed).",
    ]
    return "\n".join(told) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml", help="the teachers' run")
    parser.add_argument("--student", type=Path, default=ROOT / "configs/distill/word_level.yaml")
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=240)
    parser.add_argument("--steps", type=int, default=240, help="of each student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--cached", action="store_true", help="one way to learn more: from a cache")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/distill_experiment")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments, overrides = parser.parse_known_args()
    wrong = next((word for word in overrides if word.startswith("-") or "=" not in word), None)
    if wrong is not None:
        parser.error(f"unrecognized argument: {wrong}")
    arguments.overrides, arguments.work = overrides, arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    teachers, losses = train_teachers(arguments)
    results = {
        "environment": {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "teachers": losses,
        "students": train_students(arguments, teachers),
        "ensemble": ensemble_loss(arguments, teachers),
    }
    table = as_markdown(results)
    print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"distill-{results['environment']['date']}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    main()
