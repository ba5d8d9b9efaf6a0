"""What only counts tokens knows the share of padding from the last preparation of the same data."""

import pytest
from support import runs

from moe_llm.cli import main
from moe_llm.config import load_config
from moe_llm.data.fill import known_fill, with_known_fill
from moe_llm.data.loader import load_data
from moe_llm.planner.plan import Request, as_json, hardware_named, plan
from moe_llm.planner.report import format_plan


@pytest.fixture
def config_file(tokenizer, make_text, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(make_text(seed) for seed in range(40)), encoding="utf-8")
    raw = runs.sections(
        text,
        tmp_path / "cache",
        tmp_path / "run",
        data={"packing": "best_fit"},
        tokenizer={"path": tokenizer.name_or_path},
        train={"max_steps": None, "max_tokens": 1_000_000},
    )
    raw["model"] = raw["model"] | {"vocab_size": None}
    return runs.write_yaml(tmp_path / "config.yaml", raw)


def test_plan_counts_the_steps_that_the_run_takes(config_file, tokenizer):
    config = load_config(config_file, ["model.vocab_size=330"])
    assert known_fill(config) is None
    blind = config.max_steps
    assert main(["prepare", str(config_file)]) == 0
    data = load_data(config, tokenizer, show_progress=False)
    assert data.train.fill < 0.999, "there is padding to be left out"
    request = Request(gpus=2, nodes=1, memory=80 * 2**30, hardware=hardware_named("h100"))
    found = plan(config, request)
    assert as_json(found)["fill"] == data.train.fill
    assert as_json(found)["steps"] == config.with_fill(data.train.fill).max_steps > blind
    assert f"in blocks that are {data.train.fill:.1%} full, as prepared" in format_plan(found)


def test_other_data_or_none_have_no_known_share(config_file, tmp_path):
    config = load_config(config_file)
    assert main(["prepare", str(config_file)]) == 0
    assert known_fill(config) is not None
    assert known_fill(load_config(config_file, ["data.num_workers=2", "data.allow_changed=true"])) is not None
    for change in ("data.packing=concat", "data.sequence_length=48", "data.sources.0.document=file"):
        assert known_fill(load_config(config_file, [change])) is None, change
    text = tmp_path / "text.txt"
    text.write_text(text.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    assert known_fill(config) is None
    text.unlink()
    assert with_known_fill(config).max_steps == config.max_steps, "a plan needs no data"
