"""`devinterp sweep STUDY.toml` as a user runs it."""

import json

import pytest
import torch
from test_cli import cli, folder  # noqa: F401
from transformers import AutoModelForCausalLM

import devinterp
from devinterp.cli.study_file import StudyFile
from devinterp.errors import DevinterpInputError

STUDY = """
checkpoints = "checkpoints"
dataset = "text.txt"
output_path = "OUT"
context = 16
batch_size = 4
num_draws = 6
num_chains = 2
num_burnin_steps = 2
num_init_loss_batches = 1
batches_per_draw = 1
lr = 1e-3
[observables]
lines = "text.jsonl"
few = ["text.txt", 2]
"""
SUITE = STUDY.replace("[observables]", 'weight_restrictions = "heads"\nsampling_task = "few"\n[observables]')


@pytest.fixture
def study(folder, tmp_path):  # noqa: F811
    """Writes a study beside the texts; its name."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for step in (5, 50):
        with torch.no_grad():
            model.gpt_neox.embed_in.weight.mul_(1.1)
        model.save_pretrained(folder / "checkpoints" / f"checkpoint-{step}")

    def write(text: str) -> str:
        (folder / "study.toml").write_text(text.replace("OUT", str(tmp_path / "runs")))
        return "study.toml"

    return write


WITH_TOKENIZER = 'tokenizer = "model"\n' + STUDY


def test_a_study_is_planned_made_and_found_again(study, cli, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("devinterp.slt.sweep_forecast.ENOUGH_SECONDS", 0.0)
    plan = cli("sweep", study(WITH_TOKENIZER), "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "checkpoints   2\n  checkpoint-5: " in plan.stdout
    assert "tasks         4: 2 chains of 2 runs" in plan.stdout
    assert "about " in plan.stdout
    assert not (tmp_path / "runs").exists()
    done = cli("sweep", "study.toml")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.split("\n") if line.startswith("checkpoint-")] == [
        "checkpoint-5",
        "checkpoint-50",
    ]
    llc = devinterp.compute_llc(tmp_path / "runs")
    assert llc.step.values.tolist() == [5, 50]
    assert f"{float(llc.llc_mean[1]):.3g}" in done.stdout
    assert llc.attrs["localization"] == 300, "the command line's own choice"
    assert devinterp.open_sweep(tmp_path / "runs")["checkpoint-5"].sizes["batch_few"] == 8
    shown = cli("show", tmp_path / "runs").stdout
    assert shown in done.stdout
    assert "checkpoint-50 " in shown
    again = cli("sweep", "study.toml", "--json")
    assert again.stderr.count("nothing to compute") == 2
    found = json.loads(again.stdout)
    assert json.loads(cli("show", tmp_path / "runs", "--json").stdout)["runs"] == found["runs"]
    assert [run["llc_mean"] for run in found["runs"]] == llc.llc_mean.values.tolist()
    assert [run["step"] for run in found["runs"]] == [5, 50]
    assert found["failed"] == {}


def test_restrictions_of_a_kind_and_a_checkpoint_that_is_not_there(study, cli, folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("devinterp.slt.sweep_forecast.ENOUGH_SECONDS", 0.0)
    name = study('tokenizer = "model"\n' + SUITE.replace('checkpoints = "checkpoints"\n', "") + """
[checkpoints]
first = "checkpoints/checkpoint-5"
gone = "checkpoints/nowhere"
""")  # fmt: skip
    plan = cli("sweep", name, "--dry-run", "--json")
    assert plan.returncode == 2
    told = json.loads(plan.stdout)
    assert told["restrictions"] == ["full", "l0h0", "l0h1"]
    assert list(told["failed"]) == ["gone"]
    assert (told["num_runs"], told["num_tasks"]) == (3, 6)
    assert told["seconds"] > 0
    assert told["of_restriction"]["load"] == 0
    done = cli("sweep", name)
    assert done.returncode == 1
    assert "first/l0h1 " in done.stdout
    assert "failed: gone: InputValueError" in done.stderr
    sus = devinterp.compute_susceptibilities(tmp_path / "runs")["susceptibilities"]
    assert sus.wr.values.tolist() == ["l0h0", "l0h1"]


WRONG = {
    "an unknown key": (WITH_TOKENIZER.replace("lr = 1e-3", "learning_rate = 1e-3"), r"\['learning_rate'\]"),
    "no checkpoints": (WITH_TOKENIZER.replace('checkpoints = "checkpoints"', ""), "lacks checkpoints"),
    "no TOML": ("a = = b", "valid TOML"),
    "a bad setting": (WITH_TOKENIZER.replace("lr = 1e-3", "lr = -1"), "lr=-1"),
    "text as a number": (WITH_TOKENIZER.replace("context = 16", 'context = "16"'), "context='16'"),
    "a short context": (WITH_TOKENIZER.replace("context = 16", "context = 1"), "context=1"),
    "a bad observable": (WITH_TOKENIZER.replace('"text.jsonl"', "3"), "observables.lines=3"),
    "a missing text": (WITH_TOKENIZER.replace('"text.jsonl"', '"gone.jsonl"'), "observables.lines='gone.jsonl'"),
    "a bad checkpoint": (WITH_TOKENIZER.replace('"checkpoints"', "{ a = 3 }"), "checkpoints.a=3"),
    "an empty folder": (WITH_TOKENIZER.replace('"checkpoints"', '"model"'), "folder of checkpoints"),
    "bad restrictions": (SUITE.replace('"heads"', "3").replace("checkpoints =", 'tokenizer = "model"\ncheckpoints ='), "weight_restrictions=3"),
    "a kind that is not there": (SUITE.replace('"heads"', '"nonsense"').replace("checkpoints =", 'tokenizer = "model"\ncheckpoints =', 1), "nonsense"),
    "no tokenizer": (STUDY, "tokenizer = "),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dry", [True, False])
def test_what_is_wrong_is_told_by_name_and_nothing_is_made(case, dry, study, cli, tmp_path):  # noqa: F811
    import re

    text, message = WRONG[case]
    done = cli("sweep", study(text), *(["--dry-run"] if dry else []))
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_revisions_of_the_hub_and_paths_beside_the_file(tmp_path):
    text = 'dataset = "d"\noutput_path = "runs"\n[checkpoints]\n"a/b" = ["step1", "step2"]\nown = "c/d@step3"\n'
    (tmp_path / "study.toml").write_text(text)
    file = StudyFile.read(tmp_path / "study.toml")
    assert {name: str(origin) for name, origin in file.checkpoints.items()} == {
        "step1": "a/b@step1", "step2": "a/b@step2", "own": "c/d@step3"
    }  # fmt: skip
    assert file.output_path == tmp_path / "runs"
    (tmp_path / "c" / "d@step3").mkdir(parents=True)
    assert str(StudyFile.read(tmp_path / "study.toml").checkpoints["own"]) == str(tmp_path / "c" / "d@step3")
    (tmp_path / "study.toml").write_text(text + 'step1 = "x/y"\n')
    with pytest.raises(DevinterpInputError, match="step1"):
        StudyFile.read(tmp_path / "study.toml")
