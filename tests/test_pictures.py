"""Pictures: the axes carry the numbers of the result, labels tell units, `ax=` is drawn on, wrong results are refused."""

import subprocess
import sys
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from cases import TinyLM, random_tokens

import devinterp
from devinterp import pictures
from devinterp.analysis.clusters import clusters_of
from devinterp.analysis.projection import principal_components
from devinterp.errors import DevinterpInputError, PackageMissing
from devinterp.pictures.style import looks, shortened
from devinterp.pictures.texts import kind_of, texts_of, token_values
from devinterp.slt.calibration import Calibration

SETTINGS = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 30, "num_chains": 2,
            "num_init_loss_batches": 1, "batches_per_draw": 2, "progress": False}  # fmt: skip
DATA = random_tokens()
OBSERVABLES = {"code": DATA, "prose": random_tokens(seed=1)}


class Words:
    """A tokenizer of eleven words, which drops the space before a first one, as SentencePiece does."""

    names = (" a", " be", "x1", "\n", "  ", "77", "(", " $y$", "é", "日", "\x1b")

    def decode(self, ids: list[int]) -> str:
        return "".join(self.names[i] for i in ids).removeprefix(" ")


@pytest.fixture(autouse=True)
def figures():
    """No window, and no figure that stays."""
    mpl.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.fixture(scope="module")
def samples():
    return devinterp.sample(TinyLM(), DATA, OBSERVABLES, **SETTINGS)


@pytest.fixture(scope="module")
def suite():
    restrictions = {"full": None, "a": {"mix.weight": None}, "b": {"out.weight": None}, "c": {"embed.weight": None}}
    runs = {
        name: devinterp.sample(TinyLM(), DATA, OBSERVABLES, param_masks=masks, **SETTINGS)
        for name, masks in restrictions.items()
    }
    return lambda **options: devinterp.compute_susceptibilities(
        runs, "code", include_sampling_task=True, estimator="one_chain", **options
    )


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def drawn(ax):
    """The figure is drawn, which finds labels and glyphs that cannot be."""
    ax.figure.canvas.draw()
    return ax


def test_traces_carry_the_chains_their_running_llc_and_verdicts(samples):
    found = devinterp.diagnose(samples)
    ax = drawn(pictures.plot_traces(found))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), found.trace[0])
    np.testing.assert_allclose(ax.lines[3].get_ydata(), found.llc_running[1])
    assert ax.lines[3].get_xdata().tolist() == list(range(1, 31))
    assert legend(ax)[:2] == [f"chain {chain}: {found.verdict.values[chain]}" for chain in (0, 1)]
    band = ax.patches[0].get_bbox()
    mean, error = float(found.llc_mean), float(found.mcse)
    assert (band.y0, band.y1) == pytest.approx((mean - 2 * error, mean + 2 * error))
    assert "n_beta" in ax.get_ylabel()
    assert "dimensionless" in ax.get_ylabel()
    (right,) = ax.child_axes
    assert "nats" in right.get_ylabel()
    np.testing.assert_allclose(np.array(right.get_ylim()) * found.attrs["n_beta"], ax.get_ylim())


def test_a_trace_is_what_compute_llc_has(samples):
    found, result = devinterp.diagnose(samples), devinterp.compute_llc(samples)
    np.testing.assert_allclose(found.trace, result.attrs["n_beta"] * result.excess_trace)


def test_a_chain_that_diverged_is_named(samples):
    ds = samples.to_dataset().load()
    ds["chain_status"] = ds["chain_status"].copy(data=[1, 2])
    ax = drawn(pictures.plot_traces(devinterp.diagnose(ds)))
    assert legend(ax)[1].startswith("chain 1: diverged")
    assert np.isnan(ax.lines[2].get_ydata()).all()


def result_at(llc: float, **attrs: float) -> xr.Dataset:
    names = ["code", "prose"]
    values = {"llc_observable": [llc + 1, llc + 2], "llc_observable_sem": [0.3, 0.4], "init_loss_observable": [2.0, 3.0]}
    return xr.Dataset(
        {"llc_mean": llc, "llc_sem": 0.1, "init_loss": 5 - llc, **{name: ("observable", row) for name, row in values.items()}},
        coords={"observable": names}, attrs={"n_beta": 30.0, "localization": 300.0, **attrs},
    )  # fmt: skip


