"""The numbers of a report: of every run, of the tokens shown, of influences and susceptibilities. As plain lists, for JSON."""

import base64
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from devinterp.analysis.projection import principal_components
from devinterp.errors import ChainsUnusable
from devinterp.pictures.influence import influence_clusters
from devinterp.pictures.susceptibility import means_of
from devinterp.pictures.texts import kind_of, texts_of
from devinterp.slt.bif import compute_bif
from devinterp.slt.diagnosis import describe, diagnose
from devinterp.slt.llc import compute_llc
from devinterp.slt.report_runs import Run, Runs
from devinterp.slt.suites import averaged
from devinterp.slt.susceptibilities import compute_susceptibilities
from devinterp.store.reader import metadata_of, n_beta_of, observable_names
from devinterp.store.samples import status_of_chains
from devinterp.store.schema import COMPLETE
from devinterp.store.sweeps import FULL

MOST_SEQUENCES = 64
"""of the matrix of influences"""
MOST_POINTS = 2000
"""of the projection, at each checkpoint"""
INFLUENCE_BYTES = 4 * 2**20
"""of influences between single tokens, at all checkpoints together"""
STRONGEST = 20
NOT_KNOWN = -128
CONTEXT = 6
"""tokens before the one that is meant"""


@dataclass(frozen=True)
class Place:
    """A sequence among all of the observables, which `compute_bif` puts one after another."""

    observable: str
    sequence: int
    number: int
    same_as: int
    """number of the first sequence with the same tokens: it would influence itself"""

    @property
    def first(self) -> bool:
        return self.same_as == self.number


