"""The notebooks of examples/ run offline, hold what they assert, say nothing on stderr, and end in a picture."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}
"""the hub's own switches, and a proxy that nobody serves for everything else"""
LARGEST = 400_000

sys.path.insert(0, str(FOLDER))


def written(folder: Path, *sources: str) -> Path:
    """A notebook of these cells."""
    path = folder / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    from execute import executed

    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    _, picture = executed(path)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_whole_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from the top, once"
    assert "image/png" in cells[-1].outputs[-1].data
    assert any("assert " in cell.source for cell in cells), "what it claims is checked"
    assert path.stat().st_size < LARGEST
    assert (FOLDER.parent.parent / "docs" / "examples" / f"{path.stem}.png").exists()


def test_all_are_there():
    assert len(NOTEBOOKS) == 5


def test_what_is_wrong_is_seen(tmp_path):
    """A cell that raises, a warning, an end without a picture; and the kernel is of this Python."""
    from execute import executed

    with pytest.raises(CellExecutionError, match="no minimum"):
        executed(written(tmp_path, "assert 1 > 2, 'no minimum'"))
    with pytest.raises(ValueError, match="stderr: .*careful"):
        executed(written(tmp_path, "import warnings; warnings.warn('careful')"))
    picture = "from matplotlib import pyplot; pyplot.plot([1, 2]); pyplot.show()"
    with pytest.raises(ValueError, match="does not end in a picture"):
        executed(written(tmp_path, picture, "print('done')"))
    executed(written(tmp_path, f"import sys; assert sys.prefix == {sys.prefix!r}", picture))
