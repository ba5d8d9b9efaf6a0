"""Triples of input, draft and answer: what transformers generates as drafts, in the template that the second model is
asked with, with rewards of which the best and the worst become preferences; the result trains."""

import json

import pytest
import torch
from support import runs

from moe_llm.cli import main
from moe_llm.distill.drafts import TEMPLATE, DraftWriter, overlap
from moe_llm.ensemble.recipe import StackingRecipe


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = runs.write_text(tmp_path_factory.mktemp("texts") / "texts.txt", lines=6)
    file = path.with_suffix(".jsonl")
    documents = path.read_text().splitlines()
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(teacher, texts, out, *more: str) -> int:
    arguments = [
        "generate-dataset",
        str(teacher),
        str(texts),
        "--out",
        str(out),
        "--continue",
        "4",
        "--max-new-tokens",
        "6",
    ]
    return main([*arguments, *more])


def test_a_triple_is_the_draft_in_the_template_and_the_answer(mixtures, texts, tmp_path):
    template = "{input} | {output} | "
    assert write(mixtures[0], texts, tmp_path / "d.jsonl", "--drafts", "1", "--template", template, "--beams", "2") == 0
    assert write(mixtures[0], texts, tmp_path / "a.jsonl", "--beams", "2") == 0
    rows, answers = lines(tmp_path / "d.jsonl"), lines(tmp_path / "a.jsonl")
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    assert len(rows) == len(answers) == len(documents)
    for row, answer, document in zip(rows, answers, documents):
        asked, draft, gold = row["text"].split(" | ")
        assert asked + gold == document
        assert asked + draft == answer["text"]


def test_drawn_drafts_have_rewards_the_best_first_and_the_ends_become_pairs(mixtures, texts, tmp_path, capsys):
    more = ["--drafts", "3", "--beams", "1", "--temperature", "1.5", "--reward", "overlap"]
    out, pairs = tmp_path / "d.jsonl", tmp_path / "p.jsonl"
    assert write(mixtures[0], texts, out, *more, "--pairs-out", str(pairs)) == 0
    by_input: dict[str, list[dict]] = {}
    for row in lines(out):
        by_input.setdefault(row["input"], []).append(row)
        head = TEMPLATE.replace("{input}", row["input"]).replace("{output}", row["draft"])
        assert row["text"].startswith(head)
        assert row["reward"] == pytest.approx(overlap(row["draft"], row["text"].removeprefix(head)))
    assert max(map(len, by_input.values())) == 3
    for rows in by_input.values():
        assert [row["reward"] for row in rows] == sorted((row["reward"] for row in rows), reverse=True)
    made = {row["prompt"]: row for row in lines(pairs)}
    expected = {key for key, rows in by_input.items() if rows[0]["reward"] > rows[-1]["reward"]}
    assert set(made) == expected
    for key, pair in made.items():
        assert (pair["chosen"], pair["rejected"]) == (by_input[key][0]["draft"], by_input[key][-1]["draft"])


@torch.no_grad()
def test_a_checkpoints_reward_is_how_likely_it_makes_the_answer(mixtures):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    writer = DraftWriter("{input} so {output} then ", str(mixtures[1]))
    found = writer.reward("abc", "de", "fg hi")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(mixtures[1]), AutoTokenizer.from_pretrained(mixtures[1])
    ids = tokenizer("abc so de then fg hi", return_tensors="pt")["input_ids"]
    begin = tokenizer("abc so de then ", return_tensors="pt")["input_ids"].shape[1]
    losses = model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[begin - 1 :]
    assert found == pytest.approx(losses.mean().item(), rel=1e-4)


def test_triples_of_chat_are_prompt_and_completion_and_those_without_an_answer_are_left_out():
    rows = DraftWriter(None, "overlap").rows("2 + 2?", "four it is", ["four", "", "four", "five"], chat=True)
    assert [(row["completion"], row["draft"], row["reward"]) for row in rows] == [
        ("four it is", "four", 0.5),
        ("four it is", "five", 0.0),
    ]
    assert rows[0]["prompt"] == TEMPLATE.replace("{input}", "2 + 2?").replace("{output}", "four")
    assert DraftWriter(None, None).rows("2 + 2?", "", ["four"], chat=True) is None
    assert StackingRecipe.model_fields["template"].default == TEMPLATE


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--reward", "overlap"], "--reward is for drafts"),
        (["--drafts", "2", "--template", "{input}"], "lacks {output}"),
        (["--drafts", "1", "--reward", "overlap", "--pairs-out", "x"], "add --drafts 2 or more"),
        (["--drafts", "2", "--reward", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(mixtures, texts, tmp_path, capsys, more, words):
    assert write(mixtures[0], texts, tmp_path / "d.jsonl", *more) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
