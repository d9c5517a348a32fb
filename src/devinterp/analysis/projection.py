"""Many components on a few axes. Bare arrays only."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def principal_components(values: Floats, count: int = 2) -> tuple[Floats, Floats, Floats]:
    """Principal components by a singular value decomposition of the centred values, U S V^T.

    The sign of each axis is such that its largest weight is positive.

    Args:
        values: shape (rows, columns).
        count: axes wanted.

    Returns:
        Coordinates U S (rows, count), weights V (columns, count), and each axis' share of the variance (count). Zeros for axes
        beyond the rank.
    """
    centred = values - values.mean(axis=0)
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    wanted = min(count, len(s))
    signs = np.sign(v[np.arange(wanted), np.abs(v[:wanted]).argmax(axis=1)])
    coordinates, weights, shares = np.zeros((len(values), count)), np.zeros((values.shape[1], count)), np.zeros(count)
    coordinates[:, :wanted] = u[:, :wanted] * s[:wanted] * signs
    weights[:, :wanted] = v[:wanted].T * signs
    shares[:wanted] = s[:wanted] ** 2 / max(float((s**2).sum()), np.finfo(float).tiny)
    return coordinates, weights, shares
