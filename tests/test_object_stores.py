"""Runs in an object store: the bytes of a local run, whatever ends the process, and nothing of anybody else touched.

An S3 server runs in a process of its own; no request leaves this machine.
"""

import json
import logging
import random
import re
import shutil
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import xarray as xr
from cases import TinyLM, random_tokens
from crashes import tree

import devinterp
from devinterp.errors import InputValueError, RunLocked, RunMismatchError, StorageError, StoreError
from devinterp.store import marker, mirror, objects, schema
from devinterp.store.reader import open_store
from devinterp.store.verification import verify

obstore = pytest.importorskip("obstore", reason="obstore is not installed: pip install 'devinterp[remote]'")
pytest.importorskip("moto", reason="no S3 server: pip install 'moto[s3]' flask flask-cors")

from buckets import KILLED, SETTINGS, Bucket, FarWorlds, Proxy, digests  # noqa: E402

DATA, CODE = random_tokens(32), random_tokens(8, seed=1)
URL = "s3://bucket/runs/first"
SAMPLED = 10
"""Points in a short test; all of them with -m slow"""


@pytest.fixture(scope="module")
def bucket():
    with Bucket() as started:
        yield started


@pytest.fixture
def url(bucket, tmp_path, monkeypatch, request):
    """A new place in the bucket, seen from a machine with an empty cache."""
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(mirror.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(schema, "MOST_DRAWS_PER_CHUNK", 3)
    monkeypatch.setattr(schema, "STEPS_PER_CHUNK", 4)
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.02)
    objects.connected.cache_clear()
    return f"s3://bucket/{time.time_ns()}/run"


@pytest.fixture(scope="module")
def worlds():
    if sys.platform != "linux":
        pytest.skip("forks, and reads /proc")
    with FarWorlds() as started:
        yield started


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A local run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "MOST_DRAWS_PER_CHUNK", 3)
        patch.setattr(schema, "STEPS_PER_CHUNK", 4)
        folder = tmp_path_factory.mktemp("local")
        sampled(folder / "run")
    return tree(folder / "run")


def sampled(path, **settings) -> xr.DataTree:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return devinterp.sample(TinyLM(), DATA, {"code": CODE}, output_path=path, **(SETTINGS | settings))
    finally:
        torch.set_num_threads(threads)


def beside(url: str) -> dict[str, objects.Entry]:
    found = objects.Objects.of(url)
    return {name.removeprefix(f"{found.name}.run/"): entry for name, entry in found.list(f"{found.name}.run").items()}


def put(url: str, name: str, content: bytes) -> None:
    found = objects.Objects.of(url)
    obstore.put(found._store, name.replace("NAME", found.name), content)


def read(url: str, name: str) -> bytes:
    found = objects.Objects.of(url)
    return bytes(obstore.get(found._store, name.replace("NAME", found.name)).bytes())


def test_the_bytes_of_a_local_run_and_read_back(url, expected, tmp_path):
    samples = sampled(url)
    assert digests(url) == expected
    assert samples.attrs["completed"] == 1
    local = sampled(tmp_path / "local")
    for name, array in local.to_dataset().variables.items():
        np.testing.assert_array_equal(array.values, samples[name].values)
    assert devinterp.compute_llc(url).identical(devinterp.compute_llc(tmp_path / "local"))
    store = zarr_store(url)
    assert xr.open_datatree(store, engine="zarr", consolidated=False).identical(open_store(url))
    assert not list((tmp_path / "cache").rglob("*"))  # all of it is there
    assert set(beside(url)) >= {"run.json", "writer.json", "baseline/progress.json", "chain-0001/progress.json"}
    left = json.loads(read(url, "NAME.run/writer.json"))
    assert (left["held"], left["host"], left["pid"]) == (False, "", 0)


def zarr_store(url):
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    return ObjectStore(from_url(url, client_options={"allow_http": True}), read_only=True)


def test_a_finished_run_is_returned_without_compute_or_a_write(url, monkeypatch):
    sampled(url)
    before = beside(url)
    monkeypatch.setattr("devinterp.slt.running.prepare", None)
    assert sampled(url).attrs["completed"] == 1
    assert beside(url) == before


