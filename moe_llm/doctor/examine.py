"""The examination: runs in order, comparisons as their results come in."""

import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_llm.config import Config
from moe_llm.config.adversarial import AdversarialConfig
from moe_llm.config.optim import OPTIMIZERS
from moe_llm.data.fill import with_known_fill
from moe_llm.distributed.runtime import rank_from_environment, world_size_from_environment
from moe_llm.doctor import adapters, compare, judge
from moe_llm.doctor.causes import diagnose
from moe_llm.doctor.exported import check_export, check_files
from moe_llm.doctor.findings import FAIL, Finding, exact, note, within
from moe_llm.doctor.launched import LaunchedRanks, take_part
from moe_llm.doctor.observe import Observation, expected_samples, made_ready, observe, read_data
from moe_llm.doctor.oracle.family import comparable
from moe_llm.doctor.oracle.parts import FullReference
from moe_llm.doctor.ranks import LocalRanks, Plant, RankError, no_plant
from moe_llm.doctor.sample import small_data
from moe_llm.doctor.shrink import ALONE, in_fp32, one_process, replace, shrink
from moe_llm.errors import UserError
from moe_llm.finetune.selection import trained_names
from moe_llm.model.moe.routers import router_losses

STEPS = 4


@dataclass
class Report:
    """changes: configuration keys as they are -> as they were examined. layout: in words."""

    layout: str
    changes: dict[str, tuple[Any, Any]]
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not any(finding.failed for finding in self.findings)


