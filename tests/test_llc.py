"""compute_llc against a slow obvious version, against exact moments, and with chains that went wrong."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from arviz_stats.base import array_stats
from cases import TinyLM, Weights, quadratic, random_tokens, rows
from checks import LIMIT
from scipy.stats import t as student
from targets import leimkuhler_matthews_variance, precision, quadratic_llc, sgld_llc_moments

import devinterp
from devinterp.analysis.uncertainty import ess, rhat, standard_error
from devinterp.errors import ChainDiverged, ChainsUnusable, StoreError

DATA = random_tokens()
SHORT = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 30, "num_chains": 3,
         "num_init_loss_batches": 1, "progress": False}  # fmt: skip


def naive_llc(ds: xr.Dataset, n_beta: float) -> list[float]:
    """Per chain, one draw at a time."""
    found = []
    for chain in range(ds.sizes["chain"]):
        total = 0.0
        for draw in range(ds.sizes["draw"]):
            baseline = ds.baseline_loss.isel(draw=draw)
            baseline = baseline.isel(chain=chain) if "chain" in baseline.dims else baseline
            difference = ds.sampling_loss.isel(chain=chain, draw=draw).values.astype(float) - baseline.values
            total += difference.mean()
        found.append(n_beta * total / ds.sizes["draw"])
    return found


@pytest.mark.parametrize("shared", [True, False])
def test_llc_against_a_slow_obvious_version(shared):
    samples = devinterp.sample(TinyLM(), DATA, {"x": DATA, "xy": (DATA, 1)}, num_burnin_steps=5,
                               match_sampling_input_ids_across_chains=shared, **SHORT)  # fmt: skip
    result = devinterp.compute_llc(samples)
    naive = naive_llc(samples.to_dataset(), 10.0)
    np.testing.assert_allclose(result.llc_per_chain, naive, rtol=1e-6)
    assert float(result.llc_mean) == pytest.approx(np.mean(naive), rel=1e-6)
    assert float(result.llc_std) == pytest.approx(np.std(naive), rel=1e-6)
    assert float(result.llc_scalar) == float(result.llc_mean)
    np.testing.assert_allclose(result.loss_trace, samples.sampling_loss.values.astype(float).mean((2, 3)), rtol=1e-6)
    assert result.excess_trace.dims == ("chain", "draw")
    excess = result.excess_trace.values
    assert float(result.rhat) == pytest.approx(float(array_stats.rhat(excess, chain_axis=0, draw_axis=1)))
    assert float(result.ess_bulk) == pytest.approx(float(array_stats.ess(excess, chain_axis=0, draw_axis=1)))
    assert float(result.llc_sem) == pytest.approx(10.0 * standard_error(excess))
    for name in ("x", "xy"):
        expected = 10.0 * float((samples[f"loss_{name}"] - samples[f"init_loss_{name}"]).astype(float).mean())
        assert float(result.llc_observable.sel(observable=name)) == pytest.approx(expected, rel=1e-5)
    assert result.attrs["localization"] == 5.0
    assert result.attrs["n_beta"] == 10.0


def test_llc_in_one_call_is_compute_of_sample():
    samples = devinterp.compute_llc(devinterp.sample(TinyLM(), DATA, {}, **SHORT))
    xr.testing.assert_identical(devinterp.llc(TinyLM(), DATA, **SHORT), samples)


def test_permuted_chains_and_draws_change_no_estimate():
    samples = devinterp.sample(TinyLM(), DATA, {"x": DATA}, **SHORT).to_dataset().load()
    reference = devinterp.compute_llc(samples)
    draws = np.random.default_rng(0).permutation(30)
    for other in (samples.isel(chain=[2, 0, 1]), samples.isel(draw=draws)):
        result = devinterp.compute_llc(other)
        assert float(result.llc_mean) == pytest.approx(float(reference.llc_mean), rel=1e-9)
        np.testing.assert_allclose(result.llc_observable, reference.llc_observable, rtol=1e-9)


def test_burn_in_is_not_averaged_in():
    """Far from its stationary law for the first 200 steps: with them the LLC would be half as large."""
    n_beta, gamma, lr = 100.0, 1.0, 2e-4  # relaxation takes 2 / (lr A) = 99 steps
    chosen = {"n_beta": n_beta, "localization": gamma, "lr": lr, "batch_size": 1, "num_init_loss_batches": 1, "progress": False}
    model = Weights(torch.zeros(2000))
    result = devinterp.llc(model, rows(2), loss_fn=quadratic(1.0), num_burnin_steps=1000, num_draws=100, num_chains=2, **chosen)
    truth = quadratic_llc([1.0] * 2000, n_beta, gamma, lr)
    assert float(result.llc_mean) == pytest.approx(truth, rel=0.05)
    without = devinterp.llc(model, rows(2), loss_fn=quadratic(1.0), num_draws=100, num_chains=2, **chosen)
    assert float(without.llc_mean) < 0.6 * truth


@pytest.mark.filterwarnings("ignore:lr=0.09")
def test_sgld_on_a_quadratic_has_the_exact_mean_and_variance():
    """End to end through sample(): 40 chains of 60 draws, from the minimum, no burn-in to argue about."""
    h, dimension, n_beta, gamma, lr, chains, draws = 2.0, 50, 3.0, 4.0, 0.09, 40, 60
    result = devinterp.llc(
        Weights(torch.zeros(dimension)), rows(2), loss_fn=quadratic(h), lr=lr, n_beta=n_beta, localization=gamma,
        num_chains=chains, num_draws=draws, num_steps_bw_draws=2, num_burnin_steps=3, batch_size=1,
        num_init_loss_batches=1, progress=False,
    )  # fmt: skip
    at = [3 + (d + 1) * 2 for d in range(draws)]
    mean, variance = sgld_llc_moments(h, dimension, n_beta, gamma, lr, at)
    z = (result.llc_per_chain.values - mean) / math.sqrt(variance)
    assert abs(z.mean()) * math.sqrt(chains) < LIMIT
    assert abs((z**2).mean() - 1) < LIMIT * math.sqrt(2 / chains)
    assert float(result.llc_sem) == pytest.approx(math.sqrt(variance / chains), rel=0.5)


def test_leimkuhler_matthews_on_a_quadratic_has_no_step_size_bias():
    h, dimension, n_beta, gamma, lr = 2.0, 400, 3.0, 4.0, 0.3  # lr A = 3
    A = precision(n_beta, h, gamma)
    chosen = {"n_beta": n_beta, "localization": gamma, "num_chains": 4, "num_draws": 400, "num_burnin_steps": 20, "batch_size": 1,
              "num_init_loss_batches": 1, "progress": False}  # fmt: skip
    result = devinterp.llc(Weights(torch.zeros(dimension)), rows(2), loss_fn=quadratic(h), lr=lr,
                           sampling_method="leimkuhler_matthews", **chosen)  # fmt: skip
    truth = quadratic_llc([h] * dimension, n_beta, gamma)
    assert 0.5 * n_beta * h * dimension * leimkuhler_matthews_variance(A, lr, 200) == pytest.approx(truth, rel=1e-6)
    assert float(result.llc_sem) < 0.02 * truth
    assert abs(float(result.llc_mean) - truth) < LIMIT * float(result.llc_sem)


@pytest.mark.parametrize("at", [0, 2, 7, 12])
def test_a_diverged_chain_is_recorded_and_leaves_the_others_alone(at):
    settings = {"lr": 0.1, "n_beta": 2.0, "num_burnin_steps": 4, "num_draws": 8, "num_chains": 3, "batch_size": 1,
                "num_init_loss_batches": 1, "progress": False}  # fmt: skip
    calls = []  # every call; those of the chains are the last

    def loss_fn(model, ids):
        calls.append(1)
        broken = len(calls) == breaks_at
        return (0.5 * model.w.square().sum() * (math.nan if broken else 1.0)).expand(len(ids), 1)

    model, data, breaks_at = Weights(torch.zeros(3)), rows(20), None
    healthy = devinterp.sample(model, data, {}, loss_fn=loss_fn, **settings).load()
    per_chain = 13  # 12 steps, and one forward for the last draw
    breaks_at = len(calls) - 2 * per_chain + at + 1  # in chain 1
    calls.clear()
    samples = devinterp.sample(model, data, {}, loss_fn=loss_fn, **settings)
    assert samples.chain_status.values.tolist() == [1, 2, 1]
    assert samples.diverged_at.values.tolist() == [-1, at, -1]
    assert samples.attrs["completed"] == 1
    np.testing.assert_array_equal(samples.sampling_loss[[0, 2]], healthy.sampling_loss[[0, 2]])
    draws_before = max(0, at - 5)  # draw d is taken after 5 + d steps
    np.testing.assert_array_equal(samples.sampling_loss[1, :draws_before], healthy.sampling_loss[1, :draws_before])
    with pytest.raises(ChainsUnusable, match=r"chains 1 \(diverged\) of 3"):
        devinterp.compute_llc(samples)
    result = devinterp.compute_llc(samples, on_diverged="drop")
    assert result.attrs["dropped_chains"] == [1]
    assert result.attrs["num_chains_used"] == 2
    assert float(result.llc_mean) == pytest.approx(
        float(devinterp.compute_llc(healthy.to_dataset().isel(chain=[0, 2])).llc_mean)
    )


@pytest.mark.filterwarnings("ignore:lr=")
def test_real_divergence(caplog):
    settings = SHORT | {"lr": 0.5, "localization": 0.0, "num_draws": 200}
    quartic = lambda model, ids: model.w.pow(4).sum().expand(len(ids), 1)  # noqa: E731
    model = Weights(torch.ones(3))
    with pytest.raises(ChainDiverged, match="chain 0 left the finite range at step .* with lr=0.5. Try a smaller lr"):
        devinterp.sample(model, rows(20), {}, loss_fn=quartic, on_diverged="raise", **settings)
    samples = devinterp.sample(model, rows(20), {}, loss_fn=quartic, **settings)
    assert (samples.chain_status == 2).all()
    assert "chain 2 left the finite range" in caplog.text
    with pytest.raises(ChainsUnusable, match="no chain is left"):
        devinterp.compute_llc(samples, on_diverged="drop")


def test_unfinished_and_foreign_samples_are_refused():
    samples = devinterp.sample(TinyLM(), DATA, {}, **SHORT).to_dataset().load()
    with pytest.raises(ChainsUnusable, match=r"chains \[1\] are not finished"):
        devinterp.compute_llc(samples.assign(chain_status=("chain", [1, 0, 1])), on_diverged="drop")
    with pytest.raises(StoreError, match="lack.*sampling_loss"):
        devinterp.compute_llc(samples.drop_vars("sampling_loss"))
    with pytest.raises(StoreError, match="no run metadata"):
        devinterp.compute_llc(samples.drop_vars("n_beta").drop_attrs())
    with pytest.raises(TypeError, match="samples="):
        devinterp.compute_llc([1, 2])
    with pytest.raises(ValueError, match="on_diverged='ignore'"):
        devinterp.compute_llc(samples, on_diverged="ignore")


def test_one_chain_and_few_draws_are_legal():
    one = devinterp.llc(TinyLM(), DATA, **(SHORT | {"num_chains": 1}))
    assert math.isnan(one.rhat)
    assert float(one.llc_sem) > 0
    few = devinterp.llc(TinyLM(), DATA, **(SHORT | {"num_draws": 2}))
    assert math.isfinite(few.llc_mean)
    assert math.isnan(few.llc_sem)


def autoregressive(rng, rho: float, chains: int, draws: int, shared: float = 0.0) -> np.ndarray:
    noise = rng.standard_normal((chains, draws))
    trace = np.empty((chains, draws))
    trace[:, 0] = noise[:, 0]
    for d in range(1, draws):
        trace[:, d] = rho * trace[:, d - 1] + math.sqrt(1 - rho**2) * noise[:, d]
    return trace + shared * rng.standard_normal(draws)


@pytest.mark.parametrize(
    ("rho", "chains", "shared"), [(0.0, 4, 0.0), (0.5, 4, 0.0), (0.8, 4, 0.0), (0.8, 1, 0.0), (0.3, 4, 1.0)]
)
def test_intervals_cover_the_truth_as_often_as_they_say(rho, chains, shared):
    """95 % intervals over 300 simulated runs: between 90 % and 99 %, also when chains share the noise of their batches."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        trace = autoregressive(rng, rho, chains, 150, shared)
        hits += abs(trace.mean()) < student.ppf(0.975, max(ess(trace, "bulk") - 1, 2)) * standard_error(trace)
    assert 0.90 <= hits / 300 <= 0.99