def test_extended_by_another_machine(url, tmp_path):
    sampled(url)
    sampled(url, num_draws=11, num_chains=3)
    sampled(tmp_path / "local", num_draws=11, num_chains=3)
    assert digests(url) == tree(tmp_path / "local")
    with pytest.raises(RunMismatchError, match="not shortened"):
        sampled(url)


def test_workers_and_suites(url, tmp_path):
    for place in (url, tmp_path / "run"):
        torch.manual_seed(0)
        devinterp.susceptibilities(
            TinyLM(), DATA, {"task": CODE, "code": CODE}, {"full": None, "embed": "embed"}, sampling_task="task",
            output_path=place, **(SETTINGS | {"chains_together": "processes"}),
        )  # fmt: skip
    for name in ("full", "embed"):
        assert digests(f"{url}_{name}") == tree(tmp_path / f"run_{name}")


def test_another_run_is_refused_by_name(url, expected):
    sampled(url)
    with pytest.raises(RunMismatchError) as caught:
        sampled(url, lr=2e-3)
    assert url in str(caught.value)
    assert caught.value.differences == ["lr: stored 0.001, asked 0.002"]
    assert digests(url) == expected


def points(count: int, every: bool) -> list[int]:
    return list(range(count)) if every else sorted(random.Random(count).sample(range(count), SAMPLED))


@pytest.mark.parametrize("every", [pytest.param(False, id="some"), pytest.param(True, id="every", marks=pytest.mark.slow)])
@pytest.mark.parametrize("machine", ["same", "empty"])
def test_killed_before_any_write(url, worlds, bucket, expected, tmp_path, every, machine):
    code, writes = worlds.run(f"{url}-whole", bucket.environment, tmp_path / "cache")
    assert (code, digests(f"{url}-whole")) == (0, expected)
    killed = 0
    for point in points(writes, every):
        place = f"{url}-{point}"
        code, _ = worlds.run(place, bucket.environment, tmp_path / "cache", kill_at=point)
        killed += code == KILLED
        if machine == "empty":
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        if "zarr.json" in digests(place) and b'"completed": 1' in read(place, "NAME/zarr.json"):
            assert digests(place) == expected, point
        code, _ = worlds.run(place, bucket.environment, tmp_path / "cache")
        assert (code, digests(place)) == (0, expected), point
        assert not list((tmp_path / "cache").rglob("*")), point
    print(f"\nkilled before a write to an object store, gone on with on the {machine} machine: {killed} of {writes}, all equal")
    assert killed >= SAMPLED - 3


@pytest.mark.parametrize("every", [pytest.param(False, id="some"), pytest.param(True, id="every", marks=pytest.mark.slow)])
def test_killed_while_it_is_extended(url, worlds, bucket, tmp_path, every):
    longer = {"num_draws": 11, "num_chains": 3}
    assert worlds.run(f"{url}-whole", bucket.environment, tmp_path / "cache", **longer)[0] == 0
    assert worlds.run(f"{url}-count", bucket.environment, tmp_path / "cache")[0] == 0
    code, writes = worlds.run(f"{url}-count", bucket.environment, tmp_path / "cache", **longer)
    expected = digests(f"{url}-whole")
    assert (code, digests(f"{url}-count")) == (0, expected)
    for point in points(writes, every):
        place = f"{url}-{point}"
        assert worlds.run(place, bucket.environment, tmp_path / "cache")[0] == 0
        worlds.run(place, bucket.environment, tmp_path / "cache", kill_at=point, **longer)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        code, _ = worlds.run(place, bucket.environment, tmp_path / "cache", **longer)
        assert (code, digests(place)) == (0, expected), point


