"""Where checkpoints come from: directories, the hub's cache, functions; and that each process loads the very same weights."""

import pickle
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import TinyLM
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import devinterp
from devinterp.engine.origin import Made, Pretrained, checkpoints_in, origin_of, revisions
from devinterp.errors import DevinterpInputError, InputTypeError, InputValueError

COMMITS = {"step1": "a" * 40, "step2": "b" * 40}


def neox(seed: int) -> GPTNeoXForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        )


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    for number in (1, 2, 10):
        neox(number).save_pretrained(folder / f"checkpoint-{number}")
    (folder / "runs").mkdir()
    shutil.copytree(folder / "checkpoint-1", folder / "tmp-checkpoint-3")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A cache as the hub's client lays it out: two revisions of one model, their weights different."""
    cache = tmp_path_factory.mktemp("hub")
    model = cache / "models--some-lab--tiny-neox"
    for folder in ("refs", "blobs"):
        (model / folder).mkdir(parents=True)
    for number, (revision, commit) in enumerate(COMMITS.items(), start=1):
        neox(number).save_pretrained(model / "made")
        (model / "refs" / revision).write_text(commit)
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in (model / "made").iterdir():
            blob = model / "blobs" / f"{number:02}{file.name}"
            file.rename(blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        (model / "made").rmdir()
    return cache


def test_a_directory_gives_the_weights_saved_in_it(saved):
    loaded = origin_of(saved / "checkpoint-2").load()
    assert not loaded.training
    assert same(neox(2), loaded)
    assert not same(neox(1), loaded)


def test_a_relative_path_means_the_same_from_any_folder(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(saved)
    origin = origin_of("checkpoint-1")
    monkeypatch.chdir(tmp_path)
    assert same(neox(1), pickle.loads(pickle.dumps(origin)).load())


def test_the_hubs_cache_gives_each_revision_its_own_weights(hub, tmp_path):
    """In a process of its own: transformers reads the environment when it is imported."""
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}
import devinterp
from cases import GOOD, random_tokens
from test_origin import neox, same
found = devinterp.revisions("some-lab/tiny-neox", ["step1", "step2"])
assert list(found) == ["step1", "step2"]
for number, origin in enumerate(found.values(), start=1):
    origin.check()
    assert same(neox(number), origin.load()), origin
    assert not same(neox(3 - number), origin.load()), origin
from devinterp.engine.origin import origin_of
assert same(neox(2), origin_of("some-lab/tiny-neox@step2").load())
assert same(neox(2), origin_of("some-lab/tiny-neox@{"b" * 40}").load())
tokens = random_tokens(vocabulary=50)
tree = devinterp.sweep(found, tokens, {{}}, output_path=sys.argv[1], **GOOD)
for number, name in enumerate(found, start=1):
    alone = devinterp.sample(neox(number), tokens, {{}}, **GOOD)
    assert (tree[name].sampling_loss.values == alone.sampling_loss.values).all(), name
assert (tree["step1"].init_loss.values != tree["step2"].init_loss.values).any()
try:
    origin_of("some-lab/tiny-neox@step3").check()
except ValueError as error:
    print(error)
"""
    environment = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "runs"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint='some-lab/tiny-neox@step3'" in done.stdout


def test_a_folder_of_checkpoints_is_sorted_by_step(saved):
    found = checkpoints_in(saved)
    assert list(found) == ["checkpoint-1", "checkpoint-2", "checkpoint-10"], "by number, without what is not whole"
    assert same(neox(10), found["checkpoint-10"].load())


def test_a_function_gives_its_model():
    origin = origin_of(partial(TinyLM, seed=3))
    assert same(TinyLM(seed=3), pickle.loads(pickle.dumps(origin)).load())
    with pytest.raises(InputTypeError, match="a function that returns an nn.Module"):
        Made(dict).load()


def test_weights_that_would_be_random_are_refused(saved, tmp_path):
    model = neox(1)
    model.gpt_neox.save_pretrained(tmp_path / "base")  # the trunk alone: transformers would make up an unembedding
    with pytest.raises(InputValueError, match="lm_head|embed_out"):
        origin_of(tmp_path / "base").load()


def test_a_tokenizer_that_would_be_made_up_is_refused(saved):
    with pytest.raises(InputValueError, match="a tokenizer beside it"):
        Pretrained(str(saved / "checkpoint-1")).tokenizer()


def test_what_is_not_there_or_not_whole_is_told(saved, tmp_path):
    shutil.copytree(saved / "checkpoint-1", tmp_path / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputValueError, match=r"config\.json only"):
        origin_of(tmp_path / "no-weights").check()
    with pytest.raises(InputValueError, match="no-weights"):
        origin_of(tmp_path / "no-weights").load()
    shutil.copytree(saved / "checkpoint-1", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputValueError, match="SafetensorError"):
        origin_of(tmp_path / "cut").load()


@pytest.mark.parametrize(
    "given",
    ["", "./nowhere", "/nowhere", "a/b/c", "model@", "@step1", "a\0b", "x" * 5000, None, 3, b"bytes", TinyLM(), ["a"], "a b"],
)
def test_what_names_no_checkpoint_is_refused_at_once(given):
    with pytest.raises(DevinterpInputError, match="somewhere"):
        origin_of(given, "somewhere")


@pytest.mark.parametrize("arguments", [("m", "step1"), ("m", ["a", "a"]), ("m", [1]), ("m@r", ["a"]), (1, ["a"])])
def test_revisions_refuses_what_is_none(arguments):
    with pytest.raises((DevinterpInputError, TypeError)):
        revisions(*arguments)


def test_threads_may_load_at_once(saved):
    """transformers patches torch while it loads; unguarded, threads get weights that were never read."""
    origins, loaded = [Pretrained(str(saved / f"checkpoint-{n}")) for n in (1, 2, 10)] * 4, {}
    threads = [
        threading.Thread(target=lambda i=i, o=o: loaded.update({i: o.load()}), daemon=True) for i, o in enumerate(origins)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, number in enumerate([1, 2, 10] * 4):
        assert same(neox(number), loaded[i])


IMPORTING = """
import sys, threading
from devinterp.engine.origin import Pretrained
other = threading.Thread(target=__import__, args=("transformers",))
other.start()
while "transformers" not in sys.modules:
    pass
Pretrained(sys.argv[1]).check()
print("checked", other.is_alive())
other.join()
"""


def test_a_thread_may_load_while_another_imports_transformers(saved):
    arguments = [sys.executable, "-c", IMPORTING, str(saved / "checkpoint-1")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("checked"), done.stderr


def test_functions_that_make_models_are_called_one_at_a_time():
    """torch has one generator in a process: two that seed it at once would take each other's numbers."""
    inside, most = [], []

    def make():
        inside.append(1)
        time.sleep(0.02)
        most.append(len(inside))
        inside.pop()
        return nn.Linear(1, 1)

    threads = [threading.Thread(target=Made(make).load, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 4


def test_public_name():
    assert devinterp.revisions is revisions
