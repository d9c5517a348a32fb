"""Susceptibilities against draw-by-draw versions, the exact value of a quadratic, and devinterp 2.0.1."""

import numpy as np
import pytest
import torch
import xarray as xr
from cases import TinyLM, Weights, random_tokens, rows
from checks import LIMIT
from naive import susceptibility, susceptibility_error

import devinterp
from devinterp.errors import ChainsUnusable, DevinterpInputError, RunMismatchError, StoreError

SHORT = {"lr": 1e-3, "n_beta": 20.0, "localization": 5.0, "batch_size": 3, "num_draws": 12, "num_chains": 2,
         "num_init_loss_batches": 1, "progress": False}  # fmt: skip
DATA, OTHER = random_tokens(), random_tokens(40, seed=9)
OBSERVABLES = {"pile": (DATA, 2), "b": (OTHER, 1), "a-b": (OTHER, 2)}
MASKS = {"full": None, "mix": {"mix.weight": None, "mix.bias": None}, "out": {"out.weight": None}}


@pytest.fixture(scope="module")
def runs():
    return {
        name: devinterp.sample(TinyLM(), DATA, OBSERVABLES, param_masks=masks, **SHORT).to_dataset().load()
        for name, masks in MASKS.items()
    }


def column(tree: xr.DataTree, wr: str, dataset_id: int, shape: tuple[int, ...], name: str = "sus") -> np.ndarray:
    sus = tree["susceptibilities"].to_dataset()
    return sus[name].sel(wr=wr).values[sus.dataset_id.values == dataset_id].reshape(shape)


@pytest.mark.parametrize("estimator", ["two_chain", "one_chain"])
def test_against_a_draw_by_draw_version(runs, estimator, monkeypatch):
    monkeypatch.setattr("devinterp.store.samples.DRAWS_READ_AT_ONCE", 5)
    tree = devinterp.compute_susceptibilities(runs, "pile", estimator=estimator)
    sus = tree["susceptibilities"].to_dataset()
    assert sus.sus.dims == ("sus_flat", "wr")
    assert sus.wr.values.tolist() == ["mix", "out"]
    assert sus.attrs["dataset_id_to_name"] == ["a_b", "b"]
    for wr in ("mix", "out"):
        for number, (name, count) in enumerate((("a_b", 6), ("b", 3))):
            expected = susceptibility(runs[wr], runs["full"], "pile", name, estimator)
            np.testing.assert_allclose(
                column(tree, wr, number, (count, 5)), expected, rtol=1e-5, atol=1e-8 * np.abs(expected).max()
            )


@pytest.mark.parametrize("estimator", ["two_chain", "one_chain"])
@pytest.mark.parametrize("mean_over", [None, "sequence", "dataset"])
def test_errors_against_one_trace_at_a_time(runs, estimator, mean_over, monkeypatch):
    monkeypatch.setattr("devinterp.slt.suite_errors.READ_BYTES", 1000)  # two sequences
    options = {"estimator": estimator, "mean_over": mean_over}
    sus = devinterp.compute_susceptibilities(runs, "pile", **options)["susceptibilities"].to_dataset()
    assert sus.sus_sem.dims == sus.sus.dims
    over = {None: [], "sequence": ["token_pos"], "dataset": ["token_pos", "batch"]}[mean_over]
    for wr in ("mix", "out"):
        expected = []
        for name in ("a_b", "b"):
            losses = [runs[run][f"loss_{name}"].rename({f"batch_{name}": "batch"}) for run in (wr, "full")]
            means = [loss.mean(over, dtype=np.float64).expand_dims([d for d in ("batch", "token_pos") if d in over])
                     for loss in losses]  # fmt: skip
            for b in range(means[0].sizes["batch"]):
                for t in range(means[0].sizes["token_pos"]):
                    loss, full_loss = (m.isel(batch=b, token_pos=t).transpose("chain", "draw") for m in means)
                    expected.append(susceptibility_error(runs[wr], runs["full"], "pile", loss, full_loss, estimator))
        np.testing.assert_allclose(sus.sus_sem.sel(wr=wr), expected, rtol=1e-4)
    scaled = devinterp.compute_susceptibilities(runs, "pile", standardize=True, **options)["susceptibilities"].to_dataset()
    np.testing.assert_allclose(scaled.sus_sem * scaled.sus_std, sus.sus_sem)
    without = devinterp.compute_susceptibilities(runs, "pile", errors=False, **options)["susceptibilities"].to_dataset()
    xr.testing.assert_equal(without, sus.drop_vars("sus_sem"))


