"""A source that streams: same samples at any number of ranks and after any resume, bounded disk, nothing learned that is
held out."""

import gzip
import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from moe_llm.config.load import validate
from moe_llm.data import streamed_blocks
from moe_llm.data.loader import TrainLoader, load_data
from moe_llm.data.sources import check_sources
from moe_llm.errors import UserError

DOCUMENTS = 120


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(streamed_blocks, "WINDOW_BYTES", 1500)


@pytest.fixture
def addresses(make_text):
    """Three files of JSON lines in a file system of fsspec's."""
    system = fsspec.filesystem("memory")
    system.rm("/bucket", recursive=True) if system.exists("/bucket") else None
    texts = [make_text(seed, 15) for seed in range(DOCUMENTS)]
    for part in range(3):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[part::3])
        system.pipe(f"/bucket/part-{part}.jsonl", rows.encode())
    return "memory://bucket/*.jsonl"


@pytest.fixture
def config(addresses, make_config, tokenizer):
    source = {"type": "files", "path": addresses, "streaming": True}
    return make_config(
        [source], tokenizer={"path": tokenizer.name_or_path}, data={"validation_fraction": 0.3}, train={"max_steps": 99}
    )


def load(config, tokenizer, streams=None):
    return load_data(config, tokenizer, show_progress=False, streams=streams)


def elsewhere(config):
    """The same run with another cache, as on another machine."""
    data = config.data.model_copy(update={"cache_dir": f"{config.data.cache_dir}-elsewhere"})
    return config.model_copy(update={"data": data})


def steps(data, position, count, world=1, batch=8):
    """Rows of each step, of all ranks."""
    loaders = [
        TrainLoader(
            data.train, position=position, global_batch_size=batch, micro_batch_size=1, rank=r, world_size=world
        )
        for r in range(world)
    ]
    found = []
    for _ in range(count):
        batches = list(zip(*(next(loader) for loader in loaders)))
        found.append([tuple(row) for micro in batches for b in micro for row in b.input_ids_BS.tolist()])
    for loader in loaders:
        loader.close()
    return found


def windows(config):
    return sorted(int(path.name) for path in Path(config.data.cache_dir).glob("stream-*/[0-9]*"))


def test_a_window_that_another_run_has_just_deleted_is_made_again(config, tokenizer, monkeypatch):
    """Runs of one machine share the windows of a stream, and delete what lies behind them."""
    alone = steps(load(config, tokenizer), 0, 6)
    true, left = streamed_blocks.open_split, [3]

    def deleted(directory, split):
        if left[0]:
            left[0] -= 1
            shutil.rmtree(directory)
        return true(directory, split)

    monkeypatch.setattr(streamed_blocks, "open_split", deleted)
    assert steps(load(elsewhere(config), tokenizer), 0, 6) == alone
    assert not left[0]


def test_samples_are_the_same_for_any_number_of_ranks(config, tokenizer):
    alone = steps(load(config, tokenizer), 0, 12)
    for world in (2, 4):
        assert steps(load(config, tokenizer), 0, 12, world) == alone


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_resume_on_another_machine_and_layout_goes_on_exactly(config, tokenizer, cut):
    data = load(config, tokenizer)
    whole = steps(data, 0, 16)
    state = json.loads(json.dumps(data.streams(8 * cut)))
    again = load(elsewhere(config), tokenizer, state)
    assert steps(again, 8 * cut, 16 - cut, 2) == whole[cut:]
    assert again.streams(8 * 16) == data.streams(8 * 16)


def test_an_epoch_has_every_training_document_once_and_no_held_out_one(config, tokenizer):
    data = load(config, tokenizer)
    blocks = data.train.sources[0]
    held_out = load_held_out(config, tokenizer)
    begins, n = [], 0
    while True:
        arrays = blocks.empty_arrays(1)
        blocks.write(n, 0, arrays)
        if blocks.epoch_of(n):
            break
        begins += documents_in(arrays)
        n += 1
    assert len(begins) == DOCUMENTS - held_out
    assert held_out > 2


