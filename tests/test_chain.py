"""Which weights, which batch, which step: the plumbing of a chain, mostly without noise so that every number is exact."""

import numpy as np
import pytest
import torch
from cases import TinyLM, Weights, linear, plan_of, quadratic, random_tokens, rows
from datasets import Dataset

import devinterp
from devinterp.engine.chain import Walk, run_chains
from devinterp.engine.settings import Settings
from devinterp.engine.walker import Walker

QUIET = {"noise_level": 0.0, "num_init_loss_batches": 1, "progress": False, "num_chains": 1}


def row_number(model, ids):
    """A loss that tells which row it was taken on, and moves nothing."""
    return ids[:, :1].float() + 0 * model.w.sum()


@pytest.mark.filterwarnings("ignore:noise_level")
@pytest.mark.parametrize(("burnin", "spacing", "draws"), [(0, 1, 4), (3, 1, 2), (0, 3, 3), (5, 2, 4)])
def test_draw_d_is_taken_after_step_burnin_plus_d_plus_one_times_spacing(burnin, spacing, draws):
    # without noise a linear loss falls by the same amount at every step
    lr, n_beta, slope, dimension = 0.1, 2.0, 3.0, 5
    fall = lr / 2 * n_beta * slope**2 * dimension
    samples = devinterp.sample(
        Weights(torch.zeros(dimension)), rows(8), {"seen": rows(8)}, lr=lr, n_beta=n_beta, loss_fn=linear(slope),
        num_burnin_steps=burnin, num_steps_bw_draws=spacing, num_draws=draws, batch_size=2, batches_per_draw=2, **QUIET,
    )  # fmt: skip
    steps = np.array([burnin + (d + 1) * spacing for d in range(draws)])
    assert samples.sampling_loss.shape == (1, draws, 2, 1)
    np.testing.assert_allclose(samples.sampling_loss.isel(chain=0, batch=0, token_pos=0), -fall * steps, rtol=1e-5)
    np.testing.assert_allclose(samples.loss_seen.isel(chain=0, batch_seen=3, token_pos=0), -fall * steps, rtol=1e-5)
    # step s is taken from the weights after s - 1 steps; no step follows the last draw
    total = burnin + draws * spacing
    np.testing.assert_allclose(samples.step_loss[0], -fall * np.arange(total), rtol=1e-5, atol=1e-6)
    assert samples.step.values.tolist() == list(range(1, total + 1))
    assert (samples.baseline_loss == 0).all()
    assert (samples.init_loss == 0).all()
    assert (samples.init_loss_seen == 0).all()


@pytest.mark.filterwarnings("ignore:noise_level")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_sampling_loss_is_on_the_next_steps_batch_and_the_baseline_on_the_same(shared, accumulation):
    settings = {"lr": 0.1, "n_beta": 2.0, "num_burnin_steps": 3, "num_steps_bw_draws": 2, "num_draws": 5, "batch_size": 4,
                "gradient_accumulation_steps": accumulation, "match_sampling_input_ids_across_chains": shared}  # fmt: skip
    model, data = Weights(torch.zeros(3)), rows(50)
    samples = devinterp.sample(model, data, {}, loss_fn=row_number, **settings, **(QUIET | {"num_chains": 2}))
    plan = plan_of(model, data, row_number, **settings)
    expected = [
        [np.concatenate([part.given[:, 0] for part in plan.batches.step(chain, 3 + (d + 1) * 2)]) for d in range(5)]
        for chain in range(2)
    ]
    np.testing.assert_array_equal(samples.sampling_loss[..., 0], expected)
    assert samples.baseline_loss.dims[0] == ("draw" if shared else "chain")
    assert ((samples.sampling_loss - samples.baseline_loss) == 0).all()
    same = np.array_equal(samples.sampling_loss[0], samples.sampling_loss[1])
    assert same is shared
    first = [np.concatenate([part.given[:, 0] for part in plan.batches.step(chain, 0)]).mean() for chain in range(2)]
    np.testing.assert_allclose(samples.init_loss[:, 0], first)


def test_batches_visit_every_row_once_an_epoch_and_drop_the_last_incomplete_one():
    plan = plan_of(Weights(torch.zeros(1)), rows(10), row_number, batch_size=3)
    seen = [plan.batches.micro(0, k).given[:, 0].tolist() for k in range(9)]
    for epoch in range(3):
        rows_seen = [row for batch in seen[3 * epoch : 3 * epoch + 3] for row in batch]
        assert len(set(rows_seen)) == 9
    assert seen[:3] != seen[3:6], "epochs are reshuffled"
    unshuffled = plan_of(Weights(torch.zeros(1)), rows(10), row_number, batch_size=3, shuffle=False)
    assert [unshuffled.batches.micro(0, k).given[:, 0].tolist() for k in (0, 2, 3)] == [[0, 1, 2], [6, 7, 8], [0, 1, 2]]


