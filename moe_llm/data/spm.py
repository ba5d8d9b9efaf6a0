"""sentencepiece models: training one with Mixtral's conventions, and the same ids from `tokenizers`.

A sentencepiece BPE model becomes a `tokenizer.json` that gives the same ids, as tests show for Mixtral's
own model. With `exact=True`, for the tokenizers that we train, it also keeps U+2581, the character that
stands for a space inside sentencepiece and that a plain conversion would turn into one: it is escaped with
a private-use character before, and restored after.
"""

import io
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from moe_llm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
_ESCAPE = "\ue000"
_ESCAPES = [(_ESCAPE, _ESCAPE + "a"), (SPACE, _ESCAPE + "b")]  # in this order; undone in reverse
_LINE_BYTES = 4000  # sentencepiece skips longer training lines
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # kinds of pieces, its protocol's numbers
_BPE = 2


def _noting(texts: Iterable[str], errors: list[UserError]) -> Iterator[str]:
    try:
        yield from texts
    except UserError as error:
        errors.append(error)
        raise


def train_model(texts: Iterable[str], vocab_size: int, max_bytes: int, character_coverage: float, seed: int) -> bytes:
    """Train a BPE model with byte fallback: unk 0, bos 1, eos 2, digits apart, text taken as it is.

    Args:
        texts: training text; read up to `max_bytes` of UTF-8.
        character_coverage: share of the characters that get tokens of their own.

    Returns:
        A serialised sentencepiece model; the same inputs give the same bytes.

    Raises:
        UserError: `vocab_size` is too small or too large for the text.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed)
    model = io.BytesIO()
    unreadable: list[UserError] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(_noting(texts, unreadable), max_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            required_chars=SPACE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # Lines other than a text's first have no space put before them when text is encoded, so none
            # here; the finished model has it, as Mixtral's.
            add_dummy_prefix=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if unreadable:  # which sentencepiece wraps into an error of its own
            raise unreadable[0] from None
        raise _vocab_error(vocab_size, str(error)) from error
    proto = _parse(model.getvalue())
    proto.normalizer_spec.add_dummy_prefix = True
    return proto.SerializeToString(deterministic=True)


def _lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Training lines: no tab (sentencepiece's own mark) and no NUL, none too long."""
    left = max_bytes
    for text in texts:
        for plain, escaped in _ESCAPES:
            text = text.replace(plain, escaped)
        for line in re.split(r"[\n\t\0]", text):
            for start in range(0, len(line), _LINE_BYTES // 4):
                part = line[start : start + _LINE_BYTES // 4]
                yield part
                left -= len(part.encode("utf-8"))
                if left <= 0:
                    return


def _vocab_error(vocab_size: int, message: str) -> UserError:
    if high := re.search(r"too high.*<= (\d+)", message):
        return UserError(
            f"model.vocab_size={vocab_size} is more than the text for the tokenizer gives: "
            f"use at most {high[1]}, or more text (data.sources, tokenizer.train_bytes)"
        )
    if low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"model.vocab_size={vocab_size} has no room for the characters of the text: "
            f"use at least {low[1]}, or lower tokenizer.character_coverage"
        )
    if "sentences_.empty()" in message:
        return UserError("data.sources holds no text to train a tokenizer on: add text or set tokenizer.path")
    return UserError(
        f"model.vocab_size={vocab_size}: sentencepiece cannot train a tokenizer on data.sources "
        f"({message.strip()}), change either or set tokenizer.path"
    )


def _parse(model: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise ValueError("it is damaged or of another kind") from error
    if not proto.pieces:
        raise ValueError("it holds no vocabulary")
    return proto


def special_tokens(model: bytes) -> dict[str, str]:
    """bos, eos and unk as a model defines them, e.g. {"bos_token": "<s>", ...}."""
    proto = _parse(model)
    spec, pieces = proto.trainer_spec, [piece.piece for piece in proto.pieces]
    named = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id}
    return {name: pieces[index] for name, index in named.items() if 0 <= index < len(pieces)}


def convert(model: bytes, exact: bool = False) -> "Tokenizer":
    """A `tokenizers.Tokenizer` with the ids of a sentencepiece BPE model; it puts bos before a text.

    Args:
        exact: keep U+2581 and U+E000 in text apart from spaces; their ids then differ from sentencepiece's.

    Raises:
        ValueError: the model is damaged, or of a kind that cannot be represented; the message says which.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    proto = _parse(model)
    spec = proto.normalizer_spec
    if proto.trainer_spec.model_type != _BPE or spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        raise ValueError("only BPE models that leave text as it is (identity normalisation) are supported")
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    unk = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(proto),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    # One with U+2581 is found where spaces are that already, as in sentencepiece, which never finds one with a space.
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED and " " not in piece.piece]
    tokenizer.add_tokens([AddedToken(symbol, normalized=SPACE in symbol) for symbol in symbols])
    escapes = _ESCAPES if exact else []
    # The first Metaspace puts one space before the text even where it starts with spaces, since those are
    # U+2581 by then; one Metaspace alone would not, and a leading space would be lost.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(*e) for e in [*escapes, (" ", SPACE)]])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", "first" if spec.add_dummy_prefix else "never", split=False),
            pre_tokenizers.Metaspace(SPACE, "never", split=False),
        ]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Replace(b, a) for a, b in reversed(escapes)])
    bos = special_tokens(model).get("bos_token")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer


def with_dummy_prefix(model: bytes, wanted: bool) -> bytes:
    """A model that puts a space before a text, or does not (tokenizer_config.json's `add_prefix_space`)."""
    proto = _parse(model)
    proto.normalizer_spec.add_dummy_prefix = wanted
    return proto.SerializeToString(deterministic=True)


def texts_of_symbols(model: bytes, most: int = 200) -> list[str]:
    """Texts with the first of a model's user-defined symbols within words and between spaces, to compare ids on."""
    found = [piece.piece.replace(SPACE, " ") for piece in _parse(model).pieces if piece.type == _USER_DEFINED][:most]
    return [*(f"a{text}b" for text in found), *(f" {text} " for text in found)]


def _merges(proto) -> list[tuple[str, str]]:
    """All ways to form a piece from two, best score first, as sentencepiece would choose.

    Pieces of equal score (the runs of spaces in Mixtral's model) are formed left to right there; taking
    the longest left part first gives the same.
    """
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    merges.sort(key=lambda merge: (merge[0], merge[1], -len(merge[3])))
    return [(left, right) for _, _, left, right in merges]


def same_ids(tokenizer: "Tokenizer", model: bytes, texts: Iterable[str]) -> bool:
    """Whether a conversion gives sentencepiece's own ids on some texts."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return all(tokenizer.encode(t, add_special_tokens=False).ids == processor.encode(t) for t in texts)