def test_llc_over_checkpoints_with_error_bars():
    results = {f"step-{step}": result_at(llc) for step, llc in ((0, 1.0), (10, 2.0), (1000, 4.0))}
    ax = drawn(pictures.plot_llc_over_checkpoints(results))
    assert legend(ax) == ["sampling data", "code", "prose"]
    for container, shift, error in zip(ax.containers, (0, 1, 2), (0.1, 0.3, 0.4), strict=True):
        line, _, (bars,) = container
        assert line.get_xdata().tolist() == [0, 10, 1000]
        np.testing.assert_allclose(line.get_ydata().astype(float), np.array([1.0, 2.0, 4.0]) + shift)
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(np.ptp(ends, axis=1), 4 * error)
    assert ax.get_xscale() == "symlog"
    assert ax.get_xlabel() == "training step"
    assert "two standard errors" in ax.get_ylabel()
    assert any(text.get_text() == "n_beta 30, localization 300" for text in ax.texts)
    loss = drawn(pictures.plot_loss_over_checkpoints(results))
    np.testing.assert_allclose(loss.containers[0][0].get_ydata().astype(float), [4.0, 3.0, 1.0])
    assert "nats" in loss.get_ylabel()


def test_names_without_a_step_lie_side_by_side_and_are_shortened():
    ax = drawn(pictures.plot_llc_over_checkpoints({"first $x": result_at(1.0), "s" * 300: result_at(2.0)}))
    names = [tick.get_text() for tick in ax.get_xticklabels()]
    assert names[0] == r"first \$x"
    assert len(names[1]) <= 24
    assert ax.get_xlabel() == "checkpoint"
    assert ax.get_xscale() == "linear"


def test_llcs_at_other_settings_are_not_put_in_one_picture():
    with pytest.raises(DevinterpInputError, match="at equal settings only"):
        pictures.plot_llc_over_checkpoints({0: result_at(1.0), 1: result_at(1.0, localization=100.0)})
    pictures.plot_loss_over_checkpoints({0: result_at(1.0), 1: result_at(1.0, localization=100.0)})


def test_tables_over_checkpoints_and_restrictions_are_lines():
    """As a sweep gives them."""
    parts = [result_at(llc) for llc in (1.0, 2.0, 4.0)]
    table = xr.concat(parts, xr.Variable("checkpoint", ["a1", "b2", "c3"])).assign_coords(step=("checkpoint", [0, 10, 1000]))
    ax = drawn(pictures.plot_llc_over_checkpoints(table))
    assert legend(ax) == ["sampling data", "code", "prose"]
    assert ax.containers[0][0].get_xdata().tolist() == [0, 10, 1000]
    np.testing.assert_allclose(ax.containers[2][0].get_ydata().astype(float), [3, 4, 6])
    both = xr.concat([table, table.assign(llc_mean=10 * table.llc_mean)], xr.Variable("restriction", ["full", "l0h1"]))
    ax = drawn(pictures.plot_llc_over_checkpoints(both.drop_vars("step")))
    assert legend(ax) == ["full", "l0h1"]
    np.testing.assert_allclose(ax.containers[1][0].get_ydata().astype(float), [10, 20, 40])
    loss = drawn(pictures.plot_loss_over_checkpoints(both))
    np.testing.assert_allclose(loss.containers[0][0].get_ydata().astype(float), [4, 3, 1])
    table.attrs["localization"] = {"a1": 1.0, "b2": 2.0}
    with pytest.raises(DevinterpInputError, match="at equal settings only"):
        pictures.plot_llc_over_checkpoints(table)


def test_one_of_many_runs_has_to_be_chosen(samples, suite):
    def many(ds: xr.Dataset) -> xr.Dataset:
        return ds.expand_dims(checkpoint=["a", "b"])

    tree = suite(errors=False)
    of_all = xr.DataTree.from_dict(
        {"/susceptibilities": many(tree["susceptibilities"].to_dataset()), "/context": tree["context"].to_dataset()}
    )
    calls = [
        lambda: pictures.plot_traces(many(devinterp.diagnose(samples))),
        lambda: pictures.plot_tokens(many(devinterp.compute_llc(samples, per="token"))),
        lambda: pictures.plot_tokens(of_all),
        lambda: pictures.plot_influences(many(devinterp.compute_bif(samples, correlation_method="sequence", progress=False))),
        lambda: pictures.plot_susceptibilities(of_all),
        lambda: pictures.plot_projection(of_all),
    ]
    for call in calls:
        with pytest.raises(DevinterpInputError, match=r"\.sel\(checkpoint=\.\.\.\)"):
            call()
    one = of_all.sel(checkpoint="a")
    drawn(pictures.plot_tokens(one))
    drawn(pictures.plot_susceptibilities(one))


