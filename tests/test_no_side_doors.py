"""What the package never does on any path: run code from files, open connections, tell of this machine, lean on asserts."""

import ast
import getpass
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import zarr
from cases import TinyLM
from forged import DATA, OBSERVABLES, SHORT, finished, run

import devinterp

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "src" / "devinterp").rglob("*.py"))

BARE = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
DOTTED = {
    "torch.load", "torch.hub", "torch.serialization", "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal",
    "joblib.load", "yaml", "subprocess", "os.system", "os.popen", "os.exec", "os.spawn", "pty", "ctypes", "runpy",
    "np.load", "numpy.load", "urllib", "socket", "tempfile.mktemp", "os.chmod", "os.umask",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


def side_doors(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            names = [name] if name in BARE else []
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not off:
                    names.append(keyword.arg)
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [name for name in names if name in BARE or any(f"{name}.".startswith(f"{door}.") for door in DOTTED)
                  or name in ("trust_remote_code", "allow_pickle", "shell")]  # fmt: skip
    return found


PLANTED = [
    "import pickle", "from dill import loads", "import torch; torch.load('x')", "from torch import load as get", "eval('1')",
    "exec('1')", "import yaml", "import numpy as np; np.load('x', allow_pickle=True)", "f(trust_remote_code=True)",
    "f(trust_remote_code=chosen)", "import os; os.system('x')", "import subprocess", "import os\nos.umask(0)", "import tempfile\ntempfile.mktemp()",
]  # fmt: skip


@pytest.mark.parametrize("source", PLANTED)
def test_the_walk_finds_what_is_planted(source):
    assert side_doors(source)


def test_the_walk_lets_methods_pass():
    assert not side_doors("model.eval(); dataset.load(); f(trust_remote_code=False); re.compile('x'); torch.compile(f)")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_has_a_side_door(path):
    source = path.read_text()
    assert not side_doors(source)
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)], "asserts vanish under python -O"


def test_stores_are_read_through_one_door():
    doors = {
        "open_datatree",
        "open_zarr",
        "open_dataset",
        "open_groups",
        "open_array",
        "open_group",
        "open_consolidated",
        "open",
    }
    found = {
        (path.name, name)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and (name := dotted(node)).split(".")[0] in ("xr", "zarr") and node.attr in doors
    }
    assert found == {("reader.py", "xr.open_datatree"), ("writer.py", "zarr.open_group")}


def test_examples_load_no_code_of_others():
    for path in (ROOT / "examples").rglob("*.py"):
        assert not {"trust_remote_code", "torch.load", "pickle", "eval", "exec"} & set(side_doors(path.read_text())), path


def test_nothing_is_unpickled_while_a_store_is_opened_and_analysed(tmp_path, monkeypatch):
    store = finished(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr("torch.load", refuse)
    monkeypatch.setattr("numpy.load", refuse)
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(b"N.")
    devinterp.compute_llc(store)
    devinterp.compute_bif(store, progress=False)
    devinterp.compute_bif(store, top_k=2, output_path=None, progress=False)
    devinterp.compute_susceptibilities({"part": store}, "code", estimator="one_chain")


def test_no_connection_is_opened(tmp_path, monkeypatch):
    tried = []

    def refuse(_self, address):
        tried.append(address)
        raise OSError("no network here")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: refuse(None, where))
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("127.0.0.1", 9))
    tried.clear()
    devinterp.compute_llc(run(tmp_path / "run"))
    devinterp.llc(TinyLM(), DATA, **SHORT)
    devinterp.compute_bif(tmp_path / "run", progress=False)
    masks = {"full": None, "mix": devinterp.create_param_masks(TinyLM(), "mix.weight")}
    devinterp.susceptibilities(TinyLM(), DATA, OBSERVABLES, masks, sampling_task="code", output_path=tmp_path / "s", **SHORT)
    assert not tried


