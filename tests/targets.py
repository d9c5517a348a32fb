"""Closed-form answers, derived here or cited; nothing of the library is used."""

import math
from collections.abc import Sequence

import numpy as np


def precision(n_beta: float, h: float, localization: float, weight_decay: float = 0.0) -> float:
    """A = n_beta h + gamma + lambda of the posterior of a quadratic with curvature h."""
    return n_beta * h + localization + weight_decay


def sgld_variance(A: float, lr: float, steps: int | None = None, noise_level: float = 1.0) -> float:
    """Variance of w after `steps` steps from a point (None: stationary): sigma^2/(A(1 - lr A/4)) (1 - rho^2T)."""
    rho = 1 - lr * A / 2
    stationary = noise_level**2 / (A * (1 - lr * A / 4))
    return stationary if steps is None else stationary * (1 - rho ** (2 * steps))


def sgld_mean(A: float, lr: float, steps: int, start: float, centre: float) -> float:
    """Mean path: mu + rho^T (start - mu)."""
    return centre + (1 - lr * A / 2) ** steps * (start - centre)


def leimkuhler_matthews_variance(A: float, lr: float, steps: int) -> float:
    """Variance after `steps` >= 1 steps from a point, xi_0 drawn; tends to 1/A for every lr A < 4."""
    rho = 1 - lr * A / 2
    settled = (1 - rho ** (2 * (steps - 1))) / (1 - rho**2)
    return lr / 4 * (rho ** (2 * (steps - 1)) + (1 + rho) ** 2 * settled + 1)


def rmsprop_linear_path(
    c: float, n_beta: float, gamma: float, lr: float, alpha: float, eps: float, steps: int, corrected: bool = False
) -> tuple[float, float]:
    """Mean and variance of w - w0 after `steps` steps for the linear loss c w: the preconditioner is deterministic."""
    v, mean, variance = (1.0 if corrected else 0.0), 0.0, 0.0
    for t in range(1, steps + 1):
        v = alpha * v + (1 - alpha) * c * c
        g = 1 / (math.sqrt(v / (1 - alpha ** (t + 1)) if corrected else v) + eps)
        r = 1 - lr * g * gamma / 2
        mean = r * mean - lr / 2 * g * n_beta * c
        variance = r * r * variance + lr * g
    return mean, variance


def preconditioned_mixing(precision: float, lr: float, metric: float = 1.0) -> float:
    """Integrated autocorrelation time of w in steps of Leimkuhler-Matthews: 1 + 2 sum of rho^(k-1) (1 - lr M A / 4)."""
    return 4 / (lr * metric * precision)


def adam_linear_path(
    c: float, n_beta: float, gamma: float, lr: float, beta2: float, eps: float, steps: int
) -> tuple[float, float]:
    """Mean and variance of w - w0 for the linear loss c w: the averaged gradient is c from the first step, whatever beta1."""
    v, mean, variance = 1.0, 0.0, 0.0
    for t in range(1, steps + 1):
        v = beta2 * v + (1 - beta2) * c * c
        g = 1 / (math.sqrt(v / (1 - beta2 ** (t + 1))) + eps)
        r = 1 - lr * g * gamma / 2
        mean = r * mean - lr / 2 * g * n_beta * c
        variance = r * r * variance + lr * g
    return mean, variance


def averaged_gradient_variance(stiffness: float, prior: float, lr: float, beta1: float, steps: int) -> float:
    """Variance of w for a quadratic loss, stiffness = n_beta h, whose gradient is averaged as Adam does, from m = 0.

    The pair (w, m) moves linearly: m <- beta1 m + (1 - beta1) w, w <- w - (lr/2)(stiffness m / (1 - beta1^t) + prior w) + noise.
    """
    covariance, noise = np.zeros((2, 2)), np.diag([lr, 0.0])
    for t in range(1, steps + 1):
        pull = lr / 2 * stiffness / (1 - beta1**t)
        move = np.array([[1 - lr / 2 * prior - pull * (1 - beta1), -pull * beta1], [1 - beta1, beta1]])
        covariance = move @ covariance @ move.T + noise
    return float(covariance[0, 0])


