"""Stores in other forms hold the same numbers, and give the same estimates."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray as xr
from cases import GOOD, TinyLM, random_tokens

import devinterp
from devinterp.errors import ChainsUnusable, InputValueError, PackageMissing, StoreError
from devinterp.slt.conversion import convert
from devinterp.store.reader import open_store

OLD_STORE = Path(__file__).parent / "data" / "store_2_0_1"


@pytest.fixture(scope="module", params=[True, False], ids=["shared batches", "own batches"])
def run(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = GOOD | {"num_draws": 5, "batches_per_draw": 2, "match_sampling_input_ids_across_chains": request.param}
    devinterp.sample(TinyLM(), random_tokens(), {"a": random_tokens(seed=1)}, output_path=path, **settings)
    return path


def test_a_table_gives_the_llcs(run, tmp_path):
    table = pq.read_table(convert(run, tmp_path / "run.parquet"))
    columns = {name: column.to_numpy() for name, column in zip(table.column_names, table.columns, strict=True)}
    assert table.num_rows == 10
    assert list(zip(columns["chain"], columns["draw"], strict=True)) == [(c, d) for c in range(2) for d in range(5)]
    result = devinterp.compute_llc(run)
    excess = columns["n_beta"] * (columns["sampling_loss"] - columns["baseline_loss"])
    np.testing.assert_allclose(excess.reshape(2, 5).mean(axis=1), result.llc_per_chain, rtol=1e-9)
    on_a = columns["n_beta"] * (columns["loss_a"] - columns["init_loss_a"])
    np.testing.assert_allclose(on_a.mean(), result.llc_observable.item(), rtol=1e-5)
    stored = json.loads(table.schema.metadata[b"devinterp"])
    assert stored["config"]["sampler"]["n_beta"] == GOOD["n_beta"]


def has_r() -> bool:
    return (
        shutil.which("Rscript") is not None
        and subprocess.run(["Rscript", "-e", "library(ncdf4)"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not has_r(), reason="R with ncdf4 is not installed")
def test_the_r_code_of_the_docs_gives_our_llc(run, tmp_path):
    pytest.importorskip("h5netcdf")
    convert(run, tmp_path / "step10000.nc")
    page = (Path(__file__).parent.parent / "docs" / "other_languages.md").read_text()
    code = next(block for block in re.findall(r"```r\n(.*?)```", page, re.DOTALL) if "nc_open" in block)
    done = subprocess.run(["Rscript", "-e", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    values = [float(part) for part in done.stdout.split() if not part.startswith("[")]
    np.testing.assert_allclose(values, devinterp.compute_llc(run).llc_per_chain, rtol=1e-6, err_msg=done.stderr)


def test_netcdf_holds_every_variable(run, tmp_path):
    pytest.importorskip("h5netcdf")
    with xr.open_dataset(convert(run, tmp_path / "run.nc"), engine="h5netcdf") as found:
        stored = open_store(run).to_dataset()
        assert set(found.variables) == set(stored.variables)
        for name, variable in stored.variables.items():
            assert found[name].dims == variable.dims
            np.testing.assert_array_equal(found[name].values, variable.values, err_msg=str(name))
        assert found.sampling_loss.attrs["units"] == "nats"
        assert json.loads(found.attrs["metadata"]) == stored.attrs["metadata"]


def test_a_store_of_2_0_in_todays_layout_gives_the_same_estimates(tmp_path):
    path, old = convert(OLD_STORE, tmp_path / "new"), open_store(OLD_STORE).to_dataset()
    new = open_store(path).to_dataset()
    assert set(new.variables) == {"chain", "draw", "step", "token_pos", "n_beta", "init_loss", "sampling_loss", "step_loss",
                                  "chain_status", "diverged_at", "loss_a_b", "input_ids_a_b"}  # fmt: skip
    assert new.attrs["completed"] == 1
    assert new.step.values.tolist() == list(range(1, 14))
    np.testing.assert_allclose(new.step_loss, old.sampling_loss_micro.mean(["batch_sampling", "token_pos"]), rtol=1e-6)
    np.testing.assert_array_equal(new.input_ids_a_b, old.input_ids_a_b)
    one, other = devinterp.compute_llc(OLD_STORE), devinterp.compute_llc(path)
    for name in ("llc_mean", "llc_sem", "rhat", "excess_trace"):
        np.testing.assert_array_equal(one[name], other[name])
    influences = [devinterp.compute_bif(store, progress=False).influences for store in (OLD_STORE, path)]
    np.testing.assert_array_equal(*influences)
    assert not devinterp.verify(path).damaged
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"
    assert pq.read_table(convert(OLD_STORE, tmp_path / "old.parquet")).column_names == [
        "chain", "draw", "n_beta", "sampling_loss", "init_loss", "loss_a_b",
    ]  # fmt: skip


def test_what_is_refused(run, tmp_path, monkeypatch):
    def refused(kind, message, store, name):
        with pytest.raises(kind, match=message):
            convert(store, tmp_path / name)
        assert not list(tmp_path.iterdir()), "a file was made"

    refused(InputValueError, "ends in one of", run, "run.csv")
    refused(InputValueError, "made by devinterp 2.0", run, "run.zarr")
    refused(StoreError, "is not a store", tmp_path, "run.parquet")
    monkeypatch.setitem(__import__("sys").modules, "h5netcdf", None)
    refused(PackageMissing, r"devinterp\[netcdf\]", run, "run.nc")
    monkeypatch.setattr("devinterp.slt.conversion.status_of_chains", _unfinished)
    refused(ChainsUnusable, "not finished", run, "run.parquet")


def _unfinished(_):
    raise ChainsUnusable("chains [0] are not finished.")