def test_what_was_done_elsewhere_is_not_done_again(url, worlds, bucket, tmp_path, caplog):
    """From an empty machine, the run goes on after the last commit that was copied."""
    longer = {"num_draws": 40}
    _, writes = worlds.run(f"{url}-whole", bucket.environment, tmp_path / "cache", **longer)
    worlds.run(url, bucket.environment, tmp_path / "cache", kill_at=writes * 3 // 4, **longer)
    shutil.rmtree(tmp_path / "cache")
    with caplog.at_level(logging.INFO, "devinterp"):
        sampled(url, **longer)
    assert re.search(r"chains \[[01]\] go on after [1-9]\d* steps", caplog.text)
    assert re.search(r"taken over from process \d+ on .* which is dead", caplog.text)
    assert digests(url) == digests(f"{url}-whole")


def test_a_finished_run_keeps_the_states_that_its_records_name(url, worlds, bucket, tmp_path):
    assert worlds.run(url, bucket.environment, tmp_path / "cache")[0] == 0
    for chain in ("chain-0000", "chain-0001"):
        record = json.loads(read(url, f"NAME.run/{chain}/progress.json"))["content"]
        assert record["finished"]
        assert [name for name in beside(url) if name.startswith(f"{chain}/state-")] == [f"{chain}/{record['state']}"]


def test_an_older_working_folder_is_not_used(url, worlds, bucket, expected, tmp_path):
    """Another machine has gone on in the meantime: what this one has kept is older."""
    _, writes = worlds.run(f"{url}-whole", bucket.environment, tmp_path / "cache")
    worlds.run(url, bucket.environment, tmp_path / "here", kill_at=writes // 3)
    worlds.run(url, bucket.environment, tmp_path / "there", kill_at=writes // 2)
    for file in (tmp_path / "here").rglob("*"):
        if file.is_file() and "run.run" not in str(file) and file.name not in ("owners.json", "zarr.json"):
            file.write_bytes(b"not what was written")
    code, _ = worlds.run(url, bucket.environment, tmp_path / "here")
    assert (code, digests(url)) == (0, expected)


def another(host: str = "elsewhere") -> marker.Owner:
    return replace(marker.Owner.this_process(), host=host, machine="another", process="p")


def test_a_second_writer_is_refused_while_the_first_is_alive(url, worlds, bucket, tmp_path):
    longer = {"num_draws": 20, "num_steps_bw_draws": 30, "checkpoint_every": 300}
    worlds.start(url, bucket.environment, tmp_path / "cache", **longer)
    while "writer.json" not in beside(url):
        time.sleep(0.01)
    began = time.monotonic()
    with pytest.raises(RunLocked, match=r"is being written by process \d+ on .* Nothing was changed"):
        sampled(url, **longer)
    print(f"\nrefused after {time.monotonic() - began:.2f} s")
    assert worlds.end()[0] == 0


def test_a_fresh_marker_of_another_machine_is_respected_and_a_stale_one_taken_over(url, expected, monkeypatch, caplog):
    put(url, "NAME.run/writer.json", json.dumps(asdict(another())).encode())
    with pytest.raises(RunLocked, match=r"on 'elsewhere'.*last heard of \d+ s ago \(after 600 s it may be replaced\)"):
        sampled(url)
    assert set(beside(url)) == {"writer.json"}
    monkeypatch.setattr(marker, "STALE_SECONDS", 0.0)
    sampled(url)
    assert "taken over from process" in caplog.text
    assert "not heard of for" in caplog.text
    assert digests(url) == expected


def test_of_two_that_look_at_once_one_writes(url):
    first, second = (marker.Marker(objects.Objects.of(url)) for _ in range(2))
    first.take()
    with pytest.raises(RunLocked):
        second.take()
    first.release()
    assert beside(url) == {}  # nothing was written, so nothing is left


def test_a_writer_that_was_away_for_too_long_writes_nothing_more(url, expected, monkeypatch):
    """Its marker is taken while it runs: it stops, and what the other has written stays."""
    theirs = json.dumps(asdict(another())).encode()

    def loss_fn(model, ids):
        if not taken and (len(steps) == 12):
            put(url, "NAME.run/writer.json", theirs)
            put(url, "NAME.run/chain-0000/progress.json", b"theirs")
            taken.append(True)
            time.sleep(0.3)
        steps.append(1)
        logits = model(ids)
        return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")

    steps, taken = [], []
    for repeated in (mirror.COPIES, mirror.HEARTBEAT):
        monkeypatch.setattr(repeated, "seconds", 0.02)
    with pytest.raises((RunLocked, StorageError), match="another process|taken it over"):
        sampled(url, loss_fn=loss_fn, loss_fn_id="one", chains_together="sequential")
    assert read(url, "NAME.run/writer.json") == theirs
    assert read(url, "NAME.run/chain-0000/progress.json") == b"theirs"


@pytest.mark.parametrize("name", ["NAME/zarr.json", "NAME/notes.txt", "NAME", "NAME.run/mine", "NAME.run/writer.json"])
def test_what_is_not_ours_is_refused_and_left(url, name):
    put(url, name, b"precious")
    with pytest.raises(InputValueError, match=r"must be new, or a run of devinterp"):
        sampled(url)
    assert read(url, name) == b"precious"
    found = objects.Objects.of(url)
    assert set(found.everything()) == {name.replace("NAME", found.name)}


def test_what_appears_in_the_meantime_is_not_overwritten(url, monkeypatch):
    begin = mirror.Mirror.begin

    def late(self):
        put(url, "NAME/zarr.json", b"precious")
        begin(self)

    monkeypatch.setattr(mirror.Mirror, "begin", late)
    with pytest.raises(StorageError, match=r"another process has written there. Nothing of its was overwritten. .* is kept in"):
        sampled(url)
    assert read(url, "NAME/zarr.json") == b"precious"


def test_an_object_in_the_way_stays_in_the_way(url):
    ours = objects.Objects.of(url)
    ours.put(f"{ours.name}/one", b"ours")
    ours.put(f"{ours.name}/one", b"ours again")
    put(url, "NAME/one", b"theirs")
    for _ in range(3):
        with pytest.raises(objects.Changed):
            ours.put(f"{ours.name}/one", b"ours once more")
    ours.put(f"{ours.name}/one", b"theirs")  # the very same is no loss
    assert read(url, "NAME/one") == b"theirs"


def test_failing_requests_are_tried_again(url, bucket, expected, monkeypatch):
    with Proxy(bucket) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        objects.connected.cache_clear()
        put(url, "before", b"")
        proxy.failing = 4
        sampled(url)
        assert proxy.failing == 0
        assert digests(url) == expected
    objects.connected.cache_clear()


def test_a_network_that_fails_ends_the_run_with_all_of_it_kept(url, bucket, expected, tmp_path, monkeypatch):
    """In the midst of sampling; the same call, when the network is back, goes on where this one has stopped."""
    monkeypatch.setattr(objects, "MOST_RETRIES", 3)
    monkeypatch.setattr(mirror.COPIES, "seconds", 0.01)
    steps, failing_from = [], [10**9]

    def loss_fn(model, ids):
        steps.append(1)
        if len(steps) == failing_from[0]:
            proxy.failing = 10**9
        if len(steps) > failing_from[0]:
            time.sleep(0.1)
        logits = model(ids)
        return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")

    how = {"loss_fn": loss_fn, "loss_fn_id": "one", "chains_together": "sequential", "num_draws": 30}
    with Proxy(bucket) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        objects.connected.cache_clear()
        sampled(tmp_path / "local", **how)
        whole, failing_from[0] = len(steps), len(steps) * 2 // 3
        steps.clear()
        with pytest.raises(StorageError) as caught:
            sampled(url, **how)
        message = str(caught.value)
        assert "after 3 retries" in message
        assert f"What was committed is kept in '{tmp_path / 'cache'}" in message
        assert "the same call goes on from there" in message
        assert len(steps) < whole - 20  # it ended soon
        proxy.failing, failing_from[0] = 0, 10**9
        steps.clear()
        sampled(url, **how)
        assert len(steps) < whole * 2 // 3  # not from the beginning
        assert digests(url) == tree(tmp_path / "local")
    objects.connected.cache_clear()


def test_no_network_at_all_is_an_error_before_any_compute(url, monkeypatch, tmp_path):
    monkeypatch.setattr(objects, "MOST_RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    objects.connected.cache_clear()
    with pytest.raises(StorageError, match=r"listing 'run' failed: .* after 1 retries"):
        sampled(url)
    assert not (tmp_path / "cache").exists()
    objects.connected.cache_clear()


def test_credentials_are_in_no_object_log_or_error(url, bucket, caplog, capsys, monkeypatch):
    with caplog.at_level(0):
        sampled(url)
        with pytest.raises(RunMismatchError) as mismatch:
            sampled(url, lr=2e-3)
        monkeypatch.setattr(objects, "MOST_RETRIES", 1)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        objects.connected.cache_clear()
        with pytest.raises(StorageError) as lost:
            sampled(url)
    objects.connected.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    found = objects.Objects.of(url)
    content = b"".join(bytes(obstore.get(found._store, name).bytes()) for name in found.everything())
    told = "".join(capsys.readouterr()) + caplog.text + str(mismatch.value) + str(lost.value)
    for secret in ("the-key-id", "the-secret"):
        assert secret.encode() not in content
        assert secret not in told


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Error performing GET https://a.blob/x?sig=hidden&se=2: timed out\n\nDebug source:\nhidden",
            "GET https://a.blob/x?...: timed out",
        ),
        ("error for url (https://user:hidden@host/x)", "https://...@host/x"),
        ("403: <?xml version><AWSAccessKeyId>hidden</AWSAccessKeyId>", "403"),
    ],
)
def test_errors_of_the_library_are_told_without_what_signs_them(message, expected):
    told = objects.without_secrets(message)
    assert "hidden" not in told
    assert expected.split("...")[0] in told


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("s3://bucket", "a URL with a bucket and a name"),
        ("s3://bucket/a/../b", "a URL with a bucket and a name"),
        ("s3:///name", "a URL with a bucket and a name"),
        ("s3://bucket//name", "a URL with a bucket and a name"),
        ("s3://key:secret-word@bucket/run", "Credentials are taken from the environment"),
        ("s3://bucket/run?X-Amz-Signature=secret-word", "Credentials are taken from the environment"),
        ("https://host/run", "a local path, or a URL of s3://, gs://, az://"),
        ("memory://run", "a local path, or a URL of s3://, gs://, az://"),
        ("file:///tmp/run", "Give the path itself"),
    ],
)
def test_urls_that_are_none_of_ours(url, tmp_path, given, said):
    with pytest.raises(InputValueError) as caught:
        sampled(given)
    assert said in str(caught.value)
    assert "secret-word" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_an_executor_is_refused(url):
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as executor, pytest.raises(InputValueError, match="a local path with an executor"):
        sampled(url, executor=executor)


