"""The largest Hessian eigenvalue, and the step size that is chosen from it."""

import pytest
import torch
from cases import TinyLM, Weights, plan_of, quadratic, random_tokens, rows

import devinterp
from devinterp.engine.curvature import Curvature, Spectrum, curvature_batches, spectrum
from devinterp.engine.step_size import choose_step_size


def matrix_loss(matrix):
    return lambda model, ids: (0.5 * model.w @ matrix @ model.w).expand(len(ids), 1)


def top(plan, **options) -> float:
    return spectrum(plan, None, [plan.batches.micro(0, 0)], **options).h_max


def test_hessian_vector_product_against_the_dense_hessian():
    model, data = TinyLM(), random_tokens()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:4, ::2] = True
    plan = plan_of(model, data, masks={"mix.weight": mask, "out.bias": None}, batch_size=4)
    batches = [plan.batches.micro(0, k) for k in range(2)]
    weights = plan.selection.initial()

    def mean_loss(flat):
        bias, matrix = flat[mask.sum() :], model.mix.weight.detach().clone()
        matrix = matrix.index_put(torch.where(mask), flat[: mask.sum()])
        total = 0.0
        for ids in (batch.given for batch in batches):
            logits = torch.func.functional_call(model, {"mix.weight": matrix, "out.bias": bias}, (ids,))[:, :-1]
            total = total + torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:]) / 2
        return total

    hessian = torch.autograd.functional.hessian(mean_loss, weights)
    with plan.checkpoint.ready():
        curvature = Curvature(plan, None, batches)
        vector = torch.randn(len(weights), generator=torch.Generator().manual_seed(1))
        curvature.gradient.copy_(vector)
        quotient = curvature.apply()
    vector /= vector.norm()
    torch.testing.assert_close(curvature.gradient, hessian @ vector, rtol=1e-3, atol=1e-5)
    assert quotient == pytest.approx(float(vector @ hessian @ vector), rel=1e-3)


def test_largest_eigenvalue_is_the_largest_not_the_largest_absolute():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator))
    for eigenvalues, expected in (
        ([5.0, 2.0] + [0.1] * 18, 5.0),
        ([-9.0, 3.0] + [0.1] * 18, 3.0),
        ([-9.0] + [-0.5] * 19, 0.0),
        ([0.0] * 20, 0.0),
    ):
        matrix = basis @ torch.diag(torch.tensor(eigenvalues)) @ basis.T
        plan = plan_of(Weights(torch.zeros(20)), rows(4), matrix_loss(matrix))
        assert top(plan) == pytest.approx(expected, rel=0.05, abs=1e-4)


@pytest.mark.parametrize(("method", "share"), [("leimkuhler_matthews", 1.0), ("sgmcmc_sgld", 0.25)])
def test_auto_on_a_quadratic_is_the_formula(method, share):
    samples = devinterp.sample(
        Weights(torch.zeros(30)), rows(8), {}, loss_fn=quadratic(7.0), lr="auto", n_beta=10.0, localization=5.0,
        llc_weight_decay=2.0, sampling_method=method, num_draws=2, num_chains=1, batch_size=4, num_init_loss_batches=1,
        progress=False,
    )  # fmt: skip
    step_size = samples.attrs["metadata"]["step_size"]
    assert step_size["lr"] == pytest.approx(share / (10 * 7 + 5 + 2), rel=1e-3)
    assert step_size["h_max_checkpoint"] == pytest.approx(7.0, rel=1e-3)
    assert step_size["h_max_pilot"] == pytest.approx(7.0, rel=1e-3)


def test_auto_sees_curvature_that_grows_away_from_the_checkpoint():
    """w^4 is flat at 0: only the pilot sees the curvature 12 w^2 where the chain lives."""
    loss = lambda model, ids: model.w.pow(4).sum().expand(len(ids), 1)  # noqa: E731
    plan = plan_of(Weights(torch.zeros(50)), rows(4), loss, lr="auto", n_beta=1000.0, localization=1.0,
                   sampling_method="leimkuhler_matthews")  # fmt: skip
    with plan.checkpoint.ready():
        step_size = choose_step_size(plan)
    assert step_size.h_max_checkpoint < 0.01
    assert step_size.h_max_pilot > 0.5
    assert step_size.lr < 1 / 500


