"""Triples for deliberation (Xia et al. 2017): an input, a first model's draft and the answer, as text that a second model
learns to rewrite by, and rewards of the drafts, by which the first model may learn what to draft.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from moe_llm.data.files import replace_file, user_error_on_disk
from moe_llm.ensemble.recipe import StackingRecipe
from moe_llm.ensemble.requests import fill
from moe_llm.errors import UserError

TEMPLATE: str = StackingRecipe.model_fields["template"].default  # so that `method: stacking` asks as was trained
OVERLAP = "overlap"


class DraftWriter:
    """Args:
        template: what the second model reads, with {input} and {output}; None: that of `method: stacking`.
        reward: of a draft. overlap: F1 of its words and the answer's; a checkpoint: the mean log-probability, nats per token,
            that this second model gives the answer behind the filled template; None: none is written.

    Raises:
        UserError: a template without its places, or no such checkpoint.
    """

    def __init__(self, template: str | None, reward: str | None):
        self.template, self._reward = template or TEMPLATE, reward
        for name in ("input", "output"):
            if "{" + name + "}" not in self.template:
                raise UserError(f"--template {self.template!r} lacks {{{name}}}: write it where the text belongs")
        self._model: Any = None
        if reward not in (None, OVERLAP):
            from moe_llm.ensemble.models import load_models
            from moe_llm.ensemble.recipe import Member

            [self._model] = load_models([Member(model=str(reward))])

    def rows(self, prompt: str, gold: str, drafts: list[str], *, chat: bool) -> list[dict[str, Any]] | None:
        """A row for each draft that says something, the best first where there is a reward; None where there is no answer,
        or no draft. Of text, `text`; of chat, `prompt` and `completion`; besides, where there is a reward, `reward`, and `draft`
        and `input` as they were."""
        said = [draft for draft in dict.fromkeys(drafts) if draft.strip()]
        if not gold.strip() or not said:
            return None
        rewards = [self.reward(prompt, draft, gold) for draft in said] if self._reward is not None else None
        order = range(len(said)) if rewards is None else sorted(range(len(said)), key=lambda i: -rewards[i])
        rows = []
        for i in order:
            filled = fill(self.template, input=prompt, output=said[i])
            row: dict[str, Any] = {"prompt": filled, "completion": gold} if chat else {"text": filled + gold}
            rows.append(row if rewards is None else {**row, "reward": rewards[i], "input": prompt, "draft": said[i]})
        return rows

    def reward(self, prompt: str, draft: str, gold: str) -> float:
        """Of a draft, the higher the better."""
        if self._model is None:
            return overlap(draft, gold)
        return continuation_log_probability(self._model, fill(self.template, input=prompt, output=draft), gold)


def overlap(draft: str, gold: str) -> float:
    """F1 of two texts' words, each counted as often as it stands there; from 0 to 1."""
    ours, theirs = Counter(draft.split()), Counter(gold.split())
    shared = (ours & theirs).total()
    return 2 * shared / max(1, ours.total() + theirs.total())


def continuation_log_probability(model: Any, prompt: str, text: str) -> float:
    """The mean log-probability that a model gives the tokens of a text behind a prompt, nats per token."""
    import torch

    from moe_llm.ensemble.causal_lm import read_prompt

    whole = read_prompt(model.tokenizer, prompt + text, model.rows, longest=model.longest)["input_ids"].to(model.device)
    begin = read_prompt(model.tokenizer, prompt, model.rows)["input_ids"].shape[1]
    begin = min(begin, whole.shape[1] - 1)
    with torch.no_grad():
        log_probs_TV = model.model(input_ids=whole[:, :-1]).logits[0].float().log_softmax(-1)
    return float(log_probs_TV.gather(1, whole[0, 1:, None])[begin - 1 :].mean())


def check_pairs(out: str, reward: str | None, drafts: int | None) -> None:
    """Refuse pairs that nothing tells apart, or a file that is there.

    Raises:
        UserError: so it is.
    """
    if reward is None or (drafts or 0) < 2:
        raise UserError(
            "--pairs-out takes the best and the worst of several drafts: add --drafts 2 or more, and --reward"
        )
    if Path(out).exists():
        raise UserError(f"--pairs-out {out} exists: name another file, or remove it")


def write_pairs(written: str | Path, out: str | Path) -> int:
    """Of each input in a file of drafts with rewards the best and the worst, as rows of `content: preference`; those whose
    rewards are the same are left out. How many."""
    best: dict[str, dict[str, Any]] = {}
    worst: dict[str, dict[str, Any]] = {}
    with Path(written).open(encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            key = row["input"]
            if key not in best or row["reward"] > best[key]["reward"]:
                best[key] = row
            if key not in worst or row["reward"] < worst[key]["reward"]:
                worst[key] = row
    pairs = [
        {"prompt": key, "chosen": best[key]["draft"], "rejected": worst[key]["draft"]}
        for key in best
        if best[key]["reward"] > worst[key]["reward"]
    ]
    with user_error_on_disk("--pairs-out", Path(out)):
        replace_file(Path(out), "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs).encode())
    return len(pairs)
