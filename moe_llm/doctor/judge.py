"""The package's data, schedule and optimizer beside the oracle's: findings."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_llm.config import Config
from moe_llm.data.loader import Data
from moe_llm.distributed.state import EMA
from moe_llm.doctor.compare import ORTHOGONAL, ROUNDING, Whole, apart, relative, whole
from moe_llm.doctor.findings import Finding, exact, note, within
from moe_llm.doctor.observe import Observation, digests, read_data
from moe_llm.doctor.oracle import average, chat, initial, optimizer, order, schedule
from moe_llm.doctor.oracle.text import Judged, Text, documents
from moe_llm.doctor.shrink import replace
from moe_llm.train import trainer

_UPDATES = 2e-4  # of what training has changed so far: rounding of torch's fused and plain optimizers
_MOMENTS = 1e-4
_EIGHT_BITS = 0.1  # moments in 8 bits have a relative error of some per cent
_SOURCE = {
    "adamw": "torch's AdamW",
    "adamw_8bit": "torch's AdamW",
    "sgd": "torch's SGD",
    "muon": "torch's Muon",
    "lion": "Lion's algorithm",
    "schedule_free": "the algorithm of schedule-free AdamW",
}
# where gradients are clipped in bf16, as the weights are
_NARROW_MOMENTS = 1e-2
_MAX_SAMPLES = 4096
_CHAT = "chat: the answer and the end of its turn are learned, the question is not"
_TEXT = "blocks are the raw text: targets, borders, padding, every token once"


def judge_text(config: Config) -> list[Finding]:
    """Blocks of the small run's text, and their order. Chat is judged by `judge_conversations`."""
    if config.data.has_chat:
        return []
    from transformers import PreTrainedTokenizerFast  # the Auto class would build LlamaTokenizer by rules of its own

    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(config.run.dir) / "tokenizer")
    data = read_data(config)
    texts = [Text(documents([Path(str(source.path))], tokenizer)) for source in config.data.sources]
    held_out = [Text(documents([Path(str(source.path))], tokenizer)) for source in config.data.validation_sources]
    samples, epoch, wrong, judged = _read_epochs(config, data, texts)
    wrong_held_out, twice = _judge_held_out(config, data, held_out or texts, None if held_out else judged)
    for number, (text, found) in enumerate(zip(texts, judged)):
        wrong += [f"source {number}: {reason}" for reason in text.once(found)]
    weights = [source.weight for source in config.data.sources]
    if not samples:
        return [
            exact("oracle_text", _TEXT, wrong + wrong_held_out),
            note("sources hold the same text, so their shares and repeats are not judged"),
        ]
    disorder = order.judge_seeds(_orders_of_seeds(config, min(epoch, 64)))
    if None in weights or len(weights) == 1:
        disorder += order.judge_repeats(samples, epoch) + order.judge_epochs(samples, epoch)
    else:
        disorder += order.judge_weights(samples, [weight or 0.0 for weight in weights])
        for number in range(len(texts)):
            own = [sample for sample in samples if sample[0] == number]
            disorder += [
                f"source {number}: {reason}" for reason in order.judge_repeats(own, len(data.train.sources[number]))
            ]
    return [
        exact(
            "oracle_text",
            "blocks are the raw text: targets, borders, padding, every token once",
            wrong + wrong_held_out,
        ),
        exact("oracle_order", "each block once an epoch, shuffled by seed and epoch, sources by weight", disorder),
        exact("oracle_held_out", "no document is both trained on and held out", twice),
    ]


def judge_conversations(config: Config, checkpoint: str) -> list[Finding]:
    """Blocks of chat beside what the tokenizer and the template of a checkpoint make of the rows."""
    files = [Path(str(source.path)) for source in config.data.sources if source.content == "chat"]
    if not files:
        return []
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    if not tokenizer.chat_template:
        return [exact("oracle_chat", _CHAT, ["the checkpoint's tokenizer has no chat template"])]
    data = read_data(config)
    batch = data.train.rows(0, min(2 * len(data.train), _MAX_SAMPLES))
    told = chat.conversations(files, tokenizer)
    wrong, judged = chat.judge_chat(batch, told, config.data.sequence_length)
    if not judged and not wrong:
        return [note(f"none of {len(told)} conversations fits into a block: what of them is learned is not judged")]
    return [exact("oracle_chat", f"{_CHAT} ({judged} conversations)", wrong)]