def load_held_out(config, tokenizer):
    from moe_llm.data.sources import read_documents
    from moe_llm.data.split import find_holdout

    holdout = find_holdout(config)
    return sum(not holdout.divide(text)[0] for text in read_documents(config.data.sources[0], "data.sources.0"))


def documents_in(arrays):
    return [t for t in arrays["input_ids_BS"][0][arrays["attention_mask_BS"][0]].tolist() if t == 1]


def test_disk_is_bounded_however_long_the_stream(config, tokenizer):
    data = load(config, tokenizer)
    largest = 0
    for position in range(0, 240, 24):
        steps(data, position, 3)
        largest = max(largest, len(windows(config)))
    assert windows(config)[0] == 0, "what is held out stays"
    assert windows(config)[-1] > 6
    assert largest <= 6


def test_validation_is_the_same_later_on(config, tokenizer):
    data = load(config, tokenizer)
    steps(data, 0, 12)
    again = load(config, tokenizer, data.streams(96))
    rows = [[b.input_ids_BS.tolist() for b in d.validation.batches(micro_batch_size=2)] for d in (data, again)]
    assert rows[0] == rows[1]
    assert rows[0]


@pytest.mark.parametrize("change", ["other words", "fewer files"])
def test_a_changed_stream_is_refused_or_where_allowed_read_from_its_begin(config, tokenizer, addresses, change):
    data = load(config, tokenizer)
    steps(data, 0, 8)
    state = data.streams(64 + 1)
    system = fsspec.filesystem("memory")
    if change == "fewer files":
        system.rm("/bucket/part-2.jsonl")
        system.rm("/bucket/part-1.jsonl")
    for path in system.ls("/bucket", detail=False):
        system.pipe(path, system.cat(path).replace(b"router", b"routes"))
    with pytest.raises(UserError, match=r"data\.sources\.0: the stream gives other text.*data\.allow_changed=true"):
        load(elsewhere(config), tokenizer, state)
    allowed = elsewhere(config)
    allowed = allowed.model_copy(update={"data": allowed.data.model_copy(update={"allow_changed": True})})
    again = load(allowed, tokenizer, state)
    assert again.restarted_streams == ["data.sources.0"]
    begin = next(iter(state.values()))["begin"]
    new = load(allowed, tokenizer)
    assert not new.restarted_streams
    assert {steps(again, n, 1, batch=1)[0][0] for n in range(begin, begin + 8)} <= {
        row for (row,) in steps(new, 0, 64, batch=1)
    }
    saved = again.streams(begin + 3)
    resumed = load(allowed, tokenizer, saved)
    assert steps(resumed, begin + 3, 8, batch=1) == steps(again, begin + 3, 8, batch=1)
    assert not resumed.restarted_streams


def test_a_checkpoint_at_the_edge_of_a_window_knows_the_next_text_too(config, tokenizer):
    data = load(config, tokenizer)
    steps(data, 0, 8)
    edges = [known.begin for known in data.train.sources[0]._known[:3]]
    assert len(set(edges)) == 3
    assert all("sha256" in next(iter(data.streams(edge).values())) for edge in edges)


def test_streams_and_files_are_mixed_by_their_weights(addresses, make_config, tokenizer, tmp_path, make_text):
    (tmp_path / "a.txt").write_text("".join(make_text(seed) for seed in range(500, 560)), encoding="utf-8")
    sources = [
        {"type": "files", "path": str(tmp_path / "a.txt"), "document": "line", "weight": 1},
        {"type": "files", "path": addresses, "streaming": True, "weight": 3},
    ]
    config = make_config(sources, tokenizer={"path": tokenizer.name_or_path}, data={"validation_fraction": 0.3})
    data = load(config, tokenizer)
    whole = steps(data, 0, 10)
    state = data.streams(40)
    assert list(state) == ["1"]
    assert steps(load(config, tokenizer, state), 40, 5, 4) == whole[5:]
    told = data.progress(80)
    assert told["data.sources.1"]["tokens"] > 2 * told["data.sources.0"]["tokens"]


