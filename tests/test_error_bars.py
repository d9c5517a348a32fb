"""Error bars: how often nominal 95 % intervals hold the exact value, over many independent runs."""

import numpy as np
import pytest
import xarray as xr
from cases import autoregressive
from naive import influence_error
from targets import quadratic_covariance

import devinterp
from devinterp.analysis.susceptibility import one_chain_errors, two_chain_errors
from devinterp.analysis.uncertainty import standard_error, standard_errors
from devinterp.errors import DevinterpInputError

RUNS, CHAINS, DRAWS = 600, 4, 200
QUANTILE = 1.96


def covers(values: np.ndarray, truth: float, errors: np.ndarray) -> float:
    """Share of the runs whose interval holds the truth."""
    return float((np.abs(values - truth) < QUANTILE * errors).mean())


@pytest.mark.parametrize("chains", [1, 2, 4, 8])
@pytest.mark.parametrize("draws", [4, 5, 7, 10, 25, 100])
def test_errors_of_many_traces_are_those_of_each(chains, draws):
    rng = np.random.default_rng(draws)
    traces = np.concatenate(
        [autoregressive(rng, rho, chains, draws, 15) + spread * rng.standard_normal((chains, 1, 15))
         for rho in (-0.8, 0.0, 0.6, 0.97) for spread in (0, 2)], axis=2,
    )  # fmt: skip
    each = [standard_error(traces[..., i]) for i in range(traces.shape[2])]
    np.testing.assert_allclose(standard_errors(traces), each, rtol=1e-12)
    traces[..., 0] = 1.5
    assert np.isnan(standard_errors(traces)[0])
    assert np.isnan(standard_errors(traces[:, :3])).all()


@pytest.mark.parametrize("rho", [0.3, 0.8])
@pytest.mark.parametrize("estimator", ["one_chain", "two_chain"])
def test_susceptibility_intervals_hold_the_exact_value(estimator, rho):
    """L = w'Hw/2 and l = w'Aw/2 + b'w under a Gaussian of variance 1: -Cov(L, l - L) = tr(H H)/2 - tr(H A)/2."""
    rng, d = np.random.default_rng(1), 8
    H, A, b = np.diag(np.linspace(0.5, 1.5, d)), np.diag(rng.uniform(0, 2, d)), rng.standard_normal(d)
    truth = quadratic_covariance(H, 0 * b, H - A, -b, np.eye(d))

    def losses() -> tuple[np.ndarray, np.ndarray]:
        w = autoregressive(rng, rho, CHAINS, DRAWS, RUNS, d)
        L = 0.5 * np.square(w) @ np.diag(H)
        return L, L - 0.5 * np.square(w) @ np.diag(A) - w @ b

    g, D = losses()
    if estimator == "one_chain":
        values = (g * D).mean((0, 1)) - g.mean((0, 1)) * D.mean((0, 1))
        errors = one_chain_errors(g, D)
    else:
        _, full = losses()
        values = (g * D).mean((0, 1)) - g.mean((0, 1)) * full.mean((0, 1))
        errors = two_chain_errors(g, D, full.mean((0, 1)), standard_errors(full))
    covered = covers(values, truth, errors)
    independent = ((g - g.mean((0, 1))) * (D - D.mean((0, 1)))).std((0, 1)) / (CHAINS * DRAWS) ** 0.5
    blind = covers(values, truth, independent)
    print(f"{estimator}, rho {rho}: covered {covered:.1%}; with every draw independent {blind:.1%}")
    assert 0.92 <= covered <= 0.98
    assert blind < min(covered - 0.02, 0.94)


def samples_of(losses: np.ndarray, length: int = 1) -> xr.Dataset:
    """Samples with these losses (chain, draw, trace), as sequences of `length` tokens."""
    chains, draws = losses.shape[:2]
    shaped = losses.reshape(chains, draws, -1, length).astype(np.float32)
    return xr.Dataset(
        {
            "loss_x": (("chain", "draw", "batch_x", "token_pos"), shaped),
            "input_ids_x": (("batch_x", "token"), np.zeros((shaped.shape[2], length + 1), dtype=np.int64)),
            "sampling_loss": (("chain", "draw", "batch", "token_pos"), np.zeros((chains, draws, 1, length), np.float32)),
            "init_loss": (("chain", "token_pos"), np.zeros((chains, length), np.float32)),
            "chain_status": ("chain", np.ones(chains, dtype=np.int8)),
        },
        attrs={"metadata": {"config": {"sampler": {}, "observables": [{"obs_id": "x"}]}}},
    )


