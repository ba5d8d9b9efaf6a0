"""Data that is damaged, changed or half prepared, on two ranks: both act as one process does, and neither trains on it."""

import io
import logging
import os
import shutil
from pathlib import Path

import pytest
from support.ranks import fresh_accelerate

from moe_llm.checkpoint.state import read_provenance
from moe_llm.cli import main
from moe_llm.config import SourceConfig, load_config
from moe_llm.data import cache as cache_module
from moe_llm.data import hashes
from moe_llm.data.loader import load_data
from moe_llm.data.shards import cached_tokens
from moe_llm.data.split import HoldOut
from moe_llm.data.tokenizer import build_tokenizer, load_tokenizer
from moe_llm.distributed.runtime import start
from moe_llm.errors import UserError
from moe_llm.train.provenance import provenance_of

FIELD = "data.sources.0"


@pytest.fixture
def text(corpus, tmp_path) -> Path:
    return Path(shutil.copy(corpus, tmp_path / "text.txt"))


@pytest.fixture
def resumable(held, corpus, cache, text, tmp_path) -> Path:
    """Configuration of a run of 6 steps that has text and cache of its own and is to have two more."""
    config = held.parent / "held.yaml"
    for path in (config, held / "config.yaml"):
        path.write_text(
            path.read_text().replace(str(corpus), str(text)).replace(str(cache), str(tmp_path / "own_cache"))
        )
    assert main(["prepare", str(config), "logging.console=off"]) == 0
    return config


def _begin(config: str, checkpoint: str) -> tuple[str, str, int]:
    """As much of a resumed run as goes before its model: what is logged, what is refused, and how many pieces of text
    this rank has tokenised."""
    fresh_accelerate()
    log, refused, written = io.StringIO(), "", []
    write = cache_module.SplitWriter.write
    cache_module.SplitWriter.write = lambda *args: (written.append(1), write(*args))[1]  # type: ignore[method-assign]
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    try:
        settings = load_config(config)
        runtime = start(settings)
        tokenizer = build_tokenizer(settings, Path(settings.run.dir) / "tokenizer")
        data = load_data(settings, tokenizer, rank=runtime.rank, world_size=runtime.world_size, show_progress=False)
        provenance_of(settings, runtime, data, tokenizer, Path(checkpoint), 6)
    except UserError as error:
        refused = str(error)
    finally:
        logging.getLogger().removeHandler(handler)
        cache_module.SplitWriter.write = write  # type: ignore[method-assign]
    return log.getvalue(), refused, len(written)


def test_two_ranks_repair_a_damaged_cache_and_refuse_changed_text(resumable, held, text, tmp_path, two_ranks):
    [victim] = (tmp_path / "own_cache").glob("tokens-*/train.tokens.bin")
    whole = victim.read_bytes()
    victim.write_bytes(b"\0" * len(whole))
    begin = _begin, str(resumable), str(held / "checkpoints/latest")
    logs, refused, written = zip(*two_ranks.run(*begin))
    assert refused == ("", ""), "what is made again is the data that the checkpoint knows"
    assert sorted(map(bool, written)) == [False, True], "one rank makes it again, and the other waits"
    assert any("train.tokens.bin is not what was written" in log for log in logs)
    assert victim.read_bytes() == whole

    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[: len(lines) // 3][::-1]), encoding="utf-8")
    _, refused, _ = zip(*two_ranks.run(*begin))
    assert all("was trained on other data: data.sources.0 (" in sentence for sentence in refused)


class Killed(BaseException):
    """Ends a build as a signal does, wherever it is."""


def _tokens(path: str, tokenizer: str, cache: str) -> tuple[int, str | None]:
    """How many documents this rank has encoded, and what the result is."""
    encoded: list[int] = []
    write = cache_module.SplitWriter.write
    cache_module.SplitWriter.write = lambda *args: (encoded.append(1), write(*args))[1]  # type: ignore[method-assign]
    sizes = cache_module._BATCH_BYTES, cache_module._PORTION_BYTES, hashes.REMEMBERED_BYTES
    cache_module._BATCH_BYTES, cache_module._PORTION_BYTES, hashes.REMEMBERED_BYTES = 500, 4000, 0
    try:
        source = SourceConfig(type="files", path=path, document="line")
        found = cached_tokens(source, FIELD, HoldOut(below=2**60), load_tokenizer(tokenizer), cache_dir=cache)
    finally:
        cache_module.SplitWriter.write = write  # type: ignore[method-assign]
        cache_module._BATCH_BYTES, cache_module._PORTION_BYTES, hashes.REMEMBERED_BYTES = sizes
    return len(encoded), found["train"].digest


def test_two_ranks_resume_what_a_kill_has_left_and_know_a_copy_by_its_content(
    text, finished_run, tmp_path, monkeypatch, two_ranks
):
    folder, cache = str(finished_run / "tokenizer"), str(tmp_path / "killed")
    documents, expected = _tokens(str(text), folder, str(tmp_path / "undisturbed"))
    write, written = cache_module.SplitWriter.write, []

    def interrupted(*args):
        if len(written) > 0.6 * documents:
            raise Killed
        written.append(1)
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.SplitWriter, "write", interrupted)
        with pytest.raises(Killed):
            _tokens(str(text), folder, cache)
    encoded, digests = zip(*two_ranks.run(_tokens, str(text), folder, cache))
    assert set(digests) == {expected}
    assert 0 in encoded, "one rank waits for the other"
    assert 0 < sum(encoded) < 0.7 * documents, "what was done before the kill is not encoded again"

    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copy(text, tmp_path / "elsewhere"))
    os.utime(copy, (1, 1))
    assert two_ranks.run(_tokens, str(copy), folder, cache) == [(0, expected)] * 2


@pytest.mark.grid
def test_the_same_ranks_may_refuse_other_text_and_then_be_allowed_it(resumable, held, text, two_ranks_of_a_run):
    """A start that is refused leaves nothing that the next one in the same processes would wait for."""
    text.write_text("".join(text.read_text(encoding="utf-8").splitlines(keepends=True)[40:]), encoding="utf-8")
    assert two_ranks_of_a_run.run(_train, [str(resumable)]) == [2, 2]
    assert two_ranks_of_a_run.run(_train, [str(resumable), "data.allow_changed=true"]) == [0, 0]
    assert {entry["step"] for entry in read_provenance(held / "checkpoints/latest")["changes"]} == {6}


def _train(arguments: list[str]) -> int:
    fresh_accelerate()
    return main(["train", *arguments, "train.max_steps=7", "logging.console=off"])
