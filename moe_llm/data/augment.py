"""Training blocks whose text is changed while they are read: masked tokens, spans to be restored, edits to be undone.

Each document of a block keeps its places. A sample's changes are a pure function of (seed, sample), as the sample is.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_llm.config.augment import AugmentConfig
from moe_llm.data.documents import plain_backend
from moe_llm.data.edits import corrupt
from moe_llm.data.packing import IGNORED, runs
from moe_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Augmentation:
    """One source's changes.

    Raises:
        UserError: a mask token that the tokenizer does not have, or none to be taken.
    """

    def __init__(self, settings: AugmentConfig, tokenizer: "PreTrainedTokenizerFast", field: str):
        self.settings = settings
        self._end = tokenizer.eos_token_id
        self._fixed = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
        self._mask = _mask_id(settings, tokenizer, field) if settings.kind != "edits" else -1
        backend = plain_backend(tokenizer, parse_special_tokens=False)
        self._separator: list[int] = backend.encode(settings.separator, add_special_tokens=False).ids

    def __call__(self, arrays: dict[str, np.ndarray], row: int, seed: int, sample: int) -> None:
        """Change a row of a batch's arrays, a document at a time."""
        place = 0
        for number, length in enumerate(runs({name: array[row : row + 1] for name, array in arrays.items()})[0]):
            here = slice(place, place + length)
            place += length
            draw = random.Random(f"{seed}/{sample}/{number}")
            if not arrays["attention_mask_BS"][row, here.start] or draw.random() >= self.settings.share:
                continue
            ids = arrays["input_ids_BS"][row, here].tolist()
            if self.settings.kind == "mask":
                arrays["input_ids_BS"][row, here] = self._masked(ids, draw)
                continue
            made = self._to_restore(ids, draw)
            if made is not None:
                shown, restored = made
                _put(arrays, row, here, shown, restored, self._end)

    def _masked(self, ids: list[int], draw: random.Random) -> list[int]:
        return [
            self._mask if token not in self._fixed and draw.random() < self.settings.rate else token for token in ids
        ]

    def _to_restore(self, ids: list[int], draw: random.Random) -> tuple[list[int], list[int]] | None:
        """What is read and what is learned behind it, together one token longer than the document's places at most; None
        where these are too few. What the document has beyond that is left out."""
        room, head = len(ids), ids[:1] if ids[0] in self._fixed else []
        body = [token for token in ids[len(head) :] if token not in self._fixed]
        room -= len(head) + len(self._separator)
        if self.settings.kind == "edits":
            body = body[: max(0, room // 2)]
            if not body:
                return None
            edited = [token for tokens in corrupt(body, draw.uniform(0, self.settings.rate), draw) for token in tokens]
            edited = edited[: room - len(body)]
            return [*head, *edited, *self._separator], [*body, self._end]
        spans: list[tuple[int, int]] = []
        while body:
            spans = _spans(len(body), self.settings, draw)
            if len(body) + 2 * len(spans) <= room:
                break
            body = body[: min(len(body) - 1, room - 2 * len(spans))] if room > 2 * len(spans) else []
        if len(body) < 2:
            return None
        shown, restored, end = list(head), list[int](), 0
        for first, last in spans:
            shown += [*body[end:first], self._mask]
            restored += [self._mask, *body[first:last]]
            end = last
        return [*shown, *body[end:], *self._separator], [*restored, self._end]


def _spans(length: int, settings: AugmentConfig, draw: random.Random) -> list[tuple[int, int]]:
    """[first, last) of spans that are neither empty nor touch each other, together a share `rate` of so many tokens."""
    cut = max(1, min(length - 1, round(length * settings.rate)))
    count = max(1, min(cut, round(cut / settings.span_length), length - cut))
    sizes = _shared_out(cut - count, count, draw)
    gaps = _shared_out(length - cut - (count - 1), count + 1, draw)
    found, place = [], 0
    for i, (gap, size) in enumerate(zip(gaps, sizes)):
        first = place + gap + (i > 0)
        found.append((first, first + size + 1))
        place = first + size + 1
    return found


def _shared_out(total: int, parts: int, draw: random.Random) -> list[int]:
    """Non-negative numbers that sum to a total, every such list as likely."""
    bars = sorted(draw.sample(range(total + parts - 1), parts - 1))
    return [b - a - 1 for a, b in zip([-1, *bars], [*bars, total + parts - 1])]


def _put(
    arrays: dict[str, np.ndarray], row: int, here: slice, shown: Sequence[int], restored: Sequence[int], filler: int
) -> None:
    length, tokens = here.stop - here.start, [*shown, *restored]
    labels = [IGNORED] * (len(shown) - 1) + list(restored)
    assert len(labels) <= length, "what is made of a document fits in its places"
    rest = length - len(labels)
    arrays["input_ids_BS"][row, here] = tokens[: len(labels)] + [filler] * rest
    arrays["labels_BS"][row, here] = labels + [IGNORED] * rest


def _mask_id(settings: AugmentConfig, tokenizer: "PreTrainedTokenizerFast", field: str) -> int:
    if settings.mask_token is not None:
        found = tokenizer.get_vocab().get(settings.mask_token)
        if found is None:
            raise UserError(
                f"{field}.augment.mask_token={settings.mask_token!r} is no token of the tokenizer: name one of its tokens"
            )
        return int(found)
    for number in (tokenizer.mask_token_id, tokenizer.unk_token_id):
        if number is not None:
            return int(number)
    raise UserError(f"{field}.augment: the tokenizer has neither a mask nor an unknown token: set mask_token to one")
