"""Ways to use many models, measured on real text: what each gains, and what it costs in passes.

    python scripts/benchmarks/many_models.py                       # tiny models, a few minutes each on two cores
    python scripts/benchmarks/many_models.py --steps 4 --blocks 2 --only context      # in miniature

Text: code (the standard library's modules) and prose (their docstrings and those of installed packages), files held out
from training. All models are the same tiny mixture of experts with one tokenizer, trained for `--steps` steps.

context: a model of each source, mixed by constants and by the context, on documents of both in turn. Predicted: weights by
context beat the best constants.
bagging: three models on resampled blocks against one on all, and Monte-Carlo dropout of that one. Predicted: the mean of
three beats each of them; where members disagree more, losses are higher (rank correlation over blocks).
edits: a model trained with `augment: edits` restores corrupted code; share of words that are the original's, before and
after rounds, and the loss that the model gives the original when it sees the text. Predicted: no gain, for a model this
small.
chain: two models that restore, one after the other, with one output passed on or several; the same measures.
Predicted: no more than one restoration, for models this small.
merging: one base that is trained further on code and on prose, and every method of `moe-llm merge` that takes several
models, at its defaults; loss on both texts, on code and on prose. Predicted: what goes half way is best on both together.
deliberation: a second model trained on triples of input, draft and answer: loss of the answer with the model's own drafts
in sight, and of the same answer by the first model without. Predicted: nothing lost.
meta: plain training on several sources against Reptile, FOMAML and MAML of as many steps: loss on a source that none has
seen, before and after some steps of adaptation. Predicted: meta-learned weights gain more.

Results: JSON and tables in Markdown, in --out.
"""

import argparse
import difflib
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from finetune import PACKAGES, docstrings, moe_llm_or_exit

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.data.edits import corrupt_text
from moe_llm.data.loader import load_evaluation
from moe_llm.data.packing import model_inputs
from moe_llm.data.tokenizer import load_tokenizer
from moe_llm.distill.drafts import TEMPLATE, continuation_log_probability
from moe_llm.ensemble.ensemble import Ensemble
from moe_llm.ensemble.evaluate import evaluate
from moe_llm.ensemble.fit import fit
from moe_llm.ensemble.models import load_models
from moe_llm.ensemble.recipe import ChainRecipe, EditsRecipe, Member, parse_recipe
from moe_llm.ensemble.requests import fill
from moe_llm.ensemble.scores import document_rows, load_text, score_rows
from moe_llm.ensemble.text_steps import chain as answer_by_chain
from moe_llm.ensemble.text_steps import refine_by_edits
from moe_llm.merge.methods import METHODS
from moe_llm.merge.recipe import parse_recipe as parse_merge
from moe_llm.merge.run import merge_recipe

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512,
}  # fmt: skip
LENGTH, PIECE = 128, 600  # tokens of a block; characters of a document


def texts_of(source: str) -> Iterator[str]:
    if source == "prose":
        for package in PACKAGES:
            yield from docstrings(package)
        return
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_text(encoding="utf-8", errors="ignore")


def pieces(source: str, most: int) -> list[str]:
    """Documents of a few hundred characters."""
    cut = (text[at : at + PIECE] for text in texts_of(source) for at in range(0, len(text), PIECE))
    return list(islice((piece for piece in cut if len(piece.split()) > 20), most))


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