def _thermostat_step(A: float, lr: float, friction: float, zeta: float, heating: float) -> tuple[np.ndarray, ...]:
    """One step of (w, p) at constant zeta, kicks noisy with variance `heating`: (w, p) -> k, p, and the noises' covariance.

    k = p - time A w + kick; p = (k + sqrt(friction (2 + zeta)) xi) / (1 + zeta); w += time/2 (k + p).
    """
    time, keep, fresh = lr**0.5, 1 / (1 + zeta), friction * (2 + zeta) / (1 + zeta) ** 2
    kicked = np.array([-time * A, 1.0])
    move = np.array([[1.0, 0.0] + time / 2 * (1 + keep) * kicked, keep * kicked])
    from_kick, from_fresh = np.array([time / 2 * (1 + keep), keep]), np.array([time / 2, 1.0])
    noise = heating * np.outer(from_kick, from_kick) + fresh * np.outer(from_fresh, from_fresh)
    return kicked, move, noise


def underdamped_variance(A: float, lr: float, friction: float, steps: int) -> float:
    """Variance of w after `steps` steps from a point with momenta N(0, 1), at constant friction; tends to 1/A."""
    _, move, noise = _thermostat_step(A, lr, friction, friction, 0.0)
    covariance = np.diag([0.0, 1.0])
    for _ in range(steps):
        covariance = move @ covariance @ move.T + noise
    return float(covariance[0, 0])


def thermostat_variance(A: float, lr: float, friction: float, heating: float) -> tuple[float, float]:
    """Stationary variance of w, and zeta, for slow thermostats: zeta such that share k^2 + (1 - share) p^2 has the mean 1.

    `heating` is the variance of a kick by noise of the gradient, lr n_beta^2 v.
    """
    low, high = 1e-3, 1e3
    for _ in range(100):
        zeta = (low + high) / 2
        kicked, move, noise = _thermostat_step(A, lr, friction, zeta, heating)
        flat = np.linalg.solve(np.eye(4) - np.kron(move, move), noise.ravel())
        covariance = flat.reshape(2, 2)
        share = (4 + zeta) / (8 + 4 * zeta)
        heat = share * (kicked @ covariance @ kicked + heating) + (1 - share) * covariance[1, 1]
        low, high = (zeta, high) if heat > 1 else (low, zeta)
    return float(covariance[0, 0]), zeta


def quadratic_llc(h: Sequence[float], n_beta: float, gamma: float, lr: float = 0.0) -> float:
    """Stationary LLC at the minimum: sum of n_beta h / (2 A (1 - lr A/4)); lr = 0 for samplers without step-size bias."""
    total = 0.0
    for curvature in h:
        A = precision(n_beta, curvature, gamma)
        total += n_beta * curvature / (2 * A * (1 - lr * A / 4))
    return total


def sgld_llc_moments(
    h: float, dimension: int, n_beta: float, gamma: float, lr: float, draws_at: Sequence[int]
) -> tuple[float, float]:
    """Mean and variance of the LLC of one SGLD chain from the minimum with draws after the given steps.

    w_s and w_t are Gaussian with covariance rho^|s-t| Var(w_min(s,t)), so energies have covariance 2 cov^2.
    """
    A = precision(n_beta, h, gamma)
    rho, at = 1 - lr * A / 2, np.asarray(draws_at)
    variances = np.array([sgld_variance(A, lr, int(t)) for t in at])
    covariance = rho ** np.abs(at[:, None] - at[None, :]) * np.minimum(variances[:, None], variances[None, :])
    mean = dimension * 0.5 * n_beta * h * variances.mean()
    variance = dimension * (0.5 * n_beta * h) ** 2 * 2 * (covariance**2).mean()
    return float(mean), float(variance)


def quadratic_covariance(A: np.ndarray, a: np.ndarray, B: np.ndarray, b: np.ndarray, S: np.ndarray) -> float:
    """Covariance of w'Aw/2 + a'w and w'Bw/2 + b'w under a centred Gaussian of covariance S: a'Sb + tr(A S B S)/2."""
    return float(a @ S @ b + 0.5 * np.trace(A @ S @ B @ S))


