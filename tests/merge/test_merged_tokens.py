"""What a merge says of windows, rotary scaling and end tokens is what it writes."""

import json
from pathlib import Path

import pytest
from merge_fakes import WORDS, Words, make_model, merged, model_list, save
from transformers import AutoModelForCausalLM

ENDS = [2, WORDS.index("mat")]


def content(folder, name: str = "config.json") -> dict:
    return json.loads((Path(folder) / name).read_text())


def change(folder, name: str = "config.json", **values) -> str:
    file = Path(folder) / name
    before = content(folder, name) if file.is_file() else {}
    file.write_text(json.dumps({k: v for k, v in (before | values).items() if v != "absent"}))
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    """Makes two models of a kind, with tokenizers, whose config.json are then changed."""

    def make(kind: str, first: dict, second: dict) -> list[str]:
        paths = []
        for i, changes in enumerate((first, second)):
            path = save(make_model(kind, i, vocab_size=len(WORDS)), tmp_path / f"m{i}")
            Words(WORDS if i == 0 else [*WORDS, "new"][: len(WORDS)]).save(path)
            paths.append(change(path, **changes))
        return paths

    return make


MIXTURE = {"gate_mode": "random"}


@pytest.mark.parametrize("window", [5, None, "absent"])
def test_a_mixture_of_mistrals_has_the_window_that_it_keeps(pair, tmp_path, window):
    paths = pair("mistral", {"sliding_window": window}, {"sliding_window": 7})
    experts = [{"source_model": path, "positive_prompts": ["the"]} for path in paths]
    said: list[str] = []
    merged({"base_model": paths[0], "experts": experts, **MIXTURE}, tmp_path / "out", say=said.append)
    meant = 4096 if window == "absent" else window  # as transformers reads it
    assert AutoModelForCausalLM.from_pretrained(paths[0]).config.sliding_window == meant
    assert content(tmp_path / "out")["sliding_window"] == meant
    assert said == [f"sliding_window is 7 in {paths[1]}; {meant} of {paths[0]} is kept"]


@pytest.mark.parametrize("kind", ["mixtral", "llama", "mistral"])
def test_other_rotary_scaling_is_noted_and_equal_scaling_is_not(pair, tmp_path, kind):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    theta = 1e6 if kind == "mixtral" else 1e4
    plain = {"rope_parameters": "absent", "rope_scaling": "absent", "rope_theta": theta, "head_dim": 4}
    old = plain | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
    new = plain | {"rope_theta": "absent", "rope_parameters": yarn | {"rope_theta": theta}}
    for number, (first, second, differ) in enumerate([(plain, new, True), (old, new, False), (new, plain, True)]):
        said: list[str] = []
        paths = pair(kind, first, second)
        merged(
            {"merge_method": "linear", "models": model_list(*paths, weight=1.0)},
            tmp_path / str(number),
            say=said.append,
        )
        assert [("rope scaling is" in note and "yarn (factor=4.0" in note) for note in said] == [True] * differ
        written = content(tmp_path / str(number))
        assert (written.get("rope_scaling"), written.get("rope_parameters")) == (
            content(paths[0]).get("rope_scaling"), content(paths[0]).get("rope_parameters"),
        )  # fmt: skip


def test_a_setting_that_is_left_out_is_what_it_means(pair, tmp_path):
    said: list[str] = []
    paths = pair("mixtral", {"num_experts_per_tok": "absent", "rms_norm_eps": "absent"}, {"rms_norm_eps": 1e-5})
    merged({"merge_method": "linear", "models": model_list(*paths, weight=1.0)}, tmp_path / "out", say=said.append)
    assert said == []


@pytest.mark.parametrize("source", ["base", "union", None])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "both"])
def test_every_end_of_the_base_stays_an_end(pair, tmp_path, source, place):
    paths = pair("mixtral", {}, {})
    for name in ("generation_config.json", "config.json") if place == "both" else (place,):
        change(paths[0], name, eos_token_id=ENDS)
    recipe = {"merge_method": "linear", "models": model_list(*paths, weight=1.0), "base_model": paths[0]}
    merged(recipe | ({"tokenizer_source": source} if source else {}), tmp_path / "out")
    for folder in (paths[0], tmp_path / "out"):
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == ENDS


def test_an_end_follows_its_token_to_another_vocabulary(tmp_path):
    words = [*reversed(WORDS)]
    paths = [save(make_model("mixtral", i, vocab_size=len(WORDS)), tmp_path / f"m{i}") for i in (0, 1)]
    Words(WORDS).save(paths[0])
    Words(words).save(paths[1])
    change(paths[0], "generation_config.json", eos_token_id=ENDS, temperature=0.3)
    recipe = {"merge_method": "linear", "models": model_list(*paths, weight=1.0), "base_model": paths[0]}
    merged(recipe | {"tokenizer_source": paths[1]}, tmp_path / "out")
    written = content(tmp_path / "out", "generation_config.json")
    assert written["eos_token_id"] == [words.index("</s>"), words.index("mat")]
    assert written["temperature"] == 0.3