@dataclass(frozen=True)
class Numbers:
    """What a report computes from its runs."""

    runs: Runs
    tokenizer: Any
    sampling_task: str | None
    estimator: str
    sequences: int
    """of each observable whose text is shown"""

    def of_run(self, run: Run) -> dict[str, Any]:
        """LLC, verdicts and traces."""
        found = diagnose(run.ds)
        try:
            result: xr.Dataset | None = compute_llc(run.ds, on_diverged="drop")
        except ChainsUnusable:
            result = None
        metadata = metadata_of(run.ds) if "metadata" in run.ds.attrs else {}
        rhat = found.rhat_matched if found.attrs["num_chains_used"] > 1 else found.rhat
        return {
            "checkpoint": run.checkpoint, "restriction": run.restriction, "name": run.name,
            "llc": _of(result, "llc_mean"), "sem": _of(result, "llc_sem"), "ess": _of(result, "ess_bulk"), "rhat": float(rhat),
            "loss": float(run.ds["init_loss"].mean(dtype=np.float64)),
            "lr": float(metadata.get("step_size", {}).get("lr", math.nan)), "n_beta": found.attrs["n_beta"],
            "observables": _of_observables(result), "sentences": describe(found).split("\n"),
            "verdicts": _words(found.verdict), "reasons": _words(found.reason), "advice": _words(found.advice),
            "traces": [_short(row) for row in found.trace.values],
        }  # fmt: skip

    def shown(self, ds: xr.Dataset) -> dict[str, int]:
        """Sequences of each observable whose text is shown."""
        known = [name for name in observable_names(ds) if f"init_loss_{name}" in ds and f"input_ids_{name}" in ds]
        return {name: min(self.sequences, ds.sizes[f"batch_{name}"]) for name in sorted(known)}

    def texts(self, checkpoint: str) -> list[dict[str, Any]]:
        """The tokens of the sequences shown, with their LLCs and, where there are components, susceptibilities."""
        ds = self.runs.whole(checkpoint).ds
        counts = self.shown(ds)
        if not counts:
            return []
        few = ds.isel({f"batch_{name}": slice(count) for name, count in counts.items()})
        result = compute_llc(few, on_diverged="drop", per="token")
        found = []
        for name, count in counts.items():
            for number in range(count):
                one = result.isel({f"batch_{name}": number})
                start = few[f"init_loss_{name}"].isel({f"batch_{name}": number}).values
                values = {"llc": _short(one[f"llc_token_{name}"].values), "sem": _short(one[f"llc_token_{name}_sem"].values)}
                ids = one[f"input_ids_{name}"].values.tolist()
                found.append({"observable": name, "sequence": number, "tokens": texts_of(ids, self.tokenizer),
                              "loss": _short(start), "values": values})  # fmt: skip
        return found

    def influences(self, checkpoint: str) -> dict[str, Any] | None:
        """Between sequences, as a matrix with an order by clusters; and the strongest pairs of tokens of those shown."""
        ds = self.runs.whole(checkpoint).ds
        counts = self.shown(ds)
        if not counts:
            return None
        names, of_each = list(counts), max(1, MOST_SEQUENCES // len(counts))
        wide = _different(ds, {name: min(of_each, ds.sizes[f"batch_{name}"]) for name in names})
        numbers = [place.number for place in wide if place.first]
        options: dict[str, Any] = {"loss_keys": names, "on_diverged": "drop", "progress": False}
        whole = compute_bif(
            ds, correlation_method="sequence", batch_index_range_1=numbers, batch_index_range_2=numbers, **options
        )
        clusters = influence_clusters(whole, min(4, len(numbers)))
        few = _different(ds, counts)
        shown = [place.number for place in few if place.first]
        strongest = compute_bif(ds, top_k=STRONGEST, batch_index_range_1=shown, batch_index_range_2=shown, **options)
        ids, place_of = whole.input_ids.values, {place.number: place for place in few}
        sequences = [
            {"observable": place.observable, "sequence": place.sequence, "text": self._beginning(ids[place.number])}
            for place in wide
            if place.first
        ]
        pairs = [strongest.isel(pair=pair) for pair in range(strongest.sizes["pair"])]
        return {
            "sequences": sequences, "matrix": [_short(row) for row in whole.influences.values],
            "order": clusters.order.values.tolist(), "cluster": clusters.cluster.values.tolist(),
            "pairs": [self._pair(pair, ids, place_of) for pair in pairs if np.isfinite(float(pair.influences))],
            **self._between_tokens(ds, few, options),
        }  # fmt: skip

    def _pair(self, one: xr.Dataset, ids: Any, place_of: dict[int, Place]) -> dict[str, Any]:
        sides = []
        for batch, position in (("batch_1", "target_position"), ("batch_2", "target_position_T")):
            place, at = place_of[int(one[batch])], int(one[position])
            where = {"observable": place.observable, "sequence": place.sequence, "position": at}
            sides.append(where | self._context(ids[place.number], at))
        return {"value": float(one.influences), "sides": sides}

    def _beginning(self, ids: Any) -> str:
        return "".join(texts_of(ids.tolist()[: 2 * CONTEXT], self.tokenizer))

    def _context(self, ids: Any, at: int) -> dict[str, str]:
        texts = texts_of(ids.tolist()[max(0, at - CONTEXT) : at + 1], self.tokenizer)
        return {"before": "".join(texts[:-1]), "token": texts[-1]}

    def _between_tokens(self, ds: xr.Dataset, places: list[Place], options: dict[str, Any]) -> dict[str, Any]:
        """Correlations of all tokens shown, in hundredths, as one byte each; of the first sequences where they are too many."""
        length, firsts = ds.sizes["token_pos"], [place.number for place in places if place.first]
        few = firsts[: int((INFLUENCE_BYTES / len(self.runs.checkpoints)) ** 0.5) // length]
        if not few:
            return {"tokens": None}
        result = compute_bif(ds, batch_index_range_1=few, batch_index_range_2=few, **options)
        matrix = result.influences.transpose("batch_1", "target_position", "batch_2", "target_position_T").values
        hundredths = np.where(np.isfinite(matrix), np.round(100 * matrix), NOT_KNOWN).astype(np.int8)
        rows = [[place.observable, place.sequence, few.index(place.same_as)] for place in places if place.same_as in few]
        return {"tokens": {"rows": rows, "length": length, "hundredths": base64.b64encode(hundredths.tobytes()).decode()}}

    @cached_property
    def components(self) -> list[str]:
        return [name for name in self.runs.restrictions if name != FULL]

    def responses(self, checkpoint: str) -> dict[str, Any] | str | None:
        """Of the components to observables, sequences and tokens, standardised; or why there are none."""
        of_each = {name: run.ds for name, run in self.runs.of(checkpoint).items() if COMPLETE in status_of_chains(run.ds)}
        if not set(of_each) - {FULL}:
            return None
        if self.sampling_task is None:
            known = ", ".join(observable_names(next(iter(of_each.values()))))
            return f"Susceptibilities need to know which observable holds the sampling data: sampling_task=, one of {known}."
        options: dict[str, Any] = {
            "include_sampling_task": True,
            "estimator": self.estimator,
            "standardize": True,
            "on_diverged": "drop",
        }
        tree = compute_susceptibilities(of_each, self.sampling_task, errors=False, **options)
        means = compute_susceptibilities(of_each, self.sampling_task, mean_over="dataset", **options)
        sus, of_data = tree["susceptibilities"].to_dataset(), means["susceptibilities"].to_dataset()
        values, errors = means_of(of_data)
        names = [str(name) for name in sus.wr.values]
        grid = {name: sus[name].values for name in ("dataset_id", "batch", "target_position")}
        by_sequence, rows = averaged(sus.sus.transpose("sus_flat", "wr").values, grid, by_sequence=True)
        datasets = [str(name) for name in sus.attrs["dataset_id_to_name"]]
        return {
            "components": names, "observables": datasets, "estimator": self.estimator, "task": str(tree.attrs["sampling_task"]),
            "means": [_short(row) for row in values], "errors": None if errors is None else [_short(row) for row in errors],
            "sequences": [[datasets[d], int(b)] for d, b in zip(rows["dataset_id"], rows["batch"], strict=True)],
            "by_sequence": [_short(row) for row in by_sequence], "tokens": self._of_tokens(sus, datasets, names),
            "points": self._points(sus, tree["context"].to_dataset(), datasets),
        }  # fmt: skip

    def _of_tokens(self, sus: xr.Dataset, datasets: list[str], names: list[str]) -> list[dict[str, Any]]:
        """Of the sequences whose text is shown."""
        found = []
        for number, name in enumerate(datasets):
            for sequence in range(self.sequences):
                rows = (sus.dataset_id.values == number) & (sus.batch.values == sequence)
                if rows.any():
                    values = {wr: _short(sus.sus.sel(wr=wr).values[rows]) for wr in names}
                    found.append({"observable": name, "sequence": sequence, "values": values})
        return found

    def _points(self, sus: xr.Dataset, context: xr.Dataset, datasets: list[str]) -> dict[str, Any] | None:
        """Tokens on the first two principal components, evenly thinned where they are many."""
        values = sus.sus.transpose("sus_flat", "wr").values
        values = values[:, np.isfinite(values).all(axis=0)]
        if values.shape[1] < 2 or len(values) < 3:
            return None
        points, _, shares = principal_components(values)
        kept = range(0, len(points), -(-len(points) // MOST_POINTS))
        length = int(context.position.values.max()) + 1
        ids = context.input_ids.values.reshape(-1, length)
        where = {
            key: row
            for row, key in enumerate(
                zip(context.dataset_id.values[::length].tolist(), context.batch.values[::length].tolist(), strict=True)
            )
        }
        rows = []
        for row in kept:
            at = int(sus.target_position.values[row])
            text = self._context(ids[where[int(sus.dataset_id.values[row]), int(sus.batch.values[row])]], at)
            rows.append(
                [
                    *_short(points[row]),
                    datasets[int(sus.dataset_id.values[row])],
                    kind_of(text["token"]),
                    text["before"],
                    text["token"],
                ]
            )
        return {"rows": rows, "shares": _short(shares), "of": len(points)}


def _of(result: xr.Dataset | None, name: str) -> float:
    return math.nan if result is None else float(result[name])


def _of_observables(result: xr.Dataset | None) -> dict[str, list[float]]:
    """Name -> LLC, its standard error, loss at the checkpoint."""
    if result is None or "llc_observable" not in result:
        return {}
    columns = [result[name].values.tolist() for name in ("llc_observable", "llc_observable_sem", "init_loss_observable")]
    return {str(name): list(row) for name, *row in zip(result.observable.values, *columns, strict=True)}


def _words(values: xr.DataArray) -> list[str]:
    return [str(value) for value in values.values]


def _short(values: Any) -> list[float]:
    """Five digits: more than any error bar leaves."""
    return [float(f"{value:.5g}") for value in np.asarray(values, dtype=np.float64).tolist()]


def settings_of(runs: Runs) -> list[tuple[str, str]]:
    """What all runs have in common; of step sizes, those taken."""
    found = [("n_beta", f"{n_beta_of(runs.runs[0].ds):g}")]
    taken = [(metadata_of(run.ds) if "metadata" in run.ds.attrs else {}).get("step_size", {}).get("lr") for run in runs.runs]
    for name in dict.fromkeys(name for run in runs.runs for name in run.settings):
        values = taken if name == "lr" and None not in taken else [run.settings.get(name) for run in runs.runs]
        if name == "n_beta":
            continue
        value = values[0]
        if any(other != value for other in values):
            told = "differs between the runs"
        else:
            told = "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        if name == "lr" and any(run.settings.get("lr") == "auto" for run in runs.runs):
            told += " (chosen by 'auto')"
        found.append((name, told))
    return found


def _different(ds: xr.Dataset, counts: dict[str, int]) -> list[Place]:
    """The first sequences of each observable, so many."""
    seen: dict[bytes, int] = {}
    found, start = [], 0
    for name, count in counts.items():
        for sequence, ids in enumerate(ds[f"input_ids_{name}"].values[:count]):
            number = start + sequence
            found.append(Place(name, sequence, number, seen.setdefault(ids.tobytes(), number)))
        start += ds.sizes[f"batch_{name}"]
    return found