def _orders_of_seeds(config: Config, count: int) -> list[list[str]]:
    """The first samples of a few seeds, over the same text: which part of it is held out would depend on the seed too,
    so another text is."""
    other = Path(config.run.dir) / "held_out.jsonl"
    other.write_text(json.dumps({"text": "a text of its own"}) + "\n", encoding="utf-8")
    seeds = range(config.run.seed, config.run.seed + 4)
    whole_text = {"validation_sources": [{"type": "files", "path": str(other), "format": "jsonl"}]}
    return [
        digests(read_data(replace(config, run={"seed": seed}, data=whole_text)).train.rows(0, count)) for seed in seeds
    ]


def _read_epochs(
    config: Config, data: Data, texts: Sequence[Text]
) -> tuple[list[order.Sample], int, list[str], list[Judged]]:
    """(samples of four epochs, or with weights of one of the source that takes longest; samples of an epoch; what is
    wrong with blocks; what each source's text made of its first epoch)."""
    weighted = len(texts) > 1 and all(source.weight is not None for source in config.data.sources)
    sizes = [len(source) for source in data.train.sources]
    epoch = sum(sizes)
    count = 4 * epoch
    if weighted:
        weights = [source.weight or 0.0 for source in config.data.sources]
        count = math.ceil(max(size * sum(weights) / weight for size, weight in zip(sizes, weights))) + 4 * len(sizes)
    batch = data.train.rows(0, min(count, _MAX_SAMPLES))
    best_fit = config.data.packing == "best_fit"
    rows, samples, wrong = digests(batch), [], []
    judged = [Judged(times=np.zeros(len(text.tokens), np.int64)) for text in texts]
    left, shared = list(sizes), False
    for number, digest in enumerate(rows):
        row = batch.rows(number, number + 1)
        here = [text.judge(row, config.data.isolate_documents, best_fit) for text in texts]
        fitting = [i for i, found in enumerate(here) if not found.wrong]
        shared |= len(fitting) > 1
        source = next(iter(fitting), None)
        if source is None:
            wrong.append(f"sample {number}: {here[0].wrong[0].partition(': ')[2]}")
            samples.append((-1, digest))
            continue
        samples.append((source, digest))
        if left[source] > 0:
            left[source] -= 1
            judged[source].times += here[source].times
            judged[source].unsure += here[source].unsure
    if shared:  # sources that hold the same text: nobody can say whose a block is
        samples = []
    if wrong or shared:  # what is not there cannot be missed: the blocks themselves are the finding
        judged = [Judged(times=np.zeros(len(text.tokens), np.int64)) for text in texts]
    return samples, epoch, wrong, judged


def _judge_held_out(
    config: Config, data: Data, texts: Sequence[Text], trained: Sequence[Judged] | None
) -> tuple[list[str], list[str]]:
    """What is wrong with held-out blocks; and documents of `texts` that are trained on too."""
    wrong, twice = [], []
    best_fit = config.data.packing == "best_fit"
    for number, batch in enumerate(data.validation.batches(micro_batch_size=1)):
        here = [text.judge(batch, config.data.isolate_documents, best_fit) for text in texts]
        source = next((i for i, found in enumerate(here) if not found.wrong), None)
        if source is None:
            wrong.append(f"held-out block {number}: {here[0].wrong[0].partition(': ')[2]}")
        elif trained is not None:
            both = (trained[source].times > 0) & (here[source].times > 0)
            if both.any():
                twice.append(f"source {source}: {int(both.sum())} tokens of held-out block {number}")
    return wrong, twice