def test_chains_that_do_not_agree_get_a_wide_error_and_a_large_rhat():
    rng = np.random.default_rng(0)
    levels = np.array([[0.0], [3.0], [6.0], [9.0]])
    trace = levels + 0.1 * rng.standard_normal((4, 100))
    assert rhat(trace) > 2
    assert standard_error(trace) > 0.5 * levels.std(ddof=1) / 2


def test_constant_traces_have_no_error_bar():
    assert math.isnan(standard_error(np.zeros((2, 50))))
    assert math.isnan(rhat(np.zeros((2, 50))))
    assert math.isnan(ess(np.zeros((2, 50)), "bulk"))


def test_running_llc_ends_at_the_llc_of_each_chain():
    result = devinterp.llc(TinyLM(), DATA, **SHORT)
    np.testing.assert_allclose(result.llc_running[:, -1], result.llc_per_chain, rtol=1e-9)
    excess = result.excess_trace.values
    np.testing.assert_allclose(result.llc_running[1, 6], 10.0 * excess[1, :7].mean(), rtol=1e-9)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_llcs_of_parts_average_to_that_of_the_observable(per):
    samples = devinterp.sample(TinyLM(), DATA, {"x": DATA, "y": (DATA, 1)}, **SHORT)
    result = devinterp.compute_llc(samples, per=per)
    for name in ("x", "y"):
        parts, errors = result[f"llc_{per}_{name}"], result[f"llc_{per}_{name}_sem"]
        dims = (f"batch_{name}",) if per == "sequence" else (f"batch_{name}", "token_pos")
        assert parts.dims == errors.dims == dims
        assert float(parts.mean()) == pytest.approx(float(result.llc_observable.sel(observable=name)), rel=1e-6)
        losses = samples[f"loss_{name}"].values.astype(float) - samples[f"init_loss_{name}"].values
        row = losses[:, :, 2].mean(-1) if per == "sequence" else losses[:, :, 2, 3]
        at = (2,) if per == "sequence" else (2, 3)
        assert float(parts.values[at]) == pytest.approx(10.0 * row.mean(), rel=1e-6)
        assert float(errors.values[at]) == pytest.approx(10.0 * standard_error(row), rel=1e-6)


