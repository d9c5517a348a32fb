"""Patterning on a quadratic model, whose posterior after the data were reweighted is known."""

import numpy as np
import pytest
import torch
import xarray as xr
from cases import Weights, rows
from targets import quadratic_susceptibilities, reweighted_excess

import devinterp
from devinterp.errors import DevinterpInputError

DIMENSION, DATA, N_BETA, GAMMA = 8, 24, 40.0, 10.0
COMPONENTS = {"a": [0, 1, 2], "b": [2, 3, 4, 5], "c": [5, 6, 7]}


@pytest.fixture(scope="module")
def model() -> tuple[np.ndarray, np.ndarray]:
    """Curvatures A and slopes b of the losses w'A_j w/2 + b_j'w."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((DATA, DIMENSION, DIMENSION)) / DIMENSION**0.5
    slopes = 0.3 * rng.standard_normal((DATA, DIMENSION))
    return half @ half.transpose(0, 2, 1), slopes - slopes.mean(0)


def of(component: str, model: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    moved = COMPONENTS[component]
    return model[0][:, moved][:, :, moved], model[1][:, moved]


def tree_of(chi: np.ndarray, names: tuple[str, ...] = tuple(COMPONENTS), length: int = 1, **attrs: object) -> xr.DataTree:
    batch, position = np.divmod(np.arange(chi.shape[1]), length)
    coords = {"dataset_id": 0 * batch, "batch": batch, "target_position": position + 1}
    sus = xr.Dataset({"sus": (("sus_flat", "wr"), chi.T)}, coords={"wr": np.asarray(names, dtype=object)},
                     attrs={"dataset_id_to_name": ["x"]})  # fmt: skip
    sus = sus.assign_coords({name: ("sus_flat", values) for name, values in coords.items()})
    tree = xr.DataTree.from_dict({"/susceptibilities": sus})
    tree.attrs = {"n_beta": N_BETA, "estimator": "one_chain", "standardize": False} | attrs
    return tree


@pytest.fixture(scope="module")
def exact(model) -> xr.DataTree:
    return tree_of(np.array([quadratic_susceptibilities(*of(name, model), N_BETA, GAMMA) for name in COMPONENTS]))


def true_changes(model, weights: np.ndarray) -> np.ndarray:
    def excess(rho):
        return np.array([reweighted_excess(*of(name, model), rho, N_BETA, GAMMA) for name in COMPONENTS])

    return excess(weights) - excess(np.ones(DATA))


def test_components_change_as_predicted_to_first_order(model, exact):
    start = reweighted_excess(*of("a", model), np.ones(DATA), N_BETA, GAMMA)
    errors = []
    for step in (0.02, 0.01, 0.005):
        target = {"a": -step * start, "c": 0.5 * step * start}
        found = devinterp.compute_patterning(exact, target)
        np.testing.assert_allclose(found.predicted_change, [target["a"], 0, target["c"]], rtol=1e-9, atol=1e-12 * start)
        np.testing.assert_array_equal(found.target_change, [target["a"], 0, target["c"]])
        assert found.weights.mean() == pytest.approx(1)
        change = true_changes(model, found.weights.values)
        errors.append(change - found.predicted_change.values)
        assert np.abs(errors[-1]).max() < 0.5 * step * start
    errors = np.abs(errors)
    assert ((errors[:2] / errors[1:] > 3.5) & (errors[:2] / errors[1:] < 4.5)).all(), "of second order"


def test_the_solution_is_the_smallest_one(exact):
    chi = exact["susceptibilities"].sus.values.T
    target = np.array([0.001, 0.0, -0.002])
    expected = 1 + 3.0 * np.linalg.pinv(chi - chi.mean(1, keepdims=True)) @ target
    found = devinterp.compute_patterning(exact, {"c": -0.002, "a": 0.001}, alpha=3.0, negative="keep")
    np.testing.assert_allclose(found.weights, expected / expected.mean(), rtol=1e-9)
    raw = devinterp.compute_patterning(exact, {"c": -0.002, "a": 0.001}, alpha=3.0, negative="keep", renormalize=False)
    np.testing.assert_allclose(raw.weights, 1 + 3.0 * np.linalg.pinv(chi) @ target, rtol=1e-9)
    scaled = devinterp.compute_patterning(exact, {"c": -0.002}, largest_change=0.25)
    assert np.abs(scaled.weights.values - 1).max() == pytest.approx(0.25)
    np.testing.assert_allclose(
        scaled.predicted_change, scaled.attrs["alpha"] * N_BETA / DATA * scaled.target_change, atol=1e-15
    )


def test_rows_that_do_not_sum_to_zero_are_shifted(exact, model):
    shifted = exact.copy(deep=True)
    shifted["susceptibilities"]["sus"] += 0.3 * np.abs(exact["susceptibilities"].sus).max("sus_flat")
    target = {"a": -1e-3}
    whole = devinterp.compute_patterning(shifted, target)
    np.testing.assert_allclose(whole.weights, devinterp.compute_patterning(exact, target).weights, rtol=1e-9)
    biased = devinterp.compute_patterning(shifted, target, renormalize=False)
    assert abs(biased.attrs["mean_weight"] - 1) > 1e-3
    assert whole.attrs["mean_weight"] == pytest.approx(1)


def test_negative_weights(exact):
    kept = devinterp.compute_patterning(exact, {"a": -1.0}, largest_change=3.0, negative="keep")
    negative = int((kept.weights < 0).sum())
    assert negative > 0
    clipped = devinterp.compute_patterning(exact, {"a": -1.0}, largest_change=3.0)
    assert clipped.attrs["num_clipped"] == negative
    assert float(clipped.weights.min()) == 0
    assert float(clipped.weights.mean()) == pytest.approx(1)
    chi = exact["susceptibilities"].sus.values
    np.testing.assert_allclose(clipped.predicted_change, N_BETA / DATA * (clipped.weights.values - 1) @ (chi - chi.mean(0)))
    with pytest.raises(
        DevinterpInputError, match=rf"{negative} of {DATA} weights are negative.* Try alpha=([0-9.e+-]+)"
    ) as caught:
        devinterp.compute_patterning(exact, {"a": -1.0}, largest_change=3.0, negative="raise")
    largest = float(str(caught.value).split("alpha=")[1].split(",")[0])
    bound = devinterp.compute_patterning(exact, {"a": -1.0}, alpha=0.99 * largest, negative="raise")
    assert 0 <= float(bound.weights.min()) < 0.05


def test_near_duplicates_are_left_out_and_still_predicted(exact):
    rng = np.random.default_rng(1)
    chi = exact["susceptibilities"].sus.values.T
    twin = -2 * chi[0] + 1e-3 * np.abs(chi[0]).max() * rng.standard_normal(DATA)
    tree = tree_of(np.stack([twin, *chi, np.full(DATA, 0.1)]), ("twin", "a", "b", "c", "constant"))
    found = devinterp.compute_patterning(tree, {"a": -1e-3})
    assert found.used.values.tolist() == [False, True, True, True, False]
    np.testing.assert_allclose(found.weights, devinterp.compute_patterning(exact, {"a": -1e-3}).weights, rtol=1e-9)
    assert float(found.predicted_change[0]) == pytest.approx(2e-3, rel=0.05)
    both = devinterp.compute_patterning(tree, {"a": -1e-3}, largest_cosine=1.0, rcond=0.0, negative="keep")
    assert both.used.values.tolist() == [True, True, True, True, False]
    assert np.abs(both.weights - 1).max() > 20 * np.abs(found.weights - 1).max(), "held against its twin"
    cut = devinterp.compute_patterning(tree, {"a": -1e-3}, largest_cosine=1.0, rcond=0.1)
    assert cut.attrs["rank"] == 3
    shrunk = devinterp.compute_patterning(tree, {"a": -1e-3}, largest_cosine=1.0, ridge=0.01)
    for regular in (cut, shrunk):
        assert np.abs(regular.weights - 1).max() < 2 * np.abs(found.weights - 1).max()


def test_weights_of_whole_sequences(exact):
    chi = exact["susceptibilities"].sus.values.T
    tree = tree_of(chi, length=4)
    found = devinterp.compute_patterning(tree, {"a": -1e-3}, per="sequence")
    of_means = devinterp.compute_patterning(tree_of(chi.reshape(3, 6, 4).mean(2)), {"a": -1e-3})
    np.testing.assert_allclose(found.weights, of_means.weights)
    assert found.batch.values.tolist() == [0, 1, 2, 3, 4, 5]
    assert "target_position" not in found.coords
    tokens = devinterp.compute_patterning(tree, {"a": -1e-3})
    assert tokens.target_position.values[:5].tolist() == [1, 2, 3, 4, 1]
    assert tokens.attrs["dataset_id_to_name"] == ["x"]
    sus = tree["susceptibilities"].to_dataset()
    xr.testing.assert_equal(devinterp.compute_patterning(sus, {"a": -1e-3}, n_beta=N_BETA), tokens)


def test_noise_that_the_weights_follow_is_taken_off(exact):
    """Over many noisy measurements of one chi: what the weights do in truth, predicted, and expected."""
    rng, chi = np.random.default_rng(3), exact["susceptibilities"].sus.values.T
    errors = 0.7 * np.abs(chi).mean(1, keepdims=True) * rng.uniform(0.5, 1.5, chi.shape)
    found = []
    for _ in range(400):
        sus = tree_of(chi + errors * rng.standard_normal(chi.shape))["susceptibilities"].to_dataset()
        sus = sus.assign(sus_sem=(("sus_flat", "wr"), errors.T))
        one = devinterp.compute_patterning(sus, {"a": -1e-4, "c": 5e-5}, n_beta=N_BETA, negative="keep")
        truth = N_BETA / DATA * (chi - chi.mean(1, keepdims=True)) @ (one.weights.values - 1)
        found.append([truth, one.predicted_change.values, one.expected_change.values])
    truth, predicted, expected = np.mean(found, axis=0)
    print(f"truth {truth}, predicted {predicted}, expected {expected}")
    for component, asked in ((0, -1e-4), (2, 5e-5)):
        assert predicted[component] == pytest.approx(asked)
        assert 0.3 < truth[component] / asked < 0.9, "noise looked like response"
        assert expected[component] == pytest.approx(truth[component], rel=0.12)
    assert np.isnan(devinterp.compute_patterning(exact, {"a": -1e-4}).expected_change).all()


def test_from_sampling_to_the_change(model):
    """Chains give the susceptibilities, the weights made from them change the exact posterior as asked."""
    model = model[0], 0.2 * model[1]
    A, b = (torch.as_tensor(array, dtype=torch.float32) for array in model)

    def loss_fn(model, ids):
        i = ids[:, 0]
        return (0.5 * torch.einsum("d,ide,e->i", model.w, A[i], model.w) + b[i] @ model.w)[:, None]

    masks = {name: {"w": torch.isin(torch.arange(DIMENSION), torch.tensor(moved))} for name, moved in COMPONENTS.items()}
    tree = devinterp.susceptibilities(
        Weights(torch.zeros(DIMENSION)), rows(DATA), {"task": (rows(DATA), 1), "data": (rows(DATA), 1)}, {"full": None} | masks,
        sampling_task="task", estimator="one_chain", loss_fn=loss_fn, lr=0.02, n_beta=N_BETA, localization=GAMMA, batch_size=DATA,
        sampling_method="leimkuhler_matthews", num_chains=4, num_draws=500, num_burnin_steps=50, num_init_loss_batches=1,
        progress=False,
    )  # fmt: skip
    start = reweighted_excess(*of("b", model), np.ones(DATA), N_BETA, GAMMA)
    found = devinterp.compute_patterning(tree, {"b": -0.05 * start})
    weights = np.empty(DATA)
    weights[tree["context"].input_ids.values[::2]] = found.weights  # the row that each datum is
    change = true_changes(model, weights)
    print(f"asked -5 %, changed {change[1] / start:.1%}, expected {float(found.expected_change[1]) / start:.1%}")
    assert change[1] == pytest.approx(-0.05 * start, rel=0.3)
    assert np.abs(change[[0, 2]]).max() < 0.3 * abs(change[1]), "the others are held"
    assert float(found.target_change[1]) < float(found.expected_change[1]) < 0.8 * float(found.target_change[1])


BAD = [
    ({"target": {"d": 1.0}}, r"target=\['d'\]"),
    ({"target": {}}, "target={}"),
    ({"target": {"a": 0.0}}, "at least one component"),
    ({"target": {"a": float("nan")}}, "finite number of nats"),
    ({"target": {"a": "much"}}, "finite number of nats"),
    ({"target": [1.0, 2.0, 3.0]}, "a dict"),
    ({"alpha": -1.0}, "alpha=-1.0"),
    ({"alpha": 1.0, "largest_change": 0.5}, "None with largest_change"),
    ({"largest_change": 0.0}, "largest_change=0.0"),
    ({"n_beta": 0.0}, "n_beta=0.0"),
    ({"per": "token"}, "per='token'"),
    ({"rcond": -1.0}, "rcond=-1.0"),
    ({"ridge": "some"}, "ridge='some'"),
    ({"renormalize": 1}, "renormalize=1"),
    ({"negative": "drop"}, "negative='drop'"),
    ({"largest_cosine": 2.0}, "largest_cosine=2.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[b[1][:25] for b in BAD])
def test_bad_options(exact, change, message):
    with pytest.raises(DevinterpInputError, match=message):
        devinterp.compute_patterning(exact, **({"target": {"a": 1e-3}} | change))


def test_susceptibilities_that_cannot_be_used(exact):
    sus, target = exact["susceptibilities"].to_dataset(), {"a": 1e-3}
    with pytest.raises(DevinterpInputError, match="n_beta=None.*do not tell"):
        devinterp.compute_patterning(sus, target)
    with pytest.raises(DevinterpInputError, match="standardize=False"):
        devinterp.compute_patterning(tree_of(sus.sus.values.T, standardize=True), target)
    with pytest.raises(DevinterpInputError, match="susceptibilities"):
        devinterp.compute_patterning(sus.sus.values, target)
    with pytest.raises(DevinterpInputError, match="not finite"):
        devinterp.compute_patterning(sus.assign(sus=sus.sus * np.nan), target, n_beta=1.0)
    with pytest.raises(DevinterpInputError, match="do not respond"):
        devinterp.compute_patterning(sus.assign(sus=0 * sus.sus + 0.1), target, n_beta=1.0)
    with pytest.raises(DevinterpInputError, match="per='sequence'"):
        devinterp.compute_patterning(sus.drop_vars("batch"), target, n_beta=1.0, per="sequence")
