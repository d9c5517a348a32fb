"""calibrate(): settings that follow from rules, tried on pilots, and right when taken."""

import math

import numpy as np
import pytest
import torch
from cases import DeepLinear, TinyLM, Weights, by_row, plan_of, quadratic, random_tokens, rows
from checks import LIMIT
from targets import quadratic_llc
from zoo import tiny_model

import devinterp
from devinterp.engine.curvature import gradient_noise
from devinterp.engine.settings import Settings
from devinterp.errors import DevinterpError
from devinterp.slt.calibration import FEWEST_DRAWS
from devinterp.slt.pilots import SEEDS_APART, Pilots, cases_of, settling_steps

H = [8.0] * 5 + [2.0] * 35
SHORT = {"n_beta": 10.0, "batch_size": 4, "progress": False}


def stiff_and_flat(model, ids):
    h = torch.tensor(H)
    return (0.5 * h * model.w.square()).sum().expand(len(ids), 1)


def test_the_weakest_localization_that_settles_is_taken_and_gives_the_exact_value():
    model, data = Weights(torch.zeros(40)), rows(20)
    found = devinterp.calibrate(
        model, data, loss_fn=stiff_and_flat, accuracy=0.05, max_steps=1000, num_init_loss_batches=1, **SHORT
    )
    tried = found.table.localization.values.tolist()
    # 10 n_beta h_max downwards, until one takes more than max_steps; then what does not, 1.1 ln 100 n_beta h_max / max_steps
    weakest = found.settings["localization"]
    assert tried == [800.0, 80.0, 8.0, 0.8, weakest, 0.08]
    assert weakest == pytest.approx(1.1 * math.log(100) * 80 / 1000, rel=0.05)
    assert found.settings["lr"] == pytest.approx(1 / (10 * 8 + weakest), rel=0.02)
    assert found.settings["num_burnin_steps"] == settling_steps(found.settings["lr"], weakest)
    assert 800 < found.settings["num_burnin_steps"] <= 1000
    assert "max_steps is 1000" in str(found.table.fault.values[-1])
    result = devinterp.llc(model, data, progress=False, **found.settings)
    truth = quadratic_llc(H, 10.0, weakest)
    assert abs(float(result.llc_mean) - truth) < LIMIT * float(result.llc_sem)
    assert float(result.llc_sem) < 0.05 * 1.5 * truth
    text = str(found)
    assert f"localization={weakest:g}: the weakest of those tried" in text
    assert "not localization 0.08: flat directions settle in" in text


def test_too_little_signal_is_no_end_of_the_search(monkeypatch):
    """None of the ladder has enough, and the next does not settle: what lies in between is tried."""
    model, data = Weights(torch.zeros(40)), rows(20)

    def look(samples):
        weak = samples.attrs["metadata"]["config"]["sampler"]["localization"] >= 0.8
        found = devinterp.diagnose(samples)
        return found.assign(verdict=("chain", ["too little signal"] * 4)) if weak else found

    monkeypatch.setattr("devinterp.slt.pilots.diagnose", look)
    settings = {"loss_fn": stiff_and_flat, "accuracy": 0.05, "num_init_loss_batches": 1, **SHORT}
    found = devinterp.calibrate(model, data, **settings)
    assert found.settings["localization"] == pytest.approx(1.1 * math.log(100) * 80 / 1000, rel=0.05)
    with pytest.raises(DevinterpError, match=r"localization 8: too little signal\nTry others"):
        devinterp.calibrate(model, data, localization=[8.0], **settings)


def test_more_is_aimed_at_than_accuracy_asks_for():
    """Pilots know their standard error to a quarter: 16 independent runs of what is found reach the accuracy in the mean."""
    settings = {"loss_fn": stiff_and_flat, "localization": [80.0], "num_init_loss_batches": 1, **SHORT}
    model, data = Weights(torch.zeros(40)), rows(20)
    found = devinterp.calibrate(model, data, accuracy=0.02, **settings).settings
    assert found["num_draws"] > FEWEST_DRAWS
    levels = [float(devinterp.llc(model, data, progress=False, **found | {"init_seed": seed}).llc_mean) for seed in range(16)]
    assert np.std(levels, ddof=1) / quadratic_llc(H, 10.0, 80.0) < 0.02 * (1 + 2 / math.sqrt(2 * 15))