def pairs(ds: xr.Dataset, runs: int, **options: bool) -> tuple[np.ndarray, np.ndarray]:
    """The influence of sequence i on sequence runs + i, and its error."""
    result = devinterp.compute_bif(ds, correlation_method="sequence", errors=True, batch_index_range_1=range(runs),
                                   batch_index_range_2=range(runs, 2 * runs), progress=False, **options)  # fmt: skip
    return np.diag(result.influences), np.diag(result.influences_sem)


@pytest.mark.parametrize("compute_covariance", [False, True])
@pytest.mark.parametrize(("rho", "r", "shared"), [(0.3, 0.7, 0.0), (0.8, 0.0, 0.0), (0.8, 0.6, 0.0), (0.5, 0.4, 0.4)])
def test_influence_intervals_hold_the_exact_value(rho, r, shared, compute_covariance):
    """Linear losses a'w of Gaussian chains: Cov = a'b. A share of the noise is the same in all chains, as with shared batches."""
    rng = np.random.default_rng(2)
    a, b = np.array([1.0, 0.0]), np.array([r, (1 - r**2) ** 0.5])
    w = (1 - shared) ** 0.5 * autoregressive(rng, rho, CHAINS, DRAWS, RUNS, 2)
    w += shared**0.5 * autoregressive(rng, rho, 1, DRAWS, RUNS, 2)
    values, errors = pairs(samples_of(np.concatenate([w @ a, w @ b], axis=2)), RUNS, compute_covariance=compute_covariance)
    covered = covers(values, a @ b, errors)
    independent = (1 + r**2) ** 0.5 if compute_covariance else 1 - r**2
    blind = covers(values, a @ b, independent / (CHAINS * DRAWS) ** 0.5)
    print(f"rho {rho}, r {r}, shared {shared}: covered {covered:.1%}; with every draw independent {blind:.1%}")
    assert 0.92 <= covered <= 0.98
    assert blind < covered - 0.015


@pytest.mark.parametrize("compute_covariance", [False, True])
@pytest.mark.parametrize("d", [5, 30])
def test_influence_intervals_of_quadratic_losses(d, compute_covariance):
    """Losses w'Aw/2 + a'w: far from Gaussian with few directions, where the Gaussian formula's intervals are too narrow."""
    rng = np.random.default_rng(4)
    A, B, (a, b) = np.diag(rng.uniform(0, 2, d)), np.diag(rng.uniform(0, 2, d)), 0.3 * rng.standard_normal((2, d))
    w = autoregressive(rng, 0.5, CHAINS, DRAWS, RUNS, d)
    losses = [0.5 * np.square(w) @ np.diag(M) + w @ m for M, m in ((A, a), (B, b))]
    truth, *variances = (quadratic_covariance(*each, np.eye(d)) for each in ((A, a, B, b), (A, a, A, a), (B, b, B, b)))
    if not compute_covariance:
        truth /= np.prod(variances) ** 0.5
    values, errors = pairs(samples_of(np.concatenate(losses, axis=2)), RUNS, compute_covariance=compute_covariance)
    covered = covers(values, truth, errors)
    print(f"{d} directions, {'covariance' if compute_covariance else 'correlation'}: covered {covered:.1%}")
    assert 0.9 <= covered <= 0.98


