"""diagnose(): its statistics against slow versions, its verdicts on traces made healthy and sick on purpose."""

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from cases import TinyLM, Weights, quadratic, random_tokens, rows
from targets import energies

import devinterp
from devinterp.analysis.chains import Change, disagreement, spikes, without_common
from devinterp.analysis.uncertainty import rhat
from devinterp.analysis.verdicts import Run
from devinterp.errors import ChainsUnusable
from devinterp.slt.diagnosis import describe

SHORT = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 40, "num_chains": 3,
         "num_init_loss_batches": 1, "progress": False}  # fmt: skip


def verdicts(trace, coarse: str = "") -> list[str]:
    return [judgement.verdict for judgement in Run(trace, 1e-9, coarse).judge()]


@pytest.mark.parametrize("directions", [1, 20, 200])
@pytest.mark.parametrize(("chains", "rho", "shared"), [(4, 0.0, 0.0), (4, 0.7, 0.0), (4, 0.5, 0.5), (1, 0.5, 0.0)])
def test_chains_at_rest_are_rarely_taken_for_sick(directions, chains, rho, shared):
    rng, counts = np.random.default_rng(0), {}
    draws = 2000 if directions == 1 else 400
    for _ in range(50):
        for verdict in verdicts(energies(rng, chains, draws, directions, rho, shared * directions**0.5)):
            counts[verdict] = counts.get(verdict, 0) + 1
    assert counts.get("healthy", 0) >= 0.9 * 50 * chains, counts


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_short_runs_of_nearly_independent_draws_are_not_taken_for_drifting(shared):
    """Of 50 draws, autocorrelated by 0.25: 2 in 1000 at most are to be, and less than 1 % was, where 3 to 5 % are with the degrees
    of freedom of all chains' draws for an error that is that of their mean, or with more effective draws than draws."""
    rng = np.random.default_rng(0)
    traces = [energies(rng, draws=50, directions=100, shared=10 * shared) for _ in range(300)]
    assert sum(set(verdicts(trace)) != {"healthy"} for trace in traces) <= 5


def test_an_error_has_the_degrees_of_freedom_of_the_series_that_it_is_of():
    """Noise that all chains share makes the mean over chains the series: 25 draws in a half, not 100."""
    rng = np.random.default_rng(0)
    shared = Change.of(energies(rng, draws=50, directions=100, rho=0.0, shared=20.0))
    own = [Change.of(energies(rng, draws=50, directions=100, rho=0.0)).degrees for _ in range(10)]
    assert shared.degrees <= 23 < max(own) <= 98
    assert max(Change.of(energies(rng, 1, 50, 100, rho=0.0)).degrees for _ in range(10)) == 23, (
        "no more effective draws than draws"
    )
    assert shared.smallest_sure() > 3.4 * shared.error
    assert shared.smallest_sure(looks=5) > shared.smallest_sure()


def test_few_effective_draws_are_too_short():
    """30 draws of slow chains on their way up from the minimum, too few to be sure of it: 4 in 100 of such runs are called healthy,
    and 18 with two standard errors, however uncertain these are, for what would show."""
    rng = np.random.default_rng(0)
    found = [verdicts(energies(rng, draws=30, rho=0.875, start=0.0)) for _ in range(100)]
    assert sum(set(each) == {"healthy"} for each in found) <= 10


def test_each_fault_has_its_verdict():
    rng = np.random.default_rng(1)
    base, late = energies(rng), np.linspace(0, 1, 200)
    assert verdicts(base) == ["healthy"] * 4
    assert verdicts(base + 6 * late) == ["still climbing"] * 4
    assert verdicts(base + 8 * np.exp(-10 * late)) == ["still falling"] * 4
    assert verdicts(base - 15) == ["fell below the start"] * 4
    spiky = base.copy()
    spiky[2, [50, 120]] += 60
    assert verdicts(spiky) == ["healthy", "healthy", "spiky", "healthy"]
    assert verdicts(base + np.array([[0], [0], [0], [5]])) == ["healthy"] * 3 + ["chains disagree"]
    far = base + np.array([[0.0], [0.0], [0.0], [60.0]])  # the error of the mean is larger than a third of it
    assert set(verdicts(far)) == {"too short", "chains disagree"}
    dead = base.copy()
    dead[1] = 0.0
    assert verdicts(dead)[1] == "too little signal"
    assert verdicts(base - 10 + 30 * rng.standard_normal((4, 200))) == ["too little signal"] * 4
    assert verdicts(base, "it is too large") == ["step too large"] * 4
    assert verdicts(base[:, :8]) == ["too short"] * 4
    assert verdicts(base[:1, :3]) == ["too short"]
    stuck = base.copy()
    stuck[:, :100] = 10.0
    assert "healthy" not in verdicts(stuck), "half of it has no spread to go by"


def test_a_slow_climb_without_noise_is_no_rest():
    """As with localization 0: its autocorrelation alone would leave nothing significant."""
    climb = np.cumsum(0.05 + 0.02 * np.random.default_rng(0).standard_normal((4, 200)), axis=1)
    assert set(verdicts(climb)) == {"still climbing"}


def test_rhat_without_what_chains_share():
    """Noise that all chains share hides that their levels differ; taken off, R-hat is that of traces without it."""
    rng = np.random.default_rng(0)
    own = energies(rng, directions=50) + np.array([[0.0], [4.0], [8.0], [12.0]])
    shared = own + 20 * rng.standard_normal(200)
    assert rhat(shared) < 1.05 < 1.2 < rhat(own)
    assert rhat(without_common(shared)) == pytest.approx(rhat(without_common(own)), rel=1e-9)
    assert rhat(without_common(shared)) == pytest.approx(rhat(own), abs=0.1)
    assert verdicts(shared)[0] == verdicts(shared)[3] == "chains disagree"


