"""Training checkpoints: everything a run needs to go on, in a directory that transformers loads as it is.

    step-00000100/
      config.json, generation_config.json, model*.safetensors (+ index), tokenizer files
      trainer/state.json               counters, positions, RNG: whatever the trainer gives, as JSON
      trainer/config.yaml              the resolved configuration of the run
      trainer/optimizer*.safetensors   exp_avg.NAME, exp_avg_sq.NAME, ... by published weight names, in fp32;
                                       master.NAME too, where the exported weights are of lower precision;
                                       of adapters, which are merged into those, it is all that there is
      ema/                             with `checkpoint.ema`, once it has begun: the average of the weights, a directory
                                       that transformers loads; ema.NAME beside master.NAME
      trainer/manifest.json            size and SHA-256 of every file

What is frozen is its own average: it is stored once, in files of its own, which ema/ has links to.

Tensors are named by parameter, never by rank, so any layout of ranks reads what any other wrote. All ranks
write at once, each the tensors that it is the writer of, one tensor at a time. Reading from the engine
(`plan.stream`) and writing to the disk (`plan.ShardSet`) meet in `_write_tensors` alone; in between, a save in the
background keeps a copy in host memory of what its rank writes (`plan.HostCopy`).
"""

import json
import platform
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_llm.atomic import sync_directory
from moe_llm.checkpoint import folder
from moe_llm.checkpoint.adapters import adapter_shapes, check_base, has_adapters
from moe_llm.checkpoint.background import Background
from moe_llm.checkpoint.digests import DamagedCheckpoint, FileRecord
from moe_llm.checkpoint.export import DTYPES, token_ids, write_model_files
from moe_llm.checkpoint.frozen import write_trained, write_weight
from moe_llm.checkpoint.manifest import read_manifest, verify, write_file, write_json, write_manifest
from moe_llm.checkpoint.plan import MASTER, MODEL, OPTIMIZER, Named, ShardSet, WritePlan, make_plan, stream
from moe_llm.checkpoint.ranks import Ranks, together
from moe_llm.checkpoint.safetensors_io import TensorFiles, read_json
from moe_llm.checkpoint.space import check_room, naming_failure
from moe_llm.checkpoint.weights import Weights
from moe_llm.config import ModelConfig
from moe_llm.config.base import parse_size
from moe_llm.distributed.state import EMA, TrainedState
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.architectures import architecture_of
from moe_llm.families.card import model_card, newest_record
from moe_llm.families.family import Family
from moe_llm.families.layout import stored_shapes

FORMAT = 1
_VERSIONED = ("torch", "transformers", "deepspeed", "moe_llm")  # packages of which a checkpoint says the version
_AHEAD = 1 << 30  # bytes that a rank has read and not yet written
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it


