"""A member's tokens as those of the main model, where their tokenizers differ.

Two tokens are the same if they stand for the same bytes, or if both are the vocabulary's bos, eos, unk or pad. Within
those shared tokens a member's distribution counts; outside of them it has no say, and the main model's holds:

    q'(v) = q(v) / q(shared) * p(shared)   for shared tokens v
    q'(v) = p(v)                           for the others

with p the main model's distribution and q the member's. q' is a distribution over the main model's tokens; q(not
shared) is what is left out of the member, p(not shared) where it is not asked.

What a member reads are the main model's tokens, one by one: the same token, or else the longest ones of its own that
make up the same bytes. The text before stays as it is when a token is added, which a KV cache relies on; a member's
own tokenizer might have cut the text in other places.

Shapes: R rows, T tokens of the main model, U of the member, V vocabulary of the main model, W of the member, K shared.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_llm.errors import UserError

_SPACE = "\u2581"
_ROLES = ("eos_token_id", "bos_token_id", "unk_token_id", "pad_token_id")  # eos first: it is bos too in some


@dataclass(frozen=True)
class _Token:
    """An ordinary token: as its vocabulary writes it, and what it stands for."""

    text: str
    bytes: bytes


@dataclass(frozen=True)
class Translated:
    """A member's input. ids_RU, mask_RU: False where a row is shorter than others. ends_RT: where each token of the
    main model ends."""

    ids_RU: Tensor
    mask_RU: Tensor
    ends_RT: Tensor


class Translator:
    """From the main model's tokens to a member's, and from its distribution to one over the main model's tokens.

    shared: how many tokens both have. size: of the main model's vocabulary. one_to_one: every token is one of the
    member's, too.

    Args:
        width, other_width: of the logits, at least the tokenizers' sizes.

    Raises:
        UserError: no token is shared.
    """

    def __init__(self, main: Any, other: Any, width: int, other_width: int, names: tuple[str, str]):
        self.size = len(main)
        own, theirs = _tokens(main, width), _tokens(other, other_width)
        same = _same(own, theirs, _style(main) == _style(other))
        if not same:
            raise UserError(
                f"the vocabularies of {names[0]} and {names[1]} share no token: give models of like tokenizers"
            )
        same |= _same_roles(main, other, same, width, other_width)
        self.shared = len(same)
        self.main_K, self.other_K = (torch.tensor(ids) for ids in (sorted(same), [same[i] for i in sorted(same)]))
        spell = _Speller(theirs, other)
        self._parts = [[same[i]] if i in same else spell(own.get(i)) for i in range(width)]
        self.one_to_one = max(map(len, self._parts)) == 1

    def read(self, ids_RT: Tensor, mask_RT: Tensor) -> Translated:
        """The member's tokens for the main model's; masked ones become one masked token each."""
        rows, ends = [], []
        for ids, mask in zip(ids_RT.tolist(), mask_RT.tolist()):
            parts = [(self._parts[i], kept) for i, kept in zip(ids, mask)]
            parts = [(part if kept else part[:1], kept) for part, kept in parts]
            rows.append([(token, kept) for part, kept in parts for token in part])
            ends.append(torch.tensor([len(part) for part, _ in parts]).cumsum(0) - 1)
        longest = max(map(len, rows))
        ids_RU, mask_RU = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest).bool()
        for r, row in enumerate(rows):
            ids_RU[r, : len(row)] = torch.tensor([token for token, _ in row])
            mask_RU[r, : len(row)] = torch.tensor([kept for _, kept in row])
        return Translated(ids_RU, mask_RU, torch.stack(ends))

    def complete(self, member_NW: Tensor, main_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The member's log-probabilities as q' over the main model's tokens.

        Returns:
            q' (N, V), and the logarithms of q(shared) and p(shared), (N,) each.
        """
        main_K, other_K = self.main_K.to(main_NV.device), self.other_K.to(main_NV.device)
        shared_NK = member_NW[:, other_K]
        theirs_N, ours_N = shared_NK.logsumexp(-1), main_NV[:, main_K].logsumexp(-1)
        result_NV = main_NV.clone()
        result_NV[:, main_K] = shared_NK + (ours_N - theirs_N)[:, None]
        return result_NV, theirs_N, ours_N