def reweighted_excess(A: np.ndarray, b: np.ndarray, weights: np.ndarray, n_beta: float, gamma: float) -> float:
    """E[L - L(0)] under the posterior of the mean of rho_j l_j, l_j = w'A_j w/2 + b_j'w, with L their plain mean (no slope).

    Its precision is P = n_beta H_rho + gamma and its mean m = -n_beta P^-1 b_rho: tr(H P^-1)/2 + m'Hm/2.
    """
    H, H_rho, b_rho = A.mean(0), np.tensordot(weights, A, 1) / len(A), weights @ b / len(A)
    S = np.linalg.inv(n_beta * H_rho + gamma * np.eye(len(H)))
    m = -n_beta * S @ b_rho
    return float(0.5 * np.trace(H @ S) + 0.5 * m @ H @ m)


def quadratic_susceptibilities(A: np.ndarray, b: np.ndarray, n_beta: float, gamma: float) -> np.ndarray:
    """-Cov[L, l_j - L] of the same model, for every j."""
    H = A.mean(0)
    S = np.linalg.inv(n_beta * H + gamma * np.eye(len(H)))
    return np.array([quadratic_covariance(H, 0 * b[0], H - one, -slope, S) for one, slope in zip(A, b, strict=True)])


def deep_linear_llc(widths: Sequence[int], rank: int) -> tuple[float, int]:
    """Learning coefficient and multiplicity of a deep linear network (Aoyagi 2024, Neural Networks 172:106132)."""
    surplus = sorted(width - rank for width in widths)
    for count in range(2, len(surplus) + 1):
        inside, outside = surplus[:count], surplus[count:]
        ell, total = count - 1, sum(inside)
        if outside and not (max(inside) < min(outside) and total < ell * min(outside)):
            continue
        if total < ell * max(inside):
            continue
        a = total - (math.ceil(total / ell) - 1) * ell
        pairs = sum(inside[i] * inside[j] for i in range(count) for j in range(i + 1, count))
        value = (
            0.5 * (-(rank**2) + rank * (widths[0] + widths[-1]))
            + a * (ell - a) / (4 * ell)
            - ell * (ell - 1) / 4 * (total / ell) ** 2
            + 0.5 * pairs
        )
        return value, a * (ell - a) + 1
    raise AssertionError("no subset fulfils the conditions")


def crossing_llc(powers: Sequence[int], n_beta: float, gamma: float, points: int = 240) -> float:
    """E[n_beta K] of K = prod w_i^(2 k_i) under exp(-n_beta K - gamma/2 |w|^2), by the trapezoidal rule in log w.

    The integrand is smooth there and vanishes at both ends, so the rule converges exponentially.
    """
    u = np.linspace(math.log(1e-8), math.log(12 / gamma**0.5), points)
    axes = np.meshgrid(*[np.exp(u)] * len(powers), indexing="ij", sparse=True)
    energy = n_beta * math.prod(axis ** (2 * k) for axis, k in zip(axes, powers, strict=True))
    density = np.exp(-energy - gamma / 2 * sum(axis**2 for axis in axes)) * math.prod(axes)
    return float((energy * density).sum() / density.sum())


def energies(
    rng, chains: int = 4, draws: int = 200, directions: int = 20, rho: float = 0.5, shared: float = 0.0, start: float = 1.0
):
    """n_beta times the excess loss of chains on a quadratic, with the noise of batches that all share; at rest, unless they start
    at so many standard deviations from the minimum."""
    noise = rng.standard_normal((chains, draws, directions))
    w = np.empty_like(noise)
    w[:, 0] = start * noise[:, 0]
    for d in range(1, draws):
        w[:, d] = rho * w[:, d - 1] + math.sqrt(1 - rho**2) * noise[:, d]
    return 0.5 * np.square(w).sum(-1) + shared * rng.standard_normal(draws)
