"""What of a conversation is learned: all that the assistant says and the token that ends its turn, and nothing of what
the user says.

The checkpoint's own tokenizer and template, as transformers applies them, say what a conversation is token by token; its
places in blocks are those where just these tokens stand, so that nothing is guessed about one that was cut short.
Positions of characters tell which tokens are whose; tokens on a border are left out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100


@dataclass
class Conversation:
    """ids: its tokens. learned, not_learned: indices of those that must be targets, and of those that must not.
    ending: index of the token that ends the assistant's turn; None: the template writes none."""

    ids: np.ndarray
    learned: list[int]
    not_learned: list[int]
    ending: int | None


def conversations(files: Sequence[Path], tokenizer: Any) -> list[Conversation]:
    """Those of rows with `prompt` and `completion` in which both are found again as they are.

    Args:
        tokenizer: transformers' fast tokenizer, with a chat template.
    """
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    found = [_conversation(row["prompt"], row["completion"], tokenizer) for row in rows]
    return [conversation for conversation in found if conversation is not None]


def _conversation(prompt: str, completion: str, tokenizer: Any) -> Conversation | None:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    asked, answer = prompt.strip(), completion.strip()
    answer_begin = text.rfind(answer)
    answer_end = answer_begin + len(answer)
    asked_begin = text.find(asked)
    asked_end = asked_begin + len(asked)
    if not asked or not answer or asked_begin < 0 or asked_end > answer_begin:
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = list(enumerate(encoded["offset_mapping"]))
    after = [at for at, (begin, end) in spans if begin >= answer_end and text[begin:end].strip()]
    return Conversation(
        np.array(encoded["input_ids"], np.int32),
        [at for at, (begin, end) in spans if answer_begin <= begin < end <= answer_end],
        [at for at, (begin, end) in spans if asked_begin <= begin < end <= asked_end],
        after[0] if after else None,
    )


def judge_chat(batch: Any, of_conversations: Sequence[Conversation], length: int) -> tuple[list[str], int]:
    """(what is wrong, how many conversations stand whole in a block and so could be judged).

    Args:
        batch: input_ids_BS, labels_BS and attention_mask_BS of all blocks.
        length: of a block.
    """
    wrong, judged = [], 0
    for row in range(len(batch.input_ids_BS)):
        real = int(batch.attention_mask_BS[row].sum())
        ids, labels = (part[row, :real].numpy().astype(np.int32) for part in (batch.input_ids_BS, batch.labels_BS))
        for conversation in of_conversations:
            at = _find(ids, conversation.ids[:-1])  # nothing is predicted from the last token
            if at is not None:
                judged += 1
                reason = _judge(labels[at : at + len(conversation.ids) - 1], conversation)
                wrong += [f"block {row}: {reason}"] if reason else []
    fitting = sum(len(conversation.ids) <= length for conversation in of_conversations)
    if fitting and not judged:
        wrong.append(
            f"none of {fitting} conversations stands in a block as the checkpoint's tokenizer and template write it"
        )
    return wrong, judged


def _find(ids: np.ndarray, wanted: np.ndarray) -> int | None:
    text, at = ids.tobytes(), -1
    while (at := text.find(wanted.tobytes(), at + 1)) >= 0:
        if at % 4 == 0:
            return at // 4
    return None


def _judge(labels: np.ndarray, conversation: Conversation) -> str:
    """labels: that of each token, which is the token after it or IGNORED."""
    ids = conversation.ids

    def is_target(at: int) -> bool:
        return at > 0 and labels[at - 1] == ids[at]

    missed = [at for at in conversation.learned if not is_target(at)]
    if missed:
        return f"{len(missed)} of the {len(conversation.learned)} tokens that the assistant says are not learned"
    if any(is_target(at) for at in conversation.not_learned):
        return "what the user says is learned"
    if conversation.ending is None:
        return "the template writes nothing after the assistant's turn, so that generation does not end"
    if not is_target(conversation.ending):
        return "the token that ends the assistant's turn is not learned, so that generation does not end"
    return ""