def judge_schedule(user: Config, config: Config, one: Observation) -> list[Finding]:
    """The rates that the small run recorded, and those of the user's own length of training."""
    if user.optim.schedule not in schedule.FORMULAS:
        return [note(f"there is no second formula of optim.schedule={user.optim.schedule} to compare rates with")]
    compared = [
        (relative_rate(record["lr"], schedule.rate(config.optim, step, config.max_steps)), 1e-6, f"step {step + 1}")
        for step, record in enumerate(one.records)
    ]
    steps = user.max_steps
    warmup = min(user.optim.warmup_steps, steps - 1)
    for step in sorted({0, warmup // 2, max(warmup - 1, 0), warmup, *(steps * i // 16 for i in range(16)), steps - 1}):
        expected = schedule.rate(user.optim, step, steps)
        found = trainer.learning_rate(user, step)
        compared.append((relative_rate(found, expected), 1e-6, f"step {step + 1} of {steps} as configured"))
    return [within("oracle_schedule", "learning rate of each step, from its formula", compared)]


def explain_gradients(found: Whole, shares: dict[tuple[int, str], Whole]) -> str:
    """Which loss or which micro-batch counts otherwise than it should, if that is all that is wrong with gradients.

    Args:
        shares: what each loss of each micro-batch adds to them, by its number and name.
    """

    def flat(slopes: Whole) -> np.ndarray:
        return np.concatenate([slopes[name].ravel() for name in found]).astype(np.float64)

    seen, parts = flat(found), {key: flat(slopes) for key, slopes in shares.items()}
    parts = {key: value for key, value in parts.items() if value.any()}
    sizes = np.array([np.linalg.norm(value) for value in parts.values()])
    columns = np.stack(list(parts.values()), 1) / sizes
    counts = np.linalg.lstsq(columns, seen, rcond=None)[0]
    if np.linalg.norm(columns @ counts - seen) > 1e-4 * np.linalg.norm(seen):
        return ""
    times = {key: float(count) for key, count in zip(parts, counts / sizes)}
    rounds, names = {number for number, _ in times}, {name for _, name in times}
    for name in sorted(names):
        own = [count for (_, other), count in times.items() if other == name]
        rest = [count for (_, other), count in times.items() if other != name]
        if _all_near(rest, 1.0) and not _all_near(own, 1.0) and _all_near(own, own[0]):
            return f"in the gradients the {name} counts {abs(own[0]):.2f} times"
    for number in sorted(rounds):
        own = [count for (other, _), count in times.items() if other == number]
        rest = [count for (other, _), count in times.items() if other != number]
        if _all_near(rest, 1.0) and not _all_near(own, 1.0) and _all_near(own, own[0]):
            return f"micro-batch {number + 1} of {len(rounds)} counts {abs(own[0]):.2f} times in the gradients"
    return ""


def _all_near(counts: Sequence[float], due: float) -> bool:
    return all(abs(count - due) < 0.02 for count in counts)


def judge_initial(config: Config, one: Observation) -> list[Finding]:
    """The weights that training begins with."""
    wrong = initial.wrong_weights(
        whole([one.start["weight"]]), config.model.initializer_range, config.model.num_hidden_layers
    )
    return [exact("oracle_initial", "initial weights: deviations as configured, no two matrices equal", wrong)]


def judge_random(ranks: Sequence[Observation]) -> list[Finding]:
    """What random numbers follow from: another state on each rank and in each step."""
    seen: dict[str, str] = {}
    wrong = []
    for number, rank in enumerate(ranks):
        for step, state in enumerate(rank.random):
            place = f"rank {number}, step {step + 1}"
            other = seen.setdefault(state, place)
            wrong += [f"{place}: draws the random numbers of {other}"] if other != place else []
    return [exact("random", "random numbers: others on each rank and in each step", wrong)]


def judge_average(config: Config, one: Observation) -> list[Finding]:
    """The average of the weights when the first checkpoint was written."""
    ema = config.checkpoint.ema
    if ema.decay is None or EMA not in one.at_save:
        return []
    steps = [step for step in range(config.checkpoint.every_steps or 0) if ema.due(step + 1)]
    found = whole([one.at_save[EMA]])
    past = [{name: whole([one.weights[step]])[name] for name in found} for step in steps]
    start = whole([one.start["weight"]])
    compared = [
        (apart(found[name], value, past[-1][name] - start[name], steps=4), 1e-3, name)
        for name, value in average.average(past, ema.decay).items()
    ]
    return [within("oracle_average", "average of the weights in the checkpoint, from its formula", compared)]


def relative_rate(found: float, expected: float) -> float:
    return abs(found - expected) / expected if expected else abs(found)


def judge_optimizer(config: Config, one: Observation) -> list[Finding]:
    """What one process made of its own gradients, beside what torch's optimizer, or the paper's algorithm, makes of
    them."""
    unknown = [
        f"optim.{key}={value}"
        for key, value, known in (
            ("name", config.optim.name, optimizer.KINDS),
            ("schedule", config.optim.schedule, schedule.FORMULAS),
        )
        if value not in known
    ]
    if unknown:
        return [note(f"not judged: updates, norms and moments, since there is no second formula of {unknown[0]}")]
    start = whole([one.start["weight"]])
    gradients = [whole([slopes]) for slopes in one.gradients]
    rates = [schedule.rate(config.optim, step, config.max_steps) for step in range(len(gradients))]
    rules = rules_of(config)
    due = optimizer.replay(start, gradients, rates, rules)
    norms = [
        (relative(record["grad_norm"], norm), 1e-5, f"step {step + 1}")
        for step, (record, norm) in enumerate(zip(one.records, due.norms, strict=True))
    ]
    compared = _weights_apart(config, one, start, due)
    findings = [
        within("oracle_norm", "norm of the gradients, summed up by name", norms),
        within("oracle_updates", f"updates, as {_SOURCE[config.optim.name]} makes them of the gradients", compared),
    ]
    if due.moments[0] and one.at_save:
        last = (config.checkpoint.every_steps or 1) - 1
        findings.append(_moments(config, one, due.moments[last]))
    if config.optim.master_weights == "stochastic_rounding":
        findings.append(note("weights are rounded by chance: of updates only their size is judged, and the moments"))
    if any(finding.failed for finding in findings[1:]):
        why = _explain(config, one, start, gradients, rates, rules)
        for finding in findings[1:]:
            finding.evidence["why"] = why
    return findings


def rules_of(config: Config) -> optimizer.Rules:
    optim, rates = config.optim, config.optim.lr_multipliers
    some = config.finetune.experts
    return optimizer.Rules(
        kind=optim.name,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip=optim.grad_clip,
        momentum=optim.muon.momentum,
        nesterov=optim.muon.nesterov,
        ns_steps=optim.muon.ns_steps,
        adjust_lr=optim.muon.adjust_lr,
        multipliers=(rates.experts, rates.router, rates.rest),
        experts=None if some is None else tuple(sorted(set(some))),
        router_every=config.train.adversarial.router_every,
    )


def _weights_apart(
    config: Config, one: Observation, start: Whole, due: optimizer.Updated
) -> list[tuple[float, float, str]]:
    compared, eps = [], ROUNDING[config.optim.master_weights]
    for step, expected in enumerate(due.weights):
        found = whole([one.weights[step]])
        for name, value in expected.items():
            sure = ~due.unsure[step][name] if name in due.unsure[step] else ...
            change = (value - start[name])[sure]
            departs = apart(found[name][sure], value[sure], change, steps=step + 1, eps=eps)
            compared.append((departs, _update_tolerance(config), f"{name} after step {step + 1}"))
    return compared


def _update_tolerance(config: Config) -> float:
    return {"muon": ORTHOGONAL, "adamw_8bit": _EIGHT_BITS}.get(config.optim.name, _UPDATES)


def _moments_tolerance(config: Config) -> float:
    if config.optim.name == "adamw_8bit":
        return _EIGHT_BITS
    return _MOMENTS if config.optim.master_weights == "fp32" else _NARROW_MOMENTS


def _moments(config: Config, one: Observation, due: dict[str, Whole]) -> Finding:
    compared, tolerance = [], _moments_tolerance(config)
    for kind, values in due.items():
        found = whole([one.at_save.get(kind, {})])
        if missing := values.keys() - found.keys():
            compared.append((math.inf, tolerance, f"{kind} of {min(missing)}, which is not kept"))
            continue
        for name, value in values.items():
            size = float(np.sqrt((value.astype(np.float64) ** 2).mean()))
            difference = float(np.sqrt(((found[name].astype(np.float64) - value) ** 2).mean()))
            compared.append((difference / size if size else difference, tolerance, f"{kind} of {name}"))
    return within("oracle_moments", "the optimizer's averages in the checkpoint, from the clipped gradients", compared)


def _explain(
    config: Config,
    one: Observation,
    start: Whole,
    gradients: list[Whole],
    rates: list[float],
    rules: optimizer.Rules,
) -> str:
    """Which wrong rules give the updates that were seen; nothing where none does."""
    recorded = [record["lr"] for record in one.records]
    worst = 0.0
    best = ""
    tries = {sentence: (other, rates) for sentence, other in optimizer.other_rules(rules).items()}
    tries["the rate is another than the formula's, as it is recorded"] = (rules, recorded)
    for factor in (3.0, 2.0, 10.0, 0.5, 0.1):
        tries[f"the learning rate is multiplied by {factor:g}"] = (rules, [rate * factor for rate in rates])
    for sentence, (other, at) in tries.items():
        due = optimizer.replay(start, gradients, at, other)
        departs = [difference / tolerance for difference, tolerance, _ in _weights_apart(config, one, start, due)]
        if config.optim.name == other.kind and due.moments[0] and one.at_save:
            moments = _moments(config, one, due.moments[(config.checkpoint.every_steps or 1) - 1])
            departs.append((moments.difference or 0.0) / _moments_tolerance(config))
        worst = max(departs)
        if worst <= 1:
            best = sentence
            break
    return best
