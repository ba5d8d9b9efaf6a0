"""Corpora that others have tokenised: Megatron's `.bin` with `.idx`, and datatrove's and nanotron's `.ds` with `.ds.index`.

Megatron's index: nine bytes MMIDIDX, version 1 (uint64), a code of the tokens' type (uint8), the numbers of sequences and of
documents' edges (uint64), the sequences' lengths (int32), where they begin in bytes (int64), and the edges (int64, in
sequences). datatrove's index: the documents' ends in tokens (uint64).

A document of token ids is passed on as text, one character an id, so that it is divided and told apart as others are.
"""

import json
import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_llm.data.kinds import companion
from moe_llm.data.pieces import Piece
from moe_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SURROGATES, _SKIPPED, _MOST = 0xD800, 0x800, 0x110000 - 0x800


class TokenFile(NamedTuple):
    """tokens_N: of all documents in order; starts: (documents + 1,) where each begins."""

    tokens_N: np.ndarray
    starts: np.ndarray


def divided_tokens(path: Path, kind: str, most: int, field: str) -> list[Piece]:
    """A file in ranges of documents, each of about `most` bytes."""
    tokens_N, starts = open_token_file(path, kind, field)
    size = tokens_N.itemsize
    count = max(1, round(len(tokens_N) * size / most))
    edges = np.searchsorted(starts, [len(tokens_N) * i // count for i in range(count + 1)])
    edges = np.unique(np.minimum(edges, len(starts) - 1)).tolist()
    return [Piece(path, int(starts[b] - starts[a]) * size, a, b) for a, b in pairwise(edges)]


def token_documents(piece: Piece, kind: str, field: str) -> Iterator[str]:
    """The documents of a piece, as text of ids.

    Raises:
        UserError: an index that does not fit its tokens, or ids that no tokenizer has.
    """
    tokens_N, starts = open_token_file(piece.path, kind, field)
    end = len(starts) - 1 if piece.end is None else piece.end
    for document in range(piece.begin, end):
        ids = np.asarray(tokens_N[starts[document] : starts[document + 1]])
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < _MOST:
            raise UserError(
                f"{field}: {piece.path}, document {document} holds {int(ids.min())} to {int(ids.max())}, which are no "
                "token ids: the file is damaged or of another type of numbers"
            )
        yield ids_as_text(ids)


def ids_as_text(ids: np.ndarray) -> str:
    """One character an id; the numbers of half surrogate pairs, which are no characters, are left out."""
    codes = ids.astype("<u4")
    return (codes + np.where(codes >= _SURROGATES, _SKIPPED, 0).astype("<u4")).tobytes().decode("utf-32-le")


def text_as_ids(text: str) -> np.ndarray:
    """The ids, uint32, of such a text."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return codes - np.where(codes >= _SURROGATES, _SKIPPED, 0).astype("<u4")


def open_token_file(path: Path, kind: str, field: str) -> TokenFile:
    """A file of tokens and its index.

    Raises:
        UserError: there is no index, or it does not fit the tokens.
    """
    index = companion(path, kind)
    if not index.is_file():
        raise UserError(
            f"{field}: {path} has no {index.name} beside it, which says where documents begin: bring it too"
        )
    stats = path.stat(), index.stat()
    try:
        return _opened(path, index, kind, tuple((s.st_size, s.st_mtime_ns) for s in stats))
    except ValueError as error:
        raise UserError(f"{field}: {index} does not fit {path} ({error}): bring both again") from error


@lru_cache(maxsize=16)
def _opened(path: Path, index: Path, kind: str, states: tuple) -> TokenFile:
    size = states[0][0]
    if kind == "datatrove":
        ends = np.fromfile(index, "<u8").astype(np.int64)
        count = int(ends[-1]) if len(ends) else 0
        if index.stat().st_size % 8 or (np.diff(ends, prepend=0) < 0).any():
            raise ValueError("it is no list of documents' ends")
        if not count or size not in (2 * count, 4 * count):
            raise ValueError(f"{count} tokens are not {size} bytes")
        return TokenFile(np.memmap(path, "<u2" if size == 2 * count else "<u4", "r"), np.concatenate([[0], ends]))
    return _megatron(path, index, size)


def _megatron(path: Path, index: Path, size: int) -> TokenFile:
    with index.open("rb") as file:
        head = file.read(34)
        if len(head) < 34 or not head.startswith(_MAGIC):
            raise ValueError("it is no index of Megatron's")
        version, code, sequences, edges = struct.unpack("<QBQQ", head[9:])
        if version != 1 or code not in _TYPES:
            raise ValueError(f"version {version} and type {code} are not known")
        if index.stat().st_size < 34 + 12 * sequences + 8 * edges:
            raise ValueError(f"it is shorter than its {sequences} sequences")
        lengths = np.fromfile(file, "<i4", sequences).astype(np.int64)
        begins = np.fromfile(file, "<i8", sequences)
        edge = np.fromfile(file, "<i8", edges)
    kind = np.dtype(_TYPES[code])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or (begins != ends[:-1] * kind.itemsize).any() or ends[-1] * kind.itemsize != size:
        raise ValueError(f"its {int(ends[-1])} tokens are not the file's {size} bytes")
    if not len(edge) or edge[0] != 0 or edge[-1] != sequences or (np.diff(edge) < 0).any():
        raise ValueError("its documents are not all of its sequences")
    if not size:
        raise ValueError("there are no tokens")
    return TokenFile(np.memmap(path, kind, "r"), ends[edge])


class TokenFileEncoder:
    """Documents of ids as they are stored here: bos + ids + eos, whichever of the two a document has already.

    Args:
        field: name of the source in the configuration, for errors.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", field: str, bos: int, eos: int, dtype: np.dtype):
        self.bos, self.eos, self.dtype, self._field = bos, eos, dtype, field
        self._lengths = token_lengths(tokenizer)
        probe = tokenizer.backend_tokenizer.encode("a b", add_special_tokens=False).ids
        self._added = int(self._lengths[probe].sum()) - 3  # a space that stands before every text

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Raises:
        UserError: ids that the tokenizer does not have.
        """
        return [self._document(text_as_ids(text)) for text in texts]

    def _document(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and int(ids.max()) >= len(self._lengths):
            raise UserError(
                f"{self._field} holds the token {int(ids.max())}, and the tokenizer has {len(self._lengths)}: set "
                "tokenizer.path to the one that its files were made with"
            )
        begin = 1 if len(ids) and ids[0] == self.bos else 0
        end = len(ids) - 1 if len(ids) > begin and ids[-1] == self.eos else len(ids)
        return np.concatenate([[self.bos], ids[begin:end], [self.eos]]).astype(self.dtype)

    def utf8_length(self, text: str) -> int:
        """Bytes of the text that the ids stand for."""
        ids = text_as_ids(text)
        known = ids[ids < len(self._lengths)]  # `encode` refuses the others
        return max(int(self._lengths[known].sum()) - self._added, 0)


def token_lengths(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """(ids,) int64: the UTF-8 bytes that each token of a tokenizer stands for; none for special ones."""
    backend = tokenizer.backend_tokenizer
    by_bytes = '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))
    added = tokenizer.added_tokens_decoder
    vocabulary: dict[str, Any] = backend.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        if number in added:
            lengths[number] = 0 if added[number].special else len(token.encode())
        elif by_bytes:
            lengths[number] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            lengths[number] = 1
        else:
            lengths[number] = len(token.replace("\u2581", " ").encode())
    return lengths
