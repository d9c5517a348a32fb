"""Whether the chains of a run can be believed, why not, and what to change."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from devinterp.analysis.chains import Change, without_common
from devinterp.analysis.llc import running_mean
from devinterp.analysis.step_size import StepSize
from devinterp.analysis.uncertainty import Trace, ess, rhat, standard_error
from devinterp.analysis.verdicts import UNMOVED, Judgement, Run, counted
from devinterp.slt.llc import excess_losses
from devinterp.slt.step_size import step_size_of
from devinterp.slt.sweep_results import of_each_run
from devinterp.store.reader import metadata_of, n_beta_of
from devinterp.store.samples import Samples, of_chains, root_of, status_of_chains
from devinterp.store.schema import COMPLETE, DIVERGED, STATUS_MEANINGS
from devinterp.store.sweeps import is_sweep, label

TOLD = ("sampling_method", "localization", "num_burnin_steps", "num_steps_bw_draws", "match_sampling_input_ids_across_chains")


def diagnose(samples: Samples) -> xr.Dataset:
    """Whether the chains of a run can be believed: a verdict for each, the reason, and what to change.

    Everything is of the trace x = n_beta (L(w) - L(w0)), paired with the checkpoint's loss on the same batch, whose mean is
    the LLC. The verdicts and their rules are listed in `devinterp.analysis.verdicts`; they flag, and never drop a chain.

    Chains that see the same batches share their noise even after pairing. That makes R-hat of the traces too small, so
    `rhat_matched` leaves out what all chains have in common at each draw; verdicts go by the larger of the two.

    Args:
        samples: a DataTree (or its root dataset, or the path of a store); or a sweep (or its path), which gives everything
            along `checkpoint`, and `restriction` where it has some. Chains that diverged or failed are told of, and left out of
            everything else.

    Returns:
        Dataset with, for every `chain`: `verdict`, `reason`, `advice`; `llc_chain` and its Monte Carlo standard error
        `mcse_chain`; `ess_chain`; `change` and `change_error`, second half of the draws minus the first; and `trace` x and its
        mean so far, `llc_running` (chain, draw). Over all chains: `llc_mean`, `mcse`, `rhat`, `rhat_matched` (rank-normalised
        split R-hat, Vehtari et al. 2021), `ess_bulk`, `ess_tail` (of the 5 and 95 % quantiles), `autocorrelation_time` (draws
        for each independent one), `suggested_num_steps_bw_draws` (draws about that far apart), `within_variance` and
        `between_variance` of the traces and of the chains' levels. From the settings and the curvature known: `transient_left`,
        the largest share of the transient that can be left in the mean over the draws, that of directions in which only the
        prior acts; `reach`, lr (n_beta h_max + localization + weight_decay); `stiffest_bias` of the variance along that
        direction, and `step_size_bias` of the LLC.
        NaN where something is not known. `attrs["sentences"]` says it in words:
        `print(describe(diagnose(samples)))`.

    Raises:
        ChainsUnusable: chains are not finished.
        StoreError: the samples lack what is needed.
    """
    if is_sweep(samples):
        return of_each_run(samples, diagnose)
    ds = root_of(samples)
    n_beta, status = n_beta_of(ds), status_of_chains(ds)
    kept = [chain for chain, code in enumerate(status) if code == COMPLETE]
    settings = metadata_of(ds)["config"]["sampler"] if "metadata" in ds.attrs else {}
    step_size, every = step_size_of(ds), int(settings.get("num_steps_bw_draws", 1))
    trace: Trace = np.empty((0, ds.sizes["draw"]))
    if kept:
        trace = n_beta * excess_losses(of_chains(ds, kept))["excess"].values
    rounding = UNMOVED * n_beta * float(abs(ds["init_loss"]).mean())
    judged = iter(Run(trace, rounding, step_size.too_large).judge() if kept else [])
    judgements = [next(judged) if code == COMPLETE else _ended(ds, chain, code) for chain, code in enumerate(status)]
    steps = int(settings.get("num_burnin_steps", 0)) + every * np.arange(1, ds.sizes["draw"] + 1)
    result = xr.Dataset(
        {
            **{
                part: ("chain", [getattr(judgement, part) for judgement in judgements])
                for part in ("verdict", "reason", "advice")
            },
            **_of_each_chain(trace, kept, len(status)),
            **_of_all_chains(trace, every),
            "transient_left": step_size.transient_left(steps),
            "reach": step_size.reach,
            "stiffest_bias": step_size.stiffest_bias,
            "step_size_bias": step_size.llc_bias,
        },
        coords={"chain": ds["chain"].values if "chain" in ds.coords else np.arange(len(status))},
    )
    result.attrs = {
        "n_beta": n_beta,
        "num_chains_used": len(kept),
        **{name: settings[name] for name in TOLD if name in settings},
    }
    result.attrs["sentences"] = _sentences(result, judgements, step_size)
    return result


def describe(diagnosis: xr.Dataset) -> str:
    """The LLC and what `diagnose` found, in sentences, one to a line; of a sweep, under the name of each run."""
    if "checkpoint" in diagnosis.dims:
        return "\n".join(line for name, one in _runs(diagnosis) for line in (name, *(f"  {line}" for line in _lines(one))))
    return "\n".join(_lines(diagnosis))


def _runs(diagnosis: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """The diagnosis of each run of a sweep, with its name."""
    for checkpoint in map(str, diagnosis["checkpoint"].values):
        of_one = diagnosis.sel(checkpoint=checkpoint)
        restrictions: list[str | None] = (
            list(map(str, of_one["restriction"].values)) if "restriction" in of_one.dims else [None]
        )
        for restriction in restrictions:
            name = label(checkpoint, restriction)
            told = {key: diagnosis.attrs[key] for key in ("sentences", "num_chains_used")}
            of_run = {key: value.get(name) if isinstance(value, dict) else value for key, value in told.items()}
            if of_run["sentences"] is not None:
                one = of_one if restriction is None else of_one.sel(restriction=restriction)
                yield name, one.assign_attrs(diagnosis.attrs | of_run)


def _lines(diagnosis: xr.Dataset) -> list[str]:
    lines = list(diagnosis.attrs["sentences"])
    if diagnosis.attrs["num_chains_used"]:
        at = f"n_beta {diagnosis.attrs['n_beta']:g}, localization {diagnosis.attrs.get('localization', math.nan):g}"
        lines.insert(0, f"LLC {float(diagnosis.llc_mean):.4g} ± {float(diagnosis.mcse):.2g} (standard error), at {at}.")
    return lines


def _ended(ds: xr.Dataset, chain: int, code: int) -> Judgement:
    if code != DIVERGED:
        return Judgement(STATUS_MEANINGS[code], "it ended in an error", "the same call again, which runs it once more")
    at = int(ds["diverged_at"].values[chain]) if "diverged_at" in ds else -1
    where = f" after {at} steps" if at >= 0 else ""
    return Judgement("diverged", f"its loss stopped being finite{where}", "a smaller lr, or lr='auto'; a larger localization")


def _of_each_chain(trace: Trace, kept: list[int], count: int) -> dict[str, Any]:
    """NaN for the chains that are not there."""

    def spread(values: Any, *shape: int) -> np.ndarray[Any, Any]:
        full = np.full((count, *shape), np.nan)
        full[kept] = values
        return full

    rows = [row[None] for row in trace]
    changes = [Change.of(row) for row in rows]
    return {
        "llc_chain": ("chain", spread(trace.mean(axis=1))),
        "mcse_chain": ("chain", spread([standard_error(row) for row in rows])),
        "ess_chain": ("chain", spread([ess(row, "mean") for row in rows])),
        "change": ("chain", spread([change.size for change in changes])),
        "change_error": ("chain", spread([change.error for change in changes])),
        "trace": (("chain", "draw"), spread(trace, trace.shape[1])),
        "llc_running": (("chain", "draw"), spread(running_mean(trace), trace.shape[1])),
    }


def _of_all_chains(trace: Trace, every: int) -> dict[str, float]:
    names = ("llc_mean", "mcse", "rhat", "rhat_matched", "ess_bulk", "ess_tail", "autocorrelation_time",
             "suggested_num_steps_bw_draws", "within_variance", "between_variance")  # fmt: skip
    if not len(trace):
        return dict.fromkeys(names, math.nan)
    time = trace.size / ess(trace, "mean")
    suggested = math.nan if math.isnan(time) else float(max(1, round(every * time)))
    within = float(trace.var(axis=1, ddof=1).mean()) if trace.shape[1] > 1 else math.nan
    between = float(trace.mean(axis=1).var(ddof=1)) if len(trace) > 1 else math.nan
    found = (float(trace.mean()), standard_error(trace), rhat(trace), rhat(without_common(trace)), ess(trace, "bulk"),
             ess(trace, "tail"), time, suggested, within, between)  # fmt: skip
    return dict(zip(names, found, strict=True))


def _sentences(result: xr.Dataset, judgements: list[Judgement], step_size: StepSize) -> list[str]:
    lines = []
    for judgement, chains in counted(judgements):
        who = (
            "All chains"
            if len(chains) == len(judgements) > 1
            else f"Chain{'s' * (len(chains) > 1)} {', '.join(map(str, chains))}"
        )
        advice = f" Try {judgement.advice}." if judgement.advice else ""
        lines.append(f"{who}: {judgement.verdict}: {judgement.reason}.{advice}")
    if result.attrs["num_chains_used"]:
        lines += _about_all(result)
    return lines + _about_step_size(result, step_size)


def _about_all(result: xr.Dataset) -> list[str]:
    draws = result.sizes["draw"] * result.attrs["num_chains_used"]
    lines = []
    if result.attrs["num_chains_used"] == 1:
        lines.append("One chain: nothing tells whether another would level off elsewhere.")
    else:
        matched = result.attrs.get("match_sampling_input_ids_across_chains", True)
        shared = f" ({float(result.rhat_matched):.3f} without what the chains share by their batches)" if matched else ""
        lines.append(f"R-hat {float(result.rhat):.3f}{shared}.")
    every, suggested = result.attrs.get("num_steps_bw_draws", 1), float(result.suggested_num_steps_bw_draws)
    lines.append(f"Effective sample size {float(result.ess_bulk):.0f} (tails {float(result.ess_tail):.0f}) of {draws} draws; "
                 f"one draw in {np.maximum(1.0, float(result.autocorrelation_time)):.1f} is independent.")  # fmt: skip
    if suggested >= 2 * every:
        lines.append(f"num_steps_bw_draws={suggested:.0f} would keep independent draws only, and store less.")
    return lines


def _about_step_size(result: xr.Dataset, step_size: StepSize) -> list[str]:
    lines, left = [], float(result.transient_left)
    if step_size.prior == 0:
        lines.append("localization is 0: flat directions are never held, and no chain settles along them.")
    elif left > 0.05:
        lines.append(
            f"Where only the prior acts, {left:.0%} of the transient is still in the mean over these draws: the LLC may be "
            "too low by up to that. More burn-in steps or a larger lr settle it."
        )
    if not math.isnan(step_size.reach):
        lines.append(f"lr A = {step_size.reach:.2g} along the stiffest direction (stable below 4).")
    if step_size.llc_bias > 0:
        lines.append(
            f"The step size adds about {step_size.llc_bias:.2g} to the LLC, to first order; compute_llc with "
            "correct_step_size=True takes it off."
        )
    return lines