def examine(
    config: Config,
    *,
    ranks: int = 2,
    steps: int = STEPS,
    plant: Plant = no_plant,
    processes: LocalRanks | None = None,
    launched: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> Report:
    """Compare a small copy of the run on `ranks` local ranks with one process and with transformers.

    Args:
        steps: optimizer steps, at least 2; the checkpoint that is resumed from is written after half of them.
        plant: put in place around each process's work; a way to see a fault found.
        processes: started before, for several examinations; they are used and left running.
        launched: the ranks are those of a launcher, of which this process is rank 0, on their own devices; the others
            `take_part` meanwhile. The copy is as wide as the run, as far as that is practical.
        say: told what is going on.

    Raises:
        UserError: the configuration cannot be examined.
    """
    if world_size_from_environment() > 1 and not launched:
        raise UserError(
            "doctor starts its ranks itself: run it without a launcher, with --ranks N, or examine the launcher's "
            "ranks with --launch"
        )
    begin = time.monotonic()
    config = with_known_fill(config)
    small = shrink(config, ranks, steps, as_wide=launched)
    report = Report(_layout(small.config, ranks, launched), small.changes, [note(sentence) for sentence in small.notes])
    with contextlib.ExitStack() as stack:
        directory = _directory(stack, config, launched)
        stack.enter_context(_one_thread())
        pool = processes or stack.enter_context(LaunchedRanks(small.config, ranks) if launched else LocalRanks(ranks))
        stack.callback(pool.settle)  # before the directory goes that they write to
        say("preparing text and tokenizer")
        pool.send(made_ready)  # the ranks import in the meantime
        prepared, notes = small_data(config, small.config, directory)
        report.findings += map(note, notes)
        try:
            _Case(config, prepared, directory, pool, plant, ranks, report.findings, say).run()
        except RankError as error:
            report.findings.append(
                Finding("run", "the ranks run", FAIL, where=error.message, evidence={"trace": str(error)})
            )
    diagnose(report.findings, ranks)
    report.seconds = time.monotonic() - begin
    return report


def examine_launched(
    config: Config, *, steps: int = STEPS, say: Callable[[str], None] = lambda sentence: None
) -> Report | None:
    """`examine` on the ranks of a launcher, from each of them; the report is rank 0's alone.

    Raises:
        UserError: no launcher has started this process, or the configuration cannot be examined.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        raise UserError(
            "--launch examines the ranks of a launcher, and none has started this process: use accelerate launch or "
            "torchrun, or leave --launch out"
        )
    ranks = world_size_from_environment()
    if rank_from_environment() == 0:
        return examine(config, ranks=ranks, steps=steps, launched=True, say=say)
    take_part(shrink(config, ranks, steps, as_wide=True).config)
    return None


def _directory(stack: contextlib.ExitStack, config: Config, launched: bool) -> Path:
    """Of this examination alone. Launched ranks may be on other machines, so theirs is where runs are."""
    if not launched:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-llm-doctor-")))
    parent = Path(config.run.dir).expanduser().resolve().parent
    made = next((path for path in reversed([parent, *parent.parents]) if not path.exists()), None)
    parent.mkdir(parents=True, exist_ok=True)
    if made is not None:
        stack.callback(_remove_empty, parent, made)
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".moe-llm-doctor-", dir=parent)))


def _remove_empty(path: Path, until: Path) -> None:
    """Directories that were made for the examination, from the innermost on."""
    for directory in [path, *path.parents]:
        with contextlib.suppress(OSError):  # somebody else has begun to use it
            directory.rmdir()
        if directory == until:
            return


def _sees(path: str) -> bool:
    return Path(path).is_dir()


def _layout(config: Config, ranks: int, launched: bool) -> str:
    """In words: what the ranks do."""
    rounds, shared = config.accumulation_steps(ranks), config.parallel.expert_parallel_size
    on_gpus = launched and on_gpu(config)
    return ", ".join(
        [
            f"{ranks} launched ranks ({'NCCL' if on_gpus else 'gloo'})" if launched else f"{ranks} ranks",
            "each with all experts" if shared == 1 else f"{shared} of them share a set of experts",
            *(
                [f"{parts} of them share each sequence"]
                if (parts := config.parallel.sequence_parallel_size) > 1
                else []
            ),
            f"ZeRO-{config.parallel.zero_stage}",
            f"{rounds} micro-batch{'es' if rounds > 1 else ''} a step",
            config.train.precision,
            *(["recomputation"] if config.train.recomputes else []),
        ]
    )


class _Case:
    """One examination: `run` goes through it and appends to `findings`."""

    def __init__(
        self,
        user: Config,
        config: Config,
        directory: Path,
        pool: LocalRanks,
        plant: Plant,
        ranks: int,
        findings: list[Finding],
        say: Callable[[str], None],
    ):
        self.user, self.directory, self.pool, self.plant, self.ranks = user, directory, pool, plant, ranks
        self.findings, self.say = findings, say
        trained = any(".mlp.gate." in name for name in trained_names(config))
        self.reference = FullReference(config.model, moves=trained) if comparable(config.model) else None
        self.config = self._with_active_clip(config)
        self.allowed = self._tolerances(self.config)
        self.expected, _ = expected_samples(self.config)

    def run(self) -> None:
        self.pool.receive()
        blind = [rank for rank, sees in enumerate(self.pool.run(_sees, str(self.directory))) if not sees]
        if blind:
            raise UserError(
                f"ranks {blind} do not see {self.directory}, so that they could not write a checkpoint together: set "
                "run.dir to a directory that all machines share"
            )
        self.say(f"training on {self.ranks} ranks and in one process")
        self.pool.send(observe, self.config, plant=self.plant)
        one = self._alone(self.config, "one", keep_batches=True)
        precise = one
        if self.config.train.precision != "fp32":
            precise = self._alone(self._in_fp32(), "one_in_fp32", keep_batches=True)
            self.findings.append(compare.against_fp32(one, precise))
        self._compare_with_transformers(precise)
        self._judge(one)
        self._compare_cuts(precise)
        ranks = self.pool.receive()
        self._compare(ranks, one)
        self.say("exporting, and resuming at other layouts")
        self.pool.send(_observe_from, self._elsewhere(), one.saved[0], plant=self.plant)
        self.findings += check_files(ranks[0].saved[0], self.config)
        trained = compare.whole([rank.at_save["weight"] for rank in ranks])
        self.findings += check_export(
            ranks[0].saved[0],
            adapters.merged(trained, self.config),
            self.config,
            one.batches[0][0],
            self.allowed,
            adapters.adapted(trained),
        )
        self._compare_resumed(
            "one",
            f"{self.ranks} ranks -> one process",
            ranks,
            [self._alone(self.config, "resumed", source=ranks[0].saved[0])],
        )
        other = self._elsewhere().parallel
        title = f"one process -> {self.ranks} ranks, EP {other.expert_parallel_size}, ZeRO-{other.zero_stage}"
        self._compare_resumed("ranks", title, [one], self.pool.receive())
        if self.user.model.router_jitter_noise:
            self._compare_noise(ranks)

    def _with_active_clip(self, config: Config) -> Config:
        """A bound that the first gradient exceeds: one that never clips would show nothing."""
        if not config.optim.grad_clip:
            return config
        probe = self._alone(replace(config, train={"max_steps": 1}), "probe")
        norm = probe.records[0]["grad_norm"]
        return replace(config, optim={"grad_clip": min(config.optim.grad_clip, norm / 2)})

    def _alone(self, config: Config, name: str, as_it_is: bool = False, **how: Any) -> Observation:
        """One process that takes the ranks' micro-batches together, unless the configuration is to be taken as it is;
        in a run directory of its own. Where it raises, that is found as a rank's error is."""
        alone = config if as_it_is else one_process(config, self.ranks)
        config = replace(alone, run={"dir": str(self.directory / name)})
        try:
            return self.pool.alone(observe, config, plant=self.plant, **how)
        except Exception as error:
            if isinstance(error, UserError) and "source" not in how:  # a checkpoint is none of the user's
                raise
            last = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
            raise RankError(f"one process: {last}", traceback.format_exc()) from error

    def _tolerances(self, config: Config) -> compare.Tolerances:
        found = compare.tolerances(config)
        return compare.on_gpus(found) if on_gpu(config) else found

    def _in_fp32(self) -> Config:
        return in_fp32(self.config)

    def _as_transformers(self, precise: Observation) -> Observation:
        """One process in fp32 without what transformers has not: limits of capacity, perturbations and turns."""
        router = self.config.model.router
        without = router.unlimited()
        changed = {key: value for key, value in without.items() if getattr(router, key) != value}
        adversarial = self.config.train.adversarial != AdversarialConfig()
        if not changed and not adversarial:
            return precise
        if adversarial:
            self.findings.append(note("train.adversarial is off beside transformers, which has no such thing"))
        for key, value in changed.items():
            self.findings.append(
                note(
                    f"model.router.{key}={getattr(router, key)} is {'null' if value is None else value} beside "
                    "transformers, which has no such thing"
                )
            )
        plain = {**router.model_dump(mode="json"), **without}
        config = in_fp32(self.config, model={"router": plain}, train={"adversarial": {}})
        return self._alone(config, "one_plain", keep_batches=True)

    def _elsewhere(self) -> Config:
        """The ranks in another layout than the configured one."""
        now, experts = self.config.parallel, self.config.model.num_local_experts
        sizes = [s for s in range(self.ranks, 0, -1) if self.ranks % s == 0 and experts % s == 0]
        size = next((s for s in sizes if s != now.expert_parallel_size), 1)
        return replace(
            self.config,
            run={"dir": str(self.directory / "elsewhere")},
            parallel={"expert_parallel_size": size, "zero_stage": other_stage(self.config)},
        )

    def _compare_with_transformers(self, precise: Observation) -> None:
        if self.reference is None:
            self.findings.append(
                note(
                    "transformers has no decoder with this attention, or there is no second formula of "
                    f"model.router.type={self.config.model.router.type}: ranks are compared with one process alone"
                )
            )
            return
        one = self._as_transformers(precise)
        before = [one.start["weight"], *one.weights[:-1]]
        whole = [compare.whole([weights]) for weights in before]
        expected = [
            adapters.with_factors(
                self.reference.step(adapters.merged(weights, self.config), rounds), weights, self.config
            )
            for weights, rounds in zip(whole, one.batches)
        ]
        self.findings += compare.against_transformers(
            one, expected, self._tolerances(self._in_fp32()), self.config.finetune.experts
        )
        self._explain_gradients(whole[0], one)
        self._compare_held_out("reference_val", "held-out loss, as transformers computes it", one)
        self._compare_dropout(precise)
        if expected[0].buffers and one.at_save:
            due = expected[(self.config.checkpoint.every_steps or 1) - 1].buffers
            self.findings.append(compare.router_buffers(one, due))

    def _explain_gradients(self, weights: compare.Whole, one: Observation) -> None:
        """Where they depart though losses do not, find out which part of them it is."""
        failed = {finding.key: finding for finding in self.findings if finding.failed}
        finding = failed.get("reference_gradients")
        if finding is None or "reference_lm" in failed or not self.config.finetune.whole:
            return
        assert self.reference is not None
        found = compare.whole([one.gradients[0]])
        finding.evidence["why"] = judge.explain_gradients(found, self.reference.shares(weights, one.batches[0]))

    def _compare_held_out(self, key: str, title: str, one: Observation) -> None:
        """Where evaluation routes as training does and by the weights that are trained."""
        router, optim = self.config.model.router.type, self.config.optim.name
        if router == "expert_choice" or OPTIMIZERS[optim].switches or self.config.data.has_preference:
            return
        assert self.reference is not None
        weights = adapters.merged(compare.whole([one.weights[-1]]), self.config)
        due = self.reference.held_out(weights, read_data(self.config).validation.batches(micro_batch_size=1))
        allowed = self._tolerances(self._in_fp32()).loss[0]
        compared = [(compare.relative(one.records[-1]["val_loss"], due), allowed, "last step")]
        self.findings.append(within(key, title, compared))

    def _compare_dropout(self, without: Observation) -> None:
        """One process with the user's dropout: it acts on gradients, and evaluation knows none."""
        rates = self.user.model.expert_dropout, self.user.finetune.lora.dropout
        if not any(rates):
            return
        config = in_fp32(
            self.config,
            model={"expert_dropout": rates[0]},
            finetune={"lora": {**self.config.finetune.lora.model_dump(mode="json"), "dropout": rates[1]}},
            train={"max_steps": 1, "adversarial": {}},
        )
        one = self._alone(config, "dropout")
        before, after = (compare.whole([seen.gradients[0]]) for seen in (without, one))
        idle = [] if any((before[name] != after[name]).any() for name in before) else ["no gradient depends on it"]
        self.findings.append(exact("noise_dropout", "dropout: acts on the gradients", idle))
        self._compare_held_out("noise_val", "dropout: none in the held-out loss", one)

    def _judge(self, one: Observation) -> None:
        """One process beside the oracle: data, schedule and optimizer."""
        with self.plant(None):
            self.findings += judge.judge_text(self.config)
            self.findings += judge.judge_conversations(self.config, one.saved[0])
            self.findings += judge.judge_schedule(self.user, self.config, one)
        self.findings += judge.judge_optimizer(one_process(self.config, self.ranks), one)
        self.findings += judge.judge_average(self.config, one)
        self.findings += judge.judge_initial(self.config, one)

    def _compare_cuts(self, whole: Observation) -> None:
        """One process in fp32 whose micro-batches are single rows beside one that takes more at once."""
        model = self.config.model
        if model.router_aux_loss_scope == "transformers":
            self.findings.append(
                note("model.router_aux_loss_scope=transformers balances each micro-batch by itself: the cut matters")
            )
            return
        steps = 2
        fine = replace(
            self._in_fp32(),
            train={"micro_batch_size": 1, "precision": "fp32", "max_steps": steps},
            parallel=ALONE,
        )
        cut = self._alone(fine, "cut", as_it_is=True)
        self.findings += compare.cuts(cut, whole, self._tolerances(self._in_fp32()), model.balance_over)

    def _compare(self, ranks: Sequence[Observation], one: Observation) -> None:
        allowed = compare.widened(self.allowed, ranks, one)
        self.findings += [
            compare.samples(ranks, self.expected, "samples", "each block is read once, by one rank"),
            compare.tokens(ranks, one),
            compare.start_weights(ranks, one),
            *judge.judge_random(ranks),
            *compare.losses(ranks, one, allowed, [loss.name for loss in router_losses(self.config.model)]),
            compare.routing(ranks, one, allowed),
            *([compare.dropped(ranks, one, allowed)] if self.config.model.router.limited else []),
            compare.gradients(
                compare.whole([rank.gradients[0] for rank in ranks]),
                compare.whole([one.gradients[0]]),
                allowed,
                "gradients",
                "gradients of step 1",
            ),
            compare.norms(ranks, one, allowed, self.config.optim.grad_clip),
            compare.weights(ranks, one, allowed, compare.without_effect(self.config.model)),
            *compare.trained(ranks, self.config),
            *([] if self.config.finetune.whole else [compare.frozen(ranks, self.config)]),
        ]

    def _compare_resumed(
        self, key: str, title: str, straight: Sequence[Observation], after: Sequence[Observation]
    ) -> None:
        self.findings += compare.resumed(
            f"resume, {title}", f"resume_{key}", straight, after, self.expected, self.allowed
        )

    def _compare_noise(self, quiet: Sequence[Observation]) -> None:
        """The router's noise, on the ranks: with and without recomputation, from the same seed."""
        self.say("router noise")
        runs = []
        for recompute in (False, True):
            noisy = replace(
                self.config,
                run={"dir": str(self.directory / f"noise_{recompute}")},
                model={"router_jitter_noise": self.user.model.router_jitter_noise},
                train={"max_steps": 1, "activation_checkpointing": recompute},
            )
            runs.append(self.pool.run(observe, noisy, plant=self.plant))
        plain, again, silent = (compare.whole([rank.gradients[0] for rank in run]) for run in (runs[0], runs[1], quiet))
        seen = compare.gradients(
            again, plain, self.allowed, "noise_recomputed", "router noise: seeded, and the same in recomputation"
        )
        idle = [] if any((plain[name] != silent[name]).any() for name in plain) else ["no gradient depends on it"]
        self.findings += [seen, exact("noise_acts", "router noise: acts on the gradients", idle)]


def other_stage(config: Config) -> int:
    """A ZeRO stage that is far from the configured one, among those that the optimizer works in."""
    now, possible = config.parallel.zero_stage, OPTIMIZERS[config.optim.name].zero_stages
    return max((stage for stage in possible if stage != now), key=lambda stage: (abs(stage - now), stage), default=now)


def on_gpu(config: Config) -> bool:
    """Whether training would take place on GPUs here."""
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    return config.train.device != "cpu" and not asked_for_cpu and torch.cuda.is_available()


def _observe_from(config: Config, source: str) -> Observation:
    return observe(config, source=source)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Like each rank, so that they do not wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
