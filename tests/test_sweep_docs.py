"""The code of docs/sweeps.md runs as it stands there, on a tiny model and with fewer steps."""

import re
import shutil
import tomllib
from pathlib import Path

import torch
from cases import GOOD, TinyLM, random_tokens
from test_cli import TEXT, folder  # noqa: F401
from transformers import AutoModelForCausalLM

import devinterp
from devinterp.cli.study_file import StudyFile
from devinterp.slt.sweep_study import Study, origins_of

PAGE = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_code_of_the_page_runs(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for step in (500, 1000):
        shutil.copytree(folder / "model", tmp_path / "training" / f"checkpoint-{step}")
        model.save_pretrained(tmp_path / "training" / f"checkpoint-{step}")
        with torch.no_grad():
            model.gpt_neox.embed_in.weight.mul_(1.1)
    tokens, code = (random_tokens(vocabulary=300, seed=seed, count=1100) for seed in (1, 2))
    given = {"devinterp": devinterp, "tokens": tokens, "code": code, "my_function": TinyLM, "settings": GOOD}
    python = "\n".join(blocks("python")).replace("num_draws=100", "num_draws=4, num_chains=2, progress=False")
    exec(python.replace("num_burnin_steps=50", "num_burnin_steps=1"), given)
    assert given["llc"].step.values.tolist() == [500, 1000]
    assert sorted(given["sweep"]["checkpoint-500"].children) == ["full", "l0h0", "l0h1"]
    assert origins_of(given["checkpoints"])["step512"].revision == "step512"

    study, of_the_hub = blocks("toml")
    (tmp_path / "stories.txt").write_text(TEXT)
    (tmp_path / "code.txt").write_text(TEXT)
    (tmp_path / "study.toml").write_text(study.replace("context = 64", "context = 16"))
    checked = Study.of(**StudyFile.read(tmp_path / "study.toml").arguments())
    assert list(checked.origins) == ["checkpoint-500", "checkpoint-1000"]
    assert list(checked.restrictions) == ["full", "l0h0", "l0h1"]
    (tmp_path / "hub.toml").write_text('dataset = "stories.txt"\noutput_path = "runs"\n' + of_the_hub)
    assert list(StudyFile.read(tmp_path / "hub.toml").checkpoints) == ["step512", "step1000", "ours"]
    assert tomllib.loads(of_the_hub)
