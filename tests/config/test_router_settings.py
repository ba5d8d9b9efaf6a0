"""Settings of routers: one block each, whose keys are those of its type and no others; a file for each."""

import math
from pathlib import Path

import pytest
import yaml

from moe_llm.config import ModelConfig, dump_config, load_config
from moe_llm.config.load import parse_yaml, validate
from moe_llm.config.routers import ROUTER_SETTINGS, MixtralSettings, SwitchSettings
from moe_llm.errors import UserError

ROUTING = Path(__file__).parents[2] / "configs/routing"
QUICKSTART = ROUTING.parent / "quickstart.yaml"


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_config(QUICKSTART, overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.router.type=swich"], "model.router.type=swich is no known router: did you mean switch?"),
        (
            ["model.router.type=hash"],
            "model.router.type=hash is no known router: use one of mixtral, dense, noisy_top_k",
        ),
        (["model.router.p=0.5"], "model.router.p=0.5 is no setting of type mixtral but of top_p"),
        (["model.router.capacity_facto=2"], "did you mean model.router.capacity_factor?"),
        (
            ["model.router.type=switch"],
            "model.num_experts_per_tok=2 does not fit model.router.type=switch: set it to 1",
        ),
        (["model.router.type=gshard", "model.num_experts_per_tok=3"], "num_experts_per_tok=3"),
        (["model.router.overflow=residual"], "model.router.overflow=residual never comes about without a limit"),
        (["model.router.type=gshard", "model.router.overflow=next"], "no setting of type gshard but of mixtral"),
        (["model.router.type=dense"], "num_local_experts=8"),
        (["model.router.type=top_p", "model.router.p=0"], "model.router.p=0 is refused"),
        (["model.router.type=hierarchical"], "model.router.groups is missing"),
        (["model.router={type: hierarchical, groups: 3}"], "model.router.groups=3 does not divide num_local_experts=8"),
        (["model.router={type: hierarchical, groups: 2, groups_per_token: 3}"], "groups_per_token=3 is above groups=2"),
        (
            ["model.router={type: hierarchical, groups: 4, groups_per_token: 3}"],
            "does not divide num_experts_per_tok=2",
        ),
        (["model.router={type: hierarchical, groups: 8}"], "num_experts_per_tok=2 asks 2 experts of each group of 1"),
        (["model.router={entropy_bonus_coef: 1, local_entropy_coef: 0.5}"], "pulls against local_entropy_coef=0.5"),
        (["model.router.global_entropy_threshold=1"], "applies to nothing without global_entropy_coef"),
        (["model.router.initial_capacity_factor=2"], "leaves the schedule of the capacity open"),
        (["model.router={capacity_decay_steps: 9}"], "leaves the schedule of the capacity open"),
        (["model.router={initial_capacity_factor: 2, capacity_decay_steps: 9}"], "model.router.capacity_factor=null"),
        (["model.router.warmup_steps=-1"], "model.router.warmup_steps=-1"),
        (["model.router.load_coef=true", "model.router.type=noisy_top_k"], "takes no true or false"),
        (
            ["model.router={type: deepseek_moe, device_groups: 3, device_balance_coef: 1}"],
            "model.router.device_groups=3 does not divide num_local_experts=8",
        ),
        (
            ["model.router={type: deepseek_moe, device_groups: 2}"],
            "device_groups=2 is for model.router.device_balance_coef=0",
        ),
        (["model.router={type: deepseek_moe, device_balance_coef: 1}"], "has no groups to balance"),
        (
            ["model.router={type: bias_balanced, n_group: 3}"],
            "model.router.n_group=3 does not divide num_local_experts=8",
        ),
        (
            ["model.router={type: bias_balanced, n_group: 8}"],
            "model.router.n_group=8 leaves one of num_local_experts=8",
        ),
        (["model.router={type: bias_balanced, topk_group: 2}"], "model.router.topk_group=2 is above n_group=1"),
        (
            ["model.router={type: bias_balanced, n_group: 4}", "model.num_experts_per_tok=3"],
            "model.num_experts_per_tok=3 is above the 2 experts of model.router.topk_group=1 groups",
        ),
        (["model.router.type=soft_moe"], "model.router.slots_per_expert is missing"),
        (
            ["model.router={type: soft_moe, slots_per_expert: 9, segment_length: 8}"],
            "slots_per_expert=9 is more than the",
        ),
        (
            ["model.router={type: soft_moe, slots_per_expert: 8, segment_length: 64}"],
            "num_experts_per_tok=2 is not what 64 slots for each model.router.segment_length=64 tokens make: set it to 1",
        ),
        (
            ["model.router={type: soft_moe, slots_per_expert: 64, segment_length: 256}"],
            "model.router.segment_length=256 leaves no second segment in data.sequence_length=256",
        ),
        (
            ["model.router={type: soft_moe, slots_per_expert: 256, segment_length: 1024}"],
            "model.router.segment_length=1024 leaves no second segment in max_position_embeddings=1024",
        ),
        (["model.router={type: multi_head, heads: 5}"], "model.router.heads=5 does not divide hidden_size=192"),
        (["model.router={type: multi_head, heads: 1}"], "model.router.heads=1"),
        (["model.router.type=lory"], "num_experts_per_tok=2 does not fit model.router.type=lory: set it to 1"),
        (["model.router={type: lory, segment_length: 0}", "model.num_experts_per_tok=1"], "router.segment_length=0"),
        (
            ["model.router={type: lory, segment_length: 1024}", "model.num_experts_per_tok=1"],
            "model.router.segment_length=1024 leaves no second segment in max_position_embeddings=1024: lower it",
        ),
        (
            ["model.router.type=lory", "model.num_experts_per_tok=1"],
            "model.router.segment_length=256 leaves no second segment in data.sequence_length=256: lower the one or raise",
        ),
        (["model.router.segment_length=32"], "is no setting of type mixtral but of soft_moe, lory"),
        (
            ["model.router={type: expert_choice, capacity_factor: 4.5}"],
            "model.router.capacity_factor=4.5 asks 9 experts a token of num_local_experts=8: lower it",
        ),
        (["model.router={type: expert_choice, threshold_rate: 0}"], "model.router.threshold_rate=0"),
        (["model.shared_expert_gate=true"], "has nothing to gate with num_shared_experts=0"),
        (["model.router=switch"], "model.router=switch is not a section"),
        (["model.router={capacity_factor: 1.0, overflow: queue}"], "queue_depth=null is missing for overflow=queue"),
        (["model.router={capacity_factor: 1.0, queue_depth: 1.0}"], "queue_depth=1.0 needs overflow=queue"),
        (["model.router={type: attention, temperature: 0}"], "temperature"),
        (["model.router={type: attention, heads: 0}"], "heads"),
        (["model.router={type: transformer, width: 10, heads: 4}"], "does not divide model.router.width=10"),
        (["model.router={type: reinforce, baseline: mean}"], "baseline"),
        (["model.router={type: reinforce, cost_coef: 0.1}"], "tells experts by their width, and all have one"),
        (["model.router={type: bias_balanced, time_share: 0.1}"], "tells experts by their width, and all have one"),
        (["model.router={type: bias_balanced, loss_share: 1.1}"], "loss_share"),
        (["model.router={type: reinforce, capacity_factor: 1.0}"], "capacity_factor"),
        (["model.router={type: reinforce, load_rate: 0.3}"], "load_rate=0.3 does nothing without load_coef"),
        (
            ["model.router={type: reinforce, baseline: leave_one_out, baseline_coef: 0.1}"],
            "baseline_coef=0.1 does nothing without baseline: learned",
        ),
        (["model.router.capacity_order=choice"], "capacity_order=choice shares out no room without a limit"),
        (["model.router={type: em, form: softer}"], "form"),
        (["model.router={type: em}", "model.mlp_only_layers=[3]"], "needs experts in the last block, which is dense"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(overrides, named):
    assert named in refusal(*overrides)


def test_without_a_type_it_is_mixtral_as_it_ever_was():
    config = load_config(QUICKSTART, ["model.router={capacity_factor: 1.5, overflow: next}"])
    assert config.model.router == MixtralSettings(capacity_factor=1.5, overflow="next")
    assert load_config(QUICKSTART).model.router == MixtralSettings()


@pytest.mark.parametrize("kind", ROUTER_SETTINGS)
def test_each_has_a_file_with_its_source_that_reads_back(kind):
    path = ROUTING / f"{kind}.yaml"
    config, text = load_config(path), path.read_text()
    assert config.model.router.type == kind
    assert validate(parse_yaml(dump_config(config), "dump")) == config
    comment = "".join(line for line in text.splitlines() if line.startswith("#"))
    assert "19" in comment or "20" in comment or kind == "balanced"
    quickstart = load_config(QUICKSTART)
    others = {"run", "model"}
    assert config.model_dump(exclude=others) == quickstart.model_dump(exclude=others)
    if kind != "top_p":  # whose tokens decide how many experts they need
        active, theirs = (of.model.parameter_counts(active=True) for of in (config, quickstart))
        maps = sum(
            math.prod(shape)
            for name, shape in config.model.router.parameter_shapes(config.model).items()
            if name.endswith("_proj.weight")
        )
        extra = active.get("shared_experts", 0) + config.model.num_hidden_layers * maps
        assert active["experts"] + extra == theirs["experts"]


def test_files_and_routers_are_the_same_set():
    assert {path.stem for path in ROUTING.glob("*.yaml")} == set(ROUTER_SETTINGS)


def test_quiet_and_unlimited_are_settings():
    for kind, settings in ROUTER_SETTINGS.items():
        router = load_config(ROUTING / f"{kind}.yaml").model.router
        for change in (router.quiet(), router.unlimited()):
            changed = settings.model_validate(router.model_dump() | change)
            assert not (change and change is router.unlimited() and changed.limited)
    assert SwitchSettings().limited
    assert not SwitchSettings.model_validate(SwitchSettings().model_dump() | SwitchSettings().unlimited()).limited


@pytest.mark.parametrize("kind", sorted(ROUTER_SETTINGS))
def test_the_balance_loss_that_is_not_set_is_that_of_the_routers_source(kind):
    """As in the shipped configuration of each router, which cites it; what is set stays."""
    file = Path(__file__).parents[2] / f"configs/routing/{kind}.yaml"
    shipped = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
    expected = shipped.pop("router_aux_loss_coef")
    assert ModelConfig(**shipped).router_aux_loss_coef == expected
    assert ModelConfig(**shipped, router_aux_loss_coef=0.3).router_aux_loss_coef == 0.3