def test_parts_need_observables_and_a_known_name():
    samples = devinterp.sample(TinyLM(), DATA, {}, **SHORT)
    with pytest.raises(StoreError, match="no observables"):
        devinterp.compute_llc(samples, per="token")
    with pytest.raises(ValueError, match="per='word'"):
        devinterp.compute_llc(samples, per="word")


@pytest.mark.parametrize("batch_noise", [0.0, 2.0])
def test_variance_form_against_its_exact_value(batch_noise):
    """1/2 sum r^2 of a quadratic, with and without batches whose mean loss changes with w (a slope of each row along w)."""
    h, gamma, n_beta, dimension = 2.0, 5.0, 10.0, 20
    slopes = batch_noise * torch.randn(400, dimension, generator=torch.Generator().manual_seed(0))
    slopes -= slopes.mean(0)

    def loss_fn(model, ids):
        return (0.5 * h * model.w.square().sum() + slopes[ids[:, 0]] @ model.w)[:, None]

    # small steps: what batches add to the posterior itself is of order lr
    samples = devinterp.sample(
        Weights(torch.zeros(dimension)), rows(400), {}, loss_fn=loss_fn, lr=0.01, n_beta=n_beta, localization=gamma,
        sampling_method="leimkuhler_matthews", num_burnin_steps=100, num_draws=2000, num_steps_bw_draws=4, num_chains=4,
        batch_size=8, num_init_loss_batches=1, chains_together="sequential", progress=False,
    )  # fmt: skip
    result = devinterp.compute_llc(samples)
    r = n_beta * h / precision(n_beta, h, gamma)
    widened = 1 + 0.01 * n_beta**2 * (batch_noise**2 / 8 * (1 - 8 / 400)) / 4
    exact = dimension / 2 * (r * widened) ** 2
    assert float(result.llc_variance_sem) < 0.15 * exact
    assert abs(float(result.llc_variance) - exact) < LIMIT * float(result.llc_variance_sem)
    raw = n_beta**2 * result.excess_trace.values.var()
    assert batch_noise == 0 or raw - float(result.llc_variance) > 5 * float(result.llc_variance_sem)


