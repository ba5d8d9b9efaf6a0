"""What a teacher writes: what transformers generates, in rows that `train` takes, complete or not there."""

import json
import shutil

import pytest
import torch
from support import runs

from moe_llm.cli import main
from moe_llm.distill import answers as module
from moe_llm.errors import UserError


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents of a line each, one of them too short."""
    path = runs.write_text(tmp_path_factory.mktemp("texts") / "texts.txt", lines=7)
    documents = [*path.read_text().splitlines(), "a"]
    file = path.with_suffix(".jsonl")
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def interrupted(monkeypatch):
    """The third batch is stopped, once; returns a list that grows by one with each batch."""
    generate, calls = module._generate, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(module, "_generate", counted)
    return calls


def generated(teacher, prompt_ids, **how):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    ids = torch.tensor([prompt_ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id, **how)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def test_no_character_is_cut(mixtures, tmp_path):
    """Prompts end between characters, of which one that the tokenizer lacks takes a token for each of its bytes."""
    from moe_llm.config.data import SourceConfig
    from moe_llm.data.tokenizer import load_tokenizer

    text, tokenizer = "a \U00010348\U00010348 b\U0001f422c", load_tokenizer(mixtures[0])
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    source = SourceConfig(type="files", path=str(file))
    lengths = set()
    for count in range(1, len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1):
        (prompt,) = module._of_texts(source, tokenizer, count)
        assert len(prompt.ids) - 1 <= count
        said = tokenizer.decode(prompt.ids, skip_special_tokens=True)
        assert said.rstrip() == prompt.row["text"].rstrip() == text[: len(prompt.row["text"])].rstrip()
        lengths.add(len(prompt.row["text"]))
    assert len(lengths) >= len(text) - 3


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_continued_as_transformers_does(beams, texts, mixtures, tmp_path, capsys):
    from moe_llm.data.tokenizer import load_tokenizer

    out = tmp_path / "new/answers.jsonl"
    words = [
        "generate-dataset",
        str(mixtures[0]),
        str(texts),
        "--out",
        str(out),
        "--continue",
        "6",
        "--max-new-tokens",
        "5",
        "--beams",
        str(beams),
        "--batch-size",
        "3",
    ]
    assert main(words) == 0
    assert "left out" in capsys.readouterr().out
    tokenizer, found = load_tokenizer(mixtures[0]), [row["text"] for row in lines(out)]
    documents = [row["text"] for row in lines(texts)]
    expected = []
    for document in documents[:-1]:
        ids = [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False)["input_ids"][:6]]
        expected.append(
            generated(
                mixtures[0], ids, max_new_tokens=5, num_beams=beams, do_sample=False, early_stopping=beams > 1
            ).rstrip("\ufffd")
        )
    whole = [text for text, document in zip(expected, documents) if not document.startswith(text)]
    assert len(found) >= 5
    assert set(found) <= {*expected}
    assert whole
    assert not list(out.parent.glob("*.partial"))
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err


def test_answers_of_a_chat_are_learned_from(student, trained, mixtures, tmp_path):
    from moe_llm.data.chat_template import MIXTRAL, TEMPLATE_FILE

    teacher = shutil.copytree(mixtures[0].resolve(), tmp_path / "teacher")
    (teacher / TEMPLATE_FILE).write_text(MIXTRAL)
    # every other token ends its answers: those that do not end in time are left out
    generation = json.loads((teacher / "generation_config.json").read_text()) | {"eos_token_id": [2, *range(4, 300, 2)]}
    (teacher / "generation_config.json").write_text(json.dumps(generation))
    prompts = [{"prompt": f"abc {i}"} for i in range(30)]
    prompts += 12 * [
        {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "to be replaced"}]}
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    out = tmp_path / "answers.jsonl"
    assert (
        main(
            [
                "generate-dataset",
                str(teacher),
                str(tmp_path / "prompts.jsonl"),
                "--out",
                str(out),
                "--beams",
                "1",
                "--temperature",
                "2",
                "--max-new-tokens",
                "8",
            ]
        )
        == 0
    )
    found = lines(out)
    assert {frozenset(row) for row in found} == {frozenset({"prompt", "completion"}), frozenset({"messages"})}
    assert len({row["completion"] for row in found if "completion" in row}) > 1
    assert "to be replaced" not in out.read_text()
    data = {
        "sources": [{"type": "files", "path": str(out), "content": "chat"}],
        "validation_fraction": 0.3,
        "sequence_length": 64,
        "overlong": "truncate",
    }
    assert trained("run", {}, tokenizer={"path": str(teacher)}, data=data)[-1]["lm_loss"] > 0


def test_an_interrupted_answering_goes_on_to_the_same_file(texts, dense, tmp_path, monkeypatch):
    """Killed in the middle of a batch's lines; then with other settings, which begin anew."""
    options = module.AnswerOptions(max_new_tokens=4, beams=1, temperature=1.5, batch_size=2, continued=4)
    module.write_answers(dense, str(texts), tmp_path / "straight.jsonl", options)
    calls = interrupted(monkeypatch)
    out = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        module.write_answers(dense, str(texts), out, options)
    assert not out.exists()
    partial = tmp_path / "stopped.jsonl.partial"
    content = partial.read_text(encoding="utf-8")
    partial.write_text(content[:-3], encoding="utf-8")
    module.write_answers(dense, str(texts), out, options)
    assert out.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert len(calls) == 3 + 3  # the second batch again, and the two that were left
    other = module.AnswerOptions(max_new_tokens=4, beams=1, temperature=1.5, batch_size=2, continued=4, seed=1)
    partial.write_text(content, encoding="utf-8")
    module.write_answers(dense, str(texts), tmp_path / "stopped2.jsonl", other)
    out.unlink()
    module.write_answers(dense, str(texts), out, other)
    assert out.read_bytes() == (tmp_path / "stopped2.jsonl").read_bytes() != (tmp_path / "straight.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["TEACHER", "PROMPTS"], "has no chat template to answer with"),
        (["TEACHER", "PROMPTS", "--temperature", "1"], "add --beams 1"),
        (["missing", "PROMPTS"], "does not exist: name a checkpoint directory"),
        (["TEACHER", "missing.jsonl"], "missing.jsonl does not exist"),
        (["TEACHER", "PROMPTS", "--continue", "4", "--max-new-tokens", "100"], "none has an answer"),
    ],
)
def test_what_cannot_be_answered_is_refused(words, sentence, texts, dense, tmp_path, capsys):
    given = [{"TEACHER": str(dense), "PROMPTS": str(texts)}.get(word, word) for word in words]
    assert main(["generate-dataset", *given, "--out", str(tmp_path / "out.jsonl")]) == 2
    err = capsys.readouterr().err
    assert sentence in err.splitlines()[-1]
    assert not list(tmp_path.glob("*out.jsonl*"))