@dataclass(frozen=True)
class Boxes:
    """Where tokens were coloured, and as what."""

    numbers: list[int]
    colours: dict[int, tuple[float, ...]]
    underlined: int

    @classmethod
    def of(cls, ax) -> "Boxes":
        boxes = [patch for patch in ax.patches if patch.get_gid() is not None]
        return cls([int(b.get_gid()) for b in boxes], {int(b.get_gid()): b.get_facecolor() for b in boxes}, len(ax.lines))


def test_tokens_are_coloured_by_their_llc(samples):
    result = devinterp.compute_llc(samples, per="token")
    ax = drawn(pictures.plot_tokens(result, 3, tokenizer=Words(), observable="prose"))
    values = result.llc_token_prose.values[3]
    found = Boxes.of(ax)
    assert set(found.numbers) <= set(range(1, 6)), "the first token has no value"
    for number, colour in found.colours.items():
        assert (colour[0] < colour[2]) == (values[number - 1] > 0), "blue above zero, orange below"
    assert found.underlined == sum(values[number - 1] < 0 for number in found.numbers)
    assert "LLC of the token (dimensionless)" in ax.figure.axes[1].get_xlabel()
    texts = token_values(result, 3, Words(), "prose").texts
    assert texts == tuple(texts_of(samples["input_ids_prose"].values[3].tolist(), Words()))


def test_tokens_by_influence_and_by_susceptibility(samples, suite):
    queried = devinterp.compute_bif(samples, queries=[(2, 4)], progress=False, errors=True)
    whole = devinterp.compute_bif(samples, progress=False)
    of_query = token_values(queried, 5, Words(), query=0)
    of_whole = token_values(whole, 5, Words(), query=(2, int(queried.query_target_position[0])))
    np.testing.assert_allclose(of_query.values, of_whole.values, atol=1e-6)
    np.testing.assert_allclose(of_query.values[1:], queried.influences.values[0, 5], atol=1e-6)
    np.testing.assert_allclose(of_query.errors[1:], queried.influences_sem.values[0, 5])
    assert of_query.label.startswith("correlation with")
    tree = suite(standardize=True, errors=True)
    sus = tree["susceptibilities"].to_dataset()
    found = token_values(tree, 2, Words(), "prose", "b")
    rows = (sus.dataset_id.values == 1) & (sus.batch.values == 2)
    np.testing.assert_array_equal(found.values[1:], sus.sus.sel(wr="b").values[rows])
    np.testing.assert_array_equal(found.errors[1:], sus.sus_sem.sel(wr="b").values[rows])
    assert found.label == "susceptibility of b (z-score)"
    assert found.texts == tuple(texts_of(samples["input_ids_prose"].values[2].tolist(), Words()))
    drawn(pictures.plot_tokens(tree, 2, tokenizer=Words(), observable="prose", component="b", width=8))


def test_texts_of_tokens():
    words = Words()
    assert texts_of([0, 1, 2, 1, 7, 10], words) == ["a", " be", "x1", " be", " $y$", "\x1b"]
    assert texts_of([3, 5], None) == ["[3]", "[5]"]
    with pytest.raises(DevinterpInputError, match="tokenizer="):
        texts_of([1], "gpt2")
    kinds = ["letters after a space", "other", "line break", "space", "digits", "punctuation", "letters", "letters"]
    assert [kind_of(text) for text in (" be", "x1", "\n ", "  ", "77", "(", "é", "日")] == kinds


def test_kinds_of_the_rows(suite, samples):
    tree = suite(errors=False)
    sus, kinds = tree["susceptibilities"].to_dataset(), pictures.token_kinds(tree, Words())
    for row in (0, 17, 50):
        name = ("code", "prose")[int(sus.dataset_id[row])]
        ids = samples[f"input_ids_{name}"].values[int(sus.batch[row])].tolist()
        assert kinds[row] == kind_of(texts_of(ids, Words())[int(sus.target_position[row])])


