"""Frozen causal language models, and what they say of packed blocks.

Dimensions: B blocks, S sequence length, N labelled positions of a batch in the order in which it is flattened,
D hidden, V vocabulary, G documents that are read together, L the longest of them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.checkpoint.export import DTYPES
from moe_llm.checkpoint.folder import model_config_file
from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.config import Config
from moe_llm.config.distill import TeacherConfig
from moe_llm.data.packing import IGNORED, Batch
from moe_llm.data.tokenizer import load_tokenizer
from moe_llm.ensemble.causal_lm import load_causal_lm
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.architectures import OWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Teacher(Protocol):
    """width: of its logits. The head is apart, so that no more logits are formed than are looked at."""

    width: int

    def hidden(self, batch: Batch) -> Tensor:
        """(N, D) final hidden states of the labelled positions; or their logits, where the model does more to them
        than its head."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, width) of some rows of `hidden`."""


class OwnTeacher:
    """A Mixtral checkpoint in this package's model, which reads packed blocks as they are."""

    def __init__(self, model: MoEForCausalLM):
        self._model, self.width = model.eval().requires_grad_(False), model.config.resolved_vocab_size

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        model = self._model
        batch = batch.to(model.lm_head.weight.device)
        patterns = model.model.attention_patterns(
            batch.input_ids_BS,
            attention_mask=batch.attention_mask_BS,
            document_ids=batch.document_ids_BS,
            runs=batch.runs_B,
        )
        _, x_BSD, _ = model.model(
            batch.input_ids_BS, batch.position_ids_BS, patterns, batch.attention_mask_BS, batch.document_ids_BS
        )
        return x_BSD[batch.labels_BS != IGNORED]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._model.lm_head.weight)


class ForeignTeacher:
    """Any causal model of transformers. Each document of a block is read by itself, so that none sees another in
    whatever way the model attends or counts positions; what follows a document on the right is not seen by it.

    Raises:
        UserError: what stands later changes what the model says of earlier positions.
    """

    _base: Any  # transformers' modules, whose attributes have no types
    _head: Any

    def __init__(self, model: Any, field: str):
        self._model = model.eval().requires_grad_(False)
        base, head = getattr(model, model.base_model_prefix, None), model.get_output_embeddings()
        self.width, chunked = self._probe(base, head, field)
        self._base, self._head = (base, head) if chunked else (None, None)

    @torch.no_grad()
    def _probe(self, base: Any, head: Any, field: str) -> tuple[int, bool]:
        """Width of the logits, and whether they are the head's of the base's hidden states, and no more."""
        first = torch.tensor([[0, 1, 2, 3]], device=self._model.device)
        other = torch.tensor([[0, 1, 2, 4]], device=self._model.device)
        logits, changed = (self._model(input_ids=ids, use_cache=False).logits.float() for ids in (first, other))
        if (logits[:, :3] - changed[:, :3]).abs().max() > 0.05 * logits.abs().max():
            raise UserError(f"{field}.path is a model that looks ahead: give a causal language model")
        if base is None or base is self._model or head is None:
            return logits.shape[-1], False
        hidden = base(input_ids=first, use_cache=False)[0]
        same = hidden.shape[-1] == head.weight.shape[-1] and torch.equal(head(hidden).float(), logits)
        return logits.shape[-1], same

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        batch = batch.to(self._model.device)
        labelled_BS = batch.labels_BS != IGNORED
        index_BS = labelled_BS.flatten().cumsum(0).view_as(labelled_BS) - 1
        found: Tensor | None = None
        for group in _groups([d for d in documents(batch) if labelled_BS[d].any()], labelled_BS.numel()):
            longest = group[0][1].stop - group[0][1].start
            read = [batch.input_ids_BS[document] for document in group]
            ids_GL = torch.stack([F.pad(ids, (0, longest - len(ids))) for ids in read])
            output = (self._base or self._model)(input_ids=ids_GL, use_cache=False)[0]
            if found is None:
                found = output.new_empty(int(labelled_BS.sum()), output.shape[-1])
            for document, of_document in zip(group, output):
                labelled = labelled_BS[document]
                found[index_BS[document][labelled]] = of_document[: len(labelled)][labelled]
        if found is None:
            return torch.empty(0, 1, device=self._model.device)
        return found

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        return hidden if self._head is None else self._head(hidden)


