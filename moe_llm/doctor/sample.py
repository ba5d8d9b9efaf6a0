"""A little of the user's own text, and a tokenizer for it."""

import itertools
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

from moe_llm.config import Config, SourceConfig
from moe_llm.data.cache import DocumentEncoder
from moe_llm.data.sources import named_sources, named_validation_sources, read_documents
from moe_llm.data.tokenizer import build_tokenizer
from moe_llm.doctor.shrink import replace
from moe_llm.errors import UserError

READ, READ_HELD_OUT, DOCUMENT = 200_000, 50_000, 20_000  # characters: of all sources, of validation, of one document
VOCABULARIES = (512, 384, 320, 288, 1024, 2048, 4096, 8192, 16384)  # the first that the text allows
HUB_SECONDS = 20
_LENGTHS = (0.4, 1.3, 0.7, 1.9, 0.25)  # of documents, in blocks: so that blocks hold several and several hold one


def small_data(user: Config, small: Config, directory: Path) -> tuple[Config, list[str]]:
    """`small` with text, tokenizer and vocabulary; sentences on what is not the user's own.

    The text is as long as most of the run's steps: every block is met, the padded last ones too.

    Raises:
        UserError: a tokenizer or text that could be read but is unusable.
    """
    notes: list[str] = []
    train, held_out = _read(user, notes)
    config = replace(small, run={"dir": str(directory / "run")}, data={
        "cache_dir": str(directory / "cache"), "num_workers": 1,
        "validation_fraction": max(0.1, user.data.validation_fraction),
    })
    config = _with_tokenizer(user, config, train, directory, notes)
    encoder = DocumentEncoder(build_tokenizer(config, Path(config.run.dir) / "tokenizer"))
    tokens = 0.75 * config.max_steps * config.train.global_batch_size * config.data.sequence_length
    shares = [1.0 if source.weight is None else source.weight for source in user.data.sources]
    sources = [
        _source(directory / f"train_{i}.jsonl", cut(texts, encoder, config.data.sequence_length,
                                                    tokens * share / sum(shares)), source.weight)
        for i, (texts, share, source) in enumerate(zip(train, shares, user.data.sources))
    ]
    validation = [
        _source(directory / f"held_out_{i}.jsonl", cut(texts, encoder, config.data.sequence_length, tokens / 4), None)
        for i, texts in enumerate(held_out)
    ]
    return replace(config, data={"sources": sources, "validation_sources": validation}), notes


def cut(texts: list[str], encoder: DocumentEncoder, length: int, tokens: float) -> list[str]:
    """Pieces of the texts of very different lengths, around `length` tokens, `tokens` in all as far as they go."""
    pieces: list[str] = []
    lengths = itertools.cycle(_LENGTHS)
    queue = [(text, len(text) / len(encoder.encode([text])[0])) for text in texts]
    while tokens > 0 and queue:
        text, characters = queue.pop(0)
        at = max(1, round(next(lengths) * length * characters))
        pieces.append(text[:at])
        tokens -= len(encoder.encode([text[:at]])[0])
        if text[at:].strip():
            queue.append((text[at:], characters))
    return pieces


def _read(user: Config, notes: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """The beginnings of each training and each validation source; of the standard library where one is out of reach."""
    train, held_out = named_sources(user), named_validation_sources(user)
    try:
        return (
            [_documents(field, source, READ // len(train)) for field, source in train],
            [_documents(field, source, READ_HELD_OUT // len(held_out)) for field, source in held_out],
        )
    except UserError as error:
        notes.append(f"the text is Python's standard library, because the configured one is out of reach: {error}")
    library = _take(read_documents(SourceConfig(type="python_stdlib"), "text"), READ + READ_HELD_OUT)
    parts = len(train) + len(held_out)
    shares = [library[i::parts] for i in range(parts)]
    return shares[: len(train)], shares[len(train) :]


def _documents(field: str, source: SourceConfig, budget: int) -> list[str]:
    if source.type == "hub" and not Path(source.path).expanduser().is_dir():
        return _within_time(field, source, budget)
    return _take(read_documents(source, field), budget)


def _take(documents: Iterator[str], budget: int) -> list[str]:
    taken: list[str] = []
    for text in documents:
        taken.append(text[: min(DOCUMENT, budget)])
        budget -= len(taken[-1])
        if budget <= 0:
            break
    return taken


def _within_time(field: str, source: SourceConfig, budget: int) -> list[str]:
    """Documents from the hub, read in a process that can be ended: without a network it is tried again for minutes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_documents, args=(theirs, field, source, budget), daemon=True)
    process.start()
    theirs.close()
    try:
        answered = ours.poll(HUB_SECONDS)
        texts, sentence = ours.recv() if answered else (None, f"{field}.path={source.path} gave no text in "
                                                              f"{HUB_SECONDS} s: check the connection")
    except EOFError:
        texts, sentence = None, f"{field}.path={source.path} cannot be read here: use local files"
    finally:
        process.kill()
        process.join()
        ours.close()
    if texts is None:
        raise UserError(sentence)
    return texts


def _send_documents(pipe, field: str, source: SourceConfig, budget: int) -> None:
    try:
        pipe.send((_take(read_documents(source, field), budget), None))
    except UserError as error:
        pipe.send((None, str(error)))


def _with_tokenizer(
    user: Config, config: Config, texts: list[list[str]], directory: Path, notes: list[str]
) -> Config:
    """The user's own tokenizer where it is a local path, else one trained on the sample; in the run directory."""
    path = user.tokenizer.path
    if path is not None and Path(path).expanduser().exists():
        path = str(Path(path).expanduser().resolve())
        vocabulary = user.model.vocab_size
        config = replace(config, tokenizer={"path": path}, model={"vocab_size": vocabulary})
        size = len(build_tokenizer(config, Path(config.run.dir) / "tokenizer"))
        return replace(config, model={"vocab_size": vocabulary or size})
    if path is not None:
        notes.append(f"tokenizer.path={path} is no local path: a small tokenizer is trained in its place")
    config = replace(config, tokenizer={"path": None, "train_bytes": READ}, data={
        "sources": [_source(directory / f"text_{i}.jsonl", part, None) for i, part in enumerate(texts)],
        "validation_sources": [],
    })
    trained = _train_tokenizer(config, directory)
    return replace(config, tokenizer={"path": str(trained.tokenizer.path)},
                   model={"vocab_size": trained.model.vocab_size})


def _train_tokenizer(config: Config, directory: Path) -> Config:
    """The configuration with the path and size of a tokenizer of the first size in `VOCABULARIES` that the text
    allows."""
    refused: UserError | None = None
    for size in VOCABULARIES:
        sized = replace(config, model={"vocab_size": size})
        target = directory / f"tokenizer-{size}"
        try:
            build_tokenizer(sized, target)
        except UserError as error:
            refused = error
        else:
            return replace(sized, tokenizer={"path": str(target)})
    raise UserError(f"no small tokenizer can be trained on the beginning of the text ({refused}): set tokenizer.path")


def _source(path: Path, texts: list[str], weight: float | None) -> dict:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {"type": "files", "path": str(path), "format": "jsonl", "weight": weight}
