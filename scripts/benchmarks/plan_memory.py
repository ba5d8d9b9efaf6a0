"""What `moe-llm plan` says a training step holds at its fullest, against what it does hold, on CPUs.

    python scripts/benchmarks/plan_memory.py                # all configurations; exit code 1 if one is off by over 10%

Measured: every allocation and release of torch's CPU allocator, as its profiler records them, in the second step of
real training (engine, loss and optimizer of `moe-llm train`, random tokens), each configuration in processes of its
own. This is exact to the byte, unlike the resident size of a process, which keeps what was released and lacks what
was never touched. What torch's allocator does not hand out is not in it: oneDNN's and gloo's own buffers.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

TOLERANCE = 0.10
_MODEL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}
_FEW_PARAMETERS = [
    "model.vocab_size=512",
    "model.hidden_size=128",
    "model.num_local_experts=4",
    "model.num_hidden_layers=3",
    "train.micro_batch_size=16",
    "train.global_batch_size=16",
]
# name: (ranks, overrides)
CASES: dict[str, tuple[int, list[str]]] = {
    "fp32": (1, []),
    "bf16": (1, ["train.precision=bf16"]),
    "fp32, recomputed": (1, ["train.activation_checkpointing=true"]),
    "bf16, recomputed, long": (
        1,
        [
            "train.precision=bf16",
            "train.activation_checkpointing=true",
            "data.sequence_length=2048",
            "model.num_hidden_layers=8",
        ],
    ),
    "fp32, two micro-batches": (1, ["train.global_batch_size=8"]),
    "fp32, narrow and deep": (
        1,
        [
            "model.hidden_size=128",
            "model.intermediate_size=1024",
            "model.num_hidden_layers=6",
            "train.micro_batch_size=1",
            "train.global_batch_size=1",
        ],
    ),
    # few parameters and many tokens: all but 2% are activations
    "fp32, many tokens": (1, [*_FEW_PARAMETERS, "train.precision=fp32"]),
    "bf16, many tokens": (1, [*_FEW_PARAMETERS, "train.precision=bf16"]),
    "fp32, many tokens, expert dropout": (1, [*_FEW_PARAMETERS, "train.precision=fp32", "model.expert_dropout=0.1"]),
    "bf16, many tokens, recomputed": (
        1,
        [*_FEW_PARAMETERS, "train.precision=bf16", "train.activation_checkpointing=true"],
    ),
    "fp32, large vocabulary": (1, ["model.vocab_size=32000", "model.num_hidden_layers=2"]),
    "bf16, large vocabulary, two micro-batches": (
        1,
        [
            "train.precision=bf16",
            "model.vocab_size=32000",
            "model.num_hidden_layers=1",
            "data.sequence_length=2048",
            "train.global_batch_size=8",
        ],
    ),
    "bf16, mixed weights": (
        1,
        ["train.precision=bf16", "model.num_experts_per_tok=1", "model.router={type: lory, segment_length: 64}"],
    ),
    "fp32, EP 2, ZeRO-1": (2, ["parallel.expert_parallel_size=2", "train.global_batch_size=8"]),
    "bf16, EP 2, ZeRO-1": (2, ["train.precision=bf16", "parallel.expert_parallel_size=2", "train.global_batch_size=8"]),
    "bf16, EP 2, ZeRO-2, recomputed": (
        2,
        [
            "train.precision=bf16",
            "parallel.expert_parallel_size=2",
            "parallel.zero_stage=2",
            "train.global_batch_size=8",
            "train.activation_checkpointing=true",
        ],
    ),
    "fp32, mixed weights, EP 2, ZeRO-1": (
        2,
        [
            "parallel.expert_parallel_size=2",
            "train.global_batch_size=8",
            "model.num_experts_per_tok=1",
            "model.router={type: lory, segment_length: 64}",
        ],
    ),
    "bf16, EP 1, ZeRO-2": (2, ["train.precision=bf16", "parallel.zero_stage=2", "train.global_batch_size=8"]),
    "bf16, EP 2, ZeRO-3": (
        2,
        [
            "train.precision=bf16",
            "parallel.expert_parallel_size=2",
            "parallel.zero_stage=3",
            "train.global_batch_size=8",
        ],
    ),
}


def configuration(overrides: list[str]):
    from moe_llm.config.load import apply_override, validate

    raw = {
        "run": {"dir": "unused"},
        "model": dict(_MODEL),
        "data": {"sources": [{"type": "python_stdlib"}], "sequence_length": 512},
        "train": {"max_steps": 10, "micro_batch_size": 4, "global_batch_size": 4, "precision": "fp32", "device": "cpu"},
    }
    for override in overrides:
        apply_override(raw, override)
    return validate(raw)


def predicted(config, ranks: int) -> int:
    from moe_llm.planner.layout import layout_of
    from moe_llm.planner.memory import KERNELS, step_memory

    return round(step_memory(config, layout_of(config, ranks), KERNELS["cpu"]).total)


def measured(config, phases: bool = False) -> "int | dict[str, int]":
    """Bytes that this process (a rank of its group) holds at most in the second training step, or by phase of it."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from moe_llm.bench.run import synthetic_loader
    from moe_llm.data.packing import model_inputs
    from moe_llm.distributed.runtime import start
    from moe_llm.distributed.step_loss import StepLoss
    from moe_llm.train.build import build_trained

    runtime = start(config)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            engine, _ = build_trained(config, runtime, None)
            with synthetic_loader(config, runtime, 2) as loader:
                for step in range(2):
                    batches = next(loader)
                    loss = StepLoss(config.model, runtime, batches)
                    for i, batch in enumerate(batches):
                        with record_function(f"measured {step} forward"):
                            losses = loss(engine.forward(**model_inputs(batch)))
                        with record_function(f"measured {step} backward"):
                            engine.backward(losses.total, last=i == len(batches) - 1)
                        del losses
                    with record_function(f"measured {step} optimizer"):
                        engine.step(1e-4)
    finally:
        runtime.close()
    peaks = _peaks(recorded.profiler.kineto_results.events())
    return peaks if phases else max(peaks.values())


def _peaks(events) -> dict[str, int]:
    """The largest sum of allocations less releases within each span of the second step."""
    spans, changes = [], []
    for event in events:
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith("measured 1 "):
            begin = event.start_ns()
            spans.append((begin, begin + event.duration_ns(), event.name().removeprefix("measured 1 ")))
    peaks = dict.fromkeys((name for _, _, name in spans), 0)
    held = 0
    for moment, change in sorted(changes):
        held += change
        for begin, end, name in spans:
            if begin <= moment <= end:
                peaks[name] = max(peaks[name], held)
    return peaks


def measured_on_ranks(name: str) -> int:
    """The fullest rank's."""
    ranks, _ = CASES[name]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(ranks),
        "ACCELERATE_USE_CPU": "true",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--measure", name],
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{name}: a rank ended with an error")
    phases = [json.loads(output.splitlines()[-1]) for output in outputs]
    return max(max(found.values()) for found in phases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(configuration(CASES[arguments.measure][1]), phases=True)))
        return 0
    rows = []
    print(f"{'configuration':<44} {'predicted':>10} {'measured':>10} {'ratio':>7}")
    for name in arguments.only:
        ranks, overrides = CASES[name]
        found, said = measured_on_ranks(name), predicted(configuration(overrides), ranks)
        rows.append({"name": name, "ranks": ranks, "predicted": said, "measured": found})
        print(f"{name:<44} {said / 2**20:>6.1f} MiB {found / 2**20:>6.1f} MiB {said / found:>7.3f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(abs(row["predicted"] / row["measured"] - 1) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