def test_influences_between_sequences(samples):
    result = devinterp.compute_bif(samples, correlation_method="sequence", progress=False)
    ax = drawn(pictures.plot_influences(result))
    expected = result.influences.values.copy()
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_array_equal(np.ma.filled(ax.images[0].get_array(), np.nan), expected)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["code", "prose"]
    assert ax.lines[0].get_ydata()[0] == result.attrs["observables"]["prose"] - 0.5
    low, high = ax.images[0].get_clim()
    assert low == -high, "zero is white"
    assert "correlation" in ax.figure.axes[1].get_ylabel()
    covariances = devinterp.compute_bif(samples, correlation_method="sequence", compute_covariance=True, progress=False)
    assert "covariance (nats²)" in drawn(pictures.plot_influences(covariances)).figure.axes[1].get_ylabel()


def blocks(sizes: list[int], seed: int = 0) -> tuple[xr.Dataset, np.ndarray]:
    """Influences of sequences that belong to groups, shuffled."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    noise = 0.1 * rng.standard_normal((len(group), len(group)))
    matrix = 0.6 * np.equal.outer(group, group) + noise + noise.T
    np.fill_diagonal(matrix, 1.0)
    numbers = np.arange(len(group))
    attrs = {"observables": {"x": 0, "y": len(group) // 2}, "measure": "correlation"}
    coords = {"batch_1": numbers, "batch_2": numbers}
    return xr.Dataset({"influences": (("batch_1", "batch_2"), matrix)}, coords=coords, attrs=attrs), group


def test_clusters_are_the_groups_and_lie_side_by_side():
    result, group = blocks([5, 9, 12])
    found = pictures.influence_clusters(result, 3)
    assert len({(a, b) for a, b in zip(group.tolist(), found.cluster.values.tolist(), strict=True)}) == 3
    assert (np.diff(found.cluster.values[found.order.values]) >= 0).all()
    assert found.observable.values.tolist() == ["x"] * 13 + ["y"] * 13
    ax = drawn(pictures.plot_influences(result, clusters=3))
    order = found.order.values
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    off = ~np.eye(26, dtype=bool)
    np.testing.assert_array_equal(shown[off], result.influences.values[np.ix_(order, order)][off])
    assert np.isnan(shown.diagonal()).all()
    sizes = np.bincount(found.cluster.values)
    assert [line.get_ydata()[0] + 0.5 for line in ax.lines[:2]] == np.cumsum(sizes)[:-1].tolist()
    reversed_ = result.copy(data={"influences": -result.influences}).assign_attrs(measure="correlation, sign reversed")
    np.testing.assert_array_equal(pictures.influence_clusters(reversed_, 3).cluster, found.cluster)


def test_clusters_of_covariances_constant_traces_and_few_rows():
    result, group = blocks([6, 6])
    scale = np.geomspace(1e-3, 1e3, 12)
    labels, _ = clusters_of(result.influences.values * np.outer(scale, scale), 2)
    assert len(set(zip(group.tolist(), labels.tolist(), strict=True))) == 2
    broken = result.influences.values.copy()
    broken[3], broken[:, 3] = np.nan, np.nan
    labels, order = clusters_of(broken, 3)
    assert sorted(order) == list(range(12))
    assert (labels == labels[3]).sum() == 1
    assert clusters_of(np.ones((1, 1)), 1)[0].tolist() == [0]


def test_susceptibilities_of_all_tokens(suite):
    tree = suite(standardize=True, errors=False)
    ax = drawn(pictures.plot_susceptibilities(tree))
    np.testing.assert_array_equal(ax.images[0].get_array(), tree["susceptibilities"].sus.values.T)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b", "c"]
    assert "z-score" in ax.figure.axes[1].get_ylabel()
    raw = drawn(pictures.plot_susceptibilities(suite(errors=False)["susceptibilities"].to_dataset()))
    assert "nats²" in raw.figure.axes[1].get_ylabel()


def test_responses_are_means_with_the_errors_of_means(suite):
    tokens, means = (
        suite(errors=False)["susceptibilities"].to_dataset(),
        suite(mean_over="dataset")["susceptibilities"].to_dataset(),
    )
    ax = drawn(pictures.plot_responses(tokens))
    for number, bars in enumerate(ax.containers):
        expected = tokens.sus.values[tokens.dataset_id.values == number].mean(axis=0)
        np.testing.assert_allclose([bar.get_width() for bar in bars], expected)
    assert "standard errors" not in ax.get_xlabel(), "errors of single tokens do not average"
    ax = drawn(pictures.plot_responses(means))
    bars = [container for container in ax.containers if len(container.patches if hasattr(container, "patches") else ())]
    for number, one in enumerate(bars):
        np.testing.assert_allclose([bar.get_width() for bar in one], means.sus.values[number])
        segments = one.errorbar.lines[2][0].get_segments()
        np.testing.assert_allclose([np.ptp(segment[:, 0]) for segment in segments], 4 * means.sus_sem.values[number])
    assert "two standard errors" in ax.get_xlabel()
    assert legend(ax) == ["code", "prose"]


def test_principal_components_against_the_covariance():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4))
    points, weights, shares = principal_components(values, 3)
    variances, vectors = np.linalg.eigh(np.cov(values.T))
    np.testing.assert_allclose(points.var(axis=0, ddof=1), variances[::-1][:3])
    np.testing.assert_allclose(np.abs(weights.T @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-10)
    np.testing.assert_allclose(shares, variances[::-1][:3] / variances.sum())
    np.testing.assert_allclose(points, (values - values.mean(0)) @ weights, atol=1e-12)
    assert (weights[np.abs(weights).argmax(axis=0), range(3)] > 0).all()
    flat, _, shares = principal_components(np.ones((5, 1)), 2)
    assert not flat.any()
    assert not shares.any()


def test_projection_is_coloured_by_kind(suite):
    tree = suite(errors=False)
    sus = tree["susceptibilities"].to_dataset()
    ax = drawn(pictures.plot_projection(tree))
    scaled = (sus.sus.values - sus.sus.values.mean(0)) / sus.sus.values.std(0)
    points, _, shares = principal_components(scaled)
    for number, collection in enumerate(ax.collections):
        np.testing.assert_allclose(collection.get_offsets(), points[sus.dataset_id.values == number])
    assert f"{shares[0]:.0%} of the variance" in ax.get_xlabel()
    assert legend(ax) == ["code (40)", "prose (40)"]
    kinds = ["odd" if row % 3 else "third" for row in range(80)]
    ax = drawn(pictures.plot_projection(tree, kinds=kinds))
    assert legend(ax) == ["odd (53)", "third (27)"]


def calibration() -> Calibration:
    dims = ("localization", "case")
    table = xr.Dataset(
        {"llc": (dims, [[4.0, 2.0], [8.0, 5.0], [20.0, np.nan]]), "llc_sem": (dims, np.full((3, 2), 0.5)),
         "verdict": (dims, [["healthy", "healthy"], ["healthy", "healthy"], ["spiky", "not tried"]]),
         "fault": ("localization", ["", "", "spiky (last, full)"])},
        coords={"localization": [1000.0, 100.0, 10.0], "case": ["first, full", "last, full"]},
    )  # fmt: skip
    return Calibration({"localization": 100.0}, table, ())


def test_calibration_as_lines_and_as_a_plane():
    found = calibration()
    ax = drawn(found.plot())
    np.testing.assert_allclose(ax.containers[0][0].get_ydata(), [4, 8, 20])
    assert "per squared weight" in ax.get_xlabel()
    assert "dimensionless" in ax.get_ylabel()
    plane = drawn(pictures.plot_calibration_plane(found))
    np.testing.assert_array_equal(np.ma.filled(plane.images[0].get_array(), np.nan), found.table.llc)
    assert [tick.get_text() for tick in plane.get_yticklabels()] == ["1000", "100 (chosen)", "10 (does not work)"]
    assert [text.get_text() for text in plane.texts] == ["4", "2", "8", "5", "20 x"]
    assert plane.patches[0].get_y() == 0.5, "the frame is around the choice"


def every_picture(samples, suite):
    bif = devinterp.compute_bif(samples, correlation_method="sequence", progress=False)
    tree = suite(errors=False)
    return {
        "plot_traces": (devinterp.diagnose(samples), {}),
        "plot_llc_over_checkpoints": ({0: devinterp.compute_llc(samples)}, {}),
        "plot_loss_over_checkpoints": ({0: devinterp.compute_llc(samples)}, {}),
        "plot_calibration": (calibration(), {}),
        "plot_calibration_plane": (calibration(), {}),
        "plot_tokens": (tree, {}),
        "plot_influences": (bif, {"clusters": 3}),
        "plot_susceptibilities": (tree, {}),
        "plot_responses": (tree, {}),
        "plot_projection": (tree, {}),
    }


def test_every_picture_is_drawn_where_asked_and_labelled(figures, samples, suite):
    calls = every_picture(samples, suite)
    assert set(calls) == {name for name in pictures.__all__ if name.startswith("plot_")}
    for name, (result, options) in calls.items():
        draw = getattr(pictures, name)
        figure, (left, right) = figures.subplots(1, 2, figsize=(12, 5), layout="constrained")
        known = len(figures.get_fignums())
        assert draw(result, ax=right, **options) is right
        assert len(figures.get_fignums()) == known, f"{name} made another figure"
        assert not left.has_data()
        assert right.has_data() or right.images or right.patches
        figure.canvas.draw()
        ax = draw(result, **options)
        assert ax.figure is not figure
        assert name == "plot_tokens" or (ax.get_xlabel() and ax.get_ylabel())
        with pytest.raises(DevinterpInputError, match="ax="):
            draw(result, ax=figure, **options)


def test_wrong_results_are_refused_before_anything_is_drawn(figures, samples, suite):
    bif = devinterp.compute_bif(samples, correlation_method="sequence", progress=False)
    tree, llc = suite(errors=False), devinterp.compute_llc(samples, per="token")
    calls = [
        (lambda: pictures.plot_traces(llc), "diagnosis="),
        (lambda: pictures.plot_llc_over_checkpoints({}), "results="),
        (lambda: pictures.plot_llc_over_checkpoints([llc]), "results="),
        (lambda: pictures.plot_llc_over_checkpoints({0: bif}), "llc_mean"),
        (lambda: pictures.plot_calibration(llc), "calibration="),
        (lambda: pictures.plot_influences(devinterp.compute_bif(samples, progress=False)), "correlation_method='sequence'"),
        (lambda: pictures.plot_influences(bif, clusters=0), "clusters=0"),
        (lambda: pictures.plot_influences(bif, clusters=17), "clusters=17"),
        (lambda: pictures.plot_influences(bif.isel(batch_2=slice(3)), clusters=2), "same sequences on both sides"),
        (lambda: pictures.plot_susceptibilities(llc), "result="),
        (lambda: pictures.plot_responses(bif), "result="),
        (lambda: pictures.plot_projection(tree, method="tsne"), "method='tsne'"),
        (lambda: pictures.plot_projection(tree, kinds=["a"]), "kinds='1 labels'"),
        (lambda: pictures.plot_projection(tree["susceptibilities"].to_dataset().isel(wr=[0])), "1 components"),
        (lambda: pictures.plot_tokens(bif), "values of single tokens"),
        (lambda: pictures.plot_tokens(tree, component="l9h9"), "component='l9h9'"),
        (lambda: pictures.plot_tokens(tree, 99), "sequence=99"),
        (lambda: pictures.plot_tokens(llc, -1), "sequence=-1"),
        (lambda: pictures.plot_tokens(llc, observable="none"), "observable='none'"),
        (lambda: pictures.plot_tokens(suite(mean_over="sequence", errors=False)), "mean_over=None"),
        (lambda: pictures.plot_tokens(devinterp.compute_bif(samples, progress=False), query=3), "query=3"),
    ]
    for call, message in calls:
        with pytest.raises(DevinterpInputError, match=message):
            call()
    assert not figures.get_fignums()


def test_what_is_not_installed_is_named(monkeypatch, suite):
    tree = suite(errors=False)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(PackageMissing, match=r"needs UMAP, .* pip install umap-learn"):
        pictures.plot_projection(tree, method="umap")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for draw in (pictures.plot_tokens, pictures.plot_projection, pictures.plot_responses):
        with pytest.raises(PackageMissing, match=r"needs matplotlib, .* pip install 'devinterp\[plots\]'"):
            draw(tree)
    with pytest.raises(PackageMissing, match="needs matplotlib"):
        pictures.plot_calibration_plane(calibration())


def test_no_two_looks_are_told_by_colour_alone():
    first = [look for look, _ in zip(looks(), range(16), strict=False)]
    assert len({(look.colour, look.marker) for look in first}) == 16
    assert len({look.marker for look in first[:8]}) == 8
    assert shortened("x" * 50, 10) == "x" * 5 + "…" + "x" * 4
    assert shortened("a\x1b[2J\n$") == r"a\x1b[2J\n\$"


def test_names_are_exported_lazily():
    code = "import sys; from devinterp import pictures; dir(pictures); assert 'matplotlib' not in sys.modules; "
    code += "assert 'torch' not in sys.modules; [getattr(pictures, name) for name in pictures.__all__]; "
    code += "assert 'matplotlib' not in sys.modules, 'before a picture is drawn'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pictures.nonsense
