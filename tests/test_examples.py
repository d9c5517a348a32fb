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