def test_importing_all_modules_opens_no_connection():
    names = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in MODULES if path.name != "__main__.py"]
    names = [
        name.removesuffix(".__init__")
        for name in names
        if not name.startswith("devinterp.optim") and name != "devinterp.slt.sampler"
    ]
    code = (
        "import sys, importlib\n"
        "def hook(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'): raise SystemExit(f'{event} {arguments}')\n"
        "sys.addaudithook(hook)\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def everything(store: Path) -> bytes:
    """All names, files and decoded arrays of a store."""
    parts = [str(path.relative_to(store)).encode() for path in store.rglob("*")]
    parts += [path.read_bytes() for path in store.rglob("*") if path.is_file()]
    if store.suffix == ".run":  # what lies beside it
        return b"\n".join(parts)
    root = zarr.open_group(store, mode="r")
    parts.append(json.dumps(root.attrs.asdict()).encode())
    for _, array in root.arrays():
        parts += [json.dumps(array.attrs.asdict()).encode(), np.asarray(array[...]).tobytes()]
    return b"\n".join(parts)


def test_a_finished_store_tells_nothing_of_this_machine(tmp_path, monkeypatch):
    home = tmp_path / "home-of-somebody"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    secrets = [
        str(home),
        str(tmp_path),
        os.path.expanduser("~"),
        str(ROOT),
        socket.gethostname(),
        socket.getfqdn(),
        os.uname().nodename,
    ]
    run(home / "run")
    masks = {"full": None, "mix": {"mix.weight": None}}
    devinterp.susceptibilities(TinyLM(), DATA, OBSERVABLES, masks, sampling_task="code", output_path=home / "suite", **SHORT)
    devinterp.compute_bif(home / "run", output_path=home / "bif", progress=False)
    user = getpass.getuser().encode()
    for store in home.iterdir():
        text = everything(store)
        assert b"n_beta" in text or store.name == "bif"
        for secret in filter(None, secrets):
            assert secret.encode() not in text, (store.name, secret)
        assert not re.search(rb"(?<![A-Za-z_])" + re.escape(user) + rb"(?![A-Za-z_])", text), (store.name, user)


UNDER_O = """
import sys
from pathlib import Path
assert False, "asserts are on"
import devinterp
from devinterp.errors import StoreError
store = Path(sys.argv[1])
print(repr(float(devinterp.compute_llc(store).llc_mean)))
for node, old, new in (("n_beta", '"float64"', "[1]"), ("init_loss", '"bytes"', '"vlen-utf8"')):
    file = store / node / "zarr.json"
    text = file.read_text()
    file.write_text(text.replace(old, new))
    try:
        devinterp.compute_llc(store)
    except StoreError as error:
        print("refused")
    file.write_text(text)
(store / "link").symlink_to("/etc")
try:
    devinterp.compute_llc(store)
except StoreError as error:
    print("refused")
"""


def test_without_asserts_the_checks_are_the_same(tmp_path):
    store = finished(tmp_path)
    done = subprocess.run([sys.executable, "-O", "-c", UNDER_O, str(store)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run" / "link").unlink()
    assert done.stdout.split() == [repr(float(devinterp.compute_llc(store).llc_mean)), "refused", "refused", "refused"]


def test_required_versions_leave_out_known_holes():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for floor in ("numcodecs>=0.16.6", "zarr>=3.1.3", "torch>=2.6"):
        assert floor in wanted
    assert tuple(map(int, version("numcodecs").split(".")[:3])) >= (0, 16, 6)


def test_the_policy_says_what_it_must():
    text = (ROOT / "SECURITY.md").read_text()
    for part in ("store from someone else", "checkpoint from the internet", "Hostile text", "shared machine", "supply chain", "loss_fn",
                 "accident, not attack", "90 days", "Report a vulnerability", "Versions supported"):  # fmt: skip
        assert part in text
    assert not re.search(r"[\w.]+@\w+\.\w+", text)
