"""What devinterp 2.0.1 computed from its own stores (tests/data/make_suite_2_0_1.py), computed here from the same stores.

Deliberate differences, none of which touches these numbers: a baseline on the sampling task's own tokens (its stores have
none), and influences that are NaN for constant traces.
"""

from pathlib import Path

import numpy as np
import pytest

import devinterp

FOLDER = Path(__file__).parent / "data" / "suite_2_0_1"


@pytest.fixture(scope="module")
def theirs():
    return np.load(FOLDER / "computed.npz")


@pytest.mark.parametrize("method", ["token", "sequence"])
@pytest.mark.parametrize("reduce", ["stack", "mean"])
@pytest.mark.parametrize("covariance", [False, True])
def test_influences(theirs, method, reduce, covariance):
    ours = devinterp.compute_bif(FOLDER / "full", correlation_method=method, reduce_chain_dimension_method=reduce,
                                 compute_covariance=covariance, progress=False)  # fmt: skip
    expected = theirs[f"{method} {reduce} {covariance}"]
    np.testing.assert_allclose(ours.influences, expected, rtol=0, atol=1e-5 * min(1.0, np.abs(expected).max()))
    np.testing.assert_array_equal(ours.input_ids, theirs["bif input_ids"])


def test_averaged_influences_and_ranges(theirs):
    averaged = devinterp.compute_bif(FOLDER / "full", average_tokenwise_bif=True, progress=False)
    np.testing.assert_allclose(averaged.influences, theirs["average"], atol=1e-5)
    part = devinterp.compute_bif(FOLDER / "full", loss_keys=["pile", "b"], batch_index_range_1=[4, 0],
                                 batch_index_range_2=[8, 1, 2], progress=False)  # fmt: skip
    np.testing.assert_allclose(part.influences, theirs["ranges"], atol=1e-5)
    assert part.batch_1.values.tolist() == [4, 0]


def test_susceptibilities(theirs):
    runs = {name: FOLDER / name for name in ("full", "mix")}
    ours = devinterp.compute_susceptibilities(runs, "pile", include_sampling_task=True)
    sus = ours["susceptibilities"].to_dataset()
    np.testing.assert_allclose(sus.sus, theirs["sus"], atol=1e-5 * np.abs(theirs["sus"]).max())
    for name in ("dataset_id", "batch", "target_position"):
        np.testing.assert_array_equal(sus[name], theirs[name])
    for name in ("input_ids", "position"):
        np.testing.assert_array_equal(ours["context"][name], theirs[name])
    assert sus.attrs["dataset_id_to_name"] == ["a_b", "b", "pile"]
