"""A whole run on chat rows, from configs/finetune/chat.yaml to a checkpoint that answers in transformers."""

import json
import shutil
from pathlib import Path

import pytest
from support import runs
from support.ranks import fresh_accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_llm.cli import main
from moe_llm.evaluation.evaluate import evaluate_files

CONFIG = str(Path(__file__).parents[2] / "configs/finetune/chat.yaml")
ANSWERS = {"sky": "blue", "grass": "green", "coal": "black", "snow": "white"}
OPTIM = ["optim={lr: 1e-2, schedule: constant, weight_decay: 0}"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """40 rows of both kinds; a row of 300 words, which no block holds, and held-out rows."""
    root = tmp_path_factory.mktemp("chat")
    rows = []
    for i in range(40):
        thing, colour = list(ANSWERS.items())[i % 4]
        asked = f"{'what colour is ' * (i % 3 // 2)}{thing}{'?' * (i % 2)}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]
        rows.append({"prompt": asked, "completion": colour} if i % 5 == 0 else {"messages": turns})
    rows.append({"prompt": "word " * 300, "completion": "no"})
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"prompt": thing, "completion": colour} for thing, colour in ANSWERS.items()]
    (root / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return root


def overrides(root: Path, run: str, *more: str) -> list[str]:
    validation = f"[{{type: files, path: {root}/held.jsonl, content: chat}}]"
    return [
        f"run.dir={root / run}",
        f"model={json.dumps({**runs.MODEL, 'hidden_size': 32, 'intermediate_size': 32})}",
        f"data.sources.0.path={root}/chat.jsonl",
        "data.sequence_length=64",
        f"data.cache_dir={root}/cache",
        f"data.validation_sources={validation}",
        *OPTIM,
        "train.max_steps=30",
        "train.micro_batch_size=4",
        "train.global_batch_size=4",
        "train.precision=fp32",
        "train.device=cpu",
        "checkpoint.every_steps=15",
        "evaluate.every_steps=15",
        "logging.console=plain",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(root) -> Path:
    assert main(["train", CONFIG, *overrides(root, "run")]) == 0
    return root / "run"


def test_the_loss_falls_on_held_out_rows_too(trained):
    records = runs.records(trained)
    assert records[-1]["lm_loss"] < 0.2 * records[0]["lm_loss"]
    assert records[-1]["val_loss"] < 0.7


def test_the_checkpoint_answers_in_transformers_by_its_own_template(trained):
    checkpoint = trained / "checkpoints/latest"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    right = 0
    for thing, colour in ANSWERS.items():
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": thing}], return_tensors="pt", return_dict=True, add_generation_prompt=True
        )
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=2)[0]
        answer = output[inputs["input_ids"].shape[1] :]
        right += tokenizer.decode(answer).strip() == f"{colour}</s>"
    assert right >= 3


def test_a_checkpoint_is_scored_on_chat_files(root, trained, capsys):
    checkpoint = trained / "checkpoints/latest"
    scored = evaluate_files(checkpoint, str(root / "held.jsonl"), chat=True)
    assert scored["loss"] == pytest.approx(runs.records(trained)[-1]["val_loss"], rel=1e-4)
    assert main(["evaluate", str(checkpoint), "--data", str(root / "held.jsonl"), "--chat", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(scored["loss"])
    assert main(["evaluate", str(checkpoint), "--data", str(root / "held.jsonl")]) == 2  # it has no column text


def test_a_resumed_run_goes_on_exactly(root, trained):
    resumed = root / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(trained / "tokenizer", resumed / "tokenizer")
    shutil.copytree(trained / "checkpoints/step-00000015", resumed / "checkpoints/step-00000015")
    first = (trained / "metrics.jsonl").read_text().splitlines(keepends=True)
    (resumed / "metrics.jsonl").write_text("".join(first[:15]))
    assert main(["train", CONFIG, *overrides(root, "resumed")]) == 0
    assert runs.timeless(resumed) == runs.timeless(trained)


def test_two_ranks_equal_one_and_what_is_left_out_is_told(root, trained, two_ranks_of_a_run):
    arguments = overrides(
        root,
        "ranks",
        "train.micro_batch_size=2",
        "train.max_steps=4",
        "checkpoint.every_steps=4",
        "parallel.expert_parallel_size=2",
    )
    codes, told = zip(*two_ranks_of_a_run.run(train_on_rank, arguments))
    assert codes == (0, 0)
    # the rows that are held out are not learned
    assert "data.sources.0 (train): of 28 examples 1 are left out and 0 cut" in told[0]
    assert "examples" not in told[1]
    found, expected = runs.records(root / "ranks"), runs.records(trained)[:4]
    for name in ("lm_loss", "aux_loss", "grad_norm"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], rel=1e-3), name
    assert found[0]["lm_loss"] == pytest.approx(expected[0]["lm_loss"], rel=1e-5)


def train_on_rank(arguments: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    fresh_accelerate()
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        code = main(["train", CONFIG, *arguments])
    return code, out.getvalue()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [('{"messages": [{"role": "critic", "content": ""}]}', 'line 2: turn 1 has the role "critic"'), ("{", "line 2 is not")],
)  # fmt: skip
def test_a_broken_row_ends_the_command_with_one_sentence(root, tmp_path, line, sentence, capsys):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    code = main(
        [
            "train",
            CONFIG,
            *overrides(tmp_path, "run"),
            f"data.sources.0.path={path}",
            f"data.validation_sources=[{{type: files, path: {root}/held.jsonl, content: chat}}]",
        ]
    )
    error = capsys.readouterr().err
    assert code == 2
    (line,) = [line for line in error.splitlines() if not line.startswith("training a tokenizer")]
    assert sentence in line
    assert not (tmp_path / "run/checkpoints").exists()
