"""Execute notebooks and keep what they show.

    python examples/notebooks/execute.py [NAME.ipynb ...]        (`make notebooks`; all of them by default)

Each runs in an empty folder, in a kernel of this Python. It fails where a cell raises, where one writes to stderr (a warning, a
progress bar), or where the last output is no picture. The notebook is written back with its outputs, its last picture to
docs/examples/.
"""

import base64
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
PICTURES = HERE.parent.parent / "docs" / "examples"


def executed(path: Path) -> tuple[nbformat.NotebookNode, bytes]:
    """The notebook with the outputs of a fresh run, and its last picture."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    for output in outputs:
        if output.get("name") == "stderr":
            raise ValueError(f"{path.name} writes to stderr: {output.text}")
    if "image/png" not in outputs[-1].get("data", {}) or outputs[-1] not in notebook.cells[-1].get("outputs", []):
        raise ValueError(f"{path.name} does not end in a picture, but in {str(outputs[-1])[:200]}")
    return notebook, base64.b64decode(outputs[-1].data["image/png"])


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(map(str, HERE.glob("*.ipynb")))):
        began = time.monotonic()
        notebook, picture = executed(path)
        nbformat.write(notebook, path)
        (PICTURES / path.with_suffix(".png").name).write_bytes(picture)
        print(f"{path.name}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1000:.0f} kB")
