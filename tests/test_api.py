"""What a Python program calls does what the command line does, and costs nothing until it is used."""

import ast
import sys
from pathlib import Path

import grimp
import networkx
import pytest
from support import runs

import moe_llm

EXAMPLES = runs.ROOT / "docs/examples"


def python(*arguments: str | Path) -> str:
    done = runs.finish([sys.executable, *map(str, arguments)])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_exported_name_is_there_and_typed():
    typed = next(node for node in ast.parse(Path(moe_llm.__file__).read_text()).body if isinstance(node, ast.If))
    names = {alias.name for statement in typed.body for alias in statement.names}
    assert names | {"Stopped", "TrainingFailure", "UserError"} == set(moe_llm.__all__) <= set(dir(moe_llm))
    assert all(callable(getattr(moe_llm, name)) for name in moe_llm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = moe_llm.trian


@pytest.mark.parametrize(
    "imports",
    [
        "from moe_llm import train",
        "import moe_llm; train = moe_llm.train",
        "import moe_llm.train.optim; train = moe_llm.train",
        "from moe_llm import train; import moe_llm.train.optim as optim; assert train.optim is optim",
    ],
)
def test_train_is_called_and_its_modules_imported_in_any_order(imports):
    program = (
        f"{imports}\nimport moe_llm.train.run as run\nrun.train = lambda config: ['trained', config]\n"
        "import moe_llm\nassert train is moe_llm.train\nprint(train('this'))"
    )
    assert python("-c", program) == "['trained', 'this']\n"


def test_names_that_are_only_looked_up_load_neither_torch_nor_transformers():
    program = (
        "import sys, moe_llm; moe_llm.train, moe_llm.evaluate, moe_llm.generate, moe_llm.load_config\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert python("-c", program) == "[]\n"


def test_a_configuration_read_in_python_takes_its_model_from_init_from(finished_run, make_config):
    checkpoint = finished_run / "checkpoints/latest"
    path = make_config(model={"init_from": str(checkpoint)})
    raw = path.read_text().replace("hidden_size: 16\n  ", "", 1)
    path.write_text(raw)
    assert "\n  hidden_size" not in raw
    config = moe_llm.load_config(path, ["optim.lr=0.5"])
    assert (config.model.hidden_size, config.optim.lr, config.tokenizer.path) == (16, 0.5, str(checkpoint))


def test_training_in_python_writes_what_the_command_writes(finished_run, make_config, tmp_path):
    config = moe_llm.load_config(make_config(evaluate={"every_steps": 2, "max_blocks": 4}))
    checkpoint = moe_llm.train(config)
    assert checkpoint == tmp_path / "run/checkpoints/step-00000006"
    assert runs.timeless(tmp_path / "run") == runs.timeless(finished_run)
    assert moe_llm.train(config) == checkpoint  # nothing is left to train
    with pytest.raises(moe_llm.UserError, match=r"train\.max_steps"):
        moe_llm.load_config(tmp_path / "run.yaml", ["train.max_steps=0"])


ONE_AFTER_THE_OTHER = """
import sys, moe_llm
config, *layouts = sys.argv[1:]
for i, overrides in enumerate(layouts):
    moe_llm.train(moe_llm.load_config(config, [f"run.dir={config}-{i}", *overrides.split()]))
"""


def test_runs_of_any_engine_follow_one_another_in_a_process(make_config):
    config = make_config(train={"max_steps": 1}, evaluate={"every_steps": None})
    python(
        "-c",
        ONE_AFTER_THE_OTHER,
        config,
        "parallel.engine=deepspeed",
        "",
        "parallel.engine=deepspeed train.precision=bf16",
    )
    first, second = (runs.records(config.with_name(f"{config.name}-{i}")) for i in (0, 1))
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], rel=1e-5)


def test_the_examples_run(make_config, tmp_path):
    trained = python(EXAMPLES / "train_and_generate.py", make_config(train={"max_steps": 2}))
    assert "bits per byte of this file: " in trained
    assert "\ndef " in trained
    load = python(EXAMPLES / "expert_load.py", tmp_path / "run/checkpoints/latest", "abc abd").splitlines()
    counts = [ast.literal_eval(line.partition(": ")[2]) for line in load]
    assert len(counts) == runs.MODEL["num_hidden_layers"]
    assert {len(layer) for layer in counts} == {runs.MODEL["num_local_experts"]}
    assert len({sum(layer) for layer in counts}) == 1
    assert sum(counts[0]) % runs.MODEL["num_experts_per_tok"] == 0 < sum(counts[0])


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    graph = networkx.DiGraph((module, other) for module, others in imports.items() for other in others)
    return [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]


def test_no_modules_import_each_other_in_a_circle_not_even_for_types():
    graph = grimp.build_graph("moe_llm", cache_dir=None)  # with imports in functions and under TYPE_CHECKING
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    assert "moe_llm.api" in imports["moe_llm"]  # under TYPE_CHECKING alone
    assert circles(imports) == []
    imports["moe_llm.config.base"] = {"moe_llm.config.schema"}  # a planted one
    assert len(circles(imports)) == 1
