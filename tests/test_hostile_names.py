"""Names and paths of any kind: nothing outside of the run's folder is read, written or deleted, and messages are inert."""

import os
import stat
import time
from pathlib import Path

import pytest
from cases import TinyLM
from forged import DATA, HOSTILE, OBSERVABLES, SHORT, contents, edit, finished, run

import devinterp
from devinterp.cli.printing import print_settings
from devinterp.engine.discovery.restrict import GRAMMAR
from devinterp.engine.observables import stored_name
from devinterp.errors import DevinterpError, DevinterpInputError, InputValueError, StoreError
from devinterp.slt.requests import path_of_run
from devinterp.store import matrices, writer
from devinterp.store.matrices import check_new_path
from devinterp.store.reader import open_store
from devinterp.store.writer import check_output_path

NAMES = [
    "../x", "../../etc/passwd", "..", ".", "/etc/passwd", "/", "a/b", "a\\b", "..\\x", "C:\\x", "c:x", "a\0b", "\n", "\x1b[2J", HOSTILE,
    "$(touch x)", "`id`", "a;b", "%2e%2e%2f", "\u202ename", "\ufb00", "..\uff0fx", "a" * 300, "", " ", "zarr.json", ".zarray", "c", "~", "~root",
    "-rf", "*", "con", "loss_code", "__class__", "{0.__class__}", "%s%n",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_observable_of_any_name_writes_nothing_elsewhere(tmp_path, name):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    try:
        samples = devinterp.sample(TinyLM(), DATA, {name: DATA}, output_path=folder / "run", **SHORT)
    except DevinterpInputError as error:
        assert str(error).isprintable(), error  # noqa: PT017
        assert not list(folder.iterdir())
    else:
        stored = stored_name(name)
        assert stored.isascii()
        assert stored.isidentifier()
        assert f"loss_{stored}" in samples
        arrays = {path.name for path in (folder / "run").iterdir()}
        assert {"sampling_loss", f"loss_{stored}", f"init_loss_{stored}", f"input_ids_{stored}"} <= arrays
        devinterp.compute_llc(folder / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert {p.name for p in folder.iterdir()} <= {"run", "run.run"}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_restriction_of_any_name_writes_nothing_elsewhere(tmp_path, name, monkeypatch):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    restrictions = {"full": None, name: {"mix.weight": None}}
    try:
        devinterp.susceptibilities(
            TinyLM(), DATA, OBSERVABLES, restrictions, sampling_task="code", output_path="run.zarr", **SHORT
        )
    except DevinterpInputError as error:
        assert str(error).isprintable(), error  # noqa: PT017
        assert not list(folder.iterdir())
    else:
        stores = {"run_full.zarr", f"run_{name}.zarr"}
        assert {p.name for p in folder.iterdir()} == stores | {f"{store}.run" for store in stores}
        assert name.isprintable()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_names_that_would_meet_are_refused():
    with pytest.raises(InputValueError, match="would both be stored"):
        devinterp.sample(TinyLM(), DATA, {"a-b": DATA, "a.b": DATA}, **SHORT)
    made = [path_of_run("runs/x.zarr", name) for name in ("a", "b", "..", "a.b")]
    assert len(set(made)) == len(made)
    assert {os.path.dirname(path) for path in made} == {"runs"}


URLS = ["http://x/y", "https://x", "s3://bucket/x", "gs://b", "file:///tmp/x", "memory://x", "simplecache::s3://b", "zip::x",
        "S3://b", "a+b://c"]  # fmt: skip
ODD_PATHS = ["\0", "a\0b", "~nobody-of-this-name/x", "x" * 5000, "x/" * 3000, HOSTILE * 200]


@pytest.mark.parametrize("path", URLS + ODD_PATHS, ids=lambda path: ascii(path)[:20])
def test_paths_that_are_not_local_or_none_at_all(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    refused = []
    for call in (check_output_path, check_new_path, open_store, devinterp.compute_llc):
        with pytest.raises(DevinterpError) as caught:
            call(path)
        refused.append(str(caught.value))
    assert all(text.isprintable() for text in refused)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["memory::run", "simplecache::run", "~", "run.zip", "http:", HOSTILE])
def test_a_folder_with_the_name_of_a_url_is_a_folder(tmp_path, monkeypatch, name):
    finished(tmp_path).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert float(devinterp.compute_llc(name).llc_mean) == float(devinterp.compute_llc(tmp_path / name).llc_mean)


def test_hostile_text_in_errors_is_inert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = finished(tmp_path).rename(tmp_path / HOSTILE)
    (tmp_path / "file").write_text("")
    masks = {"full": None, HOSTILE: None}
    calls = [
        lambda: open_store(HOSTILE + "x"),
        lambda: devinterp.compute_llc(HOSTILE + "x"),
        lambda: devinterp.sample(TinyLM(), DATA, {}, output_path="s3://" + HOSTILE, **SHORT),
        lambda: run(other, n_beta=99.0),
        lambda: devinterp.sample(TinyLM(), DATA, {HOSTILE: "text"}, **SHORT),
        lambda: devinterp.sample(TinyLM(), DATA, {HOSTILE: DATA, HOSTILE + "!": DATA}, **(SHORT | {"num_draws": HOSTILE})),
        lambda: devinterp.sample(TinyLM(), DATA, {}, param_masks={HOSTILE: None}, **SHORT),
        lambda: devinterp.sample(TinyLM(), DATA, {}, sampling_method=HOSTILE, **SHORT),
        lambda: devinterp.susceptibilities(TinyLM(), DATA, OBSERVABLES, masks, sampling_task="code", **SHORT),
        lambda: devinterp.susceptibilities(TinyLM(), DATA, OBSERVABLES, masks, sampling_task=HOSTILE, **SHORT),
        lambda: devinterp.compute_susceptibilities({"full": other, HOSTILE: other}, "code"),
        lambda: devinterp.compute_bif(other, loss_keys=[HOSTILE]),
        lambda: devinterp.compute_bif(other, output_path=other),
        lambda: devinterp.create_param_masks(TinyLM(), HOSTILE),
        lambda: devinterp.create_param_masks(TinyLM(), HOSTILE + "/l0"),
    ]
    for call in calls:
        with pytest.raises(DevinterpError) as caught:
            call()
        text = str(caught.value)
        assert "\x1b" not in text
        assert "rm " not in text.replace("a'; rm -rf ~;", "")
        assert "devinterp " not in text.replace("devinterp 2.0", ""), "a command"


def test_hostile_text_of_a_store_is_shown_inert(tmp_path, capsys):
    store = finished(tmp_path)
    sampler = {HOSTILE: HOSTILE, "sampling_method": "a"}
    edit(store, lambda declared: declared["attributes"]["metadata"]["config"]["sampler"].update(sampler))
    print_settings(open_store(store))
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("text", ["l" + "9" * 10_000, "l0n" + "0" * 10_000 + ":", "l0 " + " " * 10_000 + "x", "cross" * 2_000, "a" * 10_000,
                                  "l0" + "h" * 10_000, "l0h0 " * 2_000, "/" * 10_000], ids=lambda text: text[:6])  # fmt: skip
def test_long_patterns_take_no_time(text):
    began = time.process_time()
    GRAMMAR.fullmatch(text)
    with pytest.raises(InputValueError):
        stored_name(text)
    assert time.process_time() - began < 0.05
    with pytest.raises(DevinterpError):
        devinterp.create_param_masks(TinyLM(), text)
    assert time.process_time() - began < 0.5


def foreign(folder: Path) -> Path:
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter").write_text("years of work")
    return folder


def test_links_at_the_output_path(tmp_path):
    theirs, path = foreign(tmp_path / "theirs"), tmp_path / "run"
    before = contents(theirs)
    path.symlink_to(theirs)
    with pytest.raises(InputValueError, match="Nothing was changed"):
        run(path)
    path.unlink()
    path.symlink_to(theirs / "not yet there")
    for call in (run, check_new_path):
        with pytest.raises(InputValueError, match="a link to nothing"):
            call(path)
    assert contents(theirs) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "theirs"]


def test_a_link_inside_a_finished_store_is_not_written_through(tmp_path):
    store = finished(tmp_path)
    edit(store, lambda declared: declared["attributes"].update(completed=0))
    (store / "step_loss").rename(tmp_path / "theirs")
    (store / "step_loss").symlink_to(tmp_path / "theirs")
    before = contents(tmp_path)
    with pytest.raises(DevinterpInputError, match="Nothing was changed") as caught:
        run(store)
    assert "a symbolic link" in str(caught.value.__cause__)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("planted", ["link", "folder", "file"])
def test_what_appears_at_the_path_meanwhile_is_not_touched(tmp_path, monkeypatch, planted):
    theirs, path, seen = foreign(tmp_path / "theirs"), tmp_path / "run", []
    before, original = contents(theirs), writer.create_array

    def plant(root, *rest):
        if not seen:
            seen.append(root)
            if planted == "link":
                path.symlink_to(theirs)
            elif planted == "folder":
                foreign(path)
            else:
                path.write_text("years of work")
        original(root, *rest)

    monkeypatch.setattr(writer, "create_array", plant)
    with pytest.raises(OSError, match="run"):
        run(path)
    assert contents(theirs) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "theirs"], "nothing is left over"
    if planted == "folder":
        assert list(contents(path).values()) == list(before.values())