def same_vocabulary(main: Any, other: Any) -> bool:
    """Whether two tokenizers give each id the same token."""
    roles = all(getattr(main, role) == getattr(other, role) for role in _ROLES[:2])
    return roles and main.get_vocab() == other.get_vocab()


def _style(tokenizer: Any) -> str:
    """How the tokens are written: `bytes` (GPT-2's letters for bytes), `pieces` (sentencepiece) or `text`."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = json.dumps([content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")])
    if '"ByteLevel"' in steps:
        return "bytes"
    pieces = '"Metaspace"' in steps or '"ByteFallback"' in steps or json.dumps(_SPACE) in steps
    return "pieces" if pieces else "text"


def _tokens(tokenizer: Any, width: int) -> dict[int, _Token]:
    """The ordinary tokens that the model has a logit for."""
    style, special = _style(tokenizer), set(tokenizer.all_special_ids)
    alphabet = _byte_alphabet()
    added = tokenizer.added_tokens_decoder
    found = {}
    for text, i in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if i in special or i >= width:
            continue
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
        if i in added or style == "text":
            found[i] = _Token(text, text.encode("utf-8"))
        elif style == "bytes":
            found[i] = _Token(text, bytes(alphabet[letter] for letter in text if letter in alphabet))
        else:
            found[i] = _Token(text, bytes.fromhex(byte[1]) if byte else text.replace(_SPACE, " ").encode("utf-8"))
    return found


def _byte_alphabet() -> dict[str, int]:
    """Letter -> byte, as byte-level tokenizers write bytes: printable Latin-1 as itself, others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _same(own: dict[int, _Token], theirs: dict[int, _Token], alike: bool) -> dict[int, int]:
    """Ids of shared tokens, each of the member's used once.

    Args:
        alike: both are written in one way, so that the byte 41 and the letter A are told apart.
    """
    if alike:
        known = {token.text: i for i, token in theirs.items()}
        return {i: known[token.text] for i, token in own.items() if token.text in known}
    by_bytes, result = _by_bytes(theirs), {}
    for content, i in _by_bytes(own).items():
        if content in by_bytes:
            result[i] = by_bytes[content]
    return result


def _by_bytes(tokens: dict[int, _Token]) -> dict[bytes, int]:
    """Ids by bytes; where a letter and a bare byte stand for the same, the letter."""
    bare = re.compile(r"<0x[0-9A-F]{2}>")
    return {token.bytes: i for i, token in sorted(tokens.items(), key=lambda entry: not bare.fullmatch(entry[1].text))}


def _same_roles(main: Any, other: Any, same: dict[int, int], width: int, other_width: int) -> dict[int, int]:
    """Special tokens that mean the same, whatever they are called."""
    result, taken = {}, set(same.values())
    for role in _ROLES:
        ours, theirs = getattr(main, role), getattr(other, role)
        if ours is None or theirs is None or ours >= width or theirs >= other_width:
            continue
        if ours not in same and ours not in result and theirs not in taken:
            result[ours] = theirs
            taken.add(theirs)
    return result


class _Speller:
    """Bytes as the longest tokens of a member, from left to right."""

    def __init__(self, tokens: dict[int, _Token], tokenizer: Any):
        self._ids = _by_bytes(tokens)
        self._longest = max(map(len, self._ids))
        self._eos = tokenizer.eos_token_id
        self._unknown = self._eos if tokenizer.unk_token_id is None else tokenizer.unk_token_id

    def __call__(self, token: _Token | None) -> list[int]:
        """Ids, at least one: eos for a special token that the member has not, as documents without a bos begin."""
        if token is None:
            return [self._eos]
        result, at = [], 0
        while at < len(token.bytes):
            for length in range(min(self._longest, len(token.bytes) - at), 0, -1):
                found = self._ids.get(token.bytes[at : at + length])
                if found is not None:
                    result.append(found)
                    break
            at += length
        return result or [self._unknown]