def documents(batch: Batch) -> list[tuple[int, slice]]:
    """(block, positions) of what is attended to together; whole blocks, without their padding, if not isolated."""
    lengths = batch.attention_mask_BS.sum(1).tolist()
    if batch.document_ids_BS is None:
        return [(row, slice(0, length)) for row, length in enumerate(lengths) if length]
    found = []
    for row, length in enumerate(lengths):
        counts = torch.unique_consecutive(batch.document_ids_BS[row, :length], return_counts=True)[1].tolist()
        start = 0
        for count in counts:
            found.append((row, slice(start, start + count)))
            start += count
    return found


def _groups(found: list[tuple[int, slice]], most: int) -> Iterator[list[tuple[int, slice]]]:
    """Documents of similar length together, the longest first, with at most so many places, padding among them."""
    found = sorted(found, key=lambda d: d[1].start - d[1].stop)
    while found:
        longest = found[0][1].stop - found[0][1].start
        count = max(1, most // longest)
        yield found[:count]
        found = found[count:]


class Ensemble:
    """Teachers as one: the weighted mean of their probabilities, to which the temperature is applied as to one model's.

    Args:
        width: of the student's logits. A teacher may have more; what is beyond is no token.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float], width: int, temperature: float):
        self._teachers, self.width, self._temperature = list(teachers), width, temperature
        self._log_weights = (torch.tensor(weights, dtype=torch.float64) / sum(weights)).log().tolist()

    def hidden(self, batch: Batch) -> list[Tensor]:
        """Of each teacher, for the labelled positions."""
        return [teacher.hidden(batch) for teacher in self._teachers]

    @torch.no_grad()
    def log_p(self, hidden: Sequence[Tensor], start: int, stop: int, device: torch.device) -> Tensor:
        """(stop - start, V) log-probabilities at the temperature, fp32."""
        mixed: Tensor | None = None
        for teacher, rows, log_weight in zip(self._teachers, hidden, self._log_weights):
            logits_CV = teacher.logits(rows[start:stop])[:, : self.width].to(device, torch.float32)
            log_p_CV = logits_CV.log_softmax(-1) + log_weight
            mixed = log_p_CV if mixed is None else torch.logaddexp(mixed, log_p_CV)
        assert mixed is not None, "there is a teacher"
        return mixed if self._temperature == 1 else (mixed / self._temperature).log_softmax(-1)


def check_teachers(config: Config) -> None:
    """Refuse teachers that are not there or cannot read the run's blocks, from their configuration files alone.

    Raises:
        UserError: names the teacher's field.
    """
    for field, teacher in named_teachers(config):
        _check_device(teacher, field)
        if config.distill.cache_top_k is not None and not Path(teacher.path).expanduser().exists():
            continue  # what it said may be on disk
        content = _described(teacher, field)
        longest = _longest(content)
        if isinstance(longest, int) and longest < config.data.sequence_length:
            raise UserError(
                f"{field}.path={teacher.path!r} reads {longest} positions, fewer than data.sequence_length="
                f"{config.data.sequence_length}: lower it, or use another teacher"
            )
    path = config.tokenizer.path
    if config.distill.teachers and path is not None and Path(path).expanduser().is_dir():
        check_vocabularies(config, load_tokenizer(Path(path).expanduser()))


def check_vocabularies(config: Config, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse a teacher whose tokens are not the student's.

    Raises:
        UserError: names a token that differs.
    """
    ours = tokenizer.get_vocab()
    for field, teacher in named_teachers(config):
        directory = Path(teacher.path).expanduser()
        if not directory.exists():
            continue
        theirs = load_tokenizer(directory).get_vocab()
        differing = next(
            (word for word, i in [*ours.items(), *theirs.items()] if ours.get(word) != i or theirs.get(word) != i), None
        )
        if differing is not None:
            raise UserError(
                f"{field}.path={teacher.path!r} has another vocabulary ({json.dumps(differing)} is its token "
                f"{theirs.get(differing)} and the run's {ours.get(differing)}): set tokenizer.path to its tokenizer, "
                "or use another teacher"
            )


def named_teachers(config: Config) -> list[tuple[str, TeacherConfig]]:
    return [(f"distill.teachers.{i}", teacher) for i, teacher in enumerate(config.distill.teachers)]


def load_ensemble(config: Config, device: torch.device) -> Ensemble:
    """The run's teachers in memory, those of one path and setting once.

    Args:
        device: where the student's rank computes.

    Raises:
        UserError: a checkpoint that cannot be loaded, or whose logits are narrower than the student's.
    """
    loaded: dict[tuple[str, str, str], Teacher] = {}
    for field, teacher in named_teachers(config):
        key = (teacher.path, teacher.dtype, teacher.device)
        if key not in loaded:
            loaded[key] = load_teacher(
                teacher, device if teacher.device == "auto" else torch.device(teacher.device), field
            )
        if loaded[key].width < config.model.resolved_vocab_size:
            raise UserError(
                f"{field}.path={teacher.path!r} has {loaded[key].width} logits, fewer than model.vocab_size="
                f"{config.model.vocab_size}: set model.vocab_size={loaded[key].width}"
            )
    teachers = config.distill.teachers
    return Ensemble(
        [loaded[t.path, t.dtype, t.device] for t in teachers],
        [t.weight for t in teachers],
        config.model.resolved_vocab_size,
        config.distill.temperature,
    )


def load_teacher(teacher: TeacherConfig, device: torch.device, field: str) -> Teacher:
    """A teacher's checkpoint: in this package's model where it is Mixtral's, else in transformers'."""
    directory, dtype = Path(teacher.path).expanduser(), DTYPES.get(teacher.dtype)
    if _is_mixtral(directory):
        return OwnTeacher(MoEForCausalLM.from_pretrained(directory, dtype).to(device))
    return ForeignTeacher(load_causal_lm(directory, dtype or "auto", field).to(device), field)


def _is_mixtral(directory: Path) -> bool:
    """Whether this package's model computes the checkpoint's function."""
    if not any(directory.glob("*.safetensors")):
        return False
    try:
        hf.from_transformers_config(read_json(directory / "config.json"), str(directory))
    except UserError:  # another architecture, or a Mixtral with something that ours does not have
        return False
    return True


def _described(teacher: TeacherConfig, field: str) -> dict:
    """What a teacher's config.json says, if transformers has a causal language model for it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    file = model_config_file(Path(teacher.path).expanduser(), f"{field}.path={teacher.path!r}")
    content = read_json(file)
    if content.get("model_type") == OWN.model_type:  # loading it tells what is wrong with it
        return content
    try:
        known = type(AutoConfig.from_pretrained(file.parent)) in MODEL_FOR_CAUSAL_LM_MAPPING
    except (OSError, ValueError, KeyError, ImportError):
        known = False
    if not known:
        raise UserError(
            f"{field}.path={teacher.path!r} is of type {content.get('model_type')!r}, for which transformers has no "
            "causal language model: use another teacher"
        )
    return content


def _longest(content: dict[str, Any]) -> Any:
    """Tokens that a model is meant for, as far as its config.json says it; more where its rotary embeddings are scaled."""
    try:
        return hf.from_transformers_config(content).longest_text
    except UserError:  # no family of ours
        return content.get("max_position_embeddings") or content.get("n_positions")


def _check_device(teacher: TeacherConfig, field: str) -> None:
    if not teacher.device.startswith("cuda"):
        return
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(teacher.device.partition(":")[2] or 0) >= there:
        raise UserError(f"{field}.device={teacher.device} is not there, among {there} GPUs: use another, or auto")