class Bench:
    """Texts, and models by name: trained once, read afterwards."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.held: dict[str, list[str]] = {}
        for source in ("code", "prose"):
            found = pieces(source, args.documents)
            random.Random(0).shuffle(found)
            count = len(found) // 10
            self.held[source] = found[:count]
            write_rows(self.work / f"{source}.jsonl", found[count:])
        write_rows(self.work / "both.jsonl", self._in_turn(slice(1, None, 2)))
        write_rows(self.work / "fit.jsonl", self._in_turn(slice(0, None, 2)))

    def _in_turn(self, part: slice) -> list[str]:
        """Held-out documents of both sources, each pair joined, so that the source changes within a document."""
        pairs = zip(self.held["code"][part], self.held["prose"][part])
        return [f"{a}\n{b}" if i % 2 else f"{b}\n{a}" for i, (a, b) in enumerate(pairs)]

    def train(self, name: str, sources: list[dict[str, Any]], **sections: Any) -> Path:
        run = self.work / name
        raw: dict[str, Any] = {
            "run": {"dir": str(run)},
            "model": SIZES,
            "data": {"sources": sources, "sequence_length": LENGTH, "validation_fraction": 0.02,
                     "cache_dir": str(self.work / "cache")},
            "optim": {"lr": 3e-3, "warmup_steps": 10},
            "train": {"max_steps": self.args.steps, "micro_batch_size": 8, "global_batch_size": 16, "precision": "fp32"},
            "checkpoint": {"keep_last": 1},
            "evaluate": {"max_blocks": 4},
            "logging": {"console": "off"},
        }  # fmt: skip
        base = self.work / "first/checkpoints/latest"
        if name != "first":
            raw["tokenizer"] = {"path": str(base)}
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        path = self.work / f"{name}.yaml"
        path.write_text(json.dumps(raw), encoding="utf-8")  # JSON is YAML
        moe_llm_or_exit("train", str(path))
        return run / "checkpoints/latest"

    def source(self, name: str, **more: Any) -> dict[str, Any]:
        return {"type": "files", "path": str(self.work / f"{name}.jsonl"), "format": "jsonl", **more}

    def first(self) -> Path:
        """On both sources; its tokenizer is everyone's."""
        return self.train("first", [self.source("code", weight=1), self.source("prose", weight=1)])

    def file(self, name: str) -> list[str]:
        return [str(self.work / f"{name}.jsonl")]


def context(bench: Bench) -> list[dict[str, Any]]:
    bench.first()
    members = [{"model": str(bench.train(name, [bench.source(name)]))} for name in ("code", "prose")]
    rows = []
    for name, recipe in (
        ("code alone", {"method": "linear", "members": members[:1]}),
        ("prose alone", {"method": "linear", "members": members[1:]}),
        ("fitted constants", {"method": "linear", "members": members, "weights": "fit"}),
        ("by recent losses", {"method": "contextual", "members": members}),
        ("by the hidden state", {"method": "contextual", "members": members, "features": "hidden"}),
    ):
        ensemble = Ensemble(parse_recipe(recipe))
        if ensemble.recipe.to_fit:
            fit(ensemble, bench.file("fit"), max_blocks=bench.args.blocks)
        loss = evaluate(ensemble, bench.file("both"), max_blocks=bench.args.blocks)["loss"]
        rows.append({"model": name, "loss, nats per token": loss, "passes a token": len(ensemble.models)})
    return rows


def bagging(bench: Bench) -> list[dict[str, Any]]:
    first = bench.first()
    both = [bench.source("code", weight=1), bench.source("prose", weight=1)]
    bags = [bench.train(f"bag{seed}", both, data={"bootstrap_seed": seed, "sources": both, "sequence_length": LENGTH,
            "validation_fraction": 0.02, "cache_dir": str(bench.work / "cache")}, run={"seed": seed,
            "dir": str(bench.work / f"bag{seed}")}) for seed in (1, 2, 3)]  # fmt: skip
    rows = []
    for name, recipe in (
        ("one model", {"method": "linear", "members": [{"model": str(first)}]}),
        ("mean of three bags", {"method": "linear", "members": [{"model": str(bag)} for bag in bags]}),
        ("mc_dropout 0.1, 8 passes", {"method": "mc_dropout", "members": [{"model": str(first)}], "passes": 8}),
    ):
        ensemble = Ensemble(parse_recipe(recipe))
        found = evaluate(ensemble, bench.file("both"), max_blocks=bench.args.blocks)
        rows.append(
            {
                "model": name,
                "loss, nats per token": found["loss"],
                "members' mean loss": sum(m["loss"] for m in found["members"]) / len(found["members"]),
                "disagreement": found["disagreement"],
                "rank correlation with the loss": by_block(ensemble, bench),
                "passes a token": len(ensemble.models),
            }
        )
    return rows