def test_limit_and_seed_act(texts, dense, tmp_path):
    options = {"max_new_tokens": 4, "beams": 1, "temperature": 2.0, "continued": 4}
    found = []
    for seed in (0, 1):
        written = module.write_answers(
            dense, str(texts), tmp_path / f"{seed}.jsonl", module.AnswerOptions(limit=2, seed=seed, **options)
        )
        assert written.rows + written.left_out == 2
        found.append((tmp_path / f"{seed}.jsonl").read_bytes())
    assert found[0] != found[1]
    with pytest.raises(UserError, match="draws"):
        module.AnswerOptions(beams=2, temperature=1.0)


def test_line_separators_within_a_text_end_no_row(dense, tmp_path, monkeypatch):
    """U+2028 and U+0085 stand in JSON as they are, and only a newline ends a row."""
    documents = [f"abc def\u2028ghi\x85jkl {i}" for i in range(4)]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    options = module.AnswerOptions(max_new_tokens=4, beams=1, batch_size=1, continued=14)
    out = tmp_path / "answers.jsonl"
    interrupted(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        module.write_answers(dense, str(texts), out, options)
    written = module.write_answers(dense, str(texts), out, options)
    rows = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [written.rows, written.left_out] == [4, 0]
    assert all(text.startswith("abc def\u2028ghi\x85") for text in rows)