def test_few_directions_are_looked_at_from_more_chains(monkeypatch):
    """In one dimension the curvature where two chains end says little of where others go."""
    looked = []

    def pilot(plan, chain, lr, looks, batches):
        looked.append(chain)
        return Spectrum(1.0 + chain, 1.0, 1.0), lr, 20

    monkeypatch.setattr("devinterp.engine.step_size.pilot", pilot)
    for size, chains in ((1, 16), (10, 4), (16, 2), (1000, 2)):
        plan = plan_of(Weights(torch.zeros(size)), rows(4), quadratic(1e-3), lr="auto", localization=1.0,
                       sampling_method="leimkuhler_matthews")  # fmt: skip
        with plan.checkpoint.ready():
            assert choose_step_size(plan).lr == pytest.approx(1 / chains)
        assert looked == list(range(chains))
        looked.clear()


def test_the_largest_curvature_on_the_way_counts_where_there_are_few_directions(monkeypatch):
    """And the largest anywhere, not that of the end. From 17 directions on only the end is looked at."""
    for size, looks in ((1, 8), (2, 8), (10, 3), (16, 2), (17, 1), (1000, 1)):
        seen = []

        def look(plan, weights, batches, seen=seen, looks=looks):
            seen.append(None if weights is None else weights.clone())
            rise = len(seen) - 1
            return Spectrum(1.0, 1.0, 1.0) if weights is None else Spectrum(2.0 if rise == 1 else 1.5, 1.5, float(rise))

        monkeypatch.setattr("devinterp.engine.step_size.spectrum", look)
        plan = plan_of(Weights(torch.zeros(size)), rows(4), quadratic(1e-3), lr="auto", localization=1.0,
                       sampling_method="leimkuhler_matthews")  # fmt: skip
        with plan.checkpoint.ready():
            found = choose_step_size(plan)
        chains = max(2, min(16, -(-32 // size)))
        assert len(seen) == 1 + chains * looks
        assert found.lr == pytest.approx(1 / 2.0)
        assert found.trace_pilot == pytest.approx(sum(looks * chain for chain in range(1, chains + 1)) / chains)
        assert len({tuple(weights.flatten()[:1].tolist()) for weights in seen[1:]}) == chains * looks, "at other weights each"


def test_from_a_flat_checkpoint_the_way_is_looked_at(monkeypatch):
    """Flat: the prior holds the weights there, the loss does where a chain ends. The chains that follow are looked at 8 times."""
    for at_checkpoint, away, count in ((0.05, 0.2, 1 + 1 + 8), (0.05, 0.05, 1 + 2), (2.0, 9.0, 1 + 2)):
        seen = []

        def look(plan, weights, batches, seen=seen, at_checkpoint=at_checkpoint, away=away):
            seen.append(weights)
            h_max = at_checkpoint if weights is None else away
            return Spectrum(10.0 * h_max + 1.0, h_max, 1.0)

        monkeypatch.setattr("devinterp.engine.step_size.spectrum", look)
        plan = plan_of(Weights(torch.zeros(1000)), rows(4), quadratic(1e-3), lr="auto", localization=1.0, n_beta=10.0,
                       sampling_method="leimkuhler_matthews")  # fmt: skip
        with plan.checkpoint.ready():
            choose_step_size(plan)
        assert len(seen) == count


def test_auto_depends_on_neither_the_number_of_chains_nor_of_draws():
    chosen = {"lr": "auto", "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "sampling_method": "leimkuhler_matthews"}
    found = set()
    for more in ({"num_chains": 1, "num_draws": 2}, {"num_chains": 7, "num_draws": 500}):
        plan = plan_of(TinyLM(), random_tokens(), **chosen, **more)
        with plan.checkpoint.ready():
            found.add(choose_step_size(plan))
    assert len(found) == 1


def test_auto_without_curvature_and_prior_is_refused():
    flat = lambda model, ids: (3.0 * model.w.sum()).expand(len(ids), 1)  # noqa: E731
    with pytest.raises(ValueError, match="no positive curvature"):
        devinterp.sample(Weights(torch.zeros(3)), rows(8), {}, loss_fn=flat, lr="auto", n_beta=10.0, batch_size=4,
                         num_init_loss_batches=1, sampling_method="leimkuhler_matthews")  # fmt: skip


def test_attention_kernels_without_a_second_derivative_do_no_harm():
    class Attention(TinyLM):
        def forward(self, ids):
            x = self.embed(ids)[:, None]
            return self.out(torch.nn.functional.scaled_dot_product_attention(self.mix(x), x, x, is_causal=True)[:, 0])

    plan = plan_of(Attention(), random_tokens(), batch_size=4)
    with plan.checkpoint.ready():
        assert top(plan) > 0


def test_half_precision_models_have_the_curvature_of_float32():
    full = top(plan_of(TinyLM(), random_tokens(), batch_size=8))
    half = top(plan_of(TinyLM().bfloat16(), random_tokens(), batch_size=8))
    assert half == pytest.approx(full, rel=0.05)


def test_traces_of_a_quadratic_and_of_what_is_not():
    """Exact where all directions are alike; otherwise right on average over seeds."""
    plan = plan_of(Weights(torch.zeros(30)), rows(8), quadratic(7.0), batch_size=4)
    assert spectrum(plan, None, [plan.batches.micro(0, 0)]).trace == pytest.approx(7.0 * 30, rel=1e-3)
    plan = plan_of(Weights(torch.zeros(30)), rows(8), quadratic(-7.0), batch_size=4)
    assert spectrum(plan, None, [plan.batches.micro(0, 0)]).trace == pytest.approx(-7.0 * 30, rel=1e-3)
    matrix, found = torch.diag(torch.tensor([40.0, 4.0, 1.0, 0.0])), []
    for seed in range(400):
        plan = plan_of(Weights(torch.zeros(4)), rows(4), matrix_loss(matrix), init_seed=seed)
        found.append(spectrum(plan, None, [plan.batches.micro(0, 0)], iterations=1).trace)
    found = torch.tensor(found)
    assert abs(found.mean() - 45.0) < 4.89 * found.std() / 20


def test_a_given_step_size_is_kept_with_the_curvature_it_was_compared_with():
    settings = {"n_beta": 10.0, "localization": 5.0, "num_draws": 2, "num_chains": 1, "batch_size": 4, "num_init_loss_batches": 1,
                "progress": False, "loss_fn": quadratic(7.0)}  # fmt: skip
    found = devinterp.sample(Weights(torch.zeros(30)), rows(8), {}, lr=0.001, **settings).attrs["metadata"]["step_size"]
    assert found["lr"] == 0.001
    assert found["h_max_checkpoint"] == pytest.approx(7.0, rel=1e-3)
    assert found["trace_checkpoint"] == pytest.approx(210.0, rel=1e-3)
    assert found["h_max_pilot"] is None
    with pytest.warns(UserWarning, match="no chain is stable from 4 on"):
        devinterp.sample(Weights(torch.zeros(30)), rows(8), {}, lr=0.06, sampling_method="leimkuhler_matthews", **settings)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_curvature_of_sorted_data_is_that_of_all_of_it(shuffle):
    """Of 1000 rows the last hundred curve a hundred times as much as the others."""
    steep = lambda model, ids: 0.5 * (1 + 99 * (ids[:, :1] >= 900)) * model.w.square().sum()  # noqa: E731
    plan = plan_of(Weights(torch.zeros(1)), rows(1000), steep, batch_size=10, shuffle=shuffle)
    found = spectrum(plan, None, curvature_batches(plan)).h_max
    assert found == pytest.approx(10.9, abs=3 * 29.7 / 128**0.5)  # three standard errors of a mean over 128 rows
