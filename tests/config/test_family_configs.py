"""The shipped configuration of each family: sizes that were published, and those of transformers' model."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_llm.api import load_config
from moe_llm.config import ModelConfig
from moe_llm.config.load import dump_config, parse_yaml, validate
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.architectures import architecture_of

FOLDER = Path(__file__).parents[2] / "configs/families"
# Parameters, of which the first is published with Qwen3-30B-A3B as 30.5 billion, and so on.
SIZES = {
    "qwen3_30b_a3b": ("Qwen3MoeForCausalLM", 30_532_122_624),
    "olmoe_1b_7b": ("OlmoeForCausalLM", 6_919_161_856),
    "glm_4_5_air": ("Glm4MoeForCausalLM", 106_852_245_504),
    "deepseek_v2_lite": ("DeepseekV2ForCausalLM", 15_706_484_224),
    "gpt_oss_20b": ("GptOssForCausalLM", 20_914_757_184),
}


def model_of(name: str) -> ModelConfig:
    return load_config(FOLDER / f"{name}.yaml").model


def test_every_family_has_a_file():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_transformers_model_on_the_meta_device(name):
    model = model_of(name)
    content = hf.to_transformers_config(model, bos_token_id=None, eos_token_id=None, dtype="bf16")
    kind = content.pop("model_type")
    with torch.device("meta"):
        # every block with experts has one size, and so has every one without
        config = AutoConfig.for_model(kind, **copy.deepcopy(content))
        config.num_hidden_layers = 2 + model.num_hidden_layers - model.num_moe_layers
        theirs = AutoModelForCausalLM.from_config(config)
    block = sum(p.numel() for p in theirs.model.layers[-1].parameters())
    whole = theirs.num_parameters() + (model.num_hidden_layers - config.num_hidden_layers) * block
    assert (type(theirs).__name__, whole) == SIZES[name]
    assert model.num_params() == whole
    assert architecture_of(model).architecture == SIZES[name][0]


@pytest.mark.parametrize("name", SIZES)
def test_a_resolved_configuration_says_what_the_family_means_and_is_read_back(name):
    config = load_config(FOLDER / f"{name}.yaml")
    text = dump_config(config)
    assert validate(parse_yaml(text, "text")) == config
    from moe_llm.finetune.init_from import complete

    raw = parse_yaml(text, "text")
    complete(raw)
    assert validate(raw) == config


def test_a_family_alone_is_its_configuration_in_transformers(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "run: {dir: x}\ntokenizer: {path: tok}\nmodel: {architecture: qwen3_moe}\ndata: {sources: [{type: files, path: t.txt}], "
        "sequence_length: 64}\ntrain: {max_steps: 1, micro_batch_size: 1, global_batch_size: 1}\n"
    )
    model = load_config(file).model
    assert (model.vocab_size, model.num_hidden_layers, model.num_local_experts) == (None, 24, 128)
    assert (model.qk_norm, model.intermediate_size, model.dense_width) == ("head", 768, 6144)
    assert model.router.type == "deepseek_moe"
    assert load_config(file, ["model.intermediate_size=96"]).model.intermediate_size == 96
    assert load_config(file, ["model.router={type: mixtral}"]).model.router.type == "mixtral"
    with pytest.raises(UserError, match=r"model\.architecture='qwen9' .*mixtral, qwen2_moe"):
        load_config(file, ["model.architecture=qwen9"])
