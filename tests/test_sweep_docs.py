"""The TOML of docs/sweeps.md is read as it stands there; its Python is run by test_docs.py."""

import re
import shutil
import tomllib
from pathlib import Path

from test_cli import TEXT, folder  # noqa: F401

from devinterp.cli.study_file import StudyFile
from devinterp.slt.sweep_study import Study

PAGE = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text()


def test_the_studies_of_the_page(folder, tmp_path):  # noqa: F811
    for step in (500, 1000):
        shutil.copytree(folder / "model", tmp_path / "training" / f"checkpoint-{step}")
    study, of_the_hub = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "stories.txt").write_text(TEXT)
    (tmp_path / "code.txt").write_text(TEXT)
    (tmp_path / "study.toml").write_text(study.replace("context = 64", "context = 16"))
    checked = Study.of(**StudyFile.read(tmp_path / "study.toml").arguments())
    assert list(checked.origins) == ["checkpoint-500", "checkpoint-1000"]
    assert list(checked.restrictions) == ["full", "l0h0", "l0h1"]
    (tmp_path / "hub.toml").write_text('dataset = "stories.txt"\noutput_path = "runs"\n' + of_the_hub)
    assert list(StudyFile.read(tmp_path / "hub.toml").checkpoints) == ["step512", "step1000", "ours"]
    assert tomllib.loads(of_the_hub)