def by_block(ensemble: Ensemble, bench: Bench) -> float:
    """Spearman's, of a document's mean disagreement and its mean loss; 0 of one member, who never disagrees."""
    if len(ensemble.models) == 1:
        return 0.0
    text, pairs = load_text(ensemble, bench.file("both"), bench.args.blocks), []
    for batch in text.batches(micro_batch_size=1):
        for rows in document_rows(batch, LENGTH):
            scored = score_rows(ensemble, rows)
            mixed = ensemble.rule(scored.log_probs)
            loss = -mixed.gather(1, scored.targets_N[:, None]).mean().item()
            pairs.append((ensemble.rule.disagreement(scored.log_probs, mixed).mean().item(), loss))
    ranks = torch.tensor(pairs).argsort(0).argsort(0).double()
    return float(torch.corrcoef(ranks.T)[0, 1]) if len(pairs) > 2 else 0.0


def restorer(bench: Bench, name: str = "edits", seed: int = 0) -> Path:
    """A model that restores corrupted code."""
    bench.first()
    source = bench.source("code", augment={"kind": "edits", "rate": 0.4})
    return bench.train(name, [source], run={"seed": seed, "dir": str(bench.work / name)})


def corrupted(bench: Bench) -> tuple[list[str], list[str]]:
    """Lines of held-out code, and the same with 30% of their words edited."""
    draw = random.Random(0)
    lines = [" ".join(text.split()[:12]) for text in bench.held["code"][: bench.args.texts]]
    return lines, [corrupt_text(line, 0.3, draw) for line in lines]


GREEDY = {"max_new_tokens": 32, "do_sample": False}
RESTORE = "{draft}\n=>\n"  # what a restorer continues


def restored(scorer: Any, told: str, found: list[str], lines: list[str], calls: int) -> dict[str, Any]:
    """A row of a table: how much of the original a text has, and how much of it a model can tell from the text."""
    losses = [
        -continuation_log_probability(scorer, fill(RESTORE, draft=text), line) for text, line in zip(found, lines)
    ]
    return {
        "text": told,
        "words that are the original's": likeness(found, lines),
        "loss of the original, given the text": sum(losses) / len(losses),
        "calls": calls,
    }


def edits(bench: Bench) -> list[dict[str, Any]]:
    model = restorer(bench)
    [loaded] = load_models([Member(model=str(model))])
    lines, drafts = corrupted(bench)
    rows = [restored(loaded, "corrupted, 30% of the words", drafts, lines, 0)]
    for rounds in (1, 2):
        recipe = EditsRecipe(
            method="edits", members=[Member(model=str(model))], rounds=rounds, rate=0.2, template=RESTORE
        )
        found = [
            refine_by_edits(recipe, [loaded], fill(RESTORE, draft=draft), GREEDY, lambda _: None) for draft in drafts
        ]
        told = f"restored, and {rounds} more round{'s' * (rounds > 1)} of edits"
        rows.append(restored(loaded, told, found, lines, 1 + rounds))
    return rows


def chain(bench: Bench) -> list[dict[str, Any]]:
    paths = [restorer(bench), restorer(bench, "edits-again", seed=1)]
    loaded, (lines, drafts) = load_models([Member(model=str(path)) for path in paths]), corrupted(bench)
    rows = [restored(loaded[0], "corrupted, 30% of the words", drafts, lines, 0)]
    for steps, n_best in ((1, 1), (2, 1), (2, 3)):
        members = [{"model": str(path), "template": "{output}\n=>\n"} for path in paths[:steps]]
        recipe = parse_recipe({"method": "chain", "members": members, "n_best": n_best})
        assert isinstance(recipe, ChainRecipe)
        found = [answer_by_chain(recipe, loaded[:steps], draft, GREEDY, lambda _: None) for draft in drafts]
        told = "one model restores" if steps == 1 else f"and another its answer, {n_best} passed on"
        rows.append(restored(loaded[0], told, found, lines, 1 + n_best * (steps - 1)))
    return rows


