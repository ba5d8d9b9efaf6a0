"""What of a conversation is learned: all that the assistant says and the end of its turn, and nothing of the user's.

Judged by the text that targets stand for, with white space left out, since tokenizers decode it in different ways.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IGNORED = -100


def conversations(files: Sequence[Path], tokenizer: Any) -> list[tuple[str, str, str]]:
    """(what the user says, what the assistant says, what the tokenizer's template writes after that) of rows with
    `prompt` and `completion`."""
    found = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            text = _bare(tokenizer.apply_chat_template(turns, tokenize=False))
            answer = _bare(row["completion"])
            at = text.rfind(answer)
            found.append((_bare(row["prompt"]), answer, text[at + len(answer) :] if at >= 0 else ""))
    return found


def judge_chat(batch: Any, of_conversations: Sequence[tuple[str, str, str]], tokenizer: Any) -> tuple[list[str], int]:
    """(what is wrong, conversations that were whole and so could be judged) of a batch's examples.

    Args:
        batch: input_ids_BS, labels_BS, document_ids_BS and attention_mask_BS.
    """
    wrong, judged = [], 0
    for row in range(len(batch.input_ids_BS)):
        for document in batch.document_ids_BS[row][batch.attention_mask_BS[row]].unique():
            mine = batch.document_ids_BS[row] == document
            ids, labels = batch.input_ids_BS[row][mine], batch.labels_BS[row][mine]
            whole = _decoded(tokenizer, [*ids.tolist(), *([int(labels[-1])] if labels[-1] != IGNORED else [])])
            learned = _decoded(tokenizer, labels[labels != IGNORED].tolist())
            match = next((told for told in of_conversations if told[1] in whole and whole.find(told[0]) >= 0), None)
            if match is None:  # cut short
                continue
            judged += 1
            reason = _judge(learned, *match)
            if reason:
                wrong.append(f"block {row}: {reason}")
    return wrong, judged


def _judge(learned: str, asked: str, answer: str, ending: str) -> str:
    at = learned.rfind(answer)
    if at < 0:
        return "what the assistant says is not all learned"
    if len(asked) > 12 and asked in learned[:at]:
        return "what the user says is learned"
    after = learned[at + len(answer) :]
    if ending and not after:
        return f"the end of the assistant's turn, {ending[:20]!r}, is not learned, so that generation does not end"
    if not ending.startswith(after):
        return f"what follows the assistant's turn, {after[:20]!r}, is learned, and is not the template's"
    return ""


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return _bare(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)
