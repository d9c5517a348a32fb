"""Influences against double loops, closed forms and devinterp 2.0.1."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from cases import TinyLM, Weights, random_tokens, rows
from naive import correlation, covariance, loss_traces, sequence_influences, token_influences

import devinterp
from devinterp.errors import ChainsUnusable, DevinterpInputError, StoreError

SHORT = {"lr": 1e-3, "n_beta": 20.0, "localization": 5.0, "batch_size": 3, "num_draws": 15, "num_chains": 2,
         "num_init_loss_batches": 1, "progress": False}  # fmt: skip
DATA, OTHER = random_tokens(), random_tokens(40, seed=9)
OBSERVABLES = {"b": (DATA, 1), "a-b": (OTHER, 2)}  # stored as b and a_b: six sequences and three, sorted a_b first


@pytest.fixture(scope="module")
def samples():
    return devinterp.sample(TinyLM(), DATA, OBSERVABLES, **SHORT).to_dataset().load()


@pytest.mark.parametrize("reduce", ["stack", "mean"])
@pytest.mark.parametrize("compute_covariance", [False, True])
def test_token_influences_against_a_double_loop(samples, reduce, compute_covariance):
    chosen = {"reduce_chain_dimension_method": reduce, "compute_covariance": compute_covariance, "progress": False}
    traces = loss_traces(samples, ["a_b", "b"], reduce)
    expected = token_influences(traces, range(9), range(9), covariance if compute_covariance else correlation)
    for batch_size in (1, 4, 32):
        result = devinterp.compute_bif(samples, batch_size=batch_size, **chosen)
        assert result.influences.dims == ("batch_1", "batch_2", "target_position", "target_position_T")
        scale = np.abs(expected).max()
        np.testing.assert_allclose(result.influences, expected, atol=2e-6 * scale, rtol=2e-5)
    assert result.target_position.values.tolist() == [1, 2, 3, 4, 5]
    assert result.attrs["observables"] == {"a_b": 0, "b": 6}
    np.testing.assert_array_equal(result.input_ids[:6], samples.input_ids_a_b)
    averaged = devinterp.compute_bif(samples, average_tokenwise_bif=True, **chosen)
    np.testing.assert_allclose(averaged.influences, expected.mean((2, 3)), atol=2e-6 * scale)
    reversed_sign = devinterp.compute_bif(samples, average_tokenwise_bif=True, sign="bif", **chosen)
    np.testing.assert_array_equal(reversed_sign.influences, -averaged.influences)


@pytest.mark.parametrize("reduce", ["stack", "mean"])
@pytest.mark.parametrize("compute_covariance", [False, True])
def test_sequence_influences_against_a_double_loop(samples, reduce, compute_covariance):
    result = devinterp.compute_bif(samples, correlation_method="sequence", reduce_chain_dimension_method=reduce, batch_size=4,
                                   compute_covariance=compute_covariance, progress=False)  # fmt: skip
    measure = covariance if compute_covariance else correlation
    expected = sequence_influences(loss_traces(samples, ["a_b", "b"], reduce), range(9), range(9), measure)
    assert result.influences.dims == ("batch_1", "batch_2")
    np.testing.assert_allclose(result.influences, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())


def test_ranges_keys_and_traces_that_do_not_fit_in_memory(samples, monkeypatch):
    whole = devinterp.compute_bif(samples, progress=False)
    chosen = {"batch_index_range_1": [7, 0, 7], "batch_index_range_2": range(1, 4), "progress": False}
    part = devinterp.compute_bif(samples, **chosen)
    np.testing.assert_allclose(part.influences, whole.influences[[7, 0, 7]][:, 1:4], atol=1e-6)
    assert part.batch_1.values.tolist() == [7, 0, 7]
    swapped = devinterp.compute_bif(samples, loss_keys=["b", "a-b"], progress=False)
    order = [6, 7, 8, 0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(swapped.influences, whole.influences[order][:, order], atol=1e-6)
    only = devinterp.compute_bif(samples, loss_keys=["b"], progress=False)
    np.testing.assert_allclose(only.influences, whole.influences[6:, 6:], atol=1e-6)
    monkeypatch.setattr("devinterp.slt.bif_blocks.BLOCK_BYTES", 400)
    tight = devinterp.compute_bif(samples, **chosen)
    np.testing.assert_allclose(tight.influences, part.influences, atol=1e-6)


def test_queries_are_columns_of_the_whole(samples):
    whole = devinterp.compute_bif(samples, progress=False).influences
    few = devinterp.compute_bif(samples, queries=[(8, 5), (0, 1)], batch_size=2, progress=False)
    assert few.influences.dims == ("query", "batch_1", "target_position")
    np.testing.assert_allclose(few.influences[0], whole[:, 8, :, 4], atol=1e-6)
    np.testing.assert_allclose(few.influences[1], whole[:, 0, :, 0], atol=1e-6)
    assert few.query_target_position.values.tolist() == [5, 1]
    sequences = devinterp.compute_bif(samples, correlation_method="sequence", queries=[3], progress=False)
    all_sequences = devinterp.compute_bif(samples, correlation_method="sequence", progress=False)
    np.testing.assert_allclose(sequences.influences[0], all_sequences.influences[:, 3], atol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 32])
def test_top_k_against_sorting_everything(samples, batch_size):
    samples, rng = samples.copy(deep=True), np.random.default_rng(0)
    for name in ("loss_b", "loss_a_b"):  # equal tokens of the tiny model have equal losses: no ties here
        samples[name][:] = rng.standard_normal(samples[name].shape)
    matrix = devinterp.compute_bif(samples, progress=False).influences.values.transpose(0, 2, 1, 3).reshape(45, 45)
    upper = [(abs(matrix[i, j]), i, j) for i in range(45) for j in range(i + 1, 45)]
    best = sorted(upper, reverse=True)[:7]
    result = devinterp.compute_bif(samples, top_k=7, batch_size=batch_size, progress=False)
    np.testing.assert_allclose(np.abs(result.influences), [size for size, _, _ in best], atol=1e-6)
    found = set(zip((result.batch_1 * 5 + result.target_position - 1).values.tolist(),
                    (result.batch_2 * 5 + result.target_position_T - 1).values.tolist(), strict=True))  # fmt: skip
    assert found == {(i, j) for _, i, j in best}
    for pair in range(7):
        one = result.isel(pair=pair)
        assert int(one.token) == int(result.input_ids[int(one.batch_1), int(one.target_position)])
        assert int(one.token_T) == int(result.input_ids[int(one.batch_2), int(one.target_position_T)])
    per_query = devinterp.compute_bif(samples, queries=[(3, 2)], top_k=44, progress=False)
    column = np.delete(matrix[:, 16], 16)
    np.testing.assert_allclose(np.abs(per_query.influences[0]), np.sort(np.abs(column))[::-1], atol=1e-6)
    assert per_query.influences.dims == ("query", "rank")
    repeated = devinterp.compute_bif(samples, batch_index_range_1=[1, 0, 1], top_k=2000, progress=False)
    assert len(set(zip(*(repeated[name].values.tolist() for name in
                         ("batch_1", "target_position", "batch_2", "target_position_T")), strict=True))) == repeated.sizes["pair"]  # fmt: skip
    of_sequences = devinterp.compute_bif(samples, correlation_method="sequence", top_k=100, progress=False)
    assert of_sequences.sizes["pair"] == 9 * 8 / 2
    assert "token" not in of_sequences


def test_constant_traces_are_nan_and_counted_without_a_word(samples):
    changed = samples.copy(deep=True)
    changed["loss_b"][:, :, 1, 2] = 0.37
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = devinterp.compute_bif(changed, progress=False)
    assert result.attrs["constant_traces"] == 1
    values = result.influences.values
    assert np.isnan(values[7, :, 2]).all()
    assert np.isnan(values[:, 7, :, 2]).all()
    assert np.isnan(values).sum() == 2 * 45 - 1
    zero = devinterp.compute_bif(changed, compute_covariance=True, progress=False)
    assert (zero.influences[7, :, 2] == 0).all()
    strongest = devinterp.compute_bif(changed, top_k=2000, progress=False)
    assert strongest.sizes["pair"] == 44 * 43 / 2


def test_centring_by_chain_leaves_out_differences_of_level(samples):
    shifted = samples.copy(deep=True)
    for name in ("a_b", "b"):
        shifted[f"loss_{name}"][1] += 3.0
    mixed = devinterp.compute_bif(shifted, compute_covariance=True, progress=False).influences
    assert (mixed > 1).all(), "both chains' levels dominate"
    options = {"center": "chain", "compute_covariance": True, "progress": False}
    by_chain = devinterp.compute_bif(shifted, **options)
    np.testing.assert_allclose(by_chain.influences, devinterp.compute_bif(samples, **options).influences, atol=1e-6)
    traces = loss_traces(samples, ["a_b", "b"]).reshape(9, 5, 2, 15)
    centred = (traces - traces.mean(-1, keepdims=True)).reshape(9, 5, 30)
    np.testing.assert_allclose(by_chain.influences[2, 7, 1, 3], (centred[2, 1] * centred[7, 3]).sum() / 28, rtol=1e-4)


def test_closed_form_on_a_quadratic():
    """Losses l_i = w'A_i w/2 + b_i'w under a Gaussian of covariance S: Cov = b_i'S b_j + tr(A_i S A_j S)/2."""
    generator = torch.Generator().manual_seed(0)
    d, n, n_beta, gamma = 4, 5, 40.0, 10.0
    half = torch.randn(n, d, d, generator=generator) / d**0.5
    quadratic, slopes = half @ half.transpose(1, 2), torch.randn(n, d, generator=generator)
    slopes -= slopes.mean(0)  # the minimum of the mean loss is at 0

    def loss_fn(model, ids):
        w, i = model.w, ids[:, 0]
        return (0.5 * torch.einsum("d,ide,e->i", w, quadratic[i], w) + slopes[i] @ w)[:, None]

    chains, draws = 4, 1000
    samples = devinterp.sample(
        Weights(torch.zeros(d)), rows(n), {"rows": (rows(n), 1)}, loss_fn=loss_fn, lr=0.015, n_beta=n_beta, localization=gamma,
        sampling_method="leimkuhler_matthews", batch_size=n, num_chains=chains, num_draws=draws,
        num_burnin_steps=100, num_init_loss_batches=1, progress=False,
    )  # fmt: skip
    order = samples.input_ids_rows[:, 0].values
    S = torch.linalg.inv(n_beta * quadratic.mean(0) + gamma * torch.eye(d))
    A, b = quadratic[order], slopes[order]
    linear = torch.einsum("id,de,je->ij", b, S, b)
    square = 0.5 * torch.einsum("iab,bc,jcd,da->ij", A, S, A, S)
    truth = (linear + square).numpy()
    ds = samples.to_dataset().load()

    def covariances(ds):
        return devinterp.compute_bif(ds, compute_covariance=True, progress=False).influences.values[:, :, 0, 0]

    spread = [covariances(ds.isel(draw=slice(start, start + 100))) for start in range(0, draws, 100)]
    error = np.std(spread, axis=0, ddof=1) / len(spread) ** 0.5
    z = (covariances(ds) - truth) / error
    assert np.abs(z).max() < 6, z  # ten batches: Student's t with 9 degrees of freedom
    assert (np.abs(truth) / error).max() > 20, "the test can tell a wrong value"