def merging(bench: Bench) -> list[dict[str, Any]]:
    base = bench.first()
    further = {"model": {"init_from": str(base)}, "optim": {"lr": 1e-3, "warmup_steps": 2}}
    tuned = [bench.train(f"{name}-further", [bench.source(name)], **further) for name in ("code", "prose")]
    for name in ("code", "prose"):
        write_rows(bench.work / f"held-{name}.jsonl", bench.held[name])
    texts = {"both": bench.file("both"), "code": bench.file("held-code"), "prose": bench.file("held-prose")}

    def losses(paths: list[Path]) -> dict[str, float]:
        ensemble = Ensemble(parse_recipe({"method": "linear", "members": [{"model": str(path)} for path in paths]}))
        return {name: evaluate(ensemble, files, max_blocks=bench.args.blocks)["loss"] for name, files in texts.items()}

    rows = [
        {"model": name, **losses(paths), "passes a token": len(paths)}
        for name, paths in (("base", [base]), ("code", tuned[:1]), ("prose", tuned[1:]), ("ensemble of both", tuned))
    ]
    for method, about in METHODS.items():
        if about.most == 1:
            continue
        several = [base, *tuned] if method == "model_stock" else tuned
        recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(path)} for path in several]}
        wanted = {"weight": 1.0 if about.needs_base else 0.5, "density": 0.5, "t": 0.5}
        recipe["parameters"] = {key: value for key, value in wanted.items() if key in about.parameters}
        if method == "slerp":
            recipe["base_model"] = str(tuned[0])
        elif about.needs_base:
            recipe["base_model"] = str(base)
        out = bench.work / f"merged-{method}"
        if not out.exists():
            merge_recipe(parse_merge(recipe), out)
        rows.append({"model": f"merged: {method}", **losses([out]), "passes a token": 1})
    return rows


def likeness(found: list[str], lines: list[str]) -> float:
    """Mean over texts of difflib's ratio of words, what is said beyond the original's length left out."""
    ratios = [
        difflib.SequenceMatcher(None, text.split()[: len(line.split())], line.split(), autojunk=False).ratio()
        for text, line in zip(found, lines)
    ]
    return sum(ratios) / len(ratios)


def deliberation(bench: Bench) -> list[dict[str, Any]]:
    first, out = bench.first(), bench.work / "triples.jsonl"
    count = str(4 * bench.args.texts)
    if not out.exists():
        moe_llm_or_exit(
            "generate-dataset", str(first), str(bench.work / "code.jsonl"), "--out", str(out), "--continue", "24",
            "--max-new-tokens", "24", "--drafts", "2", "--beams", "1", "--temperature", "1", "--reward", "overlap",
            "--limit", count,
        )  # fmt: skip
    second = bench.train("second", [bench.source("triples"), bench.source("code")], model={"init_from": str(first)})
    models = dict(zip(("first", "second"), load_models([Member(model=str(m)) for m in (first, second)])))
    held = [text for text in bench.held["code"] if len(text) > 300][: bench.args.texts]
    names = ("first, without a draft", "second, without a draft", "second, with the first one's draft")
    losses: dict[str, list[float]] = {name: [] for name in names}
    tokenizer = models["first"].tokenizer
    for text in held:
        begin, gold = text[:80], text[80:300]
        ids = tokenizer(begin, return_tensors="pt")
        torch.manual_seed(0)
        said = models["first"].model.generate(
            **ids, max_new_tokens=24, do_sample=True, top_k=0, pad_token_id=tokenizer.eos_token_id
        )
        draft = tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        asked = fill(TEMPLATE, input=begin, output=draft)
        for name, model, prompt in zip(names, ("first", "second", "second"), (begin, begin, asked)):
            losses[name].append(-continuation_log_probability(models[model], prompt, gold))
    calls = dict(zip(names, ("1 pass", "1 pass", "1 pass, and one call of generate()")))
    return [
        {"model": name, "loss of the answer, nats per token": sum(found) / len(found), "cost": calls[name]}
        for name, found in losses.items()
    ]