def test_the_table_says_where_each_value_belongs(runs):
    tree = devinterp.compute_susceptibilities(runs, "pile", include_sampling_task=True)
    sus, context = tree["susceptibilities"].to_dataset(), tree["context"].to_dataset()
    assert sus.attrs["dataset_id_to_name"] == context.attrs["dataset_id_to_name"] == ["a_b", "b", "pile"]
    assert sus.sizes["sus_flat"] == (6 + 3 + 6) * 5
    assert context.sizes["ctx_flat"] == (6 + 3 + 6) * 6
    assert sus.target_position.values[:6].tolist() == [1, 2, 3, 4, 5, 1]
    assert sus.batch.values[28:32].tolist() == [5, 5, 0, 0]
    assert context.position.values[:7].tolist() == [0, 1, 2, 3, 4, 5, 0]
    of_b = context.input_ids.values[context.dataset_id.values == 1].reshape(3, 6)
    np.testing.assert_array_equal(of_b, runs["full"].input_ids_b)
    only = devinterp.compute_susceptibilities(runs, "pile", ["b"])["susceptibilities"].to_dataset()
    np.testing.assert_array_equal(only.sus, sus.sus[sus.dataset_id.values == 1])


def test_means_over_sequences_and_observables(runs):
    tokens = devinterp.compute_susceptibilities(runs, "pile")["susceptibilities"].to_dataset()
    sequences = devinterp.compute_susceptibilities(runs, "pile", mean_over="sequence")["susceptibilities"].to_dataset()
    observables = devinterp.compute_susceptibilities(runs, "pile", mean_over="dataset")["susceptibilities"].to_dataset()
    np.testing.assert_allclose(sequences.sus, tokens.sus.values.reshape(9, 5, 2).mean(1), rtol=1e-9)
    assert sequences.batch.values.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert sequences.dataset_id.values.tolist() == [0] * 6 + [1] * 3
    np.testing.assert_allclose(observables.sus[1], tokens.sus.values[30:].mean(0), rtol=1e-9)
    assert observables.dataset_id.values.tolist() == [0, 1]
    assert "target_position" not in sequences.coords


def test_standardising_removes_a_factor_of_each_component(runs):
    tree = devinterp.compute_susceptibilities(runs, "pile", standardize=True)
    sus = tree["susceptibilities"].to_dataset()
    np.testing.assert_allclose(sus.sus.mean("sus_flat"), 0, atol=1e-12)
    np.testing.assert_allclose(sus.sus.std("sus_flat"), 1)
    raw = devinterp.compute_susceptibilities(runs, "pile")["susceptibilities"].to_dataset()
    np.testing.assert_allclose(sus.sus * sus.sus_std + sus.sus_mean, raw.sus)
    assert tree.attrs["standardize"] is True


def test_exact_on_a_quadratic_and_its_sign():
    """One-chain value of a quadratic restricted to some coordinates: tr(H S H S)/2 - (tr(H S A S)/2), at any token's A.

    The two-chain estimator has the same expectation where the whole model is the restriction's own chain.
    """
    generator = torch.Generator().manual_seed(0)
    d, n, n_beta, gamma, moved = 6, 4, 40.0, 10.0, [1, 2, 4]
    half = torch.randn(n, d, d, generator=generator) / d**0.5
    A = half @ half.transpose(1, 2)
    A[0] *= 3

    def loss_fn(model, ids):
        return 0.5 * torch.einsum("d,ide,e->i", model.w, A[ids[:, 0]], model.w)[:, None]

    mask = torch.zeros(d, dtype=torch.bool)
    mask[moved] = True
    chains, draws = 4, 1000
    observables = {"task": (rows(n), 1), "probe": (rows(n), 1)}
    samples = {
        name: devinterp.sample(
            Weights(torch.zeros(d)), rows(n), observables, param_masks={"w": mask}, loss_fn=loss_fn, lr=0.015, n_beta=n_beta,
            localization=gamma, sampling_method="leimkuhler_matthews", batch_size=n, num_chains=chains, num_draws=draws,
            num_burnin_steps=100, num_init_loss_batches=1, progress=False, init_seed=seed,
        ).to_dataset().load()
        for name, seed in (("full", 5), ("some", 6))
    }  # fmt: skip
    for name, ds in samples.items():  # two seeds and one mask: a suite would refuse them
        ds.attrs["metadata"]["identity"] |= {"init_seed": 0, "param_masks": name}
    H = A.mean(0)[moved][:, moved]
    S = torch.linalg.inv(n_beta * H + gamma * torch.eye(3))
    ids = samples["full"].input_ids_probe[:, 0].values
    truth = np.array([0.5 * float(torch.trace(H @ S @ (H - A[i][moved][:, moved]) @ S)) for i in ids])

    def estimates(estimator, full, some, name="sus"):
        tree = devinterp.compute_susceptibilities({"full": full, "some": some}, "task", estimator=estimator)
        return column(tree, "some", 0, (n,), name)

    parts = [slice(start, start + 100) for start in range(0, draws, 100)]
    for estimator in ("one_chain", "two_chain"):
        spread = [estimates(estimator, *(ds.isel(draw=part) for ds in samples.values())) for part in parts]
        error = np.std(spread, axis=0, ddof=1) / len(parts) ** 0.5
        z = (estimates(estimator, *samples.values()) - truth) / error
        assert np.abs(z).max() < 6, z  # ten batches: Student's t with 9 degrees of freedom
        told = estimates(estimator, *samples.values(), "sus_sem")
        assert np.abs((estimates(estimator, *samples.values()) - truth) / told).max() < LIMIT
        assert ((told > 0.5 * error) & (told < 3 * error)).all(), "a wide error hides nothing"
        assert (np.abs(truth) > 8 * error).sum() >= 2, "the test can tell the sign"
    assert truth[list(ids).index(0)] < 0, "the row that the component serves most: expression is negative"


