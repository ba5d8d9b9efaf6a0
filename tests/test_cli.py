"""The command line: what it loads, what it prints, how it exits."""

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_llm import cli
from moe_llm.cli import registry
from moe_llm.cli.parser import CommandParser
from moe_llm.config import Config, load_config
from moe_llm.errors import UserError

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


def run(*argv: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "moe_llm", *argv],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, check=False,
    )  # fmt: skip


def test_help_loads_nothing_heavy():
    code = (
        "import sys, moe_llm.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml', 'rich', 'deepspeed'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("LOADED []\n")
    assert "tokenizer" in done.stdout


def test_reading_a_configuration_loads_no_torch():
    code = (
        "import sys, moe_llm.cli as cli\n"
        f"assert cli.main(['params', {QUICKSTART!r}]) == 0\n"
        "print('LOADED', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("LOADED []\n")


@pytest.mark.parametrize("command", [["train"], ["tokenizer"], ["params"], ["config", "show"]])
def test_a_mistake_in_the_configuration_is_one_line_and_code_2(command, capsys):
    assert cli.main([*command, QUICKSTART, "model.hiden_size=3"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("moe-llm: error: unknown configuration key model.hiden_size: did you mean model.hidden_size?\n")


def test_the_process_exits_with_the_code():
    done = run("params", "none.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "moe-llm: error: configuration file 'none.yaml' does not exist: give the path of a YAML file\n"
    )
    script = [sys.executable, "scripts/train.py", "none.yaml"]
    assert subprocess.run(script, capture_output=True, cwd=ROOT, check=False).returncode == 2


def test_rank_0_alone_prints_and_all_exit(monkeypatch, capsys):
    def fail():
        raise UserError("one sentence")

    printed = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.run_command(fail) == 2
        printed[rank] = capsys.readouterr().err
    assert printed == {"0": "moe-llm: error: one sentence\n", "1": ""}


def test_interrupts_exit_quietly_and_faults_do_not():
    def interrupt():
        raise KeyboardInterrupt

    def fault():
        raise ValueError("ours")

    assert cli.run_command(interrupt) == 130
    with pytest.raises(ValueError, match="ours"):
        cli.run_command(fault)


@pytest.mark.parametrize(
    ("number", "name", "sentence"),
    [
        (errno.ENOSPC, None, "a file of this command: No space left on device: free some, or write elsewhere"),
        (errno.EFBIG, "out.html", "out.html: File too large: see to it, or to the file system"),
        (errno.EISDIR, "run/metrics.jsonl", "run/metrics.jsonl: Is a directory: see to it, or to the file system"),
        (errno.EIO, "out.html", "out.html: Input/output error: see to it, or to the file system"),
    ],
)
def test_a_disk_that_refuses_is_one_line_whatever_the_command_writes(number, name, sentence, capsys):
    def refused():
        raise OSError(number, os.strerror(number), name)

    assert cli.run_command(refused) == 2
    assert capsys.readouterr().err == f"moe-llm: error: {sentence}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["params", QUICKSTART, "--jsn"], "unrecognized arguments: --jsn"),
        (["config", "schema", "x=1"], "unrecognized arguments: x=1"),
        (["generate", "c", "--prompt", "p", "--top-p", "0"], "above 0 and at most 1"),
        (["generate", "c", "--prompt", "p", "--top-p", "nan"], "above 0 and at most 1"),
        (["generate", "c", "--prompt", "p", "--temperature", "-1"], "from 0 upwards"),
        (["generate", "c", "--prompt", "p", "--temperature", "inf"], "from 0 upwards"),
        (["generate", "c", "--prompt", "p", "--max-new-tokens", "1.5"], "'1.5' is not a whole number"),
        (["evaluate", "c", "--data", "x", "--batch-size", "0"], "from 1 upwards"),
    ],
)
def test_wrong_arguments_exit_with_2(argv, words, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(argv)
    assert done.value.code == 2
    assert words in capsys.readouterr().err


def test_evaluate_needs_text_or_tasks_and_tasks_a_single_model(capsys):
    assert cli.main(["evaluate", "c"]) == 2
    assert "neither --data nor --tasks is given" in capsys.readouterr().err
    assert cli.main(["evaluate", "--ensemble", "e.yaml", "--tasks", "t"]) == 2
    assert "--tasks takes one checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["params", "--json", QUICKSTART, "model.hidden_size=384"],
        ["params", QUICKSTART, "--json", "model.hidden_size=384"],
        ["params", QUICKSTART, "model.hidden_size=384", "--json"],
    ],
)
def test_params_as_json_in_any_order_of_arguments(argv, capsys):
    assert cli.main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    model = load_config(QUICKSTART, ["model.hidden_size=384"]).model
    assert (printed["total"], printed["active"]) == (model.num_params(), model.num_params(active=True))
    assert {part: sizes["total"] for part, sizes in printed["parts"].items()} == model.parameter_counts()
    assert {p: s["active"] for p, s in printed["parts"].items()} == model.parameter_counts(active=True)


def test_params_as_a_table(capsys):
    assert cli.main(["params", str(ROOT / "configs/mixtral_8x7b.yaml")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert ["model", "46,702,792,704", "100.0%", "12,879,925,248", "100.0%"] in rows
    assert ["experts", "45,097,156,608", "96.6%", "11,274,289,152", "87.5%"] in rows


def test_params_show_which_rank_holds_which_experts(capsys):
    layout = ["parallel.expert_parallel_size=2", "train.micro_batch_size=4"]
    argv = ["params", QUICKSTART, "--parallel", "4", *layout, "--json"]
    assert cli.main(argv) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert [row["experts"] for row in ranks] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert [row["same_experts"] for row in ranks] == [[2], [3], [0], [1]]
    model = load_config(QUICKSTART).model
    counts = model.parameter_counts()
    assert {row["parameters"] for row in ranks} == {model.num_params() - counts["experts"] // 2}
    assert cli.main([a for a in argv if a != "--json"]) == 0
    assert "4, 5, 6, 7" in capsys.readouterr().out
    assert cli.main(["params", QUICKSTART, "--parallel", "3", "parallel.expert_parallel_size=2"]) == 2


def test_params_need_a_vocabulary(capsys):
    assert cli.main(["params", QUICKSTART, "model.vocab_size=null", "tokenizer.path=t"]) == 2
    assert "model.vocab_size=null" in capsys.readouterr().err


def test_config_show_prints_what_reproduces_the_run(tmp_path, capsys):
    assert cli.main(["config", "show", QUICKSTART, "optim.lr=1e-3", "run.dir='1e5'"]) == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == load_config(QUICKSTART, ["optim.lr=1e-3", "run.dir='1e5'"])


def test_config_schema_is_the_schema(capsys):
    assert cli.main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(Config.model_json_schema()))


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("moe-llm ")


class Recorder:
    """Stands in for a module of the training layer and keeps the calls made to it."""

    def __init__(self, result=None):
        self.calls, self.result = [], result

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self.result

        return call


@pytest.mark.parametrize(
    ("command", "module", "function"),
    [("train", "train.run", "train"), ("tokenizer", "cli.tokenizer", "build_tokenizer_command")],
)
def test_one_call_with_the_configuration(command, module, function, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, f"moe_llm.{module}", recorder)
    assert cli.main([command, QUICKSTART, "run.seed=7"]) == 0
    assert recorder.calls == [(function, (load_config(QUICKSTART, ["run.seed=7"]),), {})]


def test_generate_is_one_call(monkeypatch, capsys, tmp_path):
    recorder = Recorder(["def f(): pass", "class A"])
    monkeypatch.setitem(sys.modules, "moe_llm.inference.generate", recorder)
    options = ["--max-new-tokens", "5", "--temperature", "0", "--top-p", "1", "--seed", "3", "--stop", "x"]
    (tmp_path / "prompts.txt").write_text("class \n\n")
    assert (
        cli.main(["generate", "runs/a", "--prompt", "def ", "--prompt-file", f"{tmp_path}/prompts.txt", *options]) == 0
    )
    given = {"max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 3}
    given |= {"stop": ["x"], "batch_size": 8, "use_cache": True}
    assert recorder.calls == [("generate_texts", ("runs/a", ["def ", "class "]), given)]
    assert capsys.readouterr().out == "def f(): pass\n---\nclass A\n"
    assert cli.main(["generate", "runs/a", "--prompt", "a", "--json", "--no-cache", "--batch-size", "2", "--chat"]) == 0
    changed = {"batch_size": 2, "use_cache": False, "chat": True, "stop": []}
    assert recorder.calls[-1][2].items() >= changed.items()
    assert json.loads(capsys.readouterr().out) == [{"prompt": "a", "text": "def f(): pass"}]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--prompt"),
        (["--prompt-file", "absent.txt"], "absent.txt"),
        (["--prompt", "a", "--stop", ""], "--stop ''"),
    ],
)
def test_generate_without_what_it_needs_is_a_sentence(options, words, capsys):
    assert cli.main(["generate", "runs/a", *options]) == 2
    assert words in capsys.readouterr().err


def test_evaluate_is_one_call(monkeypatch, capsys):
    recorder = Recorder({"loss": 1.25, "blocks": 4})
    monkeypatch.setitem(sys.modules, "moe_llm.evaluation.evaluate", recorder)
    assert cli.main(["evaluate", "runs/a", "--data", "a", "b", "--max-blocks", "4", "--json"]) == 0
    named = {"batch_size": 8, "max_blocks": 4, "chat": False}
    assert recorder.calls == [("evaluate_files", ("runs/a", ["a", "b"]), named)]
    assert json.loads(capsys.readouterr().out) == {"loss": 1.25, "blocks": 4}
    assert cli.main(["evaluate", "runs/a", "--data", "a", "--chat"]) == 0
    assert recorder.calls[-1][2]["chat"] is True
    assert cli.main(["evaluate", "runs/a", "--data", "a", "--text-field", "body"]) == 0
    assert recorder.calls[-1][2]["text_field"] == "body"
    capsys.readouterr()
    assert cli.main(["evaluate", "runs/a", "--data", "a", "--chat"]) == 0
    assert capsys.readouterr().out.split() == ["loss", "1.25", "blocks", "4"]


def test_help_shows_every_command_in_a_group_with_an_example(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for group, functions in registry.GROUPS.items():
        assert f"\n{group}:\n" in shown
        parser = CommandParser("moe-llm")
        for add in functions:
            command = add(parser)
            assert command.summary in shown
            assert command.example in shown
        assert all(f"\n  {name} " in shown for name in parser.commands)


def test_examples_of_commands_parse():
    parser = CommandParser("moe-llm")
    for functions in registry.GROUPS.values():
        for add in functions:
            words = shlex.split(add(parser).example.partition(" > ")[0])
            assert words[0] == "moe-llm"
            assert callable(registry.parse(words[1:]).handler)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["trian", QUICKSTART], "train"),
        (["config", "shw"], "show"),
        (["params", QUICKSTART, "--jsn"], "--json"),
        (["evaluate", "c", "--dta", "x"], "--data"),
        (["evaluate", "c", "--max-block=3", "--data", "x"], "--max-blocks"),
        (["--versio"], "--version"),
    ],
)
def test_a_mistyped_command_or_option_gets_the_nearest_name(argv, meant, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(argv)
    assert done.value.code == 2
    assert capsys.readouterr().err.endswith(f": did you mean {meant}?\n")


def test_a_renamed_command_works_with_a_warning(monkeypatch, capsys, tmp_path):
    recorder = Recorder(SimpleNamespace(rows=3, left_out=1))
    monkeypatch.setattr("moe_llm.distill.answers.write_answers", recorder.write)
    argv = ["TEACHER", "p.jsonl", "--out", "o.jsonl"]
    assert cli.main(["teach", *argv]) == cli.main(["generate-dataset", *argv]) == 0
    assert recorder.calls[0] == recorder.calls[1]
    assert capsys.readouterr().err == "moe-llm: warning: teach has been renamed: write generate-dataset\n"


def test_output_that_cannot_be_written_is_one_line_and_no_trace():
    for command in (["config", "schema"], ["params", QUICKSTART, "--json"]):  # longer and shorter than a buffer
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "moe_llm.cli", *command],
                stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False,
            )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr == (
            "moe-llm: error: the output cannot be written (No space left on device): send it elsewhere\n"
        )


