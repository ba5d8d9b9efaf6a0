"""Edits that corrupt a text, for models that learn to undo them (after Diffuser, Reid et al. 2022)."""

import random
import re
from collections.abc import Sequence
from typing import TypeVar

_WORDS = re.compile(r"\S+")
Unit = TypeVar("Unit", int, str)


def corrupt(units: Sequence[Unit], rate: float, draw: random.Random) -> list[list[Unit]]:
    """What stands in the place of each unit, a word or a token, after about a share `rate` of them has been deleted,
    doubled, exchanged with the next one, or replaced by another of the same text, each kind as often.

    Args:
        rate: from 0, the text as it is, to 1. draw: gives the same edits for the same state.
    """
    edited: list[list[Unit]] = []
    while len(edited) < len(units):
        i = len(edited)
        unit, kind = units[i], draw.randrange(4) if draw.random() < rate else None
        if kind == 2 and i + 1 < len(units):
            edited += [[units[i + 1]], [unit]]
            continue
        changes: dict[int | None, list[Unit]] = {0: [], 1: [unit, unit], 3: [draw.choice(units)] if kind == 3 else []}
        edited.append(changes.get(kind, [unit]))
    return edited


def corrupt_text(text: str, rate: float, draw: random.Random) -> str:
    """`corrupt` of a text's words; white space between words stays where it is."""
    found = list(_WORDS.finditer(text))
    edited = corrupt([match[0] for match in found], rate, draw)
    pieces, end = [], 0
    for match, words in zip(found, edited, strict=True):
        pieces += [text[end : match.start()] if words or end == 0 else "", " ".join(words)]
        end = match.end()
    return "".join([*pieces, text[end:]])
