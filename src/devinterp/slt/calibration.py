"""Settings of the sampler with reasons: from the curvature, the noise of batches, and short pilot chains that are diagnosed."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xarray as xr
from torch import nn

from devinterp.engine.settings import integer, number
from devinterp.errors import DevinterpError, InputTypeError, got
from devinterp.slt.pilots import PILOT_CHAINS, SETTLED, Pilots, Tried, batch_noise, candidates, cases_of
from devinterp.utils import default_nbeta

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("devinterp")

FEWEST_DRAWS, MOST_DRAWS = 50, 5000
SPARE = 0.75
"""of the standard error asked for is aimed at: that of a pilot is itself known to about a quarter"""
MOST_BETWEEN = 3
"""Localizations tried between the last of the ladder that settles and the next"""
LONGER = 2
"""times a pilot: a run longer than that is tried at its full length"""
MOST_LENGTHS = 4
"""runs of full length"""
WEAK = "too little signal"
"""A stronger localization than this verdict is of leaves less of the loss still"""
METHOD = "leimkuhler_matthews"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found."""

    settings: dict[str, Any]
    """to be passed on: `sample(model, dataset, observables, **settings)`"""
    table: xr.Dataset
    """everything tried, (localization, case)"""
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.reasons)

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """The LLC against localization for every case, with verdicts, and what was chosen."""
        from devinterp.pictures.calibration import plot_calibration

        return plot_calibration(self, ax=ax)


def calibrate(
    model: nn.Module | Mapping[str, nn.Module],
    dataset: Any,
    *,
    param_masks: Mapping[str, Any] | None = None,
    n_beta: float | None = None,
    localization: float | Sequence[float] | None = None,
    batch_size: int = 32,
    accuracy: float = 0.03,
    max_steps: int = 1000,
    largest_excess: float | None = None,
    progress: bool = True,
    **settings: Any,
) -> Calibration:
    """Settings for `sample()` around a checkpoint, or for a whole sweep, chosen by rule and tried.

    The sampler is Leimkuhler-Matthews, whose step has no bias on quadratics, with the step size of `lr="auto"` (the smallest
    over all cases). Localizations are tried from strong to weak, and the last is taken at which, in every case, pilot chains
    are

    - settled: a burn-in that leaves 1 % of the transient where only the prior acts, ln 100 / (lr localization) steps,
      fits into `max_steps`;
    - local: the loss rises by at most `largest_excess`;
    - healthy, by `diagnose`; and where the run is to be more than twice as long as they, stable at its length, too.

    A weaker localization measures more of the loss and less of the prior, so the weakest that works is the one to take. The
    number of draws follows from the pilots' standard error and `accuracy`.

    Args:
        model: a model, or name -> model: the checkpoints of a sweep, or its extremes. One setting is found for all.
        dataset: as in `sample`.
        param_masks: of one restriction as `sample` takes them; or restriction's name -> masks, None or "l0h1", as
            `susceptibilities` takes them: each is tried on each model.
        n_beta: None = `default_nbeta(batch_size)`. It is part of the question, like `localization`.
        localization: what to try, per squared weight; None = from 10 n_beta h_max downwards, each a tenth, and where the next
            would not settle in time, the weakest that does.
        batch_size: sequences per step.
        accuracy: relative standard error of the LLC that `num_draws` is to reach; three quarters of it are aimed at.
        max_steps: of a pilot's burn-in; the pilot is three times as long.
        largest_excess: rise of the loss that still counts as local, in nats; None = a tenth of the checkpoint's loss (no
            limit where that is below 0.001).
        progress: show the pilots' bars.
        **settings: other settings of `sample`, handed through: `loss_fn`, `device`, `gradient_accumulation_steps` ...

    Returns:
        A Calibration: `settings` for `sample`, the `table` of everything tried, `reasons` in sentences, and `plot()`.

    Raises:
        DevinterpInputError: an argument cannot be used.
        DevinterpError: no localization works, with what was seen at each.
    """
    cases = cases_of(model, param_masks)
    number("Try 0.03.", above=0.0, high=1.0)("accuracy", accuracy)
    integer(1)("max_steps", max_steps)
    for taken in ("lr", "num_burnin_steps", "num_draws", "num_chains", "output_path", "sampling_method"):
        if taken in settings:
            raise InputTypeError(got(taken, settings[taken], "absent", "It is chosen here; pass it to sample() afterwards."))
    fixed = {"n_beta": default_nbeta(batch_size) if n_beta is None else n_beta, "batch_size": batch_size,
             "sampling_method": METHOD, "progress": progress, **settings}  # fmt: skip
    pilots = Pilots(cases, dataset, fixed, max_steps, largest_excess)
    tried: list[Tried] = []
    for candidate in candidates(localization, pilots):
        tried.append(pilots.at(candidate))
        logger.info("%s", tried[-1])
        if not tried[-1].rows or (not tried[-1].works and any(one.works for one in tried)):
            break  # weaker ones settle later still, or go further
    if localization is None:
        tried += _weakest_to_settle(pilots, tried)
    _some_works(tried)
    return _chosen(pilots, _stable_at_length(pilots, tried, accuracy, localization is not None), accuracy)