def test_a_directory_of_a_hub_dataset_streams(tmp_path, make_config, tokenizer, make_text):
    (tmp_path / "set").mkdir()
    rows = "".join(json.dumps({"text": make_text(seed, 15)}) + "\n" for seed in range(60))
    (tmp_path / "set/train.jsonl").write_text(rows, encoding="utf-8")
    source = {"type": "hub", "path": str(tmp_path / "set"), "streaming": True}
    config = make_config([source], tokenizer={"path": tokenizer.name_or_path}, data={"validation_fraction": 0.3})
    data = load(config, tokenizer)
    whole = steps(data, 0, 9)
    assert steps(load(config, tokenizer, data.streams(48)), 48, 3) == whole[6:]


def test_a_missing_address_is_one_sentence_before_any_work(make_config, tokenizer):
    source = {"type": "files", "path": "memory://nowhere/*.jsonl", "streaming": True}
    with pytest.raises(UserError, match=r"data\.sources\.0\.path=memory://nowhere/\*\.jsonl matches no file"):
        check_sources(make_config([source], tokenizer={"path": tokenizer.name_or_path}))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.jsonl", b"", r"matches empty files alone: name files that hold text"),
        (
            "half.jsonl.gz",
            gzip.compress(os.urandom(4000).hex().encode())[:2000],
            r"cannot be loaded \(.*repair or remove",
        ),
        ("half.jsonl", b'{"text": "a"}\n{"text": "b', r"cannot be loaded \(.*repair or remove"),
    ],
)
def test_a_file_of_a_stream_that_cannot_be_read_is_one_sentence(
    make_config, tokenizer, tmp_path, name, content, sentence
):
    (tmp_path / name).write_bytes(content)
    source = {"type": "files", "path": str(tmp_path / name), "streaming": True}
    config = make_config([source], tokenizer={"path": tokenizer.name_or_path}, train={"max_steps": 9})
    with pytest.raises(UserError, match=r"^data\.sources\.0\.path=.*" + sentence):
        load(config, tokenizer)


def test_an_empty_file_of_a_stream_is_passed_over(config, tokenizer):
    before = steps(load(config, tokenizer), 0, 4)
    fsspec.filesystem("memory").pipe("/bucket/a.jsonl", b"")
    assert steps(load(elsewhere(config), tokenizer), 0, 4) == before


STREAM = {"type": "files", "path": "memory://a/*.jsonl", "streaming": True}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"sources": [STREAM | {"streaming": False}]}, r"data\.sources\.0\.path=.*set streaming: true"),
        ({"sources": [STREAM, STREAM]}, r"data\.sources\.0\.weight=.*size of a stream is not known"),
        ({"sources": [{"type": "python_stdlib", "streaming": True}]}, r"data\.sources\.0\.streaming=.*python_stdlib"),
        ({"sources": [STREAM | {"content": "chat"}]}, r"data\.sources\.0\.streaming=.*content: chat"),
        ({"sources": [STREAM | {"format": "megatron"}]}, r"data\.sources\.0\.streaming=.*megatron"),
        ({"sources": [STREAM], "order": "similar"}, r"data\.order=similar needs all documents"),
        (
            {"sources": [{"type": "python_stdlib"}], "validation_sources": [STREAM]},
            r"data\.validation_sources\.0\.streaming=.*other text each time",
        ),
    ],
)
def test_streams_that_cannot_be_are_refused(data, named):
    with pytest.raises(UserError, match=named):
        validate({"model": {"vocab_size": 300}, "train": {"max_steps": 9}, "data": data})
