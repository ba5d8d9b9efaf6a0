"""The documents of a source of any content, as text that tells them apart."""

from collections.abc import Iterator

from moe_llm.config import SourceConfig
from moe_llm.data.chat import read_examples
from moe_llm.data.preference import read_pairs
from moe_llm.data.sources import holds_tokens, read_documents, read_token_documents


def read_texts(source: SourceConfig, field: str) -> Iterator[str]:
    """What a source's documents are told apart by: text itself, or an example's `text`, or token ids as text."""
    if holds_tokens(source, field):
        return read_token_documents(source, field)
    if source.content == "text":
        return read_documents(source, field)
    if source.content == "preference":
        return (pair.text for pair in read_pairs(source, field))
    return (found.text for found in read_examples(source, field))
