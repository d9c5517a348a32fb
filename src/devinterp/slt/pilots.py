"""Short chains of every case that settings are to serve, at one localization after another."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr
from torch import nn

from devinterp.engine.curvature import gradient_noise
from devinterp.engine.forward import Forward
from devinterp.engine.selection import Selection
from devinterp.engine.settings import Settings, number
from devinterp.engine.step_size import SHORT_PILOT
from devinterp.engine.walker import Plan
from devinterp.errors import InputValueError, got
from devinterp.slt.diagnosis import diagnose
from devinterp.slt.requests import request_of
from devinterp.slt.sampling import sample
from devinterp.slt.weight_restrictions import create_param_masks
from devinterp.store.samples import mean_init_loss, root_of

RATIOS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""localization that is tried, as multiples of n_beta h_max"""
SETTLED = 0.01
"""of the transient that burn-in may leave in the flattest direction"""
LARGEST_EXCESS = 0.1
"""of the checkpoint's loss: chains that climb further have left its neighbourhood"""
SOLVED = 1e-3
"""A checkpoint's loss below this is that of an exactly solved problem, and no measure of what is far"""
FEWEST_STEPS = 20
PILOT_CHAINS, PILOT_DRAWS = 4, 100
PILOT_SPACING = 50
"""Draws of a pilot within the length of its burn-in: afterwards it is twice as long again"""
SEEDS_APART = 2**32
"""Those of pilots and of the run: not the next ones, which are the user's for more runs"""
SHARES = (1.0, 0.25, 0.0625)
"""of the step size of lr="auto" that are tried"""
UNSTABLE = ("diverged", "spiky")
LEAST_LR = 1e-12
"""of runs that only measure the checkpoint"""


@dataclass(frozen=True)
class Tried:
    """One localization, tried on every case; without rows where it was not worth a pilot."""

    localization: float
    lr: float
    step_sizes: dict[str, dict[str, Any]]
    burn_in: int
    rows: dict[str, dict[str, Any]]
    """by case: what the pilot chains found"""
    fault: str
    """why it does not work; empty where it does"""

    @property
    def works(self) -> bool:
        return not self.fault

    def __str__(self) -> str:
        return f"localization {self.localization:g}: {self.fault or 'works'}"


