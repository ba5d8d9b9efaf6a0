"""Sequence-level distillation (Kim and Rush 2016): a teacher writes the text that a student is then trained on.

The teacher's likeliest answer to a prompt, found by beam search, stands for its whole distribution over answers; or
answers are drawn from it. What is written is a source that `train` takes: rows of chat, or of text.

While it is being written, the file has the suffix .partial: first the settings, then a line for each prompt. The same
command goes on from there; batches are seeded one by one, so that it comes to the same answers.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_llm.atomic import write_atomically
from moe_llm.checkpoint.folder import model_config_file
from moe_llm.config import SourceConfig
from moe_llm.data.chat import Example, to_question
from moe_llm.data.chat_template import own_template, render_prompt
from moe_llm.data.documents import DocumentEncoder, check_rows, plain_backend, prompt_ids
from moe_llm.data.files import user_error_on_disk
from moe_llm.data.hashes import stamp_of
from moe_llm.data.shapes import wanted_columns
from moe_llm.data.sources import list_files, read_documents, read_records
from moe_llm.data.tokenizer import end_token_ids, load_tokenizer
from moe_llm.ensemble.causal_lm import generate_plainly, load_causal_lm
from moe_llm.errors import UserError
from moe_llm.progress import tracked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FIELD = "PROMPTS"


@dataclass(frozen=True)
class AnswerOptions:
    """beams: of the search; temperature: draw answers instead, and then beams is 1. continued: PROMPTS are texts, and
    what is continued is so many tokens of each; None: they are rows of chat. limit: prompts, at most.
    drafts: PROMPTS have answers, and of each so many of the teacher's are written as drafts, for a model that rewrites
    them (`moe_llm.distill.drafts`). template, reward: of drafts."""

    max_new_tokens: int = 256
    beams: int = 5
    temperature: float | None = None
    batch_size: int = 8
    continued: int | None = None
    limit: int | None = None
    seed: int = 0
    drafts: int | None = None
    template: str | None = None
    reward: str | None = None

    def __post_init__(self):
        for name in ("template", "reward"):
            if getattr(self, name) is not None and self.drafts is None:
                raise UserError(f"--{name} is for drafts, and none are asked for: add --drafts N, or remove it")
        if self.temperature is not None and self.beams != 1:
            raise UserError(
                f"--beams {self.beams} searches and --temperature {self.temperature:g} draws: "
                "add --beams 1, or leave --temperature out"
            )


@dataclass(frozen=True)
class _Prompt:
    """ids: what the teacher reads. row: of the file to be written, without the answer, which goes to `answer`. text: what
    is asked, gold: the answer that is there, where there is one."""

    ids: list[int]
    row: dict[str, Any]
    answer: str
    text: str = ""
    gold: str = ""

    def answered(self, text: str) -> dict[str, Any] | None:
        """The row with its answer; None for an empty one, of which there is nothing to learn."""
        if not text.strip():
            return None
        if self.answer == "messages":
            return self.row | {"messages": [*self.row["messages"], {"role": "assistant", "content": text}]}
        return {**self.row, self.answer: self.row.get(self.answer, "") + text}


@dataclass(frozen=True)
class Written:
    """rows: answered prompts; left_out: prompts that are too short or too long, or whose answer is empty or cut."""

    rows: int
    left_out: int


def write_answers(teacher: str | Path, prompts: str | list[str], out: str | Path, options: AnswerOptions) -> Written:
    """Let a causal language model of transformers answer prompts, and write both as JSON lines.

    Args:
        prompts: files or globs. Rows have `messages`, of which a last answer is replaced, or `prompt`; with
            `options.continued` they are text, as in `data.sources`.
        out: a file that does not exist; it is complete, or not there.

    Raises:
        UserError: no such teacher or prompts, no chat template, no answer at all, or no space.
    """
    directory, out = Path(teacher).expanduser(), Path(out)
    if out.exists():
        raise UserError(f"--out {out} exists: name another file, or remove it")
    model_config_file(directory, f"TEACHER {str(teacher)!r}")
    tokenizer = load_tokenizer(directory)
    writer = _writer(options)
    source = SourceConfig(type="files", path=prompts, content="text" if options.continued else "chat")
    partial = out.with_name(f"{out.name}.partial")
    with user_error_on_disk("--out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        done = _resume(partial, _settings(directory, source, options))
        try:
            _answer_all(directory, tokenizer, _read_prompts(source, tokenizer, options), done, partial, options, writer)
            return _finish(partial, out)
        except UserError:
            if not done:  # a mistake that was there from the first leaves nothing behind
                partial.unlink(missing_ok=True)
            raise


def _writer(options: AnswerOptions) -> Callable[[_Prompt, list[str]], Any]:
    """From a prompt and its answers to what is written of it: a row, or a list of rows; None for nothing."""
    if options.drafts is None:
        return lambda prompt, texts: prompt.answered(texts[0])
    from moe_llm.distill.drafts import DraftWriter

    drafts = DraftWriter(options.template, options.reward)
    return lambda prompt, texts: drafts.rows(prompt.text, prompt.gold, texts, chat=not options.continued)


def _settings(directory: Path, source: SourceConfig, options: AnswerOptions) -> str:
    """A line that is the same for the same answers."""
    files = [
        [str(file.resolve()), *stamp_of(file)]
        for file in [*list_files(source, _FIELD), directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    ]
    return json.dumps({"options": asdict(options), "files": files}) + "\n"


def _resume(partial: Path, settings: str) -> int:
    """How many prompts have been dealt with; the file then ends behind the last of them."""
    lines = _lines(partial) if partial.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if not whole or whole[0] != settings:
        whole = [settings]
    if whole != lines:
        write_atomically(partial, "".join(whole))
    return len(whole) - 1


def _answer_all(
    directory: Path,
    tokenizer: "PreTrainedTokenizerFast",
    found: Iterator[_Prompt | None],
    done: int,
    partial: Path,
    options: AnswerOptions,
    writer: Callable[[_Prompt, list[str]], Any],
) -> None:
    """Append the answers of all prompts, batch by batch."""
    model, size = None, options.batch_size
    done -= done % size  # a batch is answered whole
    _keep_lines(partial, 1 + done)
    with partial.open("a", encoding="utf-8") as stream:
        for start, batch in tracked(_batches(found, size), "answering batches of prompts"):
            if start < done:
                continue
            if model is None:
                model = load_causal_lm(directory, called="TEACHER")
                generate_plainly(model, tokenizer)
                model.to("cuda" if torch.cuda.is_available() else "cpu")
            for prompt in batch:
                check_rows(prompt.ids if prompt else (), tokenizer, len(model.get_input_embeddings().weight), _FIELD)
            texts = iter(_generate(model, tokenizer, [p.ids for p in batch if p is not None], start, options))
            rows = [None if prompt is None else writer(prompt, next(texts)) for prompt in batch]
            stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            stream.flush()


def _batches(found: Iterator[_Prompt | None], size: int) -> Iterator[tuple[int, list[_Prompt | None]]]:
    batch: list[_Prompt | None] = []
    start = 0
    for prompt in found:
        batch.append(prompt)
        if len(batch) == size:
            yield start, batch
            start, batch = start + size, []
    if batch:
        yield start, batch


def _lines(partial: Path) -> list[str]:
    """With their newlines, which alone end a row: `splitlines` also cuts at U+2028 and the like, within a text."""
    with partial.open(encoding="utf-8") as stream:
        return list(stream)


def _keep_lines(partial: Path, count: int) -> None:
    lines = _lines(partial)
    if len(lines) > count:
        write_atomically(partial, "".join(lines[:count]))


def _finish(partial: Path, out: Path) -> Written:
    lines = _lines(partial)[1:]
    rows = [line for line in lines if line != "null\n"]
    rows = [own for line in rows for own in ([line] if line[0] != "[" else _each(line))]
    if not rows:
        raise UserError(
            f"{_FIELD}: of {len(lines)} prompts none has an answer, all are too short or too long for the "
            "teacher, or it says nothing: give others, or a smaller --continue or --max-new-tokens"
        )
    write_atomically(out, "".join(rows))
    partial.unlink()
    return Written(len(rows), lines.count("null\n"))


def _each(line: str) -> list[str]:
    """The rows of a line that holds several."""
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in json.loads(line)]


@torch.no_grad()
def _generate(
    model: Any, tokenizer: "PreTrainedTokenizerFast", prompts: Sequence[list[int]], start: int, options: AnswerOptions
) -> list[list[str]]:
    """The answers to each prompt, one where no drafts are asked for; a prompt that leaves no room gives empty ones.

    So does an answer that has not ended within `options.max_new_tokens`: a student would learn to end in its middle. Text
    that is continued has no end to come to.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    fits = [longest is None or len(ids) + options.max_new_tokens <= longest for ids in prompts]
    read = [ids for ids, fit in zip(prompts, fits) if fit]
    count = options.drafts or 1
    if not read:
        return [[""] * count] * len(prompts)
    width, pad, ends = max(map(len, read)), tokenizer.eos_token_id, end_token_ids(tokenizer)
    ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in read], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in read], device=model.device)
    digest = hashlib.sha256(f"{options.seed}/{start}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    beams = max(options.beams, count)
    how: dict[str, Any] = {"do_sample": False, "num_beams": beams, "early_stopping": beams > 1}
    if options.temperature is not None:
        how = {"do_sample": True, "num_beams": 1, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=options.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends,
        **({"num_return_sequences": count} if count > 1 else {}),
        **how,
    )
    answers = [
        _said(tokenizer, ids, new[:end]) if options.continued or end < len(new) else ""
        for ids, new in zip([ids for ids in read for _ in range(count)], output[:, width:].tolist())
        for end in [next((at for at, token in enumerate(new) if token in ends), len(new))]
    ]
    several = iter(answers[start : start + count] for start in range(0, len(answers), count))
    return [next(several) if fit else [""] * count for fit in fits]


def _said(tokenizer: "PreTrainedTokenizerFast", read: list[int], new: list[int]) -> str:
    """New tokens as the text that they add: a tokenizer may write a first token otherwise than a later one."""
    before = tokenizer.decode(read, skip_special_tokens=True)
    after = str(tokenizer.decode([*read, *new], skip_special_tokens=True))
    return after[len(before) :].rstrip("\ufffd")  # of a character that was cut in the middle


def _read_prompts(
    source: SourceConfig, tokenizer: "PreTrainedTokenizerFast", options: AnswerOptions
) -> Iterator[_Prompt | None]:
    """Prompts in order; None for a text that is too short to be cut."""
    found = _of_texts(source, tokenizer, options.continued) if options.continued else _of_chat(source, tokenizer)
    for number, prompt in enumerate(found):
        if number == options.limit:
            return
        yield prompt


def _of_texts(source: SourceConfig, tokenizer: "PreTrainedTokenizerFast", count: int) -> Iterator[_Prompt | None]:
    first = DocumentEncoder(tokenizer).bos
    backend = plain_backend(tokenizer, parse_special_tokens=False)
    for text in read_documents(source, _FIELD):
        encoding = backend.encode(text, add_special_tokens=False)
        end, places = count if len(encoding.ids) >= count else 0, encoding.offsets
        while 0 < end < len(places) and places[end][0] < places[end - 1][1]:
            end -= 1  # within a character, which several tokens write
        if end == 0:
            yield None
        else:
            begin = text[: places[end - 1][1]]
            yield _Prompt([first, *encoding.ids[:end]], {"text": begin}, "text", begin, text[len(begin) :])


def _of_chat(source: SourceConfig, tokenizer: "PreTrainedTokenizerFast") -> Iterator[_Prompt]:
    if own_template(tokenizer) is None:
        raise UserError(
            "TEACHER has no chat template to answer with: add --continue N, for PROMPTS that are texts, or "
            "save a template beside its tokenizer"
        )
    for where, record in read_records(source, _FIELD, wanted_columns(None)):
        question = to_question(record, where, _FIELD)
        if question is None:
            raise UserError(
                f"{_FIELD}: {where} has neither messages nor a prompt: rename its columns, or add "
                "--continue N for rows of text"
            )
        found = question.example
        text = render_prompt(tokenizer, found.messages, f"{_FIELD}: {where}", tools=found.tools, options=found.options)
        asked = found.messages[-1]["content"] if found.messages else ""
        if question.single:
            row, answer = {"prompt": asked, **_passed(found)}, "completion"
        else:
            row, answer = {"messages": found.messages, **_passed(found)}, "messages"
        yield _Prompt(prompt_ids(tokenizer, text, begin=False), row, answer, asked, question.answer)


def _passed(found: Example) -> dict[str, Any]:
    """What the template gets besides turns, for the row that is written."""
    arguments = {name: value for name, value in found.options.items() if name != "documents"}
    given = {
        "tools": found.tools, "documents": found.options.get("documents"), "chat_template_kwargs": arguments,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value}