def save_checkpoint(
    root: str | Path,
    state: TrainedState,
    *,
    step: int,
    trainer_state: Mapping[str, Any],
    model_config: ModelConfig,
    run_config_text: str,
    tokenizer: Any,
    dtype: str = "fp32",
    max_shard_size: str = "5GB",
    keep_last: int | None = None,
    best_step: int | None = None,
    background: Background | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of step `step` and return its directory. Collective.

    With `background`, return when the tensors have been copied to host memory (on each rank those that it writes:
    in fp32 with Adam 12 bytes a parameter, over all ranks together; kept for the next save), and write them from
    there. The directory then gets its name later, at the latest when `background` has been waited for.

    Args:
        root: the run's `checkpoints` directory, on a file system that all ranks share.
        trainer_state: JSON-able; rank 0's is written.
        model_config: with `vocab_size` resolved.
        run_config_text: YAML of the resolved run.
        tokenizer: anything with transformers' `save_pretrained`, `bos_token_id`, `eos_token_id`; None: none.
        dtype: of the exported weights and their average, `fp32` or `bf16`; fp32 masters stand beside them if it is
            not fp32.
        max_shard_size: of the weights' and the optimizer's files, e.g. "5GB".
        keep_last: delete all but so many, once this one is complete; None: delete nothing.
        best_step: of the run so far, this one or an earlier one: it is not deleted, and `best` points to it.
        provenance: JSON-able: what the run is made from, for `read_provenance`.
        background: waits for the save before; with a group of ranks other than that of `state`.

    Raises:
        UserError: on all ranks, if one has no space or a failing file system; in the background, the one before.
            What was there is untouched.
    """
    if background is not None:
        together(state, background.wait)
    root = Path(root)
    tmp, final = folder.tmp_path(root, step), root / folder.step_name(step)
    average, family = state.averaged > 0, architecture_of(model_config)
    plan = make_plan(state, DTYPES[dtype], parse_size(max_shard_size), average, family)
    _assert_whole(plan, model_config)

    def prepare() -> dict[str, Any]:
        head = _trainer_head(root, state, step, dtype, trainer_state, provenance or {})
        _prepare(root, tmp, plan)
        return head

    def complete(records: dict[str, FileRecord]) -> None:
        assert head is not None, "only rank 0 completes a checkpoint, and it has the head"
        small = _write_small_files(tmp, plan, head, run_config_text)
        run, record = yaml.load(run_config_text, _YamlLoader), newest_record(root.parent / "metrics.jsonl", step)
        card = model_card(
            model_config, run=run if isinstance(run, dict) else None, provenance=provenance, record=record
        )
        for directory in (tmp / EMA, tmp) if average else (tmp,):
            model = write_model_files(directory, model_config, token_ids(tokenizer), dtype, tokenizer, card)
            small |= {str((directory / name).relative_to(tmp)): record for name, record in model.items()}
        for link, file in plan.average.linked.items() if plan.average else ():
            folder.link_or_copy(tmp / file, tmp / link)
            small[link] = records[file]
        write_manifest(tmp, records | small)
        for directory in filter(Path.is_dir, tmp.rglob("*")):
            sync_directory(directory)
        folder.publish(tmp, final)
        folder.record(root, final, best_step)
        if keep_last is not None:
            folder.prune(root, keep_last, final, best_step)

    def write(ranks: Ranks, tensors: Iterable[Named]) -> None:
        with _removed_on_failure(tmp, ranks):
            mine = together(ranks, with_sentence(lambda: _write_tensors(tmp, plan, tensors)))
            records = {name: record for share in ranks.gather(mine) for name, record in share.items()}
            together(ranks, with_sentence(lambda: complete(records)), only=0)

    with_sentence = partial(naming_failure, root, final, plan)
    tensors = stream(state, DTYPES[dtype], average, family)
    with _removed_on_failure(tmp, state):
        head = together(state, with_sentence(prepare), only=0)
        if background is not None:
            together(state, lambda: background.copy.take(tensors, DTYPES[dtype], plan.dtypes))
    if background is None:
        write(state, tensors)
    else:
        background.start(lambda: write(background.ranks, background.copy))
    return final


@contextmanager
def _removed_on_failure(tmp: Path, ranks: Ranks) -> Iterator[None]:
    """`tmp` does not outlive a failure inside, of which `together` has told all ranks."""
    try:
        yield
    except Exception:  # of whatever kind: it is raised again, and half a checkpoint helps no one
        if ranks.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise


def _prepare(root: Path, tmp: Path, plan: WritePlan) -> None:
    root.mkdir(parents=True, exist_ok=True)
    folder.remove_leftovers(root)
    folder.free_name(tmp)
    check_room(root, tmp.name.removeprefix(".tmp-"), plan)
    for stem in plan.sets:
        (tmp / stem).parent.mkdir(parents=True, exist_ok=True)


def _write_tensors(tmp: Path, plan: WritePlan, tensors: Iterable[Named]) -> dict[str, FileRecord]:
    """Every tensor that this rank is the writer of, to its file, in a thread, while the next ones are read.

    Ranks read together, tensor by tensor, and each writes only its own. So that none of them waits for another one's
    disk, what is read waits in memory, up to `_AHEAD` bytes.
    """
    shards = {stem: ShardSet(tmp, files) for stem, files in plan.sets.items()}
    waiting: deque[tuple[Future[None], int]] = deque()
    failure: BaseException | None = None

    def finish(room: int) -> None:
        nonlocal failure
        while waiting and sum(nbytes for _, nbytes in waiting) > room:
            written, _ = waiting.popleft()
            failure = failure or written.exception()

    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as pool:
        for stem, name, tensor in tensors:  # to the end even after a failure: reading is collective
            if failure is None:
                waiting.append((pool.submit(shards[stem].write, name, tensor), tensor.nbytes))
                finish(_AHEAD)
        finish(-1)
    if failure is not None:
        for shard in shards.values():
            shard.abort()
        raise failure
    return {name: record for shard in shards.values() for name, record in shard.finish().items()}


def _write_small_files(tmp: Path, plan: WritePlan, head: dict[str, Any], run_config_text: str) -> dict[str, FileRecord]:
    records = {
        folder.STATE: write_json(tmp / folder.STATE, head),
        "trainer/config.yaml": write_file(tmp / "trainer/config.yaml", run_config_text),
    }
    for files in plan.sets.values():
        if files.index is not None:
            name = f"{files.stem}.safetensors.index.json"
            records[name] = write_json(tmp / name, files.index)
    return records


@cache
def _versions() -> dict[str, str]:
    return {d.name: d.version for name in _VERSIONED for d in distributions(name=name)}


def _trainer_head(
    root: Path,
    state: TrainedState,
    step: int,
    dtype: str,
    trainer: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> dict:
    """The content of trainer/state.json; refuses what JSON cannot hold before anything is written."""
    head = {
        "format": FORMAT,
        "serial": folder.next_serial(root),
        "step": step,
        "trainer": dict(trainer),
        "provenance": dict(provenance),
        "optimizer_tensors": list(state.kinds),
        **({"optimizer_counters": state.counters} if state.counters else {}),
        "masters": DTYPES[dtype] != torch.float32,
        **({"base": state.base_files} if has_adapters(state) else {}),
        "ema_updates": state.averaged,
        "written_by": {"world_size": state.world_size, "python": platform.python_version()} | _versions(),
    }
    # A TypeError now rather than after the tensors; and training may go on to change what it gave us.
    return json.loads(json.dumps(head))


def _assert_whole(plan: WritePlan, model: ModelConfig) -> None:
    """No expert and no layer is left out, whoever the writers are."""
    expected = {
        stored: stored_shape
        for name, shape in (hf.parameter_shapes(model) | hf.buffer_shapes(model)).items()
        for stored, stored_shape in stored_shapes(architecture_of(model), name, shape)
    }
    planned = {spec.name: spec.shape for spec in plan.model.specs}
    wrong = {name for name, _ in expected.items() ^ planned.items()}
    assert not wrong, f"the ranks would not write the model that was configured: {sorted(wrong)[:4]}"


def load_checkpoint(path: str | Path, state: TrainedState, *, hashes: bool = True) -> dict[str, Any]:
    """Restore weights and optimizer tensors, written at any layout, into this one. Collective.

    Each rank reads the tensors that it holds, one at a time. With adapters, these alone: the checkpoint has the weights
    beneath them only merged, and `state` has them already.

    Args:
        path: a step directory.
        hashes: compare every file's SHA-256 first, shared out among the ranks, so that nothing is changed by a damaged
            checkpoint. False: read each file once, and compare its blocks with their digests on the way.

    Returns:
        The `trainer_state` that was saved.

    Raises:
        UserError: on every rank, before anything is changed: a missing, truncated or damaged file, another
            format, another architecture or another optimizer.
        DamagedCheckpoint: on every rank, with `hashes=False`, when all is read: a file holds other bytes than were
            written. The state is of no use until another checkpoint has been loaded.
    """
    path, failures = Path(path), list[UserError]()
    verify(path, state, hashes=hashes)
    head, sources, apart = together(state, lambda: _open(path, state, failures))
    adapted = has_adapters(state)
    state.make_average(head["ema_updates"] if EMA in sources else 0)
    if state.counters:
        state.counters = head["optimizer_counters"]
    for entry in state.entries():
        if entry.adapter:
            write_trained(state, entry, "weight", sources[MASTER])
        elif entry.name in apart and not adapted:
            write_trained(state, entry, "weight", apart[entry.name][MASTER])
        elif not adapted:
            write_weight(state, entry, sources[MODEL], sources[MASTER])
        for kind in entry.kinds_among(state.kinds):
            write_trained(state, entry, kind, sources[kind])
        if EMA in sources and entry.trainable:
            write_trained(state, entry, EMA, apart.get(entry.name, sources)[EMA])
    found = [sentence for sentence in state.gather(str(failures[0]) if failures else None) if sentence]
    if found:  # told now: reading is collective, and other ranks would have waited for one that had stopped
        raise DamagedCheckpoint(found[0])
    return head["trainer"]


def read_trainer_state(path: str | Path) -> dict[str, Any]:
    """What `load_checkpoint` will return, before anything else is read.

    Raises:
        UserError: no checkpoint of this format there, or a damaged one.
    """
    return _read_head(Path(path))["trainer"]


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as provenance; empty for a checkpoint of a version that had none.

    Raises:
        UserError: as `read_trainer_state`.
    """
    provenance = _read_head(Path(path)).get("provenance", {})
    if not isinstance(provenance, dict):
        raise UserError(f"file {Path(path) / folder.STATE} is damaged: provenance is no object: use another checkpoint")
    return provenance


def _read_head(path: Path) -> dict[str, Any]:
    """The content of trainer/state.json."""
    head = read_json(path / folder.STATE)
    if head.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} is of format {head.get('format')}, and this version reads {FORMAT}: "
            "use the version of moe_llm that wrote it"
        )
    absent = {"step", "trainer", "optimizer_tensors", "masters"} - head.keys()
    if absent:
        raise UserError(f"file {path / folder.STATE} is damaged: it lacks {min(absent)}: use another checkpoint")
    return head