def test_temporary_names_cannot_be_guessed(tmp_path, monkeypatch):
    names, original = set(), matrices.create_array

    def note(root, *rest):
        names.update(p.name for p in tmp_path.iterdir() if p.name.startswith("."))
        original(root, *rest)

    monkeypatch.setattr(matrices, "create_array", note)
    store = finished(tmp_path / "samples")
    for number in range(3):
        devinterp.compute_bif(store, output_path=tmp_path / f"influences{number}", progress=False)
    assert len(names) == 3
    assert len({name.rpartition(".")[2] for name in names}) == 3
    assert min(len(name.rpartition(".")[2]) for name in names) >= 8


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022, 0o002, 0o000], ids=oct)
def test_permissions_are_those_of_the_umask(tmp_path, monkeypatch, mask):
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            for name in ("umask", "chmod", "fchmod", "lchmod"):
                patch.setattr(os, name, None, raising=False)
            run(tmp_path / "new folder" / "run")
            devinterp.compute_bif(tmp_path / "new folder" / "run", output_path=tmp_path / "bif", progress=False)
    finally:
        os.umask(before)
    for path in [*tmp_path.rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_nothing_of_others_is_deleted_or_changed(tmp_path):
    store = finished(tmp_path)
    folders = [foreign(tmp_path / "folder"), store, foreign(tmp_path / "odd")]
    (tmp_path / "odd" / "zarr.json").write_text("{}")
    before = contents(tmp_path)
    for folder in folders:
        with pytest.raises(DevinterpError):
            run(folder, n_beta=99.0)
        with pytest.raises(DevinterpInputError):
            devinterp.compute_bif(store, output_path=folder, progress=False)
    with pytest.raises(DevinterpInputError):
        devinterp.compute_bif(store, output_path=tmp_path / "folder" / "thesis" / "chapter", progress=False)
    assert contents(tmp_path) == before
    with pytest.raises(StoreError):
        open_store(tmp_path / "folder")