def test_a_result_larger_than_memory_is_written_block_by_block(samples, tmp_path):
    in_memory = devinterp.compute_bif(samples, progress=False)
    written = devinterp.compute_bif(samples, output_path=tmp_path / "bif", batch_size=2, progress=False)
    xr.testing.assert_allclose(written.load(), in_memory, atol=1e-6)
    assert written.attrs["observables"] == {"a_b": 0, "b": 6}
    plain = xr.open_datatree(tmp_path / "bif", engine="zarr", consolidated=False).to_dataset()
    xr.testing.assert_identical(plain.load(), written.load())
    with pytest.raises(DevinterpInputError, match="Something is there; nothing was changed"):
        devinterp.compute_bif(samples, output_path=tmp_path / "bif")
    assert [p.name for p in tmp_path.iterdir()] == ["bif"]


def test_a_result_that_breaks_off_leaves_nothing_behind(samples, tmp_path, monkeypatch):
    broken = samples.copy(deep=True)
    broken["loss_b"][0, 0, 2, 0] = np.inf
    with pytest.raises(StoreError, match="not finite"):
        devinterp.compute_bif(broken, output_path=tmp_path / "bif", batch_size=2, progress=False)
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, sys
import numpy as np, xarray as xr
import devinterp

rng = np.random.default_rng(0)
def run_of(count, length):
    ds = xr.Dataset(
        {
            "loss_x": (("chain", "draw", "batch_x", "token_pos"), rng.standard_normal((2, 20, count, length), dtype=np.float32)),
            "input_ids_x": (("batch_x", "token"), np.zeros((count, length + 1), dtype=np.int64)),
            "sampling_loss": (("chain", "draw", "batch", "token_pos"), np.zeros((2, 20, 1, length), dtype=np.float32)),
            "init_loss": (("chain", "token_pos"), np.zeros((2, length), dtype=np.float32)),
            "chain_status": ("chain", np.ones(2, dtype=np.int8)),
        },
        attrs={"metadata": {"config": {"sampler": {}, "observables": [{"obs_id": "x"}]}}},
    )
    return ds
