"""What teachers say of blocks, on disk: for each labelled position its likeliest successors and, as one, all others.

    CACHE_DIR/teacher-KEY/manifest.json   part-*/{digests,ends,ids,log_p}.npy

KEY is a hash of the teachers' files, weights and dtypes, of the temperature, of how many successors are named and of
the student's width. A block is found by a digest of what is read and predicted in it, so that text, tokenizer, packing
and order may change as they like: what has stayed the same is found again. The tail is one outcome, with its mass as it
was. Renormalising the named tokens instead would teach that all others are impossible, and so to be surer than the
teacher is; as one outcome the tail's mass is learned, and how it is shared among its tokens is left to the student. The
divergence is then at most the whole one, and equal to it where all tokens are named.

A directory that has its name is complete, so a build that was killed loses the part that it was at.

Dimensions: N positions, K named tokens, V vocabulary, C positions of a chunk.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from moe_llm.config import Config
from moe_llm.config.distill import TeacherConfig
from moe_llm.data.files import building, publish, replace_file
from moe_llm.data.hashes import is_recent, stamp_of
from moe_llm.data.packing import IGNORED, Batch
from moe_llm.distill.teachers import Ensemble, named_teachers
from moe_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 1
_CHUNK_ELEMENTS = 4 * 2**20
_FIELD = "data.cache_dir"


class Named(NamedTuple):
    """ids_NK: uint16 or uint32, the likeliest first. log_p_NJ: fp32, J = K + 1 with the tail last, or K = V without."""

    ids_NK: np.ndarray
    log_p_NJ: np.ndarray


class TeacherCache:
    """The blocks that are on disk for one choice of teachers."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.reopen()

    def reopen(self) -> None:
        """Take in the parts that have come since."""
        self._parts = [_open(path) for path in sorted(self.directory.glob("part-*")) if path.is_dir()]
        digests = [part["digests"] for part in self._parts]
        every = np.concatenate([np.empty(0, "S16"), *digests])
        order = np.argsort(every, kind="stable")
        self._digests = every[order]
        self._part = np.repeat(np.arange(len(digests)), [len(d) for d in digests])[order]
        self._row = np.concatenate([np.empty(0, np.int64), *(np.arange(len(d)) for d in digests)])[order]

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, digest: bytes) -> bool:
        return self._find(digest) is not None

    def _find(self, digest: bytes) -> int | None:
        at = int(np.searchsorted(self._digests, np.array(digest, "S16")))
        return at if at < len(self._digests) and self._digests[at] == np.array(digest, "S16") else None

    def read(self, digest: bytes) -> Named | None:
        """One block's positions; None if it is not there."""
        at = self._find(digest)
        if at is None:
            return None
        part, row = self._parts[self._part[at]], self._row[at]
        place = slice(int(part["ends"][row]), int(part["ends"][row + 1]))
        return Named(part["ids"][place], part["log_p"][place])

    def add(self, blocks: Sequence[Batch], ensemble: Ensemble, top_k: int, device: torch.device) -> None:
        """Write a part with these blocks. Processes that are at the same part wait for each other.

        Raises:
            UserError: no space left; nothing of the part remains then.
        """
        digests = [digest for batch in blocks for digest in block_digests(batch)]
        name = f"part-{hashlib.sha256(b''.join(digests)).hexdigest()[:16]}"
        with building(self.directory, name):
            if (self.directory / name).exists():
                return
            named = [name_successors(batch, ensemble, top_k, device) for batch in blocks]
            counts = [int(n) for batch in blocks for n in (batch.labels_BS != IGNORED).sum(1)]
            with publish(self.directory / name, field=_FIELD) as temporary:
                np.save(temporary / "digests.npy", np.array(digests, "S16"))
                np.save(temporary / "ends.npy", np.cumsum([0, *counts], dtype=np.int64))
                np.save(temporary / "ids.npy", np.concatenate([part.ids_NK for part in named]))
                np.save(temporary / "log_p.npy", np.concatenate([part.log_p_NJ for part in named]))


def _open(directory: Path) -> dict[str, np.ndarray]:
    names = ("digests", "ends", "ids", "log_p")
    part = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in names[:2]}
    positions = int(part["ends"][-1])
    # an empty file cannot be mapped
    return part | {name: np.load(directory / f"{name}.npy", mmap_mode="r" if positions else None) for name in names[2:]}


