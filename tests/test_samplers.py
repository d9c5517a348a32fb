"""One contract for all samplers; the laws of the thermostats and of Adam."""

import dataclasses

import numpy as np
import pytest
import torch
from cases import Weights, linear, plan_of, quadratic, rows, walk
from checks import LIMIT, check_gaussian
from targets import (
    adam_linear_path,
    averaged_gradient_variance,
    leimkuhler_matthews_variance,
    precision,
    sgld_variance,
    thermostat_variance,
    underdamped_variance,
)

from devinterp.engine.walker import Walker
from devinterp.samplers import SAMPLERS, Force

D, H, N_BETA, GAMMA, LR = 200_000, 2.0, 3.0, 4.0, 0.09  # A = 10, lr A = 0.9
A = precision(N_BETA, H, GAMMA)
METHODS = list(SAMPLERS)


def run(steps, h=H, **settings) -> np.ndarray:
    chosen = {"lr": LR, "n_beta": N_BETA, "localization": GAMMA} | settings
    return walk(plan_of(Weights(torch.zeros(D)), rows(4), quadratic(h), **chosen), steps)


def steps_of(sampler, gradients, noises, metric, start):
    """Moves and states of some steps, on copies of what is given."""
    state, found = sampler.init(start.clone(), noises[0].clone()), []
    for gradient, xi in zip(gradients, noises[1:], strict=True):
        given = [gradient.clone(), (3 * gradient).clone(), xi.clone()]
        force = Force(given[0], 2.0, given[1], metric)
        before = state
        move, state = sampler.step(force, state, given[2])
        assert torch.equal(given[0], gradient), "an argument was written to"
        assert torch.equal(given[1], 3 * gradient), "an argument was written to"
        assert torch.equal(given[2], xi), "an argument was written to"
        again, state_again = sampler.step(force, before, given[2])
        assert torch.equal(again.noise, move.noise), "not a function of its arguments"
        assert torch.equal(again.drift, move.drift), "not a function of its arguments"
        torch.testing.assert_close(move.drift, -move.gain * force.total())
        found.append((move, state))
        assert fields_of(state_again).keys() == fields_of(state).keys()
    return found


