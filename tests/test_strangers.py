"""A store from a stranger runs no code, reads nothing outside of itself, and exhausts nothing."""

import json
import os
import pickle
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from forged import HOSTILE, added_array, edit, finished, rle_frame
from numcodecs.zstd import Zstd

import devinterp
from devinterp.errors import DevinterpInputError, StoreError
from devinterp.store import guard
from devinterp.store.guard import check_store
from devinterp.store.reader import open_store

OLD = Path(__file__).parent / "data"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


PICKLE_FILTERS = [
    [{"id": "pickle", "protocol": 5}],
    [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}],
]


@pytest.mark.parametrize("filters", PICKLE_FILTERS, ids=["pickle", "vlen-utf8, pickle"])
@pytest.mark.parametrize("where", ["root", "inside"])
def test_a_pickle_in_a_store_of_format_2_is_not_run(tmp_path, where, filters):
    sentinel = tmp_path / "code was run"
    payload = pickle.dumps(Payload(sentinel))
    pickle.loads(payload)
    assert sentinel.exists()  # the payload works
    sentinel.rmdir()
    if where == "root":
        store = tmp_path / "run"
        store.mkdir()
        (store / ".zgroup").write_text('{"zarr_format": 2}')
    else:
        store = finished(tmp_path)
    for name in ("sampling_loss", "init_loss", "draw") if where == "root" else ("hidden",):
        (store / name).mkdir()
        array = {
            "zarr_format": 2,
            "shape": [1],
            "chunks": [1],
            "dtype": "|O",
            "compressor": None,
            "fill_value": None,
            "order": "C",
        }
        (store / name / ".zarray").write_text(json.dumps(array | {"filters": filters}))
        (store / name / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["draw"]}')
        (store / name / "0").write_bytes(payload)
    with pytest.raises(StoreError, match=r"no zarr\.json" if where == "root" else "Zarr format 2"):
        devinterp.compute_llc(store)
    assert not sentinel.exists()


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
REFUSED_METADATA = {
    "zarr_format 2": {"zarr_format": 2},
    "zarr_format '3'": {"zarr_format": "3"},
    "node_type": {"node_type": "table"},
    "codecs": {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
    r"codecs \['bytes', 'unknown'\]": {"codecs": [BYTES, {"name": "unknown", "configuration": {"\x1b[2J": 1}}]},
    r"codecs \['vlen-utf8', 'zstd'\]": {"codecs": ["vlen-utf8", {"name": "zstd"}]},
    r"codecs \['sharding_indexed'\]": {"codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [8]}}]},
    "codecs None": {"codecs": "bytes"},
    "data type 'string'": {"data_type": "string"},
    "data type {": {"data_type": {"name": "numpy.datetime64", "configuration": {"unit": "s"}}},
    r"data type \[": {"data_type": ["float32"]},
    "storage transformers": {"storage_transformers": [{"name": "x"}]},
    "chunk grid": {"chunk_grid": {"name": "rectangular"}},
    "keys": {"chunk_key_encoding": {"name": "v2"}},
    "keys {": {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
    "shape": {"shape": [-1]},
    r"shape \[1.5\]": {"shape": [1.5]},
    r"shape \[True\]": {"shape": [True]},
    "shape {": {"shape": {}},
    "equally long": {"shape": [8, 8]},
    r"chunks \[0\]": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0]}}},
    "dimension names": {"dimension_names": [1]},
    "attributes": {"attributes": []},
    "consolidated": {"consolidated_metadata": {"kind": "inline", "metadata": {}}},
}


@pytest.mark.parametrize("message", REFUSED_METADATA)
def test_metadata_of_no_store_of_ours_are_refused(tmp_path, message):
    store = finished(tmp_path)
    added_array(store, **REFUSED_METADATA[message])
    with pytest.raises(StoreError, match=message) as caught:
        open_store(store)
    assert "at 'extra/zarr.json'" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_what_we_and_2_0_1_write_is_allowed(tmp_path):
    check_store(finished(tmp_path))
    devinterp.compute_bif(tmp_path / "run", output_path=tmp_path / "bif", progress=False)
    for store in (tmp_path / "bif", OLD / "store_2_0_1", OLD / "suite_2_0_1" / "full"):
        check_store(store)
    open_store(tmp_path / "run").to_zarr(tmp_path / "copied by xarray")
    assert devinterp.compute_llc(tmp_path / "copied by xarray").equals(devinterp.compute_llc(tmp_path / "run"))


@pytest.mark.parametrize("what", ["chunk", "metadata", "folder", "inward", "pipe", "pipe as metadata"])
def test_links_and_pipes_are_refused(tmp_path, what):
    store = finished(tmp_path)
    chunk, metadata = store / "n_beta" / "c", store / "n_beta" / "zarr.json"
    secret = tmp_path / "secret"
    secret.write_bytes(chunk.read_bytes())
    if what == "folder":
        (store / "n_beta").rename(tmp_path / "n_beta")
        (store / "n_beta").symlink_to(tmp_path / "n_beta")
    elif what == "inward":
        (store / "other").symlink_to(store / "n_beta")
    elif "pipe" in what:
        at = store / "pipe" if what == "pipe" else metadata
        at.unlink(missing_ok=True)
        os.mkfifo(at)
    else:
        at = chunk if what == "chunk" else metadata
        if what == "metadata":
            secret.write_bytes(metadata.read_bytes())
        at.unlink()
        at.symlink_to(secret)
    with pytest.raises(
        StoreError,
        match="not a regular file" if "metadata" in what else "neither a file" if what == "pipe" else "a symbolic link",
    ):
        devinterp.compute_llc(store)


