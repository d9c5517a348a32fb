"""Which sequences influence each other, and which heads respond to code and which to prose, in the model of training_run.py.

    python examples/code_and_prose.py        (after examples/training_run.py; about two minutes on two cores)

Influences (BIF) come from a run of the whole model, susceptibilities from runs of every attention head and MLP. These are of
the one-chain kind: two-chain values contain a term "component times token", here 97 % of the variance of all tokens.
"""

from pathlib import Path

import numpy as np
import training_run
import xarray as xr
from datasets import Dataset, concatenate_datasets
from matplotlib import pyplot
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

import devinterp
from devinterp.pictures import plot_influences, plot_projection, plot_responses

SAMPLING = training_run.SAMPLING | {"localization": 300.0, "num_chains": 2, "num_draws": 75, "batches_per_draw": 2}
MORE_DRAWS = {"num_chains": 3, "num_draws": 150}
"""for influences: the noise of a correlation is 1 / sqrt(number of draws)"""


def load(folder: Path, checkpoint: Path) -> tuple[Dataset, dict[str, Dataset]]:
    """The sampling data, and observables: code, prose, and both in the proportion of the training data."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    parts = [training_run.tokenize([(folder / f"{name}.txt").read_text()], tokenizer) for name in ("code", "prose")]
    (code, held_out_code), (prose, held_out_prose) = parts
    both = concatenate_datasets([held_out_code, held_out_prose])
    return concatenate_datasets([code, prose]), {"both": both, "code": held_out_code, "prose": held_out_prose}


def means_by_kind(matrix: np.ndarray, kinds: np.ndarray) -> dict[str, tuple[float, float]]:
    """Mean influence of pairs of different sequences, with the jackknife's standard error over sequences."""

    def means(kept: np.ndarray) -> list[float]:
        part = np.where(np.eye(len(kept), dtype=bool), np.nan, matrix[np.ix_(kept, kept)])
        first = kinds[kept] == 0
        return [np.nanmean(part[first][:, first]), np.nanmean(part[~first][:, ~first]), np.nanmean(part[first][:, ~first])]

    everything, count = np.arange(len(kinds)), len(kinds)
    left_out = np.array([means(np.delete(everything, i)) for i in range(count)])
    errors = np.sqrt((count - 1) * left_out.var(axis=0))
    names = ("within code", "within prose", "across")
    return {name: (float(m), float(e)) for name, m, e in zip(names, means(everything), errors, strict=True)}


def influences(samples: xr.DataTree, title: str, picture: Path) -> dict[str, tuple[float, float]]:
    result = devinterp.compute_bif(samples, correlation_method="sequence", loss_keys=["code", "prose"])
    kinds = (result.batch_1.values >= result.attrs["observables"]["prose"]).astype(int)
    found = means_by_kind(result.influences.values, kinds)
    print("\nmean correlation between the losses of two sequences")
    for name, (mean, error) in found.items():
        print(f"  {name:<14} {mean:+.4f} ± {error:.4f}")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(1.3, 1))
    plot_influences(result, ax=left)
    means, errors = zip(*found.values(), strict=True)
    right.bar(range(len(means)), means, yerr=[2 * error for error in errors], capsize=4, color="0.75")
    right.set_xticks(range(len(means)), list(found))
    right.axhline(0, color="black", linewidth=0.8)
    right.set_ylabel("mean influence over pairs (correlation)\nbars: two standard errors")
    save(figure, title, picture)
    return found


def save(figure: Figure, title: str, picture: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


def responses(tree: xr.DataTree, title: str, picture: Path) -> dict[str, list[float]]:
    """Mean standardised susceptibility of every component to code and to prose, and tokens on principal components."""
    sus = tree["susceptibilities"].to_dataset()
    components, names = [str(wr) for wr in sus.wr.values], sus.attrs["dataset_id_to_name"]
    means = {name: sus.sus.values[sus.dataset_id.values == number].mean(0).tolist() for number, name in enumerate(names)}
    print("\nmean standardised susceptibility (negative: expression)")
    print(f"  {'':<10}" + "".join(f"{name:>9}" for name in names))
    for number, component in enumerate(components):
        print(f"  {component:<10}" + "".join(f"{means[name][number]:>+9.3f}" for name in names))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    plot_responses(tree, ax=left)
    plot_projection(tree, ax=right)
    save(figure, title, picture)
    return means


def run(folder: Path, **changed: object) -> tuple[dict[str, tuple[float, float]], dict[str, list[float]]]:
    checkpoint = sorted((folder / "checkpoints").iterdir())[-1]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    dataset, observables = load(folder, checkpoint)
    settings = SAMPLING | changed
    heads = [f"l{layer}h{head}" for layer in range(2) for head in range(4)]
    restrictions = {"full": None} | {name: name for name in (*heads, "l0 mlp", "l1 mlp")}
    stores, longer = folder / "runs", settings | MORE_DRAWS | changed
    kinds = {name: observables[name] for name in ("code", "prose")}
    samples = devinterp.sample(model, dataset, kinds, output_path=stores / "influences", **longer)
    found = influences(samples, title(checkpoint, longer), folder / "influences.png")
    tree = devinterp.susceptibilities(
        model, dataset, observables, restrictions, sampling_task="both", estimator="one_chain", standardize=True,
        output_path=stores / "components", **settings,
    )  # fmt: skip
    means = responses(tree, title(checkpoint, settings), folder / "susceptibilities.png")
    print(f"\npictures: {folder / 'influences.png'}, {folder / 'susceptibilities.png'}")
    print(f"stores:   {stores / 'influences'}, {stores / 'components_full'}, {stores / 'components_l0h0'} ...")
    return found, means


def title(checkpoint: Path, settings: dict) -> str:
    return (
        f"GPT-NeoX, 231k parameters, {checkpoint.name}; n_beta {settings['n_beta']:g}, localization "
        f"{settings['localization']:g}, {settings['num_chains']} chains x {settings['num_draws']} draws"
    )


if __name__ == "__main__":
    run(training_run.folder_asked_for(__doc__.split("\n")[0]))
