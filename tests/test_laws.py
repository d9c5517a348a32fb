"""The exact laws of the samplers at finite step size, through the chain that users run.

A model of D equal coordinates is D independent chains: one run of T steps gives an exact test of mean and variance.
"""

import numpy as np
import pytest
import torch
from cases import Weights, linear, plan_of, quadratic, rows, walk
from checks import LIMIT, check_gaussian
from targets import leimkuhler_matthews_variance, precision, rmsprop_linear_path, sgld_mean, sgld_variance

from devinterp.engine.seeds import noise_generator
from devinterp.engine.walker import Walker

D, T = 1_000_000, 60
H, N_BETA, GAMMA, LR = 2.0, 3.0, 4.0, 0.09  # A = 10, lr A = 0.9
A = precision(N_BETA, H, GAMMA)


def run(start: float = 0.0, centre: float = 0.0, steps: int = T, dimension: int = D, **settings) -> np.ndarray:
    chosen = {"lr": LR, "n_beta": N_BETA, "localization": GAMMA} | settings
    model = Weights(torch.full((dimension,), start))
    return walk(plan_of(model, rows(4), quadratic(H, centre), **chosen), steps)


def test_sgld_mean_path_and_variance():
    # from 1, pulled to the loss's centre at 0 and to w0 = 1: mu = gamma / A
    mean = sgld_mean(A, LR, 5, start=1.0, centre=GAMMA * 1.0 / A)
    check_gaussian(run(start=1.0, steps=5), mean, sgld_variance(A, LR, 5))


def test_sgld_stationary_variance():
    check_gaussian(run(), 0.0, sgld_variance(A, LR, T))


def test_weight_decay_pulls_to_zero_and_localization_to_the_start():
    # w0 = 1, loss centred at 1: only the decay pulls away
    total = precision(N_BETA, H, GAMMA, weight_decay=5.0)
    mu = (N_BETA * H + GAMMA) / total
    got = run(start=1.0, centre=1.0, lr=0.05, llc_weight_decay=5.0)
    check_gaussian(got, sgld_mean(total, 0.05, T, 1.0, mu), sgld_variance(total, 0.05, T))


def test_noise_level_scales_the_variance():
    check_gaussian(run(noise_level=0.5), 0.0, sgld_variance(A, LR, T, noise_level=0.5))


@pytest.mark.parametrize("lr", [0.09, 0.2, 0.35])
@pytest.mark.parametrize("steps", [1, 3, T])
def test_leimkuhler_matthews_variance(lr, steps):
    got = run(sampling_method="leimkuhler_matthews", lr=lr, steps=steps)
    check_gaussian(got, 0.0, leimkuhler_matthews_variance(A, lr, steps))


def test_leimkuhler_matthews_has_no_step_size_bias():
    # lr A = 3.5: SGLD would be at 8 / A
    assert leimkuhler_matthews_variance(A, 0.35, T) == pytest.approx(1 / A, rel=1e-3)
    check_gaussian(run(sampling_method="leimkuhler_matthews", lr=0.35), 0.0, 1 / A)


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_leimkuhler_matthews_autocovariance(lag):
    plan = plan_of(Weights(torch.zeros(D)), rows(4), quadratic(H), lr=0.2, n_beta=N_BETA, localization=GAMMA,
                   sampling_method="leimkuhler_matthews")  # fmt: skip
    walker = Walker(plan, 0)
    for t in range(30 + lag):
        if t == 30:
            before = walker.weights[0].clone()
        walker.differentiate(t)
        walker.step()
    rho = 1 - 0.2 * A / 2
    expected = rho ** (lag - 1) * (rho / A + 0.2 / 4)
    products = (before * walker.weights[0]).double().numpy()
    assert abs(products.mean() - expected) < LIMIT * products.std() / D**0.5


def test_rmsprop_with_alpha_one_is_sgld_with_lr_over_eps():
    # v stays 0, so G = 1 / eps
    got = run(sampling_method="rmsprop_sgld", sampling_method_kwargs={"alpha": 1.0, "eps": 0.1}, lr=LR * 0.1)
    check_gaussian(got, 0.0, sgld_variance(A, LR, T))


@pytest.mark.parametrize("corrected", [False, True])
def test_rmsprop_adapts_as_the_exact_path_says(corrected):
    slope, lr = 2.0, 0.05
    plan = plan_of(Weights(torch.zeros(D)), rows(4), linear(slope), lr=lr, n_beta=N_BETA, localization=GAMMA,
                   sampling_method="rmsprop_sgld",
                   sampling_method_kwargs={"alpha": 0.9, "eps": 0.5, "bias_correction": corrected})  # fmt: skip
    mean, variance = rmsprop_linear_path(slope, N_BETA, GAMMA, lr, 0.9, 0.5, steps=20, corrected=corrected)
    check_gaussian(walk(plan, 20), mean, variance)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2)])
