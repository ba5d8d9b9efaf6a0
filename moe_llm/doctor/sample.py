"""A little of the user's own text, and a tokenizer for it."""

import itertools
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

from moe_llm.config import Config, SourceConfig
from moe_llm.data.chat import example, read_examples
from moe_llm.data.chat_template import ChatEncoder
from moe_llm.data.documents import DocumentEncoder
from moe_llm.data.preference import read_pairs
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
    config = replace(
        small,
        run={"dir": str(directory / "run")},
        data={
            "cache_dir": str(directory / "cache"),
            "num_workers": 1,
            "validation_fraction": max(0.1, user.data.validation_fraction),
        },
    )
    config = _with_tokenizer(user, config, train, directory, notes)
    if user.data.has_chat and not user.data.has_preference:
        config = _with_chat(user, config, notes)
    encoder = DocumentEncoder(build_tokenizer(config, Path(config.run.dir) / "tokenizer"))
    tokens = 0.75 * config.max_steps * config.train.global_batch_size * config.data.sequence_length
    shares = [1.0 if source.weight is None else source.weight for source in user.data.sources]
    length = config.data.sequence_length

    def shortened(name: str, source: SourceConfig, texts: list[str], tokens: float, weight: float | None) -> dict:
        if source.content == "chat":
            return _chat_source(directory / name, cut(texts, encoder, length // 2, tokens), weight)
        return _source(directory / name, cut(texts, encoder, length, tokens), weight)

    sources = [
        shortened(f"train_{i}.jsonl", source, texts, tokens * share / sum(shares), source.weight)
        for i, (texts, share, source) in enumerate(zip(train, shares, user.data.sources))
    ]
    validation = [
        shortened(f"held_out_{i}.jsonl", source, texts, tokens / 4, None)
        for i, (texts, source) in enumerate(zip(held_out, user.data.validation_sources))
    ]
    return replace(config, data={"sources": sources, "validation_sources": validation}), notes


def _with_chat(user: Config, config: Config, notes: list[str]) -> Config:
    """The configuration with the user's chat template, and blocks that hold text beside what the template writes."""
    asked = user.data.model_dump(mode="json")
    template = user.data.chat_template
    if template == "tokenizer" and config.tokenizer.path != _resolved(user.tokenizer.path):
        notes.append("data.chat_template=tokenizer is auto here, because the tokenizer is another one")
        template = "auto"
    config = replace(
        config,
        data={
            "chat_template": template,
            "overlong": "truncate",
            **{key: asked[key] for key in ("sources", "validation_sources")},
        },
    )
    encoder = ChatEncoder(build_tokenizer(config, Path(config.run.dir) / "tokenizer"), "data.chat_template")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    ((ids, _),) = encoder.encode([example(turns, "a user's and an assistant's turn")])
    length = min(user.data.sequence_length, config.data.sequence_length + len(ids))
    notes.append(f"data.sequence_length is {length} here, because the chat template alone writes {len(ids)} tokens")
    return replace(config, data={"sequence_length": length})


def _resolved(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


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
    if source.type == "hub" and not Path(str(source.path)).expanduser().is_dir():
        return _within_time(field, source, budget)
    return _take(_texts(source, field), budget)


def _texts(source: SourceConfig, field: str) -> Iterator[str]:
    if source.content == "text":
        return read_documents(source, field)
    if source.content == "preference":
        return (side.plain for pair in read_pairs(source, field) for side in pair)
    return (found.plain for found in read_examples(source, field))


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
        texts, sentence = (
            ours.recv()
            if answered
            else (None, f"{field}.path={source.path} gave no text in {HUB_SECONDS} s: check the connection")
        )
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
        pipe.send((_take(_texts(source, field), budget), None))
    except UserError as error:
        pipe.send((None, str(error)))


def _with_tokenizer(user: Config, config: Config, texts: list[list[str]], directory: Path, notes: list[str]) -> Config:
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
    config = replace(
        config,
        tokenizer={"path": None, "train_bytes": READ},
        data={
            "chat_template": "auto",
            "overlong": "drop",
            "sources": [_source(directory / f"text_{i}.jsonl", part, None) for i, part in enumerate(texts)],
            "validation_sources": [],
        },
    )
    trained = _train_tokenizer(config, directory)
    return replace(
        config, tokenizer={"path": str(trained.tokenizer.path)}, model={"vocab_size": trained.model.vocab_size}
    )


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


def _chat_source(path: Path, texts: list[str], weight: float | None) -> dict:
    """Rows that say the texts: the first third asks, the rest answers."""
    halves = [(text[: len(text) // 3], text[len(text) // 3 :]) for text in texts]
    rows = [{"prompt": asked, "completion": answer} for asked, answer in halves if answer.strip()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"type": "files", "path": str(path), "format": "jsonl", "content": "chat", "weight": weight}