def test_the_sign_on_a_trained_model():
    """What a layer has learned to predict it expresses: negative. What cannot be predicted has nothing to lose: positive."""
    rng = np.random.default_rng(0)
    first, after = rng.integers(0, 5, (2, 256)), rng.integers(0, 5, (3, 256))
    # 0..4 is always followed by itself + 5, which is followed by anything of 0..4
    ids = np.stack([first[0], first[0] + 5, first[1], first[1] + 5, after[0], after[0] + 5], axis=1)
    data = type(DATA).from_dict({"input_ids": ids.tolist()})
    model, tokens = TinyLM(), torch.as_tensor(ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        losses = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:])
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    settings = SHORT | {"lr": "auto", "sampling_method": "leimkuhler_matthews", "n_beta": 100.0, "localization": 10.0,
                        "batch_size": 32, "num_draws": 150, "num_burnin_steps": 50}  # fmt: skip
    tree = devinterp.susceptibilities(
        model, data, {"task": (data, 2), "probe": (data, 2)}, {"full": None, "mix": MASKS["mix"]}, sampling_task="task",
        estimator="one_chain", **settings,
    )  # fmt: skip
    by_position = column(tree, "mix", 0, (64, 5)).mean(0)
    assert (by_position[[0, 2, 4]] < 0).all(), "the second of each pair is predictable"
    assert by_position[[1, 3]].mean() > 0, "the first is not"