def test_a_pilot_that_looks_sick_gets_another_look(monkeypatch):
    """Each first look is taken for sick: the same localization is chosen as when none is."""
    model, data, looks = Weights(torch.zeros(40)), rows(20), []
    settings = {"loss_fn": stiff_and_flat, "localization": [8.0], "num_init_loss_batches": 1, **SHORT}

    def look(samples):
        found = devinterp.diagnose(samples)
        looks.append(samples.attrs["metadata"]["config"]["sampler"] | {"mean": float(found.llc_mean)})
        return found.assign(verdict=("chain", ["spiky"] * 4)) if len(looks) in sick else found

    monkeypatch.setattr("devinterp.slt.pilots.diagnose", look)
    sick: set[int] = {1}
    assert devinterp.calibrate(model, data, **settings).settings["localization"] == 8.0
    first, second = looks
    assert second["num_draws"] == 2 * first["num_draws"]
    assert second["mean"] != first["mean"], "other chains"
    assert len({first["init_seed"], second["init_seed"], Settings.init_seed}) == 3, "nor are they the run's"
    sick, looks[:] = set(range(10)), []
    with pytest.raises(DevinterpError, match="localization 8: spiky"):
        devinterp.calibrate(model, data, **settings)


@pytest.mark.parametrize(("sick_above", "lr", "localization"), [(1 / 100, 1 / 352, 8.0), (1 / 400, 1 / 160, 80.0)])
def test_long_runs_are_tried_at_their_length(monkeypatch, sick_above, lr, localization):
    """Chains as long as the run are taken for spiky at 8 and a larger lr: a quarter of it, then a stronger localization."""
    model, data, looks = Weights(torch.zeros(40)), rows(20), []
    settings = {"loss_fn": stiff_and_flat, "accuracy": 0.01, "num_init_loss_batches": 1, **SHORT}

    def look(samples):
        found, took = devinterp.diagnose(samples), samples.attrs["metadata"]["config"]["sampler"]
        looks.append((took["num_draws"] * took["num_steps_bw_draws"], took["init_seed"]))
        sick = (
            took["localization"] == 8.0
            and took["lr"] > sick_above
            and took["init_seed"] == Settings.init_seed + 3 * SEEDS_APART
        )
        return found.assign(verdict=("chain", ["spiky", "healthy", "healthy", "healthy"])) if sick else found

    monkeypatch.setattr("devinterp.slt.pilots.diagnose", look)
    found = devinterp.calibrate(model, data, localization=[8.0, 80.0], max_steps=400, **settings)
    assert found.settings["localization"] == localization
    assert found.settings["lr"] == pytest.approx(lr, rel=0.02)
    assert ("times 0.25, since chains were not stable with more" in str(found)) == (localization == 8.0)
    run = found.settings["num_draws"] * found.settings["num_steps_bw_draws"]
    steps, seed = looks[-1]
    assert run > 400, "much longer than pilots"
    assert (steps, seed) == (run, Settings.init_seed + 3 * SEEDS_APART), "so it was tried, with other chains"
    if localization == 80.0:
        assert "not localization 8: in chains of" in str(found)
        with pytest.raises(DevinterpError, match=r"localization 8: in chains of \d+ steps, though not of \d+: spiky"):
            devinterp.calibrate(model, data, localization=[8.0], max_steps=400, **settings)


def test_step_sizes_see_curvature_that_grows_all_through_the_burn_in():
    """Of a deep linear network at its deepest point: the flat directions, in which it grows, take thousands of steps."""
    model, data = DeepLinear((4, 3, 4), 1), rows(4)
    fixed = {"n_beta": 100.0, "batch_size": 4, "loss_fn": by_row, "sampling_method": "leimkuhler_matthews", "progress": False}
    pilots = Pilots({"model": (model, None)}, data, fixed, max_steps=1000, largest_excess=None)
    short, settled = pilots.step_size("model", 0.5), pilots.step_size_settled("model", 0.5)
    assert short["pilot_steps"] == 100 < settled["pilot_steps"] <= 1000
    assert settled["h_max_pilot"] > 1.3 * short["h_max_pilot"]
    assert settled["lr"] < short["lr"]


def test_pilots_are_as_long_as_the_burn_in_that_they_lead_to(monkeypatch):
    """Steeper places take smaller steps and those a longer burn-in: looked at again, unless the pilot ended of itself."""

    def settled(lrs, ends=10**6, max_steps=1000):
        asked = []

        def step_size(self, name, localization, lr="auto", burn_in=0):
            asked.append(burn_in)
            return {"lr": lrs[len(asked) - 1], "pilot_steps": min(ends, max(100, burn_in))}

        monkeypatch.setattr(Pilots, "step_size", step_size)
        found = Pilots({"model": (None, None)}, None, {}, max_steps, None).step_size_settled("model", 2.0)
        return asked, found["lr"]

    once, twice = settling_steps(0.01, 2.0), settling_steps(0.005, 2.0)
    assert 100 < once < twice < 1000
    assert settled([0.01, 0.005, 0.005]) == ([0, once, twice], 0.005)
    assert settled([0.01, 0.01]) == ([0, once], 0.01), "seen all the way"
    assert settled([0.01, 0.005], ends=once - 1) == ([0, once], 0.005), "ended of itself"
    assert settled([0.05]) == ([0], 0.05), "settles in what the first pilot saw"
    assert settled([0.01, 0.001]) == ([0, once], 0.001), "does not settle in time"
    assert settled([0.001, 0.0005]) == ([0, 1000], 0.0005), "neither did the first"