@pytest.mark.parametrize("localization", [1.0, 20.0])
def test_step_size_bias_of_sgld_is_that_of_the_formula(localization):
    """lr n_beta tr(H) / 8, whatever the localization; taking it off leaves an error of second order."""
    h, n_beta, dimension, lr = 2.0, 10.0, 50, 0.01
    settings = SHORT | {"lr": lr, "n_beta": n_beta, "localization": localization, "num_draws": 400, "num_burnin_steps": 100}
    samples = devinterp.sample(Weights(torch.zeros(dimension)), rows(20), {}, loss_fn=quadratic(h), **settings)
    plain = devinterp.compute_llc(samples)
    bias = lr * n_beta * h * dimension / 8
    assert float(plain.step_size_bias) == pytest.approx(bias, rel=1e-3)
    corrected = devinterp.compute_llc(samples, correct_step_size=True)
    assert float(plain.llc_mean - corrected.llc_mean) == pytest.approx(bias, rel=1e-3)
    assert float(corrected.llc_sem) == pytest.approx(math.hypot(float(plain.llc_sem), bias / 2), rel=1e-3)
    limit, at_lr = (quadratic_llc([h] * dimension, n_beta, localization, step) for step in (0.0, lr))
    assert at_lr - limit == pytest.approx(bias, rel=0.15)


def test_leimkuhler_matthews_needs_no_correction_and_an_unknown_curvature_is_told():
    settings = SHORT | {"sampling_method": "leimkuhler_matthews"}
    assert float(devinterp.llc(TinyLM(), DATA, correct_step_size=True, **settings).step_size_bias) == 0
    samples = devinterp.sample(TinyLM(), DATA, {}, **SHORT | {"sampling_method": "rmsprop_sgld"})
    with pytest.raises(StoreError, match="do not tell the curvature"):
        devinterp.compute_llc(samples, correct_step_size=True)