def fields_of(state) -> dict:
    return {} if state is None else {item.name: getattr(state, item.name) for item in dataclasses.fields(state)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_sampler_is_pure_and_elementwise_on_any_slice(method, dtype):
    rng = torch.Generator().manual_seed(0)
    gradients, noises, metric = (torch.randn(shape, generator=rng, dtype=dtype) for shape in ((4, 2, 10), (5, 2, 10), (10,)))
    metric, start = metric.square() + 0.1, torch.ones(2, 10, dtype=dtype)
    sampler = SAMPLERS[method](lr=0.1)
    whole = steps_of(sampler, gradients, noises, metric, start)
    part = steps_of(sampler, gradients[..., 3:7], noises[..., 3:7], metric[3:7], start[..., 3:7])
    for (move, state), (piece, held) in zip(whole, part, strict=True):
        for tensor in (move.drift, move.noise):
            assert tensor.dtype == dtype
            assert tensor.shape == (2, 10)
        assert torch.equal(move.drift[..., 3:7] + move.noise[..., 3:7], piece.drift + piece.noise)
        for name, value in fields_of(state).items():
            other = fields_of(held)[name]
            assert torch.equal(value[..., 3:7], other) if isinstance(value, torch.Tensor) else value == other
    vectors = sum(isinstance(value, torch.Tensor) for value in fields_of(whole[0][1]).values())
    assert SAMPLERS[method].traits.vectors == vectors + hasattr(sampler, "metric")


@pytest.mark.filterwarnings("ignore:noise_level")
@pytest.mark.parametrize("method", METHODS)
def test_no_force_and_no_noise_means_no_move(method):
    plan = plan_of(Weights(torch.full((10,), 2.0)), rows(4), quadratic(H, centre=2.0), noise_level=0.0,
                   localization=GAMMA, sampling_method=method, lr=LR)  # fmt: skip
    assert (walk(plan, 5) == 2.0).all()


@pytest.mark.parametrize("lr", [0.09, 0.35])
@pytest.mark.parametrize(("friction", "steps"), [(0.5, 1), (0.5, 4), (0.1, 150), (3.0, 150)])
def test_underdamped_at_constant_friction_is_exact(lr, friction, steps):
    got = run(steps, lr=lr, sampling_method="sgnht", sampling_method_kwargs={"friction": friction, "coupling": 0.0})
    check_gaussian(got, 0.0, underdamped_variance(A, lr, friction, steps))
    if steps == 150:
        assert underdamped_variance(A, lr, friction, steps) == pytest.approx(1 / A, rel=1e-3)


def test_much_constant_friction_is_leimkuhler_matthews():
    got = run(7, sampling_method="sgnht", sampling_method_kwargs={"friction": 1e6, "coupling": 0.0})
    np.testing.assert_allclose(got, run(7, sampling_method="leimkuhler_matthews"), atol=1e-5)
    check_gaussian(got, 0.0, leimkuhler_matthews_variance(A, LR, 7))


@pytest.mark.parametrize("lr", [0.02, 0.09, 0.35])
def test_thermostats_leave_no_bias(lr):
    """lr A up to 3.5, where SGLD would be at 8 / A."""
    check_gaussian(run(250, lr=lr, sampling_method="sgnht"), 0.0, 1 / A)


def test_noise_level_scales_the_temperature_of_thermostats():
    check_gaussian(run(150, noise_level=0.5, sampling_method="sgnht"), 0.0, 0.25 / A)


@pytest.mark.parametrize("heating", [0.1, 0.5])
def test_thermostats_take_up_noise_of_the_gradient_of_unknown_size(heating):
    """Fresh noise in every gradient; its share of the law of SGLD is heating / 4 = lr n_beta^2 v / 4."""
    excess = []
    for method in ("sgnht", "sgmcmc_sgld"):
        walker = Walker(plan_of(Weights(torch.zeros(D)), rows(4), quadratic(H), lr=LR, n_beta=N_BETA, localization=GAMMA,
                                sampling_method=method, sampling_method_kwargs={}), 0)  # fmt: skip
        rng = torch.Generator().manual_seed(5)
        for t in range(500 if method == "sgnht" else 60):
            walker.differentiate(t)
            walker.gradient += (heating / LR) ** 0.5 / N_BETA * torch.randn(1, D, generator=rng)
            walker.step()
        excess.append(float(walker.weights.double().square().mean()) * A - 1)
    exact, friction = thermostat_variance(A, LR, 0.5, heating)
    assert exact == pytest.approx(1 / A, rel=1e-6)
    error = LIMIT * (2 / D) ** 0.5
    assert excess[1] + 1 == pytest.approx(A * sgld_variance(A, LR, 60) * (1 + heating / 4), abs=2 * error)
    print(f"SGNHT, gradient noise {heating}: {excess[0]:+.3f}, SGLD {excess[1]:+.3f}, friction {friction:.3f}")
    assert abs(excess[0]) < error


def test_adam_with_a_large_eps_is_sgld_with_the_gradient_averaged():
    """G = 1 / eps to six digits; beta1 = 0 leaves SGLD itself."""
    for beta1, lr, steps in ((0.0, LR, 60), (0.9, LR, 1), (0.9, LR, 5), (0.9, 0.02, 400)):
        expected = averaged_gradient_variance(N_BETA * H, GAMMA, lr, beta1, steps)
        got = run(steps, lr=lr * 1e6, sampling_method="adam_sgld", sampling_method_kwargs={"beta1": beta1, "eps": 1e6})
        check_gaussian(got, 0.0, expected)
        if not beta1:
            assert expected == pytest.approx(sgld_variance(A, lr, steps), rel=1e-12)


def test_bias_of_averaging_the_gradient_is_as_documented():
    """lr G n_beta h (1/4 + tau/2), tau = beta1 / (1 - beta1), to first order."""
    for beta1 in (0.0, 0.5, 0.9):
        exact = averaged_gradient_variance(10.0, 0.0, 1e-5, beta1, 200_000) * 10.0 - 1
        assert exact == pytest.approx(1e-4 * (1 / 4 + beta1 / (1 - beta1) / 2), rel=0.02)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.0, 0.9), (0.9, 0.9), (0.9, 0.99)])
def test_adam_adapts_as_the_exact_path_says(beta1, beta2):
    slope, lr = 2.0, 0.05
    kwargs = {"beta1": beta1, "beta2": beta2, "eps": 0.5}
    plan = plan_of(Weights(torch.zeros(D)), rows(4), linear(slope), lr=lr, n_beta=N_BETA, localization=GAMMA,
                   sampling_method="adam_sgld", sampling_method_kwargs=kwargs)  # fmt: skip
    mean, variance = adam_linear_path(slope, N_BETA, GAMMA, lr, beta2, 0.5, steps=20)
    check_gaussian(walk(plan, 20), mean, variance)


@pytest.mark.parametrize(("method", "documented"), [("rmsprop_sgld", 1.12), ("adam_sgld", 1.50)])
def test_bias_of_the_adaptive_samplers_is_as_documented(method, documented):
    """Variance times A = 10 on a quadratic at their defaults and lr = 0.03, in docs/guide.md."""
    count, steps = 10_000, 600
    walker = Walker(plan_of(Weights(torch.zeros(count)), rows(4), quadratic(9.0), lr=0.03, n_beta=1.0, localization=1.0,
                            sampling_method=method), 0)  # fmt: skip
    found = []
    for t in range(steps):
        walker.differentiate(t)
        walker.step()
        if t >= steps // 2 and not t % 20:
            found.append(10 * float(walker.weights.double().square().mean()))
    assert np.mean(found) == pytest.approx(documented, abs=0.02)
