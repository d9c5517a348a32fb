"""The examples run, in a shortened form, through the same code."""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def test_training_run(tmp_path, capsys):
    import training_run

    settings = {"num_draws": 20, "num_burnin_steps": 10, "num_chains": 2, "num_init_loss_batches": 2, "progress": False}
    rows = training_run.run(tmp_path, checkpoints=(0, 60), characters=300_000, **settings)
    first, last = rows
    assert last["loss code"] < first["loss code"] - 1
    assert last["llc"] > first["llc"] + 5 * math.hypot(first["sem"], last["sem"]), "a trained model has a larger LLC"
    for row in rows:
        assert 0 < row["sem"] < 1
        assert row["rhat"] < 1.3
        assert row["lr"] < 1e-3
    assert (tmp_path / "llc_over_training.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "R-hat" in out
    assert str(tmp_path / "runs") in out
    # asked again, nothing is computed
    assert training_run.run(tmp_path, checkpoints=(0, 60), characters=300_000, **settings) == rows

    import code_and_prose

    few = {"num_draws": 12, "num_burnin_steps": 4, "num_chains": 2, "num_init_loss_batches": 1, "batches_per_draw": 1}
    found, means = code_and_prose.run(tmp_path, progress=False, **few)
    assert set(found) == {"within code", "within prose", "across"}
    assert all(abs(mean) < 1 and 0 < error < 1 for mean, error in found.values())
    assert len(means["code"]) == 10
    # standardised over all tokens, half of them code
    assert all(abs(a + b) < 1e-9 for a, b in zip(means["code"], means["prose"], strict=True))
    for name in ("influences.png", "susceptibilities.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_means_by_kind_and_their_errors():
    import code_and_prose
    import numpy as np

    rng, kinds = np.random.default_rng(0), np.repeat([0, 1], 20)
    levels = np.where(kinds[:, None] == kinds, 0.3, 0.1)
    matrix = levels + 0.05 * (noise := rng.standard_normal((40, 40))) + 0.05 * noise.T
    np.fill_diagonal(matrix, 1.0)  # a sequence with itself does not count
    found = code_and_prose.means_by_kind(matrix, kinds)
    for name, level in (("within code", 0.3), ("within prose", 0.3), ("across", 0.1)):
        mean, error = found[name]
        assert abs(mean - level) < 5 * error
        assert 0.001 < error < 0.02