def test_disagreement_is_a_probability():
    """Of chains of one law it is uniform: rarely small."""
    rng = np.random.default_rng(0)
    found = np.array([disagreement(energies(rng, draws=400))[0] for _ in range(300)])
    assert (found < 0.05).mean() < 0.15
    assert (found < 1e-4).mean() < 0.02
    assert 0.3 < np.median(found) < 0.7


def test_spikes_are_counted_where_they_are():
    rng = np.random.default_rng(0)
    trace = energies(rng, directions=1, rho=0.0, draws=2000)  # the heaviest tail: chi-squared of one direction
    assert spikes(trace).tolist() == [0, 0, 0, 0]
    trace[3, 7] += 40
    assert spikes(trace).tolist() == [0, 0, 0, 1]


def test_change_of_a_line():
    change = Change.of(np.arange(8.0)[None])
    assert change.size == 4.0
    assert math.isnan(Change.of(np.arange(6.0)[None]).error)


def test_statistics_are_those_of_the_paired_trace():
    samples = devinterp.sample(TinyLM(), random_tokens(), {}, num_burnin_steps=10, num_steps_bw_draws=2, **SHORT)
    found = devinterp.diagnose(samples)
    trace = 10.0 * devinterp.compute_llc(samples).excess_trace.values
    axes = {"chain_axis": 0, "draw_axis": 1}
    assert float(found.llc_mean) == pytest.approx(trace.mean())
    np.testing.assert_allclose(found.llc_chain, trace.mean(1))
    np.testing.assert_allclose(found.llc_running[1], [trace[1, : n + 1].mean() for n in range(40)])
    assert float(found.rhat) == pytest.approx(float(array_stats.rhat(trace, **axes)))
    assert float(found.ess_tail) == pytest.approx(float(array_stats.ess(trace, method="tail", prob=(0.05, 0.95), **axes)))
    time = trace.size / float(array_stats.ess(trace, method="mean", **axes))
    assert float(found.autocorrelation_time) == pytest.approx(time)
    assert float(found.suggested_num_steps_bw_draws) == max(1, round(2 * time))
    assert float(found.within_variance) == pytest.approx(np.mean([np.var(row, ddof=1) for row in trace]))
    assert float(found.between_variance) == pytest.approx(np.var(trace.mean(1), ddof=1))
    steps = 10 + 2 * np.arange(1, 41)
    assert float(found.transient_left) == pytest.approx(np.mean((1 - 1e-3 * 5.0 / 2) ** (2 * steps)))
    assert found.attrs["num_chains_used"] == 3
    assert found.llc_running.dims == ("chain", "draw")


def test_it_is_told_in_sentences():
    samples = devinterp.sample(Weights(torch.zeros(40)), rows(20), {}, loss_fn=quadratic(2.0), lr=0.04, n_beta=10.0,
                               localization=5.0, num_burnin_steps=60, num_draws=300, num_steps_bw_draws=4, batch_size=4,
                               num_init_loss_batches=1, sampling_method="leimkuhler_matthews", progress=False)  # fmt: skip
    text = describe(devinterp.diagnose(samples))
    assert "All chains: healthy: level, without spikes, and with the others." in text
    assert "R-hat 1.0" in text
    assert "lr A = 1 along the stiffest direction (stable below 4)." in text
    assert "LLC 15.9" in text or "LLC 16" in text


@pytest.mark.filterwarnings("ignore:lr=")
def test_chains_that_diverged_are_told_of_and_left_out():
    quartic = lambda model, ids: model.w.pow(4).sum().expand(len(ids), 1)  # noqa: E731
    wild = SHORT | {"lr": 0.5, "localization": 0.0, "num_draws": 200}
    samples = devinterp.sample(Weights(torch.ones(3)), rows(20), {}, loss_fn=quartic, **wild)
    found = devinterp.diagnose(samples)
    assert found.verdict.values.tolist() == ["diverged"] * 3
    assert "its loss stopped being finite after" in str(found.reason.values[0])
    assert math.isnan(float(found.llc_mean))
    assert found.llc_running.isnull().all()
    assert "LLC" not in describe(found).split("\n")[0]
    one = devinterp.sample(TinyLM(), random_tokens(), {}, **SHORT).to_dataset().load()
    one = one.assign(chain_status=("chain", [1, 3, 1]))
    found = devinterp.diagnose(one)
    assert found.verdict.values[1] == "failed"
    assert found.attrs["num_chains_used"] == 2
    assert found.llc_chain.isnull().values.tolist() == [False, True, False]
    with pytest.raises(ChainsUnusable, match=r"chains \[0\] are not finished"):
        devinterp.diagnose(one.assign(chain_status=("chain", [0, 1, 1])))


def test_a_step_that_is_too_large_is_seen_by_the_curvature():
    settings = SHORT | {"localization": 1.0, "num_draws": 400, "num_burnin_steps": 50}
    for method, lr, expected in (
        ("sgmcmc_sgld", 0.14, "step too large"),
        ("sgmcmc_sgld", 0.01, "healthy"),
        ("leimkuhler_matthews", 0.14, "step too large"),
        ("leimkuhler_matthews", 0.04, "healthy"),
    ):
        samples = devinterp.sample(Weights(torch.zeros(40)), rows(20), {}, loss_fn=quadratic(2.0),
                                   **settings | {"lr": lr, "sampling_method": method})  # fmt: skip
        assert set(devinterp.diagnose(samples).verdict.values) == {expected}, (method, lr)