@pytest.mark.parametrize("compute_covariance", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_errors_of_averaged_influences(average, compute_covariance):
    """Of token pairs with correlation r = 0.3 each; the mean of correlations has an error that overstates."""
    rng, runs, length, r = np.random.default_rng(6), 300, 3, 0.3
    common = autoregressive(rng, 0.5, CHAINS, DRAWS, runs, 1)
    own = [autoregressive(rng, 0.5, CHAINS, DRAWS, runs, length) for _ in range(2)]
    traces = np.concatenate([r**0.5 * common + (1 - r) ** 0.5 * each for each in own], axis=2)
    options = {"batch_index_range_1": range(runs), "batch_index_range_2": range(runs, 2 * runs), "progress": False,
               "compute_covariance": compute_covariance, "errors": True, "average_tokenwise_bif": average}  # fmt: skip
    result = devinterp.compute_bif(samples_of(traces.reshape(CHAINS, DRAWS, -1), length), **options)
    which = np.arange(runs)
    values, errors = (array.values[which, which] for array in (result.influences, result.influences_sem))
    assert 0.92 <= covers(values, r, errors) <= (0.98 if compute_covariance or not average else 1)
    assert errors.mean() < 1.5 * values.std()


@pytest.fixture(scope="module")
def few() -> xr.Dataset:
    rng = np.random.default_rng(0)
    losses = autoregressive(rng, 0.6, 3, 30, 8) + 0.5 * autoregressive(rng, 0.6, 1, 30, 8)
    losses[..., 1:4] += 0.8 * losses[..., :1]
    return samples_of(losses, length=2)


@pytest.mark.parametrize("reduce", ["stack", "mean"])
@pytest.mark.parametrize("center", ["all", "chain"])
@pytest.mark.parametrize("compute_covariance", [False, True])
def test_errors_against_a_double_loop(few, reduce, center, compute_covariance):
    options = {"reduce_chain_dimension_method": reduce, "center": center, "compute_covariance": compute_covariance}
    losses = few.loss_x.values if reduce == "stack" else few.loss_x.values.mean(0, dtype=np.float64, keepdims=True)
    for method, traces in (("token", losses.reshape(*losses.shape[:2], -1)), ("sequence", losses.mean(3))):
        result = devinterp.compute_bif(few, correlation_method=method, errors=True, progress=False, **options)
        found = result.influences_sem.values
        found = found if method == "sequence" else found.transpose(0, 2, 1, 3).reshape(8, 8)
        for i in range(traces.shape[2]):
            for j in range(traces.shape[2]):
                one, other = traces[..., i], traces[..., j]
                expected = influence_error(one, other, not compute_covariance, by_chain=center == "chain")
                # of a trace with itself it is rounding
                assert found[i, j] == pytest.approx(expected, rel=2e-3, abs=1e-3), (method, i, j)
        without = devinterp.compute_bif(few, correlation_method=method, progress=False, **options)
        np.testing.assert_array_equal(result.influences, without.influences)


def test_errors_come_in_every_form_of_the_result(few, tmp_path, monkeypatch):
    options = {"errors": True, "progress": False}
    whole = devinterp.compute_bif(few, **options)
    assert whole.influences_sem.dims == whole.influences.dims
    written = devinterp.compute_bif(few, output_path=tmp_path / "bif", batch_size=3, **options)
    xr.testing.assert_allclose(written.load(), whole, atol=1e-3)
    queried = devinterp.compute_bif(few, queries=[(3, 2), (0, 1)], **options)
    np.testing.assert_allclose(queried.influences_sem[0], whole.influences_sem[:, 3, :, 1], atol=1e-3)
    np.testing.assert_allclose(queried.influences_sem[1], whole.influences_sem[:, 0, :, 0], atol=1e-3)
    best = devinterp.compute_bif(few, top_k=5, **options)
    at = [best[name].values for name in ("batch_1", "batch_2")] + [
        best[n].values - 1 for n in ("target_position", "target_position_T")
    ]
    for name in ("influences", "influences_sem"):
        np.testing.assert_allclose(best[name], whole[name].values[tuple(at)], atol=1e-3)
    ranked = devinterp.compute_bif(few, queries=[(3, 2)], top_k=3, **options)
    assert ranked.influences_sem.dims == ("query", "rank")
    turned = devinterp.compute_bif(few, sign="bif", **options)
    np.testing.assert_array_equal(turned.influences_sem, whole.influences_sem)
    monkeypatch.setattr("devinterp.slt.bif_blocks.BLOCK_BYTES", 400)
    xr.testing.assert_allclose(devinterp.compute_bif(few, **options), whole, atol=1e-3)


def test_where_there_is_no_error(few):
    constant = few.copy(deep=True)
    constant["loss_x"][:, :, 1, 1] = 0.5
    for compute_covariance in (False, True):
        found = devinterp.compute_bif(constant, errors=True, compute_covariance=compute_covariance, progress=False)
        assert np.isnan(found.influences_sem.values[1, :, 1]).all()
        assert np.isnan(found.influences_sem.values).sum() == 2 * 8 - 1
    with pytest.raises(DevinterpInputError, match="errors=True: must be False with 3 draws per chain"):
        devinterp.compute_bif(few.isel(draw=slice(3)), errors=True)
    with pytest.raises(DevinterpInputError, match="errors='yes'"):
        devinterp.compute_bif(few, errors="yes")
