"""`make wheel`: what a user gets who installs the wheel alone, without extras, in an empty environment.

python tests/wheel.py dist
"""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

LLC = """
import sys, devinterp
assert "torch" not in sys.modules, "import devinterp imports torch"
assert "site-packages" in devinterp.__file__, devinterp.__file__
import torch
from datasets import Dataset

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)
    def forward(self, ids):
        return self.out(torch.tanh(self.embed(ids)))

tokens = Dataset.from_dict({"input_ids": torch.randint(0, 11, (64, 6)).tolist()})
result = devinterp.llc(Model(), tokens, lr="auto", n_beta=10.0, localization=100.0, num_draws=20, batch_size=8,
                       sampling_method="leimkuhler_matthews", output_path="run", progress=False)
print(f"LLC {float(result.llc_mean):.3f} ± {float(result.llc_sem):.3f}, R-hat {float(result.rhat):.3f}")
"""
MISSING = {
    "devinterp[netcdf]": "from devinterp.slt.conversion import convert; convert('run', 'run.nc')",
    "devinterp[plots]": "import devinterp; from devinterp import pictures; pictures.plot_traces(devinterp.diagnose('run'))",
    "devinterp[report]": "import devinterp; devinterp.report('run', 'report.html')",
}
"""extra -> a call that needs it, which has to say so"""


def main(dist: Path) -> None:
    wheel = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    names = sorted(item.filename for item in zipfile.ZipFile(wheel).infolist())
    print("\n".join(names))
    source = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".typed")
    }
    inside = {name for name in names if ".dist-info/" not in name}
    assert source <= inside, f"not in the wheel: {sorted(source - inside)}"
    assert all(name.startswith("devinterp/") for name in inside), "something besides the package"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1024:.0f} KiB")
    with tempfile.TemporaryDirectory() as folder:
        check(wheel, Path(folder))


def check(wheel: Path, folder: Path) -> None:
    venv.create(folder / "venv", with_pip=True)
    python, command = folder / "venv/bin/python", folder / "venv/bin/devinterp"
    pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(pip, check=True, cwd=folder)
    subprocess.run([python, "-c", LLC], check=True, cwd=folder)
    for arguments in (["--help"], ["llc", "--help"], ["show", "run"], ["convert", "run", "run.parquet"]):
        subprocess.run([command, *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    for extra, code in MISSING.items():
        done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True)
        last = done.stderr.strip().split("\n")[-1]
        assert done.returncode == 1, f"{extra} is installed without being asked for"
        assert extra in last, f"the error does not name {extra}: {last}"
        print(f"without {extra}: {last}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