def meta(bench: Bench) -> list[dict[str, Any]]:
    """Tasks are the code of modules by their first letter; the held-out task is prose."""
    bench.first()
    texts = [json.loads(line)["text"] for line in (bench.work / "code.jsonl").read_text().splitlines()]
    tasks = []
    for number in range(4):
        write_rows(bench.work / f"task{number}.jsonl", texts[number::4])
        tasks.append(bench.source(f"task{number}", weight=1))
    settings = {"inner_steps": 3, "inner_lr": 0.3, "blocks": 4}
    rows = []
    plain = {"max_steps": bench.args.steps, "micro_batch_size": 8, "global_batch_size": 16, "precision": "fp32"}
    for name, train, cost in (
        ("plain training", plain, 1),
        ("reptile", {**plain, "meta": {"method": "reptile", **settings}}, 4),
        ("fomaml", {**plain, "meta": {"method": "fomaml", **settings}}, 4),
        ("maml", {**plain, "meta": {"method": "maml", **settings}}, 10),
    ):
        optim = {"name": "sgd", "lr": 0.5, "grad_clip": 0.0, "weight_decay": 0.0} if name == "reptile" else {"lr": 3e-3}
        more = {"train": {**train, "max_steps": bench.args.steps // 4}, "optim": optim}
        path = bench.train(f"meta-{name.split()[0]}", tasks, **more)
        before, after = adapted(bench, path, settings)
        told = {"weights": name, "before": before, "after 3 steps": after, "gain": before - after}
        rows.append({**told, "forward and backward passes a step": f"{cost}x"})
    return rows


def adapted(bench: Bench, path: Path, settings: dict[str, Any]) -> tuple[float, float]:
    """Losses on held-out prose before and after some steps of gradient descent on prose."""
    model, tokenizer = MoEForCausalLM.from_pretrained(path, "fp32"), load_tokenizer(path)
    measure = write_rows(bench.work / "measure.jsonl", bench.held["prose"])

    def batches(file: Path, count: int) -> list[Any]:
        text = load_evaluation(str(file), tokenizer, sequence_length=LENGTH, max_blocks=count)
        return list(text.batches(micro_batch_size=settings["blocks"]))

    @torch.no_grad()
    def loss() -> float:
        outputs = [model(**model_inputs(batch)) for batch in batches(measure, bench.args.blocks)]
        return float(sum(o.loss_sum for o in outputs) / sum(o.num_targets for o in outputs))

    before = loss()
    for batch in batches(bench.work / "prose.jsonl", settings["inner_steps"] * settings["blocks"]):
        model.zero_grad()
        model(**model_inputs(batch)).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= settings["inner_lr"] * parameter.grad
    return before, loss()


PARTS = {
    "context": context,
    "bagging": bagging,
    "edits": edits,
    "chain": chain,
    "deliberation": deliberation,
    "meta": meta,
    "merging": merging,
}


def table(rows: list[dict[str, Any]]) -> str:
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of each model")
    parser.add_argument("--documents", type=int, default=3000, help="of each source")
    parser.add_argument("--blocks", type=int, default=24, help="to fit on, and to measure on")
    parser.add_argument("--texts", type=int, default=24, help="that are written or restored")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, default=ROOT / "runs/many_models_benchmark")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    bench, results = Bench(args), {}
    for name in args.only:
        results[name] = PARTS[name](bench)
        print(f"\n{name}\n\n{table(results[name])}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"many-models-{date.today().isoformat()}"
    environment = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
    }
    content = {"environment": environment, "steps": args.steps, "results": results}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join(f"## {name}\n\n{table(rows)}" for name, rows in results.items())
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
