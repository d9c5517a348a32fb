"""The command line as a user runs it: real processes, a real model directory, real text."""

import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import xarray as xr
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import devinterp
from devinterp.cli import main
from devinterp.cli.inputs import tokenize
from devinterp.errors import StoreError
from devinterp.store.reader import open_store

TEXT = "".join(f"The {i}th line of a text that nobody will read, with {i * i} words.\n" for i in range(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    (path / "text.txt").write_text(TEXT)
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": line, "n": 1}) for line in TEXT.split("\n")))
    Dataset.from_dict({"body": TEXT.split("\n")}).to_parquet(path / "text.parquet")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    tokenizer.save_pretrained(path / "model")
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                           max_position_embeddings=32)  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(path / "model")
    return path


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    """Runs `devinterp ...` in the folder, in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*arguments) -> Done:
        monkeypatch.setattr(sys, "argv", ["devinterp", *map(str, arguments)])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        return Done(code, *capsys.readouterr())

    return call


QUICK = ("--context", "16", "--batch-size", "4", "--num-draws", "10", "--num-chains", "2", "--num-burnin-steps", "2",
         "--num-init-loss-batches", "1")  # fmt: skip


def test_llc_then_show(folder, cli):
    done = cli("llc", "model", "--data", "text.txt", "--observable", "lines=text.jsonl", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "LLC " in done.stdout
    assert "± " in done.stdout
    assert "on lines" in done.stdout
    assert "saved in 'llc-model'" in done.stdout
    assert "leimkuhler_matthews, lr " in done.stdout
    assert "localization 300" in done.stdout
    assert "lr='auto'" in done.stderr
    again = cli("llc", "model", "--data", "text.txt", "--observable", "lines=text.jsonl", *QUICK)
    assert "nothing to compute" in again.stderr
    shown = cli("show", "llc-model")
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in done.stdout.split("\n") if line.startswith("LLC"))
    assert line in shown.stdout
    assert "0: complete, 12 of 12 steps written" in shown.stdout
    assert "GPTNeoXForCausalLM" in shown.stdout
    result = devinterp.compute_llc(folder / "llc-model")
    assert f"{float(result.llc_mean):.3f} ± {float(result.llc_sem):.3f}" in line


BOTH = ("--observable", "lines=text.jsonl", "--observable", "all=text.txt", "--batches-per-draw", "1")


@pytest.mark.parametrize("method", ["sequence", "token"])
def test_bif_prints_the_strongest_pairs_and_saves(folder, cli, method):
    done = cli("bif", "model", "--data", "text.txt", *BOTH, "--method", method, "--top", "5", "--save", f"bif-{method}",
               "--output", "bif-run", *QUICK)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = devinterp.compute_bif(folder / "bif-run", correlation_method=method, progress=False)
    saved = open_store(folder / f"bif-{method}").to_dataset()
    np.testing.assert_allclose(saved.influences, result.influences, atol=1e-6)
    best = devinterp.compute_bif(folder / "bif-run", correlation_method=method, top_k=5, progress=False)
    pairs = [line for line in done.stdout.split("\n") if "  ~  " in line]
    assert len(pairs) == 5
    assert pairs[0].split()[0] == f"{float(best.influences[0]):+.3g}"
    assert "mean correlation" in done.stdout


def as_json(done: Done) -> dict:
    """The one line of --json; nothing else may be on the standard output."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    return json.loads(done.stdout)


def test_sample_then_every_result_as_json(folder, cli):
    """The numbers are those of the calls."""
    run = ("model", "--data", "text.txt", *BOTH, *QUICK, "--json")
    made = as_json(cli("sample", *run, "--output", "sampled"))
    assert made["store"] == "sampled"
    assert made["settings"]["num_draws"] == 10
    assert [chain["status"] for chain in made["chains"]] == ["complete", "complete"]
    llc, result = as_json(cli("llc", *run, "--output", "sampled")), devinterp.compute_llc(folder / "sampled")
    assert llc["llc_mean"] == float(result.llc_mean)
    assert llc["observables"]["all"]["sem"] == float(result.llc_observable_sem.sel(observable="all"))
    assert len(llc["verdicts"]) == 2
    shown = as_json(cli("show", "sampled", "--json"))
    assert shown.items() >= (llc | {"settings": made["settings"]}).items()
    assert as_json(cli("diagnose", "sampled", "--json"))["mcse"] == float(devinterp.diagnose(folder / "sampled").mcse)
    pairs = as_json(cli("bif", *run, "--output", "sampled", "--top", "3"))["pairs"]
    best = devinterp.compute_bif(folder / "sampled", correlation_method="sequence", top_k=3, progress=False)
    assert [pair["influence"] for pair in pairs] == best.influences.values.tolist()
    assert as_json(cli("verify", "sampled", "--json"))["damaged"] == {}
    plain = cli("sample", *run[:-1], "--output", "sampled")
    assert "devinterp.compute_llc('sampled')" in plain.stdout


def test_components_and_susceptibilities_as_json(folder, cli):
    listed = as_json(cli("components", "model", "--json"))
    chosen = as_json(cli("components", "model", "l0h1", "--json"))
    assert chosen["weights"] == next(one["weights"] for one in listed["components"] if one["name"] == "l0h1")
    assert sum(chosen["parameters"].values()) == chosen["weights"] < chosen["of"] == listed["weights"]
    run = ("model", "--data", "text.txt", *BOTH, *QUICK, "--output", "as_json", "--components", "l0h1", "--json")
    found = as_json(cli("susceptibilities", *run))
    assert [one["component"] for one in found["responses"]] == ["l0h1"]
    assert set(found["responses"][0]["means"]) == {"data", "lines", "all"}
    runs = {name: folder / f"as_json_{name}" for name in ("full", "l0h1")}
    tree = devinterp.compute_susceptibilities(runs, "data", standardize=True, include_sampling_task=True, errors=False)
    sus = tree["susceptibilities"].to_dataset()
    of_all = sus.sus.values[sus.dataset_id.values == sus.attrs["dataset_id_to_name"].index("all")]
    assert found["responses"][0]["means"]["all"] == pytest.approx(of_all.mean())


def test_convert(folder, cli):
    assert cli("llc", "model", "--data", "text.txt", "--output", "to_convert", *QUICK).returncode == 0
    done = as_json(cli("convert", "to_convert", "table.parquet", "--json"))
    assert done["bytes"] == (folder / "table.parquet").stat().st_size
    again = cli("convert", "to_convert", "table.parquet")
    assert again.returncode == 2
    assert "Something is there" in again.stderr
    refused = cli("convert", "to_convert", "again.zarr")
    assert refused.returncode == 2
    assert "made by devinterp 2.0" in refused.stderr


def test_completion_names_commands_and_can_be_installed():
    asked = {"_DEVINTERP_COMPLETE": "complete_bash", "COMP_WORDS": "devinterp ca", "COMP_CWORD": "1"}
    call = [sys.executable, "-c", "import sys; sys.argv = ['devinterp']; from devinterp.cli import main; main()"]
    done = subprocess.run(call, env=os.environ | asked, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["calibrate"], done
    helped = subprocess.run([*call[:-1], call[-1].replace("']", "', '--help']")], capture_output=True, text=True, timeout=60)
    assert "--install-completion" in helped.stdout


def test_susceptibilities_of_all_heads(folder, cli):
    arguments = ("susceptibilities", "model", "--data", "text.txt", *BOTH, "--output", "sus", *QUICK)
    done = cli(*arguments, "--save", "sus-result")
    assert done.returncode == 0, done.stderr
    for name in ("sus_full", "sus_l0h0", "sus_l0h1", "sus-result"):
        assert (folder / name).is_dir()
    saved = xr.open_datatree(folder / "sus-result", engine="zarr", consolidated=False)
    runs = {name: folder / f"sus_{name}" for name in ("full", "l0h0", "l0h1")}
    again = devinterp.compute_susceptibilities(runs, "data", standardize=True, include_sampling_task=True)
    np.testing.assert_allclose(saved["susceptibilities"].sus, again["susceptibilities"].sus)
    table = {line.split()[0]: line for line in done.stdout.split("\n") if line.startswith("  l0h")}
    assert set(table) == {"l0h0", "l0h1"}
    assert "[" in table["l0h0"]
    assert "'sus_l0h0' and its like" in done.stdout
    more = cli(*arguments, "--components", "l0h1, l0 mlp", "--estimator", "one_chain", "--raw")
    assert more.returncode == 0, more.stderr
    assert more.stderr.count("nothing to compute") == 2, "full and l0h1 were there"
    assert "nats squared" in more.stdout


def test_components_lists_and_previews(cli):
    done = cli("components", "model")
    assert done.returncode == 0, done.stderr
    named = [line.split("  ")[0] for line in done.stdout.split("\n")]
    assert [name for name in named if name][:-1] == ["component", "embed", "l0", "unembed", "rest"]
    assert "  l0h1" in done.stdout
    shown = cli("components", "model", "l0h1")
    assert "query_key_value.weight" in shown.stdout
    assert "24:48 x all" in shown.stdout


def test_settings_come_from_the_file_and_options_win(folder, cli):
    (folder / "run.toml").write_text('lr = 1e-4\nn_beta = 7.0\nsampling_method = "rmsprop_sgld"\nlocalization = 1.0\n'
                                     "[sampling_method_kwargs]\neps = 0.2\n")  # fmt: skip
    done = cli("llc", "model", "--data", "text.parquet", "--column", "body", "--config", "run.toml",
                         "--n-beta", "9", "--output", "from_file", "--no-shuffle", *QUICK)  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored = open_store(folder / "from_file").attrs["metadata"]["config"]["sampler"]
    assert stored["n_beta"] == 9.0
    assert stored["lr"] == 1e-4
    assert stored["sampling_method_kwargs"] == {"eps": 0.2}
    assert stored["shuffle"] is False


WRONG = [
    (("llc", "nowhere", "--data", "text.txt"), "MODEL='nowhere'"),
    (("llc", "model", "--data", "missing.txt"), "no such file"),
    (("llc", "not/looked-up", "--data", "missing.txt"), "no such file"),
    (("llc", "not/looked-up", "--data", "text.txt", "--observable", "x=missing.txt"), "--observable x='missing.txt'"),
    (("llc", "model", "--data", "text.txt", "--lr", "-1"), "lr=-1.0: must be a finite number > 0"),
    (("llc", "model", "--data", "text.txt", "--lr", "slow"), "--lr='slow'"),
    (("llc", "model", "--data", "text.txt", "--num-chains", "0"), "num_chains=0"),
    (("llc", "model", "--data", "text.txt", "--num-chains", "many"), "num-chains"),
    (("llc", "model", "--data", "text.txt", "--observable", "code"), "NAME=DATA"),
    (("llc", "model", "--data", "text.txt", "--config", "none.toml"), "--config='none.toml'"),
    (("llc", "model", "--data", "text.jsonl", "--column", "body"), "column_name='body'"),
    (("llc", "model", "--data", "text.txt", "--context", "100000"), "too little text"),
    (("llc", "model"), "--data"),
    (("bif", "model", "--data", "text.txt"), "--observable"),
    (("bif", "nowhere", "--data", "text.txt", "--method", "word", "--observable", "a=text.txt"), "correlation_method='word'"),
    (("bif", "nowhere", "--data", "text.txt", "--save", "text.txt", "--observable", "a=text.txt"), "output_path='text.txt'"),
    (("susceptibilities", "model", "--data", "text.txt"), "--observable"),
    (("susceptibilities", "nowhere", "--data", "text.txt", "--observable", "a=text.txt", "--estimator", "x"), "estimator='x'"),
    (
        (
            "susceptibilities",
            "model",
            "--data",
            "text.txt",
            "--observable",
            "a=text.txt",
            *QUICK,
            "--components",
            "l9h9",
        ),
        "no layer 9",
    ),
    (("components", "model", "l0h7"), "head 7 of 2"),
    (("llc", "model", "--data", "text.txt", "--observable", "a=none.txt", "--context", "16"), "--observable a='none.txt'"),
    (
        ("llc", "model", "--data", "text.txt", "--observable", "a=text.txt", "--observable", "a=text.jsonl"),
        "Give each name once",
    ),
    (("llc", "model", "--data", "text.txt", "--context", "0"), "context"),
    (("llcc",), "llcc"),
    (("convert", "nowhere", "run.txt"), "ends in one of .nc, .parquet, .zarr"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[w[1][:20] for w in WRONG])
def test_errors_are_one_message_and_exit_code_2(cli, arguments, message):
    done = cli(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().split("\n")) <= 4, done.stderr


def test_failures_have_exit_code_1_and_debug_shows_where(cli):
    done = cli("show", "text.txt")
    assert done.returncode == 1
    assert "is not a store" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(StoreError):
        cli("--debug", "show", "text.txt")


def test_an_interrupted_run_says_so_and_how_to_go_on(cli, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("devinterp.slt.running.record", interrupted)
    done = cli("llc", "model", "--data", "text.txt", "--output", "interrupted", *QUICK)
    assert done.returncode == 130
    assert "interrupted; the same command goes on" in done.stderr
    monkeypatch.undo()


def test_as_a_module_in_a_process_of_its_own(folder):
    done = subprocess.run([sys.executable, "-m", "devinterp", "show", "nowhere"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'nowhere' is not a store")


def test_help_is_quick_and_complete():
    code = "import sys; sys.argv = ['devinterp', 'llc', '--help']; from devinterp.cli import main"
    code += "\ntry: main()\nexcept SystemExit: pass"
    code += "\nassert not {'torch', 'xarray', 'transformers', 'datasets'} & set(sys.modules), 'slow imports'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for option in ("--localization", "--num-chains", "--save-metrics", "--lr"):
        assert option in done.stdout


@pytest.fixture
def trained(folder):
    """The model after a little training: at random weights there is nothing to calibrate, the loss only falls."""
    model = GPTNeoXForCausalLM.from_pretrained(folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    tokens = tokenize("--data", str(folder / "text.txt"), tokenizer, "text", "train", 16, 10_000)
    ids = torch.as_tensor(np.array(tokens["input_ids"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
    for _ in range(400):
        batch = ids[torch.randint(len(ids), (64,))]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        rate.step()
    model.save_pretrained(folder / "trained")
    tokenizer.save_pretrained(folder / "trained")


def test_calibrate_then_llc_with_what_it_found(folder, trained, cli):
    few = ("--context", "16", "--batch-size", "4", "--num-init-loss-batches", "1")
    done = cli("calibrate", "trained", "--data", "text.txt", "--localization", "2000", "--save", "found.toml", *few)
    assert done.returncode == 0, done.stderr
    assert "localization=2000: the weakest of those tried" in done.stdout
    assert "devinterp llc MODEL --data DATA --config 'found.toml'" in done.stdout
    again = cli("calibrate", "trained", "--data", "text.txt", "--save", "found.toml")
    assert again.returncode == 2
    assert "--save='found.toml': must be a new file" in again.stderr
    done = cli("llc", "trained", "--data", "text.txt", "--context", "16", "--config", "found.toml", "--num-draws", "30",
               "--output", "calibrated")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "localization 2000" in done.stdout
    done = cli("diagnose", "calibrated")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LLC ")
    assert "along the stiffest direction (stable below 4)" in done.stdout
