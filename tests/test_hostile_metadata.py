"""Attributes and arrays of any kind and shape end in a result or in one of our errors, never in another."""

import copy
import io
import shutil
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import xarray as xr
from forged import HOSTILE, edit, finished, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import devinterp
from devinterp.cli.printing import print_chains, print_settings, print_summary
from devinterp.errors import DevinterpError, InputTypeError, RunMismatchError, StoreError
from devinterp.store.reader import open_store

NAN, INFINITY = float("nan"), float("inf")
JUNK = [None, True, "", "many", HOSTILE, NAN, INFINITY, -1, 10**400, 1e400, [], [1], {}, {"a": 1}, [[]], [{}], [{"obs_id": 1}]]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["obs_id", "lr", "way", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@cache
def samples() -> xr.Dataset:
    with TemporaryDirectory() as folder:
        return open_store(finished(Path(folder))).to_dataset().load()


@cache
def places() -> list[tuple[Any, ...]]:
    """Every place in the metadata of a run, and some where nothing is."""

    def inside(value: Any, path: tuple[Any, ...]):
        yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield from inside(inner, (*path, key))

    return [*inside(samples().attrs["metadata"], ()), ("new",), ("config", "sampler", "\x1b[2J"), ("step_size", "new")]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]] if len(path) > 1 else None, path[1:], new)
    return value


def analysed(ds: xr.Dataset) -> list[str]:
    """All that is computed and printed from one run, or the errors."""
    tree, said = xr.DataTree(ds), []

    def show() -> str:
        text = io.StringIO()
        with redirect_stdout(text):
            result = devinterp.compute_llc(tree)
            print_settings(tree)
            print_chains(tree)
            print_summary(tree, result)
        assert "\x1b" not in text.getvalue()
        return text.getvalue()

    calls = [
        show,
        lambda: str(devinterp.compute_llc(ds)),
        lambda: str(devinterp.compute_bif(ds, progress=False)),
        lambda: str(devinterp.compute_bif(ds, top_k=3, progress=False)),
        lambda: str(devinterp.compute_susceptibilities({"full": samples(), "part": ds}, "code")),
        lambda: str(devinterp.compute_susceptibilities({"part": ds}, "code", estimator="one_chain")),
    ]
    for call in calls:
        try:
            said.append(call())
        except DevinterpError as error:
            said.append(f"{type(error).__name__}: {error}")
    assert not any("\x1b" in text for text in said)
    return said


def test_an_unchanged_run_is_analysed():
    said = analysed(samples())
    assert sum("Error" in text for text in said) == 1  # the full run and a part with the same masks


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.data())
def test_any_value_at_any_place_of_the_metadata(data):
    path = data.draw(st.sampled_from(places()))
    new = data.draw(st.sampled_from(JUNK) | json_values)
    ds = samples().assign_attrs(metadata=replaced(samples().attrs["metadata"], path, new))
    assert len(analysed(ds)) == 6


USED = [("config",), ("config", "sampler"), ("config", "sampler", "n_beta"), ("config", "sampler", "localization"),
        ("config", "observables"), ("config", "observables", 0), ("config", "observables", 0, "obs_id"), ("identity",),
        ("step_size",), ("step_size", "lr"), ("computed",), ("computed", "way"), ("computed", "threads"), ("model",)]  # fmt: skip


@pytest.mark.parametrize("path", USED, ids=lambda path: ".".join(map(str, path)))
def test_what_an_analysis_uses_is_refused_with_its_name(path):
    ds = samples().assign_attrs(metadata=replaced(samples().attrs["metadata"], path, ["\x1b", NAN]))
    with pytest.raises(
        StoreError, match=path[-1] if isinstance(path[-1], str) and path != ("config",) else "metadata"
    ) as caught:
        devinterp.compute_bif(ds, progress=False)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("stored", [NAN, INFINITY, -1.0, "30", True, None, [], {}, 10**400])
def test_an_n_beta_that_is_no_number(stored):
    ds = samples().drop_vars("n_beta")
    ds.attrs["metadata"] = replaced(ds.attrs["metadata"], ("config", "sampler", "n_beta"), stored)
    with pytest.raises(StoreError, match="n_beta"):
        devinterp.compute_llc(ds)
    if isinstance(stored, float):
        with pytest.raises(StoreError, match="n_beta"):
            devinterp.compute_llc(samples().assign(n_beta=stored))