def test_minibatch_noise_adds_its_exact_share(batch_size, accumulation):
    """Every row pushes every coordinate by an independent sign; no row comes twice, so the gradient noise is iid, v = 1/2."""
    dimension, steps = 50_000, 60
    signs = torch.randint(0, 2, (200, dimension), generator=torch.Generator().manual_seed(0)).float() * 2 - 1

    def loss_fn(model, ids):
        return (0.5 * H * model.w.square().sum() + signs[ids[:, 0]] @ model.w)[:, None]

    plan = plan_of(Weights(torch.zeros(dimension)), rows(200), loss_fn, lr=LR, n_beta=N_BETA, localization=GAMMA,
                   batch_size=batch_size, gradient_accumulation_steps=accumulation)  # fmt: skip
    check_gaussian(walk(plan, steps), 0.0, sgld_variance(A, LR, steps) * (1 + LR * N_BETA**2 * 0.5 / 4))


def test_bfloat16_weights_move_in_float32():
    """Sampled in bfloat16 the noise of a step is rounded away where weights are large against it (variance off by 1.1)."""
    dimension, lr = 200_000, 1e-5
    model = Weights(torch.full((dimension,), 1.0, dtype=torch.bfloat16))
    plan = plan_of(model, rows(4), quadratic(H, centre=1.0), lr=lr, n_beta=N_BETA, localization=GAMMA)
    assert plan.selection.dtype == torch.float32
    check_gaussian(walk(plan, 20), 1.0, sgld_variance(A, lr, 20))


def test_elements_outside_the_masks_stay_bitwise():
    model = Weights(torch.randn(D // 2, generator=torch.Generator().manual_seed(0)))
    before = model.w.detach().clone()
    mask = torch.arange(D // 2) % 3 == 0
    plan = plan_of(model, rows(4), quadratic(H), {"w": mask}, lr=LR, n_beta=N_BETA, localization=GAMMA)
    walker = Walker(plan, 0)
    for t in range(5):
        walker.differentiate(t)
        walker.step()
    placed = plan.selection.place(walker.leaves)["w"].detach()
    assert torch.equal(placed[~mask], before[~mask])
    moved = (placed[mask] - before[mask]).numpy()
    assert (moved != 0).mean() > 0.999
    # the law on the mask: mean mu + rho^T (w0 - mu), mu = gamma w0 / A
    factor = GAMMA / A + (1 - LR * A / 2) ** 5 * (1 - GAMMA / A)
    check_gaussian((placed[mask] - factor * before[mask]).numpy(), 0.0, sgld_variance(A, LR, 5))


def test_init_noise_moves_the_start_but_not_the_anchor():
    got = run(start=1.0, centre=1.0, steps=1, init_noise=0.3)
    rho = 1 - LR * A / 2
    check_gaussian(got, 1.0, rho**2 * 0.3**2 + LR)
    settled = run(start=1.0, centre=1.0, init_noise=0.3, steps=80)
    check_gaussian(settled, 1.0, sgld_variance(A, LR))


def test_bounding_box():
    got = run(start=1.0, centre=1.0, bounding_box_size=0.05, steps=10, dimension=10_000)
    assert np.abs(got - 1.0).max() <= 0.05 + 1e-7
    assert (np.abs(np.abs(got - 1.0) - 0.05) < 1e-6).mean() > 0.1, "the box never bound: the test shows nothing"


def test_seeds_and_chains_share_no_stream():
    """1000 seeds x 8 chains, as torch's CPU generator sees them (32 bits)."""
    cpu = torch.device("cpu")
    seeds = [noise_generator(cpu, seed, chain, "noise").initial_seed() % 2**32 for seed in range(1000) for chain in range(8)]
    assert len(set(seeds)) == len(seeds)


def test_noise_of_neighbouring_seeds_and_chains_is_uncorrelated():
    model = Weights(torch.zeros(100_000))
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (2**32 + 1, 0)]
    plans = [plan_of(model, rows(4), quadratic(H), lr=LR, init_seed=seed) for seed, _ in pairs]
    noises = np.stack([walk(plan, 1, chain) for plan, (_, chain) in zip(plans, pairs, strict=True)])
    correlation = np.corrcoef(noises)[np.triu_indices(len(pairs), 1)]
    assert np.abs(correlation).max() < LIMIT / 100_000**0.5
