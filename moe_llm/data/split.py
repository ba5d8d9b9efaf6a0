"""What is held out for validation: decided by a document's text, so equal texts are always on one side.

Large corpora: a document is held out if a hash of its text falls below a threshold. Small ones, where
that would hold out nothing or a lopsided share, get a list of documents of about the right size; and
where every document is too large for that (one book, say), the end of the largest document is held out.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_llm.config import Config, SourceConfig
from moe_llm.data.chat import read_examples
from moe_llm.data.files import remember
from moe_llm.data.pieces import Piece
from moe_llm.data.preference import read_pairs
from moe_llm.data.sources import fingerprint, named_sources, named_validation_sources, read_documents
from moe_llm.data.texts import read_texts
from moe_llm.errors import UserError

logger = logging.getLogger(__name__)

_SMALL_CORPUS = 32  # a corpus that expects fewer held-out documents than this is split by the list
_MOST_LISTED = 100_000
_VERSION = 1


def text_hash(text: str) -> int:
    """64 bits of a document's content."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class HoldOut:
    """How a document is divided into training and validation text.

    below: documents whose hash is smaller are held out.
    listed: hashes of documents that are held out.
    tail: hash of a document of which the end is held out -> characters that stay for training.
    """

    below: int = 0
    listed: frozenset[int] = frozenset()
    tail: tuple[int, int] | None = None

    def divide(self, text: str) -> tuple[str, str]:
        """(training text, validation text): disjoint, in order, together the document; one may be empty."""
        key = text_hash(text)
        if key < self.below or key in self.listed:
            return "", text
        if self.tail is not None and key == self.tail[0]:
            return text[: self.tail[1]], text[self.tail[1] :]
        return text, ""

    def key(self) -> list:
        """JSON values that identify it."""
        return [_VERSION, self.below, sorted(self.listed), list(self.tail) if self.tail else None]


def training_texts(
    field: str, source: SourceConfig, holdout: HoldOut, pieces: Sequence[Piece] | None = None
) -> Iterator[str]:
    """Training text of a source's documents, in order; of chat, what is said in it.

    Args:
        pieces: those that are read; None: all.
    """
    if source.content == "preference":
        pairs = read_pairs(source, field, pieces)
        yield from (side.plain for pair in pairs if holdout.divide(pair.text)[0] for side in pair)
        return
    if source.content == "chat":
        yield from (found.plain for found in read_examples(source, field, pieces) if holdout.divide(found.text)[0])
        return
    for text in read_documents(source, field, pieces):
        train, _ = holdout.divide(text)
        if train:
            yield train


def find_holdout(config: Config) -> HoldOut:
    """Decide the split of a run's data. Reads the corpus only as far as needed, and remembers the answer.

    With `data.validation_sources`, training documents that occur there are left out of training.

    Raises:
        UserError: unreadable data, or a single document too short to be divided.
    """
    data = config.data
    cache = Path(data.cache_dir).expanduser()
    inputs = [fingerprint(s, f, cache) for f, s in named_sources(config) + named_validation_sources(config)]
    fraction = None if data.validation_sources else data.validation_fraction
    digest = hashlib.sha256(json.dumps([_VERSION, inputs, fraction]).encode()).hexdigest()[:24]
    file = cache / f"split-{digest}.json"
    remembered = _remembered(file)
    if remembered is not None:
        return remembered
    if data.validation_sources:
        texts = (t for f, s in named_validation_sources(config) for t in read_texts(s, f))
        holdout = HoldOut(listed=frozenset(map(text_hash, texts)))
    else:
        divisible = ((t, s.content == "text") for f, s in named_sources(config) for t in read_texts(s, f))
        holdout = _choose(divisible, data.validation_fraction)
    key = holdout.key()
    remember(file, json.dumps([*key, _checksum(key)]).encode())
    return holdout


def _checksum(key: list) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _remembered(file: Path) -> HoldOut | None:
    """The answer in a file of the cache; None where there is none, or a damaged one, which is found anew."""
    try:
        *key, checksum = json.loads(file.read_text(encoding="utf-8"))
        if len(key) == 3:  # of a version before, which had no checksum
            return None
        if checksum != _checksum(key):
            raise ValueError("SHA-256")
        _, below, listed, tail = key
        return HoldOut(int(below), frozenset(map(int, listed)), (int(tail[0]), int(tail[1])) if tail else None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, IndexError) as error:
        logger.warning("the split of the data in %s is damaged (%s); it is made again from the sources", file, error)
        return None


def choose_holdout(texts: Iterable[str], fraction: float) -> HoldOut:
    """The split of a stream of documents, `fraction` of which is to be held out.

    Stops reading once the corpus is known to be large enough for the hash alone to divide it well.
    """
    return _choose(((text, True) for text in texts), fraction)


def _choose(texts: Iterable[tuple[str, bool]], fraction: float) -> HoldOut:
    """The same for (document, whether it may be divided)."""
    below = int(fraction * 2**64)
    enough = min(math.ceil(_SMALL_CORPUS / fraction), _MOST_LISTED)
    sizes: dict[int, int] = {}
    longest, largest = "", -1
    held = kept = False
    for text, divisible in texts:
        key = text_hash(text)
        held, kept = held or key < below, kept or key >= below
        if len(sizes) >= enough and held and kept:
            return HoldOut(below=below)
        sizes[key] = size = len(text.encode("utf-8"))
        if divisible and size > largest:
            longest, largest = text, size
    target = fraction * sum(sizes.values())
    listed, total = [], 0
    for key in sorted(sizes):  # by hash: a fair sample of the documents
        if total + sizes[key] <= target:
            listed.append(key)
            total += sizes[key]
    if total >= target / 2:
        return HoldOut(listed=frozenset(listed))
    if len(longest) < 2 and len(sizes) > 1:  # none can be cut: they are short, or examples of chat
        return HoldOut(listed=frozenset([min(sizes, key=lambda key: (sizes[key], key))]))
    if largest < 0:
        raise UserError(
            "data.sources holds one example, which cannot be both learned and held out: add others or set "
            "data.validation_sources"
        )
    return _hold_out_tail(longest, target)


def _hold_out_tail(text: str, target_bytes: float) -> HoldOut:
    """Hold out the end of a document, from a line start where one is near."""
    if len(text) < 2:
        raise UserError(
            "data.sources holds one document of one character, which cannot be divided into training and "
            "validation text: add text or set data.validation_sources"
        )
    share = min(0.5, target_bytes / len(text.encode("utf-8")))
    cut = min(len(text) - 1, max(1, round(len(text) * (1 - share))))
    line = text.find("\n", cut) + 1
    if 0 < line < len(text) and line - cut < 0.1 * (len(text) - cut):
        cut = line
    return HoldOut(tail=(text_hash(text), cut))