ARRAYS = {
    "no chain": lambda ds: ds.isel(chain=0),
    "no draw": lambda ds: ds.isel(draw=[]),
    "no tokens": lambda ds: ds.drop_vars("sampling_loss"),
    "whole numbers": lambda ds: ds.assign(sampling_loss=ds.sampling_loss.astype(int)),
    "complex": lambda ds: ds.assign(loss_code=ds.loss_code.astype(complex)),
    "another dim": lambda ds: ds.rename(batch_code="elsewhere"),
    "init_loss without dims": lambda ds: ds.assign(init_loss=1.0),
    "status of another dim": lambda ds: ds.assign(chain_status=("draw", np.ones(3, dtype=int))),
    "status 7": lambda ds: ds.assign(chain_status=("chain", [7, 1])),
    "status -1": lambda ds: ds.assign(chain_status=("chain", [-1, 1])),
    "float ids": lambda ds: ds.assign(input_ids_code=ds.input_ids_code.astype(float)),
    "too few ids": lambda ds: ds.isel(token=slice(0, 3)),
    "n_beta of two": lambda ds: ds.assign(n_beta=("two", [1.0, 2.0])),
    "n_beta a text": lambda ds: ds.assign(n_beta="3"),
    "baseline without batch": lambda ds: ds.assign(baseline_loss=ds.baseline_loss.mean("batch")),
    "init_loss_code transposed wrongly": lambda ds: ds.assign(init_loss_code=ds.init_loss_code.isel(batch_code=0)),
    "ids a number": lambda ds: ds.assign(input_ids_code=3),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_another_form(name):
    said = analysed(ARRAYS[name](samples()))
    assert any(text.startswith(("StoreError", "InputValueError")) for text in said), said


ON_DISK = [
    {"scale_factor": "x"}, {"scale_factor": [1, 2]}, {"add_offset": {}}, {"units": "days since \x1b[2J"},
    {"units": "days since 1900-01-01", "calendar": "none"}, {"_FillValue": []}, {"_FillValue": "????"}, {"missing_value": {}},
    {"dtype": "M8[ns]"}, {"dtype": "object"}, {"coordinates": 3}, {"coordinates": "\x1b"}, {"grid_mapping": ["x"]},
    {"_Unsigned": "true"}, {"dtype": "bool"}, {"units": 3}, {"flag_meanings": 7, "flag_values": "x"},
]  # fmt: skip


@pytest.mark.parametrize("attributes", ON_DISK, ids=str)
@pytest.mark.parametrize("array", ["sampling_loss", "draw", "input_ids_code"])
def test_attributes_that_xarray_acts_on(tmp_path, attributes, array):
    store = finished(tmp_path)
    edit(store / array, lambda declared: declared["attributes"].update(attributes))
    try:
        ds = open_store(store).to_dataset()
    except StoreError as error:
        assert "_FillValue" in attributes, error  # noqa: PT017
        return
    assert ds[array].variable.equals(samples()[array].variable) or ds[array].dtype == bool
    assert len(analysed(ds)) == 6


@pytest.mark.parametrize("change", [
    lambda metadata: metadata.pop("step_size"), lambda metadata: metadata.pop("computed"),
    lambda metadata: metadata["computed"].update(threads=10**9), lambda metadata: metadata.update(identity=3),
    lambda metadata: metadata["identity"].update({HOSTILE: HOSTILE}),
], ids=range(5))  # fmt: skip
def test_a_run_is_not_gone_on_with_in_a_forged_store(tmp_path, change):
    store = finished(tmp_path)
    edit(store, lambda declared: (change(declared["attributes"]["metadata"]), declared["attributes"].update(completed=0)))
    with pytest.raises(DevinterpError) as caught:
        run(store)
    assert "\x1b" not in str(caught.value)


def test_a_store_of_other_sizes_is_not_gone_on_with(tmp_path):
    store, other = finished(tmp_path), tmp_path / "other"
    run(other, num_draws=5)
    declared = (store / "zarr.json").read_text()
    (other / "zarr.json").write_text(declared)
    with pytest.raises(RunMismatchError, match="num_draws: stored 5, asked 3"):  # its own folder knows better
        run(other)
    shutil.rmtree(tmp_path / "other.run")
    with pytest.raises(StoreError, match="has the sizes {'draw': 5"):
        run(other)


@pytest.mark.parametrize("path", [3, None, b"run", 1.5])
def test_paths_that_are_none(path):
    with pytest.raises(InputTypeError, match="must be"):
        open_store(path)