def _some_works(tried: list[Tried]) -> None:
    if not any(one.works for one in tried):
        listed = "\n".join(f"  - {one}" for one in tried)
        raise DevinterpError(
            f"no localization works:\n{listed}\nTry others, a larger max_steps or largest_excess, or larger batches."
        )


def _weakest_to_settle(pilots: Pilots, tried: list[Tried]) -> Iterator[Tried]:
    """Between the last that settles and the next, which does not. Curvature is measured anew at each."""
    settled, last = tried[:-1], tried[-1]
    if last.rows or not settled or not (settled[-1].works or WEAK in settled[-1].fault):
        return
    for _ in range(MOST_BETWEEN):
        if not last.localization < (between := pilots.weakest_to_settle(last.lr)) < settled[-1].localization:
            return
        last = pilots.at(between)
        logger.info("%s", last)
        yield last
        if last.rows:
            return


def _stable_at_length(pilots: Pilots, tried: list[Tried], accuracy: float, given: bool) -> list[Tried]:
    """A run much longer than its pilots is tried at its length. Where it is not stable, with a quarter of the step size: at
    the localization where that settles, or the next one that works."""
    for _ in range(MOST_LENGTHS):
        taken = _taken(tried)
        draws, every = _length(taken, accuracy)
        if draws * every <= LONGER * max(row["steps"] for row in taken.rows.values()):
            return tried
        long = pilots.at_length(taken, draws, every)
        if long.works:
            return tried
        logger.info("%s", long)
        rest, settles = [one for one in tried if one is not taken], pilots.weakest_to_settle(taken.lr / 4)
        if settles <= taken.localization:
            tried = [*rest, pilots.slower(taken)]
        elif given or any(one.works and one.localization <= settles for one in rest):
            tried = [*rest, long]
        else:
            tried = [*rest, long, pilots.at(settles)]
        _some_works(tried)
    raise DevinterpError(
        f"no step size found that is stable for {draws * every} steps, for a standard error of {accuracy:.1%}; the last was "
        f"{long}. Try a stronger localization, a larger max_steps, or a larger accuracy, which takes fewer steps."
    )


def _length(taken: Tried, accuracy: float) -> tuple[int, int]:
    """Draws, and steps between them: draws that lie so far apart hold as much as all the pilot's in between."""
    rows = taken.rows.values()
    every = int(max(row["steps_bw_draws"] for row in rows))
    wanted = math.ceil(max(row["steps"] * (row["llc_sem"] / row["llc"] / (SPARE * accuracy)) ** 2 for row in rows) / every)
    return min(MOST_DRAWS, max(FEWEST_DRAWS, wanted)), every


def _taken(tried: list[Tried]) -> Tried:
    return min((one for one in tried if one.works), key=lambda one: one.localization)


