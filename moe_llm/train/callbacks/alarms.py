"""Alarms about single experts and routers, from the records of a run alone: so that replaying the records of an
interrupted run leaves a resumed one in the same state.

Dimensions: L layers, E experts.
"""

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moe_llm.config import Config

# what has raised an alarm has to be so much better before it can raise it again
_RELIEF = 1.5
_NAMED = 3


@dataclass(frozen=True)
class Alarm:
    """kind: dying_expert, router_collapse, load_drift, gradient_outlier or no_gradient. places: [layer, expert] or
    [layer], all that have come up at this record; layers are counted over all blocks, those without experts too."""

    kind: str
    places: list[list[int]]
    sentence: str

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"kind": self.kind, "places": self.places, "sentence": self.sentence}


@dataclass
class _Seen:
    """What one record adds to the window."""

    steps: int
    counts_LE: np.ndarray
    entropy_L: np.ndarray  # summed over the steps
    ratio_LE: np.ndarray  # gradient norm over the layer's median; NaN for what is not trained or not recorded


@dataclass
class Alarms:
    """`look` at each record, in order; what it returns is new. An alarm is raised when its condition begins, and
    again only after the condition has passed by a margin."""

    config: Config
    _window: deque[_Seen] = field(default_factory=deque)
    _step: int = 0
    _active: set[tuple[str, int, int]] = field(default_factory=set)
    _lowest_cv_L: np.ndarray | None = None

    def replay(self, records: list[dict[str, Any]]) -> None:
        """Take what was written before, without a word."""
        for record in records:
            self.look(record)

    def look(self, record: dict[str, Any]) -> list[Alarm]:
        settings = self.config.logging.alarms
        steps, self._step = record["step"] - self._step, record["step"]
        if settings.window_steps is None or record.get("skipped"):
            return []
        self._add(steps, record["moe"])
        seen = sum(entry.steps for entry in self._window)
        if seen < settings.window_steps:
            return []
        while seen - self._window[0].steps >= settings.window_steps:
            seen -= self._window.popleft().steps
        counts_LE = np.sum([entry.counts_LE for entry in self._window], axis=0)
        found = [
            self._dying(counts_LE, seen),
            self._collapsing(seen),
            self._drifting(counts_LE, seen),
            *self._gradients(counts_LE, seen),
        ]
        return [replace(alarm, places=self._blocks(alarm.places)) for alarm in found if alarm is not None]

    def _blocks(self, places: list[list[int]]) -> list[list[int]]:
        """With the decoder's number of each layer that has experts."""
        return [[self.config.model.moe_layers[layer], *expert] for layer, *expert in places]

    def _named(self, places: list[list[int]]) -> str:
        return _places(self._blocks(places))

    def _add(self, steps: int, moe: dict[str, Any]) -> None:
        counts_LE = np.array(moe["tokens_per_expert"], dtype=float)
        norms = moe.get("expert_grad_norm")
        norms_LE = np.full(counts_LE.shape, np.nan) if norms is None else np.array(norms, dtype=float)
        entropy_L = np.array(moe["router_entropy"], dtype=float)
        self._window.append(_Seen(steps, counts_LE, steps * entropy_L, _over_median(norms_LE)))

    def _dying(self, counts_LE: np.ndarray, steps: int) -> Alarm | None:
        limit = self.config.logging.alarms.dead_share
        share_LE = _even_share(counts_LE)
        new = self._begun("dying_expert", share_LE < limit, share_LE >= limit * _RELIEF)
        if not new:
            return None
        worst = min(share_LE[layer, expert] for layer, expert in new)
        coefficient = self.config.model.router_aux_loss_coef
        return Alarm(
            "dying_expert",
            new,
            (
                f"{self._named(new)}: dying, with down to {worst:.1%} of an even share of the tokens over {steps} steps: try "
                f"a larger model.router_aux_loss_coef (now {coefficient:g}) or a smaller optim.lr_multipliers.router"
            ),
        )

    def _collapsing(self, steps: int) -> Alarm | None:
        experts = self.config.model.num_local_experts
        if experts < 2:
            return None
        limit = self.config.logging.alarms.entropy_share
        share_L = np.sum([entry.entropy_L for entry in self._window], axis=0) / steps / math.log(experts)
        new = self._begun("router_collapse", share_L < limit, share_L >= min(limit * _RELIEF, (1 + limit) / 2))
        if not new:
            return None
        worst = min(share_L[layer] for (layer,) in new)
        return Alarm(
            "router_collapse",
            new,
            (
                f"{self._named(new)}: the router collapses, its entropy is down to {worst:.1%} of ln {experts} over {steps} "
                f"steps: try model.router_z_loss_coef=0.001 (now {self.config.model.router_z_loss_coef:g}), a larger "
                f"model.router_aux_loss_coef (now {self.config.model.router_aux_loss_coef:g}) or a smaller optim.lr"
            ),
        )

    def _drifting(self, counts_LE: np.ndarray, steps: int) -> Alarm | None:
        limit = self.config.logging.alarms.load_cv
        cv_L = counts_LE.std(-1) / np.maximum(counts_LE.mean(-1), 1e-12)
        self._lowest_cv_L = cv_L if self._lowest_cv_L is None else np.minimum(cv_L, self._lowest_cv_L)
        if limit is None:
            return None
        apart_L = (cv_L > limit) & (cv_L > 2 * self._lowest_cv_L)
        new = self._begun("load_drift", apart_L, cv_L <= limit / _RELIEF)
        if not new:
            return None
        worst = max((layer for (layer,) in new), key=lambda layer: cv_L[layer])
        return Alarm(
            "load_drift",
            new,
            (
                f"{self._named(new)}: the experts' loads drift apart, their variation over {steps} steps has risen from "
                f"{self._lowest_cv_L[worst]:.2f} to {cv_L[worst]:.2f}: try a larger model.router_aux_loss_coef "
                f"(now {self.config.model.router_aux_loss_coef:g})"
            ),
        )

    def _gradients(self, counts_LE: np.ndarray, steps: int) -> list[Alarm | None]:
        limit = self.config.logging.alarms.gradient_ratio
        if limit is None:
            return []
        measured = [entry.ratio_LE for entry in self._window if not np.isnan(entry.ratio_LE).all()]
        if not measured:
            return []
        outlier_LE = np.mean([ratio > limit for ratio in measured], axis=0)
        none_LE = np.all([ratio == 0 for ratio in measured], axis=0) & (counts_LE > 0)
        outliers = self._begun("gradient_outlier", outlier_LE > 0.5, outlier_LE == 0)
        silent = self._begun("no_gradient", none_LE, ~none_LE)
        outlying = (
            Alarm(
                "gradient_outlier",
                outliers,
                (
                    f"{self._named(outliers)}: the gradient norm is above {limit:g} times its layer's median in most records of "
                    f"{steps} steps: try a smaller optim.lr_multipliers.experts or optim.grad_clip "
                    f"(now {self.config.optim.grad_clip:g})"
                ),
            )
            if outliers
            else None
        )
        without = (
            Alarm(
                "no_gradient",
                silent,
                (
                    f"{self._named(silent)}: tokens come in and no gradient has come back for {steps} steps: try `moe-llm doctor` "
                    "on this configuration, which checks that every expert is trained"
                ),
            )
            if silent
            else None
        )
        return [outlying, without]

    def _begun(self, kind: str, true: np.ndarray, over: np.ndarray) -> list[list[int]]:
        """Indices where a condition is true and was not; where it is over, it may begin again."""
        new = []
        for index in map(tuple, np.argwhere(true | over).tolist()):
            key = (kind, *index)
            if true[index] and key not in self._active:
                self._active.add(key)
                new.append(list(index))
            elif not true[index]:
                self._active.discard(key)
        return new


def _even_share(counts_LE: np.ndarray) -> np.ndarray:
    """1 for an expert with as many tokens as there would be for each."""
    return counts_LE / np.maximum(counts_LE.mean(-1, keepdims=True), 1e-12)


def _over_median(norms_LE: np.ndarray) -> np.ndarray:
    """Norms as multiples of the median of their layer's trained experts; NaN where there is nothing to compare."""
    ratio_LE = np.full(norms_LE.shape, np.nan)
    for layer, norms_E in enumerate(norms_LE):
        trained_E = ~np.isnan(norms_E)
        if trained_E.any() and (median := np.median(norms_E[trained_E])) > 0:
            ratio_LE[layer] = norms_E / median
    return ratio_LE


def _places(places: list[list[int]]) -> str:
    """`layer 2 expert 5, layer 3 expert 0 and 4 more`."""
    named = [" ".join(f"{what} {i}" for what, i in zip(("layer", "expert"), place)) for place in places[:_NAMED]]
    more = len(places) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