def test_one_call_samples_every_restriction_and_goes_on_where_it_stopped(tmp_path, runs):
    path = tmp_path / "suite.zarr"
    whole = devinterp.susceptibilities(TinyLM(), DATA, OBSERVABLES, MASKS, sampling_task="pile", output_path=path, **SHORT)
    expected = devinterp.compute_susceptibilities(runs, "pile")
    xr.testing.assert_equal(whole["susceptibilities"].to_dataset(), expected["susceptibilities"].to_dataset())
    stores = ["suite_full.zarr", "suite_mix.zarr", "suite_out.zarr"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".zarr") == stores
    assert whole.attrs["failed"] == {}

    model, calls = TinyLM(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    devinterp.susceptibilities(model, DATA, OBSERVABLES, MASKS, sampling_task="pile", output_path=path, **SHORT)
    assert not calls, "everything was stored"
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    more = MASKS | {"embed": {"embed.weight": None}}
    devinterp.susceptibilities(model, DATA, OBSERVABLES, more, sampling_task="pile", output_path=path, **SHORT)
    assert calls
    after = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert {file: after[file] for file in before} == before, "only the new restriction was sampled"
    assert {file.relative_to(tmp_path).parts[0] for file in after.keys() - before.keys()} == {
        "suite_embed.zarr",
        "suite_embed.zarr.run",
    }


@pytest.mark.parametrize("method", ["leimkuhler_matthews", "preconditioned_leimkuhler_matthews"])
def test_the_step_size_is_chosen_on_the_whole_model(tmp_path, method):
    chosen = SHORT | {"lr": "auto", "sampling_method": method, "output_path": tmp_path / "suite"}
    first = devinterp.susceptibilities(TinyLM(), DATA, OBSERVABLES, MASKS, sampling_task="pile", **chosen)
    sizes = {
        name: xr.open_datatree(tmp_path / f"suite_{name}", engine="zarr", consolidated=False).attrs["metadata"]["step_size"][
            "lr"
        ]
        for name in MASKS
    }
    assert len(set(sizes.values())) == 1
    again = devinterp.susceptibilities(TinyLM(), DATA, OBSERVABLES, MASKS, sampling_task="pile", **chosen)
    xr.testing.assert_equal(first["susceptibilities"].to_dataset(), again["susceptibilities"].to_dataset())


@pytest.mark.parametrize("kind", ["error", "diverged"])
def test_a_restriction_that_fails_does_not_lose_the_others(kind, tmp_path):
    model = TinyLM()
    reference = model.mix.weight.detach().clone()

    def loss_fn(model, ids):
        losses = torch.nn.functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        # only the chains of "mix" move this weight with the output layer at rest
        if not torch.equal(model.mix.weight, reference) and torch.equal(model.out.weight, out):
            if kind == "error":
                raise MemoryError("out of memory")
            return losses * float("nan")
        return losses

    out = model.out.weight.detach().clone()
    with pytest.warns(UserWarning, match="1 of 3 restrictions failed and are left out. mix: .*"):
        tree = devinterp.susceptibilities(
            model, DATA, OBSERVABLES, MASKS, sampling_task="pile", loss_fn=loss_fn, output_path=tmp_path / "s", **SHORT
        )
    assert tree["susceptibilities"].wr.values.tolist() == ["out"]
    assert ("out of memory" if kind == "error" else "diverged") in tree.attrs["failed"]["mix"]
    assert (tmp_path / "s_out").exists()


def test_what_failed_once_is_run_again(tmp_path, runs):
    left = iter(range(239, -1, -1))  # forwards: in the chains of "mix"

    def fail(*_):
        if not next(left, 1):
            raise MemoryError("out of memory")

    failing = TinyLM()
    failing.register_forward_pre_hook(fail)
    arguments = {"sampling_task": "pile", "output_path": tmp_path / "s", **SHORT}
    with pytest.warns(UserWarning, match="1 of 3 restrictions failed"):
        tree = devinterp.susceptibilities(failing, DATA, OBSERVABLES, MASKS, **arguments)
    (name,) = tree.attrs["failed"]
    assert 3 in xr.open_datatree(tmp_path / f"s_{name}", engine="zarr", consolidated=False).chain_status
    again = devinterp.susceptibilities(TinyLM(), DATA, OBSERVABLES, MASKS, **arguments)
    assert again.attrs["failed"] == {}
    expected = devinterp.compute_susceptibilities(runs, "pile")
    xr.testing.assert_equal(again["susceptibilities"].to_dataset(), expected["susceptibilities"].to_dataset())


def test_runs_that_do_not_belong_together_are_refused(runs):
    other = devinterp.sample(TinyLM(), DATA, OBSERVABLES, param_masks=MASKS["out"], **(SHORT | {"n_beta": 21.0}))
    with pytest.raises(DevinterpInputError, match="'full' and 'out' differ in more than their masks: n_beta"):
        devinterp.compute_susceptibilities(runs | {"out": other}, "pile")
    changed = runs["out"].copy(deep=True)
    changed["input_ids_b"][0, 0] += 1
    with pytest.raises(DevinterpInputError, match="tokens of observable b"):
        devinterp.compute_susceptibilities(runs | {"out": changed}, "pile")
    with pytest.raises(DevinterpInputError, match="These move the same weights"):
        devinterp.compute_susceptibilities(runs | {"again": runs["full"]}, "pile")
    model = TinyLM(seed=1)
    another = devinterp.sample(model, DATA, OBSERVABLES, param_masks=MASKS["out"], **SHORT)
    with pytest.raises(DevinterpInputError, match="weights and buffers of the model"):
        devinterp.compute_susceptibilities(runs | {"out": another}, "pile")


def test_names_that_are_prefixes_of_one_another():
    data = {"a": (OTHER, 1), "a_b": (OTHER, 1), "a_b_c": (DATA, 1), "loss_a": (DATA, 2), "input_ids_a": (DATA, 1)}
    tree = devinterp.susceptibilities(TinyLM(), DATA, data, {"full": None, "mix": MASKS["mix"]}, sampling_task="a-b", **SHORT)
    assert tree["susceptibilities"].attrs["dataset_id_to_name"] == ["a", "a_b_c", "input_ids_a", "loss_a"]
    assert tree["susceptibilities"].sizes["sus_flat"] == (3 + 3 + 3 + 6) * 5


BAD = [
    ({"weight_restrictions": {"mix": MASKS["mix"]}}, "holds 'full'"),
    ({"weight_restrictions": {"full": None}}, "at least one more"),
    ({"weight_restrictions": ["full", "mix"]}, "a dict"),
    ({"weight_restrictions": MASKS | {"../x": None}}, "without slashes"),
    ({"weight_restrictions": MASKS | {"": None}}, "weight_restrictions=''"),
    ({"weight_restrictions": MASKS | {"MIX": None}}, "'MIX' and 'mix' would share a file"),
    ({"weight_restrictions": MASKS | {"bad": {"nope": None}}}, "'nope'"),
    ({"weight_restrictions": MASKS | {"bad": {}}}, "at least one parameter"),
    ({"sampling_task": "nope"}, "sampling_task='nope'"),
    ({"observables": {"pile": (DATA, 1)}}, "at least one besides the sampling task"),
    ({"observables": {"pile": DATA, "a-b": OTHER, "a_b": OTHER}}, "would both"),
    ({"observables": {"pile": DATA, "sampling": OTHER}}, "taken"),
    ({"estimator": "three_chain"}, "estimator='three_chain'"),
    ({"standardize": "yes"}, "standardize='yes'"),
    ({"mean_over": "token"}, "mean_over='token'"),
    ({"errors": "yes"}, "errors='yes'"),
    ({"include_sampling_task": 1}, "include_sampling_task=1"),
    ({"param_masks": None}, "param_masks"),
    ({"output_path": "ftp://bucket/x"}, "output_path"),
    ({"output_path": 3}, "output_path=3"),
    ({"n_beta": -1.0}, "n_beta"),
    ({"num_chain": 2}, "num_chain=2.*Did you mean num_chains"),
    ({"num_chains": 1, "num_draws": 1}, "num_draws=1.*covariance"),
    ({"observables": [DATA]}, "(?s)observables=.*a dict"),
    ({"sampling_task": None}, "sampling_task=None"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[b[1][:25] for b in BAD])
def test_bad_inputs(change, message, tmp_path):
    model, calls = TinyLM(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    arguments = {"observables": OBSERVABLES, "weight_restrictions": MASKS, "sampling_task": "pile",
                 "output_path": tmp_path / "run"} | SHORT | change  # fmt: skip
    with pytest.raises(DevinterpInputError, match=message):
        devinterp.susceptibilities(model, DATA, **arguments)
    assert not calls
    assert not list(tmp_path.iterdir())


def test_another_run_at_one_of_the_paths_is_refused_before_the_first_chain(tmp_path):
    devinterp.sample(TinyLM(), DATA, OBSERVABLES, param_masks=MASKS["mix"], output_path=tmp_path / "s_out", **SHORT)
    with pytest.raises(RunMismatchError, match="param_masks"):
        devinterp.susceptibilities(
            TinyLM(), DATA, OBSERVABLES, MASKS, sampling_task="pile", output_path=tmp_path / "s", **SHORT
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s_out", "s_out.run"]


def test_samples_that_cannot_be_used(runs):
    with pytest.raises(DevinterpInputError, match="sampling_task='nope'"):
        devinterp.compute_susceptibilities(runs, "nope")
    with pytest.raises(DevinterpInputError, match="observable_names"):
        devinterp.compute_susceptibilities(runs, "pile", ["nope"])
    with pytest.raises(DevinterpInputError, match="wr_map"):
        devinterp.compute_susceptibilities({"full": runs["full"]}, "pile")
    with pytest.raises(StoreError, match="no run metadata"):
        devinterp.compute_susceptibilities({name: ds.drop_attrs() for name, ds in runs.items()}, "pile")
    restricted = {name: ds for name, ds in runs.items() if name != "full"}
    with pytest.raises(DevinterpInputError, match="one_chain"):
        devinterp.compute_susceptibilities(restricted, "pile")
    alone = devinterp.compute_susceptibilities(restricted, "pile", estimator="one_chain")
    together = devinterp.compute_susceptibilities(runs, "pile", estimator="one_chain")
    xr.testing.assert_equal(alone["susceptibilities"].to_dataset(), together["susceptibilities"].to_dataset())
    diverged = runs["out"].assign(chain_status=("chain", [2, 1]))
    with pytest.raises(ChainsUnusable, match="restriction 'out': chains 0"):
        devinterp.compute_susceptibilities(runs | {"out": diverged}, "pile")
    dropped = devinterp.compute_susceptibilities(runs | {"out": diverged}, "pile", on_diverged="drop")
    assert dropped.attrs["dropped_chains"]["out"] == [0]
    with pytest.raises(StoreError, match="one draw"):
        devinterp.compute_susceptibilities({n: ds.isel(chain=[0], draw=[0]) for n, ds in runs.items()}, "pile")