def _open(
    path: Path, state: TrainedState, failures: list[UserError]
) -> tuple[dict[str, Any], dict[str, Weights], dict[str, dict[str, Weights]]]:
    """state.json; by kind, the tensors; and by name and kind those that the model's files omit. Everything that can be
    refused is refused here."""
    head = _read_head(path)
    stored = head["optimizer_tensors"]
    if set(stored) != set(state.kinds):
        raise UserError(
            f"checkpoint {path} has the optimizer tensors {stored}, and this run's optimizer needs "
            f"{list(state.kinds)}: set optim.name as it was, or start another run.dir"
        )
    lacking = state.counters.keys() - head.get("optimizer_counters", {}).keys()
    if lacking:
        raise UserError(
            f"checkpoint {path} has no counters of the optimizer for {min(lacking)} times optim.lr: set "
            "optim.lr_multipliers as they were, or start another run.dir"
        )
    shapes, family = _stored_shapes(path, state)
    check_base(path, head, state)
    records = {path / name: record for name, record in read_manifest(path).items()}
    model = Weights(TensorFiles(path, MODEL, records), "", failures)
    whole = model.without_unused(shapes, family.omitted)
    model.check(whole)
    omitted = shapes.keys() - whole.keys()
    shapes |= adapter_shapes(path, state)
    sources = {MODEL: model, MASTER: model}
    entries = [entry for entry in state.entries() if entry.trainable]
    trainable = {entry.name: shapes[entry.name] for entry in entries}
    experts = next((entry.trained_experts for entry in entries if entry.trained_experts is not None), None)
    average = state.averages and head.get("ema_updates", 0) > 0  # absent: of a version that kept none
    masters = head["masters"] or has_adapters(state)
    beside = ([MASTER] + [EMA] * average) if masters else []
    if average and not masters:
        sources[EMA] = Weights(TensorFiles(path / EMA, MODEL, records), "", failures)
        sources[EMA].check(whole)
    if trainable and (beside or state.kinds):
        files = TensorFiles(path / "trainer", Path(OPTIMIZER).name, records)
        for kind in [*beside, *state.kinds]:
            having = {e.name for e in entries if kind in beside or e.kinds_among((kind,))}
            sources[kind] = Weights(files, f"{kind}.", failures)
            sources[kind].check(
                {n: shape for n, shape in trainable.items() if n in having},
                optional=map(hf.published_name, omitted),
                experts=experts,
            )
    apart: dict[str, dict[str, Weights]] = {}
    if omitted:
        files = TensorFiles(path / "trainer", Path(OPTIMIZER).name, records)
        kinds = [MASTER, *([EMA] if average else [])]
        kept = {kind: Weights(files, f"{kind}.", failures) for kind in kinds}
        for kind, weights in kept.items():
            due = {name for name in omitted if kind == MASTER or name in trainable}
            others = {*weights.stored()} - {hf.published_name(name) for name in due}
            weights.check({name: shapes[name] for name in due}, optional=others)
        apart = dict.fromkeys(omitted, kept)
    return head, sources, apart


def _stored_shapes(path: Path, state: TrainedState) -> tuple[dict[str, tuple[int, ...]], Family]:
    """The shape over all ranks of every parameter, which must be those of the model in training, and the family of the
    files."""
    config_file = path / "config.json"
    stored = hf.from_transformers_config(read_json(config_file), str(config_file))
    shapes = hf.parameter_shapes(stored) | hf.buffer_shapes(stored)
    held = {entry.name: entry for entry in state.entries() if not entry.adapter}
    for name in [*held, *(name for name in shapes if name not in held and hf.expert_of(name) is None)]:
        whole, here = shapes.get(name), held[name].shape if name in held else None
        same = whole == here or (hf.is_expert(name) and whole and here and whole[1:] == here[1:])
        if not same:
            raise UserError(
                f"checkpoint {path} has {name} of shape {whole}, and this run's is of shape {here}: "
                "set model as it was, or start another run.dir"
            )
    return shapes, architecture_of(stored)