def name_successors(batch: Batch, ensemble: Ensemble, top_k: int, device: torch.device) -> Named:
    """What the teachers say of a batch's labelled positions.

    Args:
        top_k: tokens named; all of them from V on.
    """
    hidden, width = ensemble.hidden(batch), ensemble.width
    top_k, chunk = min(top_k, width), max(1, _CHUNK_ELEMENTS // width)
    ids, log_p = [np.empty((0, top_k), _id_dtype(width))], [np.empty((0, top_k + (top_k < width)), np.float32)]
    for start in range(0, batch.num_targets, chunk):
        log_p_CV = ensemble.log_p(hidden, start, min(start + chunk, batch.num_targets), device)
        named_CK, index_CK = log_p_CV.topk(top_k, dim=1)
        if top_k < width:
            tail_C1 = log_p_CV.scatter_(1, index_CK, float("-inf")).logsumexp(1, keepdim=True)
            named_CK = torch.cat([named_CK, tail_C1], 1)
        ids.append(index_CK.cpu().numpy().astype(ids[0].dtype))
        log_p.append(named_CK.cpu().numpy())
    return Named(np.concatenate(ids), np.concatenate(log_p))


def _id_dtype(width: int) -> np.dtype:
    return np.dtype(np.uint16 if width <= 2**16 else np.uint32)


def block_digests(batch: Batch) -> list[bytes]:
    """A name for each row: what is read, where, and what is predicted."""
    optional = [] if batch.document_ids_BS is None else [batch.document_ids_BS]
    parts = [batch.input_ids_BS, batch.labels_BS, batch.position_ids_BS, batch.attention_mask_BS, *optional]
    arrays = [part.cpu().numpy() for part in parts]
    return [
        hashlib.sha256(b"".join(array[row].tobytes() for array in arrays)).digest()[:16]
        for row in range(len(arrays[0]))
    ]


def open_cache(config: Config, tokenizer: "PreTrainedTokenizerFast") -> Path:
    """The directory for what the run's teachers say, made if it is not there. A teacher that is no longer there is
    recognised by its path, in what was written when it was.

    Raises:
        UserError: a teacher that is not there, and nothing on disk that it said with this vocabulary.
    """
    root = Path(config.data.cache_dir).expanduser()
    said = _settings(config)
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    gone = [(field, t) for field, t in named_teachers(config) if not Path(t.path).expanduser().exists()]
    if gone:
        return _recorded(root, {**said, "vocabulary": vocabulary}, *gone[0])
    hashes = [teacher_hash(Path(t.path).expanduser(), root) for t in config.distill.teachers]
    key = hashlib.sha256(json.dumps([said["decisive"], hashes]).encode()).hexdigest()[:24]
    directory = root / f"teacher-{key}"
    with building(root, directory.name):
        if not directory.exists():
            with publish(directory, field=_FIELD) as temporary:
                manifest = {**said, "hashes": hashes, "vocabulary": vocabulary}
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return directory


def _settings(config: Config) -> dict[str, Any]:
    """decisive: all but the teachers' files that decides what they say."""
    distill = config.distill
    total = sum(t.weight for t in distill.teachers)
    return {
        "decisive": [
            _VERSION,
            distill.temperature,
            distill.cache_top_k,
            config.model.vocab_size,
            [[t.weight / total, t.dtype] for t in distill.teachers],
        ],
        "paths": [str(Path(t.path).expanduser().absolute()) for t in distill.teachers],
    }


def _recorded(root: Path, said: dict[str, Any], field: str, teacher: TeacherConfig) -> Path:
    found = []
    for file in root.glob("teacher-*/manifest.json"):
        manifest = json.loads(file.read_text())
        if all(manifest[key] == value for key, value in said.items()):
            found.append(file.parent)
    if len(found) == 1:
        return found[0]
    there = f"{len(found)} caches of what it said at different times" if found else "no cache of what it said"
    raise UserError(
        f"{field}.path={teacher.path!r} does not exist, and data.cache_dir={str(root)!r} has {there}: "
        "give the teacher's checkpoint directory"
    )


def teacher_hash(directory: Path, root: Path) -> str:
    """SHA-256 over config.json and the weights; of files that have not changed since, as it was computed then."""
    memory = root / "teacher-hashes.json"
    known = json.loads(memory.read_text()) if memory.exists() else {}
    files = sorted([directory / "config.json", *directory.glob("*.safetensors"), *directory.glob("*.bin")])
    digests = []
    for file in files:
        name, stamp = str(file.resolve()), stamp_of(file)
        recent = is_recent(stamp)
        found = known.get(name, [])
        if found[:-1] != stamp:
            with file.open("rb") as stream:
                found = [*stamp, hashlib.file_digest(stream, "sha256").hexdigest()]
        if recent:
            known.pop(name, None)
        else:
            known[name] = found
        digests.append([file.name, found[-1]])
    replace_file(memory, json.dumps(known).encode())
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