devinterp.compute_bif(run_of(4, 50), output_path=sys.argv[1] + "/small", errors=True, progress=False)  # libraries, threads
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
limit = used * 1024 + 320 * 2**20  # a block of 32 MiB exists up to six times on its way to the disk
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
large = run_of(110, 99)  # 474 MB of influences
try:
    devinterp.compute_bif(large, progress=False)
    print("fits")
except MemoryError:
    print("does not fit")
result = devinterp.compute_bif(large, output_path=sys.argv[1] + "/large", progress=False)
print(result.influences.nbytes, float(result.influences[7, 7, 3, 3]))
result = devinterp.compute_bif(run_of(60, 99), output_path=sys.argv[1] + "/errors", errors=True, progress=False)
print(float(result.influences_sem[7, 8, 3, 3]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is Linux's")
def test_memory_stays_under_an_imposed_limit(tmp_path):
    """250 MB for a result of 474 MB: in memory it fails, block by block it succeeds."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.split("\n")
    assert lines[0] == "does not fit"
    size, diagonal = lines[1].split()
    assert int(size) == 110**2 * 99**2 * 4
    assert float(diagonal) == pytest.approx(1.0, abs=1e-5)
    assert 0.08 < float(lines[2]) < 0.3, "about 1/sqrt(40) of noise"


def test_bif_in_one_call_is_compute_of_sample(samples):
    whole = devinterp.bif(TinyLM(), DATA, OBSERVABLES, correlation_method="sequence", compute_covariance=True, bif_batch_size=2,
                          **SHORT)  # fmt: skip
    again = devinterp.compute_bif(samples, correlation_method="sequence", compute_covariance=True, progress=False)
    np.testing.assert_allclose(whole.influences, again.influences, rtol=1e-5, atol=1e-9)


BAD = [
    ({"correlation_method": "tokens"}, "correlation_method='tokens'.*Did you mean 'token'"),
    ({"reduce_chain_dimension_method": "sum"}, "reduce_chain_dimension_method='sum'"),
    ({"loss_keys": ["nope"]}, r"loss_keys=\['nope'\].*\['b', 'a_b'\]"),
    ({"loss_keys": []}, "loss_keys"),
    ({"loss_keys": ["b", "b"]}, "different names"),
    ({"loss_keys": "b"}, "loss_keys='b'"),
    ({"batch_index_range_1": [9]}, r"batch_index_range_1=\[9\].*\[0, 8\]"),
    ({"batch_index_range_2": [-1]}, "batch_index_range_2"),
    ({"batch_index_range_2": []}, "batch_index_range_2"),
    ({"batch_index_range_2": [0.5]}, "batch_index_range_2"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"compute_covariance": 1}, "compute_covariance=1"),
    ({"average_tokenwise_bif": True, "correlation_method": "sequence"}, "average_tokenwise_bif"),
    ({"device": "cuda:99"}, "device='cuda:99'"),
    ({"center": "none"}, "center"),
    ({"sign": "minus"}, "sign"),
    ({"queries": [(0, 6)]}, r"queries=\[\(0, 6\)\].*\[1, 5\]"),
    ({"queries": [(0, 0)]}, "counts from 1"),
    ({"queries": [3]}, "pairs"),
    ({"queries": []}, "queries"),
    ({"queries": [(0, 1)], "correlation_method": "sequence"}, "queries"),
    ({"queries": [(0, 1)], "average_tokenwise_bif": True}, "queries"),
    ({"queries": [(0, 1)], "batch_index_range_2": [0]}, "queries"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_k": True}, "top_k=True"),
    ({"on_diverged": "record"}, "on_diverged"),
    ({"output_path": "s3://bucket"}, "output_path"),
    ({"output_path": __file__}, "output_path"),
    ({"output_path": "new", "top_k": 3}, "output_path='new'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_options(samples, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DevinterpInputError, match=f"(?s){message}"):
        devinterp.compute_bif(samples, **options)
    assert not list(tmp_path.iterdir())


AHEAD = [
    ({"correlation_method": "x"}, "correlation_method"),
    ({"loss_keys": ["nope"]}, "loss_keys"),
    ({"queries": [(99, 1)]}, "queries"),
    ({"batch_index_range_1": [9]}, "batch_index_range_1"),
    ({"bif_device": "meta"}, "device='meta'"),
    ({"num_draws": 1, "num_chains": 1}, "Sample more draws"),
    ({"num_draws": 1, "center": "chain"}, "Sample more draws"),
    ({"output_path": "same", "bif_output_path": "same"}, "two stores"),
    ({"observables": {}}, "observables"),
]


@pytest.mark.parametrize(("change", "message"), AHEAD, ids=[str(list(a[0]))[:30] for a in AHEAD])
def test_bif_checks_everything_before_the_run(change, message, tmp_path, monkeypatch):
    def never(model, ids):
        raise AssertionError("a forward pass ran")

    monkeypatch.chdir(tmp_path)
    arguments = {"observables": OBSERVABLES, "loss_fn": never} | SHORT | change
    with pytest.raises((DevinterpInputError, StoreError), match=message):
        devinterp.bif(TinyLM(), DATA, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_result_too_large_for_memory_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 60)  # 3,600 bytes: enough for a chain
    with pytest.raises(MemoryError, match="Pass output_path"):
        devinterp.bif(TinyLM(), DATA, OBSERVABLES, loss_fn=lambda *_: 1 / 0, **SHORT)


def test_samples_that_cannot_be_used(samples):
    with pytest.raises(StoreError, match="hold no observables"):
        devinterp.compute_bif(samples.drop_vars(["loss_b", "loss_a_b"]))
    with pytest.raises(StoreError, match="no run metadata"):
        devinterp.compute_bif(samples.drop_attrs())
    with pytest.raises(StoreError, match="1 observations.*more draws"):
        devinterp.compute_bif(samples.isel(chain=[0], draw=[0]))
    with pytest.raises(StoreError, match="in 2 group"):
        devinterp.compute_bif(samples.isel(draw=[0]), center="chain")
    diverged = samples.assign(chain_status=("chain", [1, 2]))
    with pytest.raises(ChainsUnusable, match="1 .diverged"):
        devinterp.compute_bif(diverged)
    dropped = devinterp.compute_bif(diverged, on_diverged="drop", progress=False)
    alone = devinterp.compute_bif(samples.isel(chain=[0]), progress=False)
    np.testing.assert_array_equal(dropped.influences, alone.influences)
    assert dropped.attrs["dropped_chains"] == [1]