def test_without_the_library_the_error_names_the_extra(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    objects.connected.cache_clear()
    with pytest.raises(InputValueError, match=r"pip install 'devinterp\[remote\]'"):
        sampled(url)
    objects.connected.cache_clear()


def test_verify_names_a_damaged_object_and_the_same_call_computes_it_again(url, expected, caplog):
    sampled(url)
    assert (verify(url).checked, verify(url).damaged) == (len(expected), {})
    name = "sampling_loss/c/1/0/0/0"
    content = bytearray(read(url, f"NAME/{name}"))
    content[-1] ^= 1
    put(url, f"NAME/{name}", bytes(content))
    assert verify(url).damaged == {name: "chains [1]"}
    found = objects.Objects.of(url)
    obstore.delete(found._store, f"{found.name}/{name}")
    assert verify(url).damaged == {name: "chains [1]"}
    sampled(url)
    assert "sampling_loss/c/1/0/0/0 damaged or missing; chain-0001 is computed again" in caplog.text
    assert digests(url) == expected
    for left in list(beside(url)):
        obstore.delete(found._store, f"{found.name}.run/{left}")
    assert verify(url).without_digests
    assert not verify(url).damaged


def test_a_store_of_a_stranger_is_looked_at(url):
    sampled(url)
    root = json.loads(read(url, "NAME/sampling_loss/zarr.json"))
    put(url, "NAME/sampling_loss/zarr.json", json.dumps(root | {"codecs": [{"name": "numcodecs.pickle"}]}).encode())
    with pytest.raises(StoreError, match=r"the store 's3://bucket/.*' is refused at 'sampling_loss/zarr.json': codecs"):
        devinterp.compute_llc(url)
    put(url, "NAME/sampling_loss/zarr.json", json.dumps(root).encode())
    import numcodecs

    bomb = numcodecs.Zstd(level=1).encode(np.zeros(10**8, np.uint8))
    put(url, "NAME/sampling_loss/c/1/0/0/0", bomb)
    with pytest.raises(StoreError, match=r"a chunk that decodes to 100,000,000 bytes, 240 are declared"):
        devinterp.compute_llc(url)
    with pytest.raises(StoreError, match="is not a store"):
        open_store(f"{url}-nothing")
