"""Examine sound configurations again and again, each time with another seed: the doctor must never cry wolf.

python scripts/doctor_repeat.py --times 50
python scripts/doctor_repeat.py --times 50 --only chat --only mixtral

A line for each examination that fails, one after each round of all kinds, and one for each kind at the end; exit code 1
where any has failed. `--first-seed` goes on where an earlier run has stopped. Each round has ranks of its own.
"""

import argparse
import inspect
import json
import os
import sys
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path

from moe_llm.config import load_config
from moe_llm.doctor.examine import examine
from moe_llm.doctor.ranks import LocalRanks

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
CHAT = "data.sources=[{{type: files, path: {conversations}, content: chat}}]"
HALF = "model.rope_parameters.partial_rotary_factor=0.5"
LATENT = [
    "model.kv_lora_rank=32",
    "model.num_key_value_heads=null",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=16",
    "model.v_head_dim=32",
]
KINDS: dict[str, list[str]] = {
    "mixtral": ["parallel.expert_parallel_size=2"],
    "bf16": ["train.precision=bf16", "checkpoint.dtype=bf16", "parallel.zero_stage=3"],
    "accumulation": ["train.global_batch_size=64", "train.activation_checkpointing=full"],
    "exact balance": ["model.balance_over=step", "train.global_batch_size=64"],
    "sgd, window": ["optim.name=sgd", "optim.lr=0.1", "model.sliding_window=64", "data.isolate_documents=false"],
    "muon": ["optim.name=muon"],
    "lion": ["optim.name=lion", "optim.lr=0.0001"],
    "schedule_free": ["optim.name=schedule_free", "optim.schedule=constant"],
    "adapters": ["finetune.lora={rank: 8, alpha: 16, targets: [attention, experts]}", "optim.lr=0.02"],
    "experts alone": ["finetune.trainable=experts", "finetune.experts=[1,6]", "parallel.expert_parallel_size=2"],
    "experts alone, bf16": ["finetune.trainable=experts", "train.precision=bf16", "checkpoint.dtype=bf16"],
    "average": ["checkpoint.ema.decay=0.9"],
    "best fit": ["data.packing=best_fit"],
    "chat": [CHAT],
    "adversarial": ["train.adversarial={epsilon: 0.05, steps: 2, router_every: 3}"],
    "noise": ["model.router_jitter_noise=0.1"],
    "qwen2_moe": ["model.num_shared_experts=1", "model.shared_expert_gate=true", "model.attention_bias=qkv"],
    "qwen3_moe": ["model.qk_norm=head"],
    "olmoe": ["model.qk_norm=projection"],
    "switch": ["model.router.type=switch", "model.num_experts_per_tok=1"],
    "noisy top-k": ["model.router.type=noisy_top_k", "parallel.expert_parallel_size=2"],
    "deepseek_moe": ["model.router.type=deepseek_moe", "model.num_shared_experts=1"],
    "bias_balanced": ["model.router.type=bias_balanced"],
    "top_p": ["model.router={type: top_p, local_entropy_coef: 0.1}"],
    "expert_choice": ["model.router.type=expert_choice"],
    "hierarchical": ["model.router={type: hierarchical, groups: 4}", "parallel.expert_parallel_size=2"],
    "balanced": ["model.router.type=balanced"],
    "soft_moe": ["model.router={type: soft_moe, slots_per_expert: 4, segment_length: 16}"],
    "multi_head": ["model.router={type: multi_head, heads: 4}", "parallel.expert_parallel_size=2"],
    "lory": ["model.router={type: lory, segment_length: 64}", "model.num_experts_per_tok=1"],
    "attention": ["model.router.type=attention"],
    "transformer": ["model.router.type=transformer"],
    "reinforce": ["model.router={type: reinforce, load_coef: 0.1}"],
    "em": ["model.router.type=em"],
    "glm4_moe": ["model.router.type=bias_balanced", "model.num_shared_experts=1", "model.qk_norm=head", HALF],
    "deepseek_v2": ["model.router.type=deepseek_moe", "model.num_shared_experts=1", *LATENT],
    "deepseek_v3": ["model.router.type=bias_balanced", "model.num_shared_experts=1", *LATENT],
    "gpt_oss": [
        "model.router={type: mixtral, bias: true}",
        "model.attention_bias=all",
        "model.attention_sinks=true",
        "model.expert_bias=true",
        "model.swiglu_limit=7.0",
        "model.sliding_window=64",
    ],
}


def conversations(directory: Path) -> Path:
    """Rows of chat from the standard library's own documentation."""
    path, rows = directory / "rows.jsonl", []
    for module in (json, os, textwrap, argparse):
        for name, value in vars(module).items():
            told = inspect.getdoc(value) if callable(value) else None
            if told:
                rows.append({"prompt": f"What does {module.__name__}.{name} do?", "completion": told})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="examinations of each kind")
    parser.add_argument("--first-seed", type=int, default=0, help="of so many seeds in a row")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each")
    parser.add_argument("--only", action="append", choices=KINDS, help="this kind; several may be given")
    parser.add_argument("--minutes", type=float, help="begin no further examination after so long")
    args = parser.parse_args()
    begin, passed, failed = time.monotonic(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as directory:
        path = conversations(Path(directory))
        for seed in range(args.first_seed, args.first_seed + args.times):
            with LocalRanks(2) as ranks:
                for kind in args.only or KINDS:
                    if args.minutes is not None and time.monotonic() - begin > 60 * args.minutes:
                        break
                    overrides = [word.format(conversations=path) if word == CHAT else word for word in KINDS[kind]]
                    report = examine(
                        load_config(QUICKSTART, [*overrides, f"run.seed={seed}"]), steps=args.steps, processes=ranks
                    )
                    (passed if report.passed else failed)[kind] += 1
                    for finding in report.findings:
                        if finding.failed:
                            print(
                                f"{kind}, seed {seed}: {finding.key}: {finding.where} {finding.difference}", flush=True
                            )
            print(f"seed {seed}: {passed.total()} passed, {failed.total()} failed", flush=True)
    for kind in args.only or KINDS:
        print(f"{kind}: {passed[kind]} of {passed[kind] + failed[kind]} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
