"""The direction of imports, the one place of each concern, and docs that name every module."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import devinterp
from devinterp.engine.settings import Settings

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "devinterp"
MODULES = sorted(SOURCE.rglob("*.py"))

# each layer may import those named, and itself
ALLOWED = {
    "samplers": {"errors"},
    "engine": {"samplers", "errors"},
    "store": {"engine", "errors"},
    "analysis": {"errors"},
    "pictures": {"analysis", "errors"},
    "slt": {"engine", "store", "analysis", "pictures", "samplers", "errors", "utils"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    layer = path.relative_to(SOURCE).parts[0]
    if layer in ALLOWED:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("devinterp.")}
        assert ours <= ALLOWED[layer] | {layer}


def test_only_the_store_imports_zarr_and_numbers_know_no_labels():
    for path in MODULES:
        names = {name.split(".")[0] for name in imports(path)}
        layer = path.relative_to(SOURCE).parts[0]
        assert layer == "store" or "zarr" not in names, path
        assert layer not in ("analysis", "engine", "samplers") or "xarray" not in names, path


def test_files_fit_a_sitting():
    long = {str(path.relative_to(ROOT)): len(path.read_text().split("\n")) for path in MODULES}
    assert {name: count for name, count in long.items() if count > 400} == {}


def test_docs_name_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    missing = [path.name for path in MODULES if path.name not in ("__init__.py", "__main__.py") and path.name not in text]
    assert not missing


def test_nothing_unsafe_on_any_path():
    for path in MODULES:
        for name in imports(path):
            assert name.split(".")[0] not in {"pickle", "dill", "yaml", "shelve", "marshal"}, path
        text = path.read_text()
        for word in ("torch.load", "eval(", "exec(", "allow_pickle", "trust_remote_code", "os.system"):
            assert word not in text.replace(".eval()", "").replace("trust_remote_code=False", ""), f"{word} in {path}"


def test_sample_has_the_defaults_of_the_settings():
    defaults = {
        item.name: item.default_factory() if item.default is dataclasses.MISSING else item.default
        for item in dataclasses.fields(Settings)
        if item.name not in ("lr", "n_beta", "sampling_method_kwargs")
    }
    signature = inspect.signature(devinterp.sample).parameters
    assert defaults == {name: signature[name].default for name in defaults}
    for name in ("lr", "n_beta"):
        assert signature[name].default is inspect.Parameter.empty
    assert all(p.kind is p.KEYWORD_ONLY for p in list(signature.values())[3:])


def test_every_argument_of_sample_is_documented():
    for name in inspect.signature(devinterp.sample).parameters:
        assert f"        {name}: " in devinterp.sample.__doc__, name


def test_importing_devinterp_imports_no_torch():
    code = "import sys, devinterp; dir(devinterp); devinterp.pictures; "
    code += "assert not {'torch', 'xarray', 'zarr', 'transformers', 'matplotlib', 'altair'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names_and_what_became_of_old_ones():
    for name in devinterp.__all__:
        assert callable(getattr(devinterp, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = devinterp.nonsense
    for old, instead in {
        "devinterp.optim": "sampling_method",
        "devinterp.optim.sgld": "sampling_method",
        "devinterp.slt.sampler": "devinterp.sample",
    }.items():
        with pytest.raises(ImportError, match=instead):
            __import__(old)
    with pytest.raises(ImportError, match="sample_single_chain"):
        from devinterp.slt.sampler import sample_single_chain  # noqa: F401


def test_the_version_is_that_of_the_citation():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version[1] == cited[1]


def test_every_page_of_the_docs_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not re.search(rf"(: |- ){re.escape(page)}$", config, re.MULTILINE)} == set()