def test_accumulation_of_2_times_4_equals_a_batch_of_8(tiny, tokens):
    losses = [
        devinterp.sample(
            tiny,
            tokens,
            {"same": (tokens, 8 // size)},
            lr=1e-3,
            n_beta=20.0,
            batch_size=size,
            num_draws=10,
            num_chains=2,
            gradient_accumulation_steps=8 // size,
            num_init_loss_batches=4,
            progress=False,
        )
        for size in (8, 4)
    ]
    for name in ("sampling_loss", "baseline_loss", "step_loss", "init_loss"):
        np.testing.assert_allclose(losses[0][name], losses[1][name], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(losses[0].loss_same[:, :, :8], losses[1].loss_same[:, :, :8], rtol=2e-5)


def test_a_chain_against_a_slow_obvious_loop(tiny, tokens):
    """The whole update, written out with per-parameter tensors and the chain's own noise."""
    settings = {"lr": 2e-3, "n_beta": 15.0, "localization": 7.0, "llc_weight_decay": 0.5, "batch_size": 4, "num_draws": 6,
                "gradient_accumulation_steps": 2}  # fmt: skip
    plan = plan_of(tiny, tokens, **settings)
    snapshots = [seen for (seen,) in run_chains(Walk(plan, [1]))]
    rng = torch.Generator().manual_seed(Walker(plan, 1).rngs[0].initial_seed())
    size = sum(p.numel() for p in tiny.parameters())
    torch.randn(size, generator=rng)  # the noise handed to the sampler's init
    model = TinyLM()
    start = [p.detach().clone() for p in model.parameters()]
    for snapshot in snapshots[:-1]:
        ids = torch.cat([part.given for part in plan.batches.step(1, snapshot.steps_taken)])
        logits = model(ids)[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.permute(0, 2, 1), ids[:, 1:], reduction="none")
        torch.testing.assert_close(snapshot.losses, losses.detach(), rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(losses.mean(), list(model.parameters()))
        noise = torch.randn(size, generator=rng)
        with torch.no_grad():
            for p, p0, g in zip(model.parameters(), start, grads, strict=True):
                xi, noise = noise[: p.numel()].view_as(p), noise[p.numel() :]
                p -= 1e-3 * (15.0 * g + 7.0 * (p - p0) + 0.5 * p)
                p += 2e-3**0.5 * xi


def test_numbers_do_not_depend_on_the_other_chains(tiny, tokens):
    settings = {"lr": 1e-3, "n_beta": 20.0, "batch_size": 4, "num_draws": 5, "num_init_loss_batches": 1, "progress": False}
    two = devinterp.sample(tiny, tokens, {}, num_chains=2, **settings)
    three = devinterp.sample(tiny, tokens, {}, num_chains=3, **settings)
    np.testing.assert_array_equal(two.sampling_loss, three.sampling_loss[:2])
    assert not np.array_equal(two.sampling_loss[0], two.sampling_loss[1])


def test_more_draws_leave_the_first_ones_as_they_were(tiny, tokens):
    settings = {"lr": "auto", "n_beta": 20.0, "batch_size": 4, "num_chains": 1, "num_init_loss_batches": 1,
                "localization": 10.0, "sampling_method": "leimkuhler_matthews", "progress": False}  # fmt: skip
    short = devinterp.sample(tiny, tokens, {}, num_draws=5, **settings)
    long = devinterp.sample(tiny, tokens, {}, num_draws=9, **settings)
    np.testing.assert_array_equal(short.sampling_loss, long.sampling_loss[:, :5])


def test_half_precision_models_are_handled_and_close_to_float32(tiny, tokens):
    settings = {"lr": 1e-4, "n_beta": 20.0, "batch_size": 8, "num_draws": 3, "num_chains": 1, "progress": False}
    full = devinterp.sample(tiny, tokens, {}, num_init_loss_batches=2, **settings)
    half = devinterp.sample(tiny.bfloat16(), tokens, {}, num_init_loss_batches=2, **settings)
    assert half.sampling_loss.dtype == np.float32
    np.testing.assert_allclose(full.sampling_loss, half.sampling_loss, rtol=0.05)


def test_metrics_are_the_parts_of_the_update():
    lr, n_beta, gamma, decay = 0.02, 3.0, 4.0, 0.5
    start = torch.tensor([1.0, -2.0, 0.5])
    plan = plan_of(Weights(start), rows(4), quadratic(2.0, centre=0.3), lr=lr, n_beta=n_beta, localization=gamma,
                   llc_weight_decay=decay, save_metrics=True, num_draws=3)  # fmt: skip
    walker = Walker(plan, 0)
    for t in range(3):
        w = walker.weights[0].double().clone()
        walker.differentiate(t)
        metrics = walker.step()
        g = 2.0 * (w - 0.3)
        grad, localization, shrink = -lr / 2 * n_beta * g, -lr / 2 * gamma * (w - start), -lr / 2 * decay * w
        noise = walker.weights[0].double() - w - grad - localization - shrink
        prior = localization + shrink
        expected = {
            "scaled_grad": grad.norm(), "unscaled_grad": g.norm(), "localization": localization.norm(),
            "weight_decay": shrink.norm(), "noise": noise.norm(), "distance": (w - start).norm(),
            "dot_grad_prior": grad @ prior, "dot_grad_noise": grad @ noise, "dot_prior_noise": prior @ noise,
        }  # fmt: skip
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_metrics_are_stored_for_every_step(tiny, tokens):
    samples = devinterp.sample(tiny, tokens, {}, lr=1e-3, n_beta=10.0, batch_size=4, num_draws=3, num_chains=2,
                               num_burnin_steps=2, save_metrics=True, num_init_loss_batches=1, progress=False)  # fmt: skip
    assert samples.metrics_noise.dims == ("chain", "step")
    assert samples.metrics_noise.shape == (2, 5)
    assert np.isfinite(samples.metrics_dot_grad_noise).all()
    assert (samples.metrics_distance[:, 0] == 0).all()


def test_observables_use_fixed_rows_and_their_own_number_of_batches(tiny, tokens):
    other = random_tokens(40, seed=5)
    samples = devinterp.sample(tiny, tokens, {"a": tokens, "a-b": (other, 2)}, lr=1e-3, n_beta=10.0, batch_size=4,
                               num_draws=2, num_chains=1, batches_per_draw=3, num_init_loss_batches=1, progress=False)  # fmt: skip
    assert samples.loss_a.shape == (1, 2, 12, 5)
    assert samples.loss_a_b.shape == (1, 2, 8, 5)
    ids = torch.as_tensor(samples.input_ids_a_b.values)
    losses = torch.nn.functional.cross_entropy(tiny(ids)[:, :-1].permute(0, 2, 1), ids[:, 1:], reduction="none")
    np.testing.assert_allclose(samples.init_loss_a_b, losses.detach(), rtol=1e-5)
    known = {tuple(row) for row in other["input_ids"]}
    assert {tuple(row) for row in ids.tolist()} <= known


def test_rows_of_observables_are_those_of_devinterp_2_0():
    """2.0.1 took random.Random(obs_seed).sample: stores of both can be compared row by row."""
    from devinterp.engine.observables import check_observables
    from devinterp.engine.rows import check_rows

    (seen,) = check_observables(
        {"x": rows(20)}, check_rows("dataset", rows(20), 1), batch_size=2, batches_per_draw=3, seed=1337
    )
    assert seen.batch.given[:, 0].tolist() == [19, 17, 11, 5, 10, 6]


@pytest.mark.parametrize("form", ["list", "numpy", "torch"])
def test_datasets_of_every_format_give_the_same_tokens(form):
    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]], "text": ["a", "b"]})
    data = data if form == "list" else data.with_format(form)
    plan = plan_of(TinyLM(), data, shuffle=False, batch_size=2)
    assert plan.batches.micro(0, 0).given.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_large_datasets_are_read_row_by_row(monkeypatch):
    monkeypatch.setattr("devinterp.engine.rows.KEPT_IN_MEMORY", 0)
    data = random_tokens(30).select(range(5, 25)).shuffle(seed=1)
    plan = plan_of(TinyLM(), data, shuffle=False, batch_size=4)
    assert plan.batches.micro(0, 1).given.tolist() == data[4:8]["input_ids"]


def test_draw_at_and_steps_before_draw_are_inverse():
    settings = Settings(lr=1.0, n_beta=1.5, num_burnin_steps=4, num_steps_bw_draws=3, num_draws=5)
    assert [settings.draw_at(settings.steps_before_draw(d)) for d in range(5)] == list(range(5))
    assert sum(settings.draw_at(t) is not None for t in range(settings.num_steps + 1)) == 5
    assert settings.steps_before_draw(4) == settings.num_steps
