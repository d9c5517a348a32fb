"""The Leimkuhler-Matthews step in a fixed metric: exact whatever the metric is; the metric that is made, and its step size."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import TinyLM, Weights, curved, plan_of, random_tokens, rows, walk
from checks import check_gaussian
from targets import leimkuhler_matthews_variance, preconditioned_mixing

import devinterp
from devinterp.engine.curvature import curvature_batches, spectrum
from devinterp.engine.metric import row_norms, with_metric
from devinterp.engine.placement import num_cores, threads
from devinterp.engine.step_size import choose_step_size

METHOD = {"sampling_method": "preconditioned_leimkuhler_matthews"}
D, N_BETA, GAMMA = 198_000, 3.0, 0.5
H = torch.logspace(0, 4, 9).repeat_interleave(D // 9)
"""Curvatures spread over 1e4"""
A = N_BETA * H + GAMMA


def anisotropic(**settings):
    return plan_of(Weights(torch.zeros(D)), rows(8), curved(H), n_beta=N_BETA, localization=GAMMA, **METHOD | settings)


@pytest.mark.parametrize("steps", [1, 3, 60])
def test_exact_for_a_random_metric_on_curvatures_spread_over_1e4(steps):
    """Finite T as for the plain step with lr M_i in place of lr; 1 / A in the end, whatever M is."""
    lr = 0.5
    share = 0.6 + 6 * torch.rand(D, generator=torch.Generator().manual_seed(3))  # lr M A from 0.3 to 3.3
    plan = replace(anisotropic(lr=lr), metric=share / A)
    variance = np.array([leimkuhler_matthews_variance(1.0, lr * float(s), steps) for s in share])
    got = walk(plan, steps) * A.sqrt().numpy()
    check_gaussian(got / np.sqrt(variance), 0.0, 1.0)
    if steps == 60:
        check_gaussian(got, 0.0, 1.0)


def test_exact_where_the_metric_does_not_commute_with_the_curvature():
    count, lr = 40_000, 1.0
    matrix = torch.tensor([[4.0, 1.5, 0.3], [1.5, 1.0, -0.2], [0.3, -0.2, 0.5]])
    metric = torch.tensor([0.1, 0.7, 0.4])

    def loss_fn(model, ids):
        w = model.w.view(count, 3)
        return (0.5 * (w @ matrix * w).sum()).expand(len(ids), 1)

    plan = plan_of(Weights(torch.zeros(3 * count)), rows(4), loss_fn, lr=lr, n_beta=N_BETA, localization=GAMMA, **METHOD)
    precision = (N_BETA * matrix + GAMMA * torch.eye(3)).double()
    root = metric.double().sqrt()
    assert torch.linalg.eigvalsh(lr * root[:, None] * precision * root).max() > 1.5, "nothing that a small step would not show"
    got = walk(replace(plan, metric=metric.repeat(count)), 150).reshape(count, 3)
    whitened = got @ torch.linalg.cholesky(precision).numpy()
    for i in range(3):
        check_gaussian(whitened[:, i], 0.0, 1.0)
        for j in range(i):  # sum and difference of two independent ones
            check_gaussian(whitened[:, i] + whitened[:, j], 0.0, 2.0)


def test_row_norms_against_the_dense_hessian():
    rng = torch.Generator().manual_seed(0)
    factor = torch.randn(200, 200, generator=rng) * torch.logspace(-1, 1, 200)
    matrix = factor @ factor.T / 200 - 0.5 * torch.eye(200)  # a saddle
    loss = lambda model, ids: (0.5 * model.w @ matrix @ model.w).expand(len(ids), 1)  # noqa: E731
    plan = plan_of(Weights(torch.zeros(200)), rows(8), loss, n_beta=N_BETA, localization=GAMMA, **METHOD)
    with plan.checkpoint.ready():
        ratio = row_norms(plan, curvature_batches(plan)) / matrix.norm(dim=1)
    assert ratio.min() > 0.4
    assert ratio.max() < 2.1  # chi of 8 degrees of freedom, over sqrt(8)
    assert ratio.square().mean() == pytest.approx(1.0, abs=0.15)


def test_of_a_diagonal_hessian_the_metric_is_its_inverse_with_damping():
    plan = anisotropic(sampling_method_kwargs={"damping": 1e-3})
    with plan.checkpoint.ready():
        metric = with_metric(plan).metric
        assert spectrum(with_metric(plan), None, curvature_batches(plan)).precision == pytest.approx(1.0, rel=1e-3)
    expected = 1 / (A + 1e-3 * A.mean())
    torch.testing.assert_close(metric, expected / (expected * A).max(), rtol=0.05, atol=0.0)


def test_all_directions_mix_alike_in_the_metric_that_is_made():
    """60 steps from a point. The plain step at its own best size needs tens of thousands for the flat directions."""
    plan = anisotropic(lr=1.0, sampling_method_kwargs={"damping": 1e-6})
    with plan.checkpoint.ready():
        plan = with_metric(plan)
        check_gaussian(walk(plan, 60) * A.sqrt().numpy(), 0.0, 1.0)
        stiffest, flattest = float(A.max()), float(A.min())
        plain = plan_of(Weights(torch.zeros(D)), rows(8), curved(H), lr=1 / stiffest, n_beta=N_BETA, localization=GAMMA,
                        sampling_method="leimkuhler_matthews")  # fmt: skip
        left = walk(plain, 60)[: D // 9] * math.sqrt(flattest)
    assert left.var() < 0.02, "the flat directions have moved: nothing is compared"
    ratio = preconditioned_mixing(flattest, 1 / stiffest) / preconditioned_mixing(flattest, 1.0, metric=1 / flattest)
    print(f"autocorrelation times of the flattest direction: {ratio:.0f} times longer without the metric")
    assert ratio > 8e3


def test_autocorrelation_time_of_the_step():
    """Stationary autocovariance at lag k: rho^(k-1) (rho / A + lr / 4), times A."""
    for reach in (0.1, 1.0, 3.0):
        rho = 1 - reach / 2
        total = 1 + 2 * sum(rho ** (k - 1) * (rho + reach / 4) for k in range(1, 2000))
        assert preconditioned_mixing(1.0, reach) == pytest.approx(total, rel=1e-9)


def test_auto_goes_by_the_stiffest_direction_in_the_metric():
    """w^4 is flat where the metric is made, so the pilot finds it stiffer than that; at 1 it has its curvature already."""
    quartic = lambda model, ids: model.w.pow(4).sum().expand(len(ids), 1)  # noqa: E731
    for start, low, high in ((0.0, 5e-4, 1e-2), (1.0, 0.7, 1.01)):  # at the checkpoint alone it would be 1
        plan = plan_of(
            Weights(torch.full((50,), start)), rows(4), quartic, lr="auto", n_beta=1000.0, localization=1.0, **METHOD
        )
        with plan.checkpoint.ready():
            chosen = choose_step_size(with_metric(plan))
        assert low < chosen.lr < high
        assert chosen.stiffest == pytest.approx(1 / chosen.lr)
        assert chosen.h_max_checkpoint is None


def test_stored_and_judged():
    chosen = {"n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 8, "num_chains": 2, "num_init_loss_batches": 1,
              "progress": False, "save_metrics": True}  # fmt: skip
    samples = devinterp.sample(TinyLM(), random_tokens(), {}, lr="auto", **METHOD, **chosen)
    step_size = samples.attrs["metadata"]["step_size"]
    assert step_size["lr"] * step_size["stiffest"] == pytest.approx(1.0)
    found = devinterp.diagnose(samples)
    assert float(found.reach) == pytest.approx(1.0)
    assert float(found.step_size_bias) == 0
    assert math.isnan(float(found.transient_left))
    assert np.isfinite(samples.metrics_noise).all()
    given = devinterp.sample(TinyLM(), random_tokens(), {}, lr=0.5, **METHOD, **chosen)
    assert float(devinterp.diagnose(given).reach) == 0.5


def test_worker_processes_get_the_metric():
    plan = with_metric(plan_of(TinyLM(), random_tokens(), batch_size=4, n_beta=10.0, localization=5.0, **METHOD))
    assert plan.metric.min() > 0
    assert torch.equal(pickle.loads(pickle.dumps(plan)).metric, plan.metric)
    chosen = {"lr": 0.5, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 2, "num_chains": 2,
              "num_init_loss_batches": 1, "progress": False}  # fmt: skip
    with threads(max(1, num_cores() // 2)):  # as each of two workers has
        runs = [devinterp.sample(TinyLM(), random_tokens(), {}, chains_together=way, **METHOD, **chosen)
                for way in ("processes", "sequential")]  # fmt: skip
    np.testing.assert_array_equal(runs[0].sampling_loss, runs[1].sampling_loss)


def test_nothing_to_make_a_metric_of_is_refused():
    flat = lambda model, ids: (3.0 * model.w.sum()).expand(len(ids), 1)  # noqa: E731
    with pytest.raises(ValueError, match="no positive curvature"):
        devinterp.sample(Weights(torch.zeros(3)), rows(8), {}, loss_fn=flat, lr=0.5, n_beta=10.0, batch_size=4,
                         num_init_loss_batches=1, progress=False, **METHOD)  # fmt: skip