def test_the_store_itself_may_be_a_link(tmp_path):
    store = finished(tmp_path)
    (tmp_path / "link").symlink_to(store)
    assert devinterp.compute_llc(tmp_path / "link").equals(devinterp.compute_llc(store))


def _huge_shape(store):
    added_array(store, shape=[2**43])


def _huge_coordinate(store):
    added_array(store, "somewhere", shape=[2**26], chunk_grid={"name": "regular", "configuration": {"chunk_shape": [2**20]}})


def _huge_chunk(store):
    added_array(store, shape=[2**29], chunk_grid={"name": "regular", "configuration": {"chunk_shape": [2**29]}})


def _many_chunks(store):
    added_array(store, shape=[2**32], chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1]}})


def _chunk(store, file, length):
    node = added_array(store, shape=[length], chunk_grid={"name": "regular", "configuration": {"chunk_shape": [length]}})
    (node / "c").mkdir()
    (node / "c" / "0").write_bytes(file)


def _sparse(store):
    _chunk(store, b"", 8)
    edit(store / "extra", lambda declared: declared.update(codecs=[BYTES]))
    os.truncate(store / "extra" / "c" / "0", 10 * 2**30)


BOMBS = {
    "declares": _huge_shape,
    "a coordinate": _huge_coordinate,
    "chunks of": _huge_chunk,
    r"4,294,967,\d+ chunks": _many_chunks,
    r"bytes that decodes to 1,073,741,824": lambda store: _chunk(store, rle_frame(2**30), 2**27),
    r"decodes to 1,073,741,824 bytes, 64": lambda store: _chunk(store, rle_frame(2**30), 8),
    "damaged": lambda store: _chunk(store, rle_frame(64) + rle_frame(2**30), 8),
    "damaged, or": lambda store: _chunk(store, b"\x50\x2a\x4d\x18\4\0\0\0abcd" + rle_frame(2**30), 8),
    "a chunk that is damaged": lambda store: _chunk(store, rle_frame(2**30, declared=False), 8),
    r"decodes to 10,737,418,240 bytes, 64": _sparse,
}


@pytest.mark.parametrize("message", BOMBS)
def test_bombs_are_refused_at_once_and_without_memory(tmp_path, message):
    store = finished(tmp_path)
    BOMBS[message](store)
    assert sum(path.stat().st_blocks for path in store.rglob("*")) * 512 < 2**20
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(StoreError, match=message):
        open_store(store)
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_the_bombs_would_go_off():
    for frame in (rle_frame(2**25), rle_frame(2**25, declared=False), rle_frame(64) + rle_frame(2**25)):
        assert len(Zstd().decode(frame)) >= 2**25
        assert len(frame) < 2000


def test_a_larger_store_can_be_allowed(tmp_path, monkeypatch):
    store = finished(tmp_path)
    added_array(store, shape=[10**10], chunk_grid={"name": "regular", "configuration": {"chunk_shape": [10**6]}})
    with pytest.raises(StoreError, match=r"DEVINTERP_MAX_STORE_BYTES=\d+") as caught:
        open_store(store)
    monkeypatch.setenv(guard.LIMIT_VARIABLE, str(caught.value).rpartition("=")[2].split(" ")[0])
    open_store(store)
    monkeypatch.setenv(guard.LIMIT_VARIABLE, "lots\x1b")
    with pytest.raises(DevinterpInputError, match="MAX_STORE_BYTES='lots"):
        open_store(store)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, '{"attributes": ' + "[" * 900 + "]" * 900 + "}", "[]", "nul",
                                  "\xff", '{"zarr_format": 3, "node_type": "group", "attributes": {"a": ' + "[" * 50 + "]" * 50 + "}}",
                                  '{"zarr_format": 3, "node_type": "group", "attributes": {"long": "' + "x" * 2**24 + '"}}'], ids=lambda text: text[:12] + str(len(text)))  # fmt: skip
@pytest.mark.parametrize("node", ["", "n_beta"])
def test_json_that_is_deep_long_or_none(tmp_path, text, node):
    store = finished(tmp_path)
    (store / node / "zarr.json").write_text(text, "latin-1")
    with pytest.raises(StoreError, match="nested|not JSON|not a JSON object|bytes"):
        devinterp.compute_llc(store)


def test_very_many_groups(tmp_path):
    store = finished(tmp_path)
    for number in range(guard.MOST_NODES):
        (store / f"g{number}").mkdir()
        (store / f"g{number}" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(StoreError, match="more than 10,000 groups"):
        open_store(store)


def test_an_array_holds_no_node(tmp_path):
    store = finished(tmp_path)
    added_array(store, "n_beta/extra")
    with pytest.raises(StoreError, match="inside an array"):
        open_store(store)


def test_names_inside_the_store_are_inert(tmp_path):
    store = finished(tmp_path)
    (store / HOSTILE.replace("/", "")).mkdir()
    (store / HOSTILE / ".zarray").write_text("{}")
    with pytest.raises(StoreError) as caught:
        open_store(store)
    assert str(caught.value).isprintable()
    assert repr(f"{HOSTILE}/.zarray") in str(caught.value)


def test_five_thousand_chunks_are_looked_at_quickly(tmp_path):
    store = finished(tmp_path)
    node = added_array(store, shape=[5000 * 1000], chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1000]}})
    chunk = Zstd(level=1, checksum=True).encode(np.random.default_rng(0).standard_normal(1000).tobytes())
    (node / "c").mkdir()
    for number in range(5000):
        (node / "c" / str(number)).write_bytes(chunk)
    began = time.process_time()
    check_store(store)
    print(f"5000 chunk files: {time.process_time() - began:.3f} s")
    assert time.process_time() - began < 1