def _chosen(pilots: Pilots, tried: list[Tried], accuracy: float) -> Calibration:
    taken = _taken(tried)
    relative = max(row["llc_sem"] / row["llc"] for row in taken.rows.values())
    draws, every = _length(taken, accuracy)
    settings = {
        **{name: value for name, value in pilots.fixed.items() if name != "progress"},
        "lr": taken.lr, "localization": taken.localization, "num_burnin_steps": taken.burn_in, "num_chains": PILOT_CHAINS,
        "num_draws": draws, "num_steps_bw_draws": every,
    }  # fmt: skip
    table = _table(pilots, tried).assign(batch_noise=("case", [batch_noise(pilots, name) for name in pilots.cases]))
    # sum over directions of (n_beta h / 2A) (lr n_beta^2 v / 4) with A >= n_beta h
    table["batch_bias"] = taken.lr * pilots.fixed["n_beta"] ** 2 * table["batch_noise"] / 8
    reasons = _reasons(table, tried, settings, relative, accuracy)
    return Calibration(settings, table, tuple(reasons))


def _table(pilots: Pilots, tried: list[Tried]) -> xr.Dataset:
    names, tried = list(pilots.cases), sorted(tried, key=lambda one: -one.localization)
    measured = ("lr", "h_max_checkpoint", "h_max_pilot", "trace_checkpoint", "trace_pilot")
    found = ("llc", "llc_sem", "excess", "loss", "rhat")

    def column(parts: str, name: str) -> list[list[float]]:
        return [[getattr(one, parts).get(case, {}).get(name, math.nan) for case in names] for one in tried]

    dims = ("localization", "case")
    return xr.Dataset(
        {name: (dims, column("step_sizes", name)) for name in measured}
        | {name: (dims, column("rows", name)) for name in found}
        | {"verdict": (dims, [[one.rows.get(case, {}).get("verdict", "not tried") for case in names] for one in tried])}
        | {
            "num_burnin_steps": ("localization", [one.burn_in for one in tried]),
            "fault": ("localization", [one.fault for one in tried]),
        },
        coords={"localization": [one.localization for one in tried], "case": names},
    )


def _reasons(
    table: xr.Dataset, tried: list[Tried], settings: dict[str, Any], relative: float, accuracy: float
) -> Iterator[str]:
    taken, n_beta = _taken(tried), settings["n_beta"]
    yield f"sampling_method={METHOD!r}: no step-size bias on quadratics."
    yield f"n_beta={n_beta:g}: as given, or n / ln n of the batch. LLCs are comparable at one n_beta and localization only."
    yield (
        f"localization={taken.localization:g}: the weakest of those tried at which chains settle in time, stay local and are "
        "healthy."
    )
    yield from (f"  not {one}" for one in tried if not one.works)
    here = table.sel(localization=taken.localization)
    h_max, trace = float(max(here["h_max_checkpoint"].max(), here["h_max_pilot"].max())), here["trace_pilot"]
    share = taken.lr / min(float(found["lr"]) for found in taken.step_sizes.values())
    yield (
        f"lr={taken.lr:.3g}: 1 / (n_beta h_max + localization), h_max {h_max:.3g} the largest met"
        + (f", times {share:.3g}, since chains were not stable with more" if share < 0.99 else "")
        + f"; tr(H) {float(trace.mean()):.3g}"
        + (f", {float(trace.min()):.3g} to {float(trace.max()):.3g} over the cases." if trace.size > 1 else ".")
    )
    yield f"num_burnin_steps={taken.burn_in}: leaves {SETTLED:.0%} of the transient where only the prior acts."
    yield (
        f"num_draws={settings['num_draws']}, num_steps_bw_draws={settings['num_steps_bw_draws']}: the pilots' standard error "
        f"is {relative:.1%} of the LLC, {accuracy:.1%} is asked for."
    )
    for name, row in taken.rows.items():
        bias = float(table["batch_bias"].sel(case=name)) / row["llc"]
        yield (
            f"{name}: LLC {row['llc']:.3g} ± {row['llc_sem']:.2g}, loss {row['loss']:.3g} + {row['excess']:.2g}; the noise of "
            f"batches adds at most {bias:.0%}"
            + (": larger batches, or gradient_accumulation_steps, lower it." if bias > 0.1 else ".")
        )
