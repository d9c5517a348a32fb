"""Weights of data that move the observables of components as wanted, to first order. Bare arrays only."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from devinterp.analysis.susceptibility import Doubles


@dataclass(frozen=True)
class Solution:
    direction: Doubles
    """x, shape (data,)"""
    shares: Doubles
    """x = chi.T @ shares, shape (components,)"""
    used: npt.NDArray[np.bool_]
    """which components entered, shape (components,)"""
    rank: int
    """singular values that were not cut"""


def summing_to_zero(chi: Doubles) -> Doubles:
    """Rows less their means; rows of one value exactly zero."""
    shifted: Doubles = np.where(np.ptp(chi, axis=1, keepdims=True) > 0, chi - chi.mean(axis=1, keepdims=True), 0.0)
    return shifted


def solve(chi: Doubles, target: Doubles, rcond: float, ridge: float, largest_cosine: float) -> Solution:
    """The smallest x with chi x = target, by a regularised pseudo-inverse of the profiles (rows) scaled to length 1:

        x = sum over singular triples (u, s, v) of  v s / (s^2 + ridge s_1^2) (u . target),   s > rcond s_1

    Without a cut and ridge this is pinv(chi) target, which scaling rows does not change; with them, scaled rows keep a
    component of small susceptibilities from being cut for that alone. Profiles that are zero, or near-duplicates of one that
    comes before them, do not enter; those with a target come first.

    Args:
        chi: shape (components, data).
        target: shape (components,).
        rcond, ridge: relative to the largest singular value and its square.
        largest_cosine: of two profiles that both enter, by size.
    """
    lengths = np.linalg.norm(chi, axis=1)
    profiles = np.divide(chi, lengths[:, None], out=np.zeros_like(chi), where=lengths[:, None] > 0)
    used = np.zeros(len(chi), dtype=bool)
    for number in np.argsort(target == 0, kind="stable"):
        used[number] = lengths[number] > 0 and (np.abs(profiles[used] @ profiles[number]) <= largest_cosine + 1e-12).all()
    u, s, v = np.linalg.svd(profiles[used], full_matrices=False)
    kept = s > rcond * s.max(initial=0)
    turned = u[:, kept].T @ (target[used] / lengths[used]) / (s[kept] ** 2 + ridge * s[kept].max(initial=0) ** 2)
    shares = np.zeros(len(chi))
    shares[used] = u[:, kept] @ turned / lengths[used]
    return Solution(v[kept].T @ (s[kept] * turned), shares, used, int(kept.sum()))


def expected_noise(shares: Doubles, errors: Doubles) -> Doubles:
    """What the noise of chi adds to chi x, for an x made from that very chi: the mean of sum_j e_Cj x_j over noise e

        shares_C sum_j error_Cj^2

    with noise that is independent between components.
    """
    added: Doubles = shares * np.square(errors).sum(axis=1)
    return added
