"""Exact sampling of deep linear networks at finite n_beta and localization: a truth to compare with where no formula is.

The loss |W_L .. W_1 - T|^2 / 2 is quadratic in each layer, so that given the others a layer's law is Gaussian,

    exp(-n_beta |A W B - T|^2 / 2 - gamma |W - W0|^2 / 2)        A, B: the products behind and before it

with independent elements in the eigenbases of A'A and BB'. Drawing one layer after another (Gibbs sampling) leaves the posterior
exactly as it is: there is no step size, no gradient, and nothing of the library.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.linalg import eigh


def energies(
    widths: Sequence[int], rank: int, n_beta: float, gamma: float, sweeps: int, burn_in: int, chains: int = 4, seed: int = 0
) -> np.ndarray:
    """n_beta times the loss after each sweep, (chain, sweep), from the deepest point: layers that are padded identities."""
    return np.stack([_chain(widths, rank, n_beta, gamma, sweeps, burn_in, (seed, chain)) for chain in range(chains)])


def _chain(
    widths: Sequence[int], rank: int, n_beta: float, gamma: float, sweeps: int, burn_in: int, seed: tuple[int, int]
) -> np.ndarray:
    rng, found = np.random.default_rng(seed), []
    start = [_identity(out, into, rank) for into, out in itertools.pairwise(widths)]
    layers, target = list(start), _identity(widths[-1], widths[0], rank)
    for _ in range(burn_in + sweeps):
        behind = [np.eye(widths[-1])]  # the product of the layers behind each, the last first
        for layer in layers[:0:-1]:
            behind.append(behind[-1] @ layer)
        before = np.eye(widths[0])
        for i, A in enumerate(reversed(behind)):
            layers[i] = _given_others(A, before, target, start[i], n_beta, gamma, rng)
            before = layers[i] @ before
        found.append(0.5 * n_beta * np.square(before - target).sum())
    return np.array(found[burn_in:])


def _given_others(
    A: np.ndarray, B: np.ndarray, target: np.ndarray, anchor: np.ndarray, n_beta: float, gamma: float, rng: np.random.Generator
) -> np.ndarray:
    a, U = eigh(A.T @ A)
    b, V = eigh(B @ B.T)
    precision = n_beta * np.outer(a.clip(0), b.clip(0)) + gamma
    force = U.T @ (n_beta * A.T @ target @ B.T + gamma * anchor) @ V
    return U @ (force / precision + rng.standard_normal(precision.shape) / np.sqrt(precision)) @ V.T


def _identity(out: int, into: int, rank: int) -> np.ndarray:
    padded = np.zeros((out, into))
    padded[:rank, :rank] = np.eye(rank)
    return padded