@dataclass(frozen=True)
class Pilots:
    """Short chains of every case."""

    cases: dict[str, tuple[nn.Module, Any]]
    dataset: Any
    fixed: dict[str, Any]
    max_steps: int
    largest_excess: float | None

    def arguments(self, name: str, **settings: Any) -> dict[str, Any]:
        model, masks = self.cases[name]
        given = {"model": model, "dataset": self.dataset, "observables": {}, "param_masks": masks, "num_init_loss_batches": 1}
        return given | {k: v for k, v in self.fixed.items() if k != "num_init_loss_batches"} | settings

    def run(self, name: str, **settings: Any) -> xr.DataTree:
        return sample(**self.arguments(name, **settings))

    def step_size(self, name: str, localization: float, lr: float | str = "auto", burn_in: int = 0) -> dict[str, Any]:
        settings = {"lr": lr, "localization": localization, "num_chains": 1, "num_draws": 1, "num_burnin_steps": burn_in}
        found: dict[str, Any] = self.run(name, **settings).attrs["metadata"]["step_size"]
        return found

    def step_size_settled(self, name: str, localization: float) -> dict[str, Any]:
        """That of lr="auto" with a pilot as long as the burn-in: curvature can grow along flat directions all that way.

        A steeper place takes smaller steps, and those a longer burn-in: again, until that was seen too or takes too long.
        """
        found, length = self.step_size(name, localization), SHORT_PILOT
        burn_in = settling_steps(found["lr"], localization)
        while found["pilot_steps"] >= length < burn_in and (length == SHORT_PILOT or burn_in <= self.max_steps):
            length = min(burn_in, self.max_steps)
            found = self.step_size(name, localization, burn_in=length)
            burn_in = settling_steps(found["lr"], localization)
        return found

    def at(self, localization: float) -> Tried:
        """The step size of lr="auto" first, then smaller ones, where chains leave the region in which it is stable."""
        step_sizes = {name: self.step_size_settled(name, localization) for name in self.cases}
        auto = min(float(found["lr"]) for found in step_sizes.values())
        for share in SHARES:
            tried = self._at(localization, step_sizes, auto * share)
            if not any(verdict in tried.fault for verdict in UNSTABLE):
                break
        return tried

    def slower(self, tried: Tried) -> Tried:
        return self._at(tried.localization, tried.step_sizes, tried.lr / 4)

    def weakest_to_settle(self, lr: float) -> float:
        """The localization at which chains of this lr settle within `max_steps`, with a tenth to spare."""
        relaxed = 1 - SETTLED ** (1 / (2 * self.max_steps))
        return float(f"{1.1 * 2 * relaxed / lr:.1e}")

    def at_length(self, tried: Tried, draws: int, every: int) -> Tried:
        """Tried again with other chains, for as many steps as the run will have: rare ways into steeper places show in them."""
        for name in self.cases:
            settings = {"lr": tried.lr, "localization": tried.localization}
            row = self._pilot(3, name, tried.burn_in, draws, every, **settings)
            if row["excess"] > row["limit"] or any(verdict in row["fault"] for verdict in UNSTABLE):
                fault = f"in chains of {draws * every} steps, though not of {tried.rows[name]['steps']}: {row['fault']}"
                return replace(tried, rows=tried.rows | {name: row}, fault=fault)
        return tried

    def _at(self, localization: float, step_sizes: dict[str, dict[str, Any]], lr: float) -> Tried:
        """Settled, then local, then healthy: the first that fails ends it."""
        burn_in, rows = settling_steps(lr, localization), {}
        if burn_in > self.max_steps:
            fault = f"flat directions settle in {burn_in} steps, and max_steps is {self.max_steps}"
            return Tried(localization, lr, step_sizes, burn_in, {}, fault)
        for name in self.cases:
            rows[name] = self._looked_at(name, burn_in, lr=lr, localization=localization)
            if fault := rows[name]["fault"]:
                where = f" ({name})" if len(self.cases) > 1 else ""
                return Tried(localization, lr, step_sizes, burn_in, rows, fault + where)
        return Tried(localization, lr, step_sizes, burn_in, rows, "")

    def _looked_at(self, name: str, burn_in: int, **settings: Any) -> dict[str, Any]:
        """A few in a hundred healthy pilots look sick: another look at those, at other chains, for twice as long."""
        every = max(1, burn_in // PILOT_SPACING)
        row = self._pilot(1, name, burn_in, PILOT_DRAWS, every, **settings)
        if row["verdict"] in ("healthy", "diverged") or row["excess"] > row["limit"]:
            return row
        return self._pilot(2, name, burn_in, 2 * PILOT_DRAWS, every, **settings)

    def _pilot(self, look: int, name: str, burn_in: int, draws: int, every: int, **settings: Any) -> dict[str, Any]:
        """Other chains than those of the run that follows and of other looks: part of a healthy pilot is no new evidence."""
        seed = (int(self.fixed.get("init_seed", Settings.init_seed)) + look * SEEDS_APART) % 2**64
        length = {"num_chains": PILOT_CHAINS, "num_draws": draws, "num_burnin_steps": burn_in, "num_steps_bw_draws": every}
        samples = self.run(name, init_seed=seed, **length, **settings)
        found = diagnose(samples)
        verdicts = sorted(set(found.verdict.values.tolist()) - {"healthy", "too short"})  # the run itself is longer
        start = float(mean_init_loss(root_of(samples)))
        excess, limit = float(found.llc_mean) / self.fixed["n_beta"], self._limit(start)
        if excess > limit:
            fault = f"the loss rises by {excess:.3g} from {start:.3g}, which is no longer local (limit {limit:.3g})"
        else:
            fault = ", ".join(verdicts)
        return {
            "llc": float(found.llc_mean), "llc_sem": float(found.mcse), "excess": excess, "loss": start, "limit": limit,
            "fault": fault, "verdict": verdicts[0] if verdicts else "healthy", "rhat": float(found.rhat_matched),
            "steps": draws * every, "steps_bw_draws": float(found.suggested_num_steps_bw_draws),
        }  # fmt: skip

    def _limit(self, loss: float) -> float:
        if self.largest_excess is not None:
            return self.largest_excess
        return LARGEST_EXCESS * loss if loss > SOLVED else math.inf


def settling_steps(lr: float, prior: float) -> int:
    """Until `SETTLED` is left of the squared distance where only the prior acts, (1 - lr prior / 2)^(2 steps)."""
    return max(FEWEST_STEPS, math.ceil(math.log(SETTLED) / (2 * math.log1p(-lr * prior / 2))))


def cases_of(model: Any, param_masks: Any) -> dict[str, tuple[nn.Module, Any]]:
    """Every restriction on every model, by name."""
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    if not models:
        raise InputValueError(got("model", model, "a model, or name -> model", "Try {'last': model}."))
    cases: dict[str, tuple[nn.Module, Any]] = {}
    for name, one in models.items():
        parameters = {parameter for parameter, _ in one.named_parameters()} if isinstance(one, nn.Module) else set()
        if not isinstance(param_masks, Mapping) or set(param_masks) <= parameters:
            restrictions = {"": param_masks}
        else:
            restrictions = {key: create_param_masks(one, mask) if isinstance(mask, str | list) else mask
                            for key, mask in param_masks.items()}  # fmt: skip
        cases |= {", ".join(filter(None, (name, key))) or "model": (one, masks) for key, masks in restrictions.items()}
    return cases


def candidates(localization: Any, pilots: Pilots) -> list[float]:
    """From strong to weak."""
    if isinstance(localization, Sequence) and not isinstance(localization, str) and localization:
        values = list(localization)
    elif localization is not None:
        values = [localization]
    else:
        stiffest = max(pilots.step_size(name, 1.0, lr=LEAST_LR)["h_max_checkpoint"] or 0.0 for name in pilots.cases)
        scale = max(1.0, pilots.fixed["n_beta"] * stiffest)
        return [float(f"{ratio * scale:.0e}") for ratio in RATIOS]
    check = number("Try [10.0, 100.0, 1000.0].", above=0.0)
    return sorted({check("localization", value) for value in values}, reverse=True)


def batch_noise(pilots: Pilots, name: str) -> float:
    """Variance of a batch's gradient, summed over the moving weights, at the checkpoint."""
    arguments = pilots.arguments(name, lr=LEAST_LR)
    arguments.pop("progress", None)
    request = request_of(**arguments)
    inputs = request.inputs
    with inputs.checkpoint.ready():
        selection = Selection.of(inputs.checkpoint.parameters, request.masks)
        sampler = inputs.settings.sampler(LEAST_LR)
        return gradient_noise(Plan(inputs.settings, sampler, Forward(inputs.checkpoint), selection, inputs.batches, ()))