def test_a_reader_that_leaves_early_is_no_fault():
    for command in (["config", "schema"], ["params", QUICKSTART, "--json"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-m", "moe_llm.cli", *command],
            stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_without_the_character_shows_its_code():
    done = run("config", "show", QUICKSTART, "run.dir=läufe", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "l\\xe4ufe" in done.stdout


def test_json_has_null_where_there_is_no_finite_number(monkeypatch, capsys):
    result = {"loss": float("nan"), "rows": [{"x": float("-inf")}, (1.5, 2)], "blocks": 4}
    monkeypatch.setitem(sys.modules, "moe_llm.evaluation.evaluate", Recorder(result))
    assert cli.main(["evaluate", "runs/a", "--data", "a", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert printed == {"loss": None, "rows": [{"x": None}, [1.5, 2]], "blocks": 4}


@pytest.mark.parametrize("text", ["a: &a [*a]", "data: &d {x: *d}", "[" * 3000])
def test_yaml_without_end_is_refused(text, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert cli.main(["params", str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err
    assert err.count("\n") == 1


def test_a_run_directory_may_begin_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(QUICKSTART, ["run.dir=~/x"]).run.dir == str(tmp_path / "x")


def test_the_package_itself_runs_as_the_command(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr("sys.argv", ["moe-llm", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("moe_llm", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip()
