"""Clusters of sequences whose influences are alike. Bare arrays only."""

import numpy as np
import numpy.typing as npt


def clusters_of(matrix: npt.NDArray[np.floating], count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hierarchical clustering by average linkage of the distances 1 - r; entries that are not known count as r = 0.

    Args:
        matrix: influences, symmetric; scaled by its diagonal, so that covariances become correlations. Shape (n, n).
        count: of clusters, at most; there may be fewer.

    Returns:
        For every row the number of its cluster, and the order of rows that puts clusters side by side and like beside like;
        clusters are numbered in this order.
    """
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    scale = np.sqrt(np.abs(np.diagonal(matrix)).astype(np.float64))
    safe = np.where(scale > 0, scale, np.nan)
    similarity = np.nan_to_num(matrix / safe[:, None] / safe[None, :])
    if len(matrix) < 2:
        return np.zeros(len(matrix), dtype=np.int64), np.arange(len(matrix))
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    order = leaves_list(tree).astype(np.int64)
    found = fcluster(tree, count, "maxclust")
    renamed = {name: number for number, name in enumerate(dict.fromkeys(found[order].tolist()))}
    return np.array([renamed[name] for name in found.tolist()], dtype=np.int64), order