def test_settling_steps_leave_what_they_say():
    steps = settling_steps(0.001, 20.0)
    assert (1 - 0.001 * 20 / 2) ** (2 * steps) <= 0.01 < (1 - 0.001 * 20 / 2) ** (2 * steps - 2)


def test_chains_that_leave_the_neighbourhood_are_not_taken():
    model, data = TinyLM(), random_tokens()
    short = {
        "lr": 1e-6,
        "num_draws": 4,
        "localization": 1.0,
        "num_init_loss_batches": 1,
        "init_seed": Settings.init_seed + SEEDS_APART,
    }
    start = float(devinterp.llc(model, data, **short, **SHORT).init_loss)
    with pytest.raises(
        DevinterpError, match=rf"no localization works:\n  - localization 3: the loss rises by .* from {start:.2f}"
    ):
        devinterp.calibrate(model, data, localization=[3.0], largest_excess=1e-4, **SHORT)
    found = devinterp.calibrate(model, data, localization=[1.0, 3.0], largest_excess=math.inf, **SHORT)
    assert found.settings["localization"] == 1.0


def test_one_setting_for_checkpoints_and_components():
    half = {"w": torch.arange(40) < 5}
    models = {"first": Weights(torch.zeros(40)), "last": Weights(torch.zeros(40))}
    found = devinterp.calibrate(models, rows(20), param_masks={"full": None, "stiff": half}, loss_fn=stiff_and_flat,
                                localization=[50.0], **SHORT)  # fmt: skip
    names = ["first, full", "first, stiff", "last, full", "last, stiff"]
    assert found.table.case.values.tolist() == names
    row = found.table.sel(localization=50.0)
    assert found.settings["lr"] == float(row.lr.min())
    assert set(row.verdict.values) <= {"healthy", "too short"}
    np.testing.assert_allclose(row.llc[1], quadratic_llc(H[:5], 10.0, 50.0), rtol=0.2)
    assert all(name in str(found) for name in names)
    ax = found.plot()
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {*names, "chosen: 50"}


def test_restrictions_by_name():
    model = tiny_model("gpt_neox", "mha")
    cases = cases_of({"a": model}, {"full": None, "l0h1": "l0h1"})
    assert list(cases) == ["a, full", "a, l0h1"]
    assert cases["a, full"] == (model, None)
    assert set(cases["a, l0h1"][1]) == set(devinterp.create_param_masks(model, "l0h1"))
    masks = devinterp.create_param_masks(model, "l0h1")
    assert cases_of(model, masks) == {"model": (model, masks)}


def test_the_settings_are_those_of_sample_and_what_was_given_is_handed_through():
    found = devinterp.calibrate(
        TinyLM(),
        random_tokens(),
        localization=20.0,
        gradient_accumulation_steps=2,
        init_seed=np.int64(3),
        num_init_loss_batches=1,
        **SHORT,
    )
    assert found.settings["gradient_accumulation_steps"] == 2
    assert found.settings["init_seed"] == 3
    samples = devinterp.sample(TinyLM(), random_tokens(), {}, progress=False, **found.settings)
    assert set(devinterp.diagnose(samples).verdict.values) == {"healthy"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.1}, "lr=0.1: must be absent"),
        ({"num_draws": 5}, "num_draws=5: must be absent"),
        ({"accuracy": 0.0}, "accuracy=0.0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"localization": [0.0, 1.0]}, "localization=0.0"),
        ({"localization": "weak"}, "localization='weak'"),
        ({"n_beta": -1.0}, "n_beta=-1.0"),
        ({"batch_size": 4000}, "batch_size"),
    ],
)
def test_wrong_arguments_are_refused(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        devinterp.calibrate(TinyLM(), random_tokens(), **SHORT | given)
    with pytest.raises((ValueError, TypeError), match="model="):
        devinterp.calibrate({}, random_tokens(), **SHORT)


def test_noise_of_batches_is_their_variance():
    """Every row pushes each of 1000 weights by an independent sign: variance 1/4 a weight for batches of 4."""
    signs = torch.randint(0, 2, (400, 1000), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    loss_fn = lambda model, ids: (signs[ids[:, 0]] @ model.w + 3.0 * model.w.sum())[:, None]  # noqa: E731
    plan = plan_of(Weights(torch.zeros(1000)), rows(400), loss_fn, batch_size=4)
    with plan.checkpoint.ready():
        found = gradient_noise(plan)
    assert found == pytest.approx(1000 / 4, abs=LIMIT * 1000 / 4 * np.sqrt(2 / 7 / 1000))
    plan = plan_of(Weights(torch.ones(10)), rows(40), quadratic(2.0), batch_size=4)
    with plan.checkpoint.ready():
        assert gradient_noise(plan) == pytest.approx(0.0, abs=1e-6)
