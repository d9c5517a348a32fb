"""Train a small language model on Python's own source, and follow its local learning coefficient over training.

    python examples/training_run.py                 (a few minutes on two cores; see --help)

Everything is made on this machine: the text is the standard library's source (code) and its docstrings (prose), the
tokenizer is a byte-level BPE of 1024 entries, the model a GPT-NeoX with 231k parameters.
"""

import argparse
import ast
import logging
import sysconfig
import time
from pathlib import Path

import datasets
import torch
import transformers
import xarray as xr
from datasets import Dataset, concatenate_datasets
from matplotlib import pyplot
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import devinterp
from devinterp.pictures import plot_llc_over_checkpoints, plot_loss_over_checkpoints

CONTEXT, VOCABULARY, BATCH = 64, 1024, 16
CHECKPOINTS = (0, 8, 28, 97, 342, 640, 1200)
SAMPLING = {
    "sampling_method": "leimkuhler_matthews",
    "lr": "auto",
    "n_beta": 30.0,
    "localization": 1000.0,
    "batch_size": BATCH,
    "num_chains": 4,
    "num_draws": 50,
    "num_burnin_steps": 25,
    "num_init_loss_batches": 8,
    "batches_per_draw": 1,
}


def read_standard_library(characters: int) -> tuple[list[str], list[str]]:
    """Sources without their docstrings, and the docstrings: the first files in alphabetical order, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}
    code, prose = [], []
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts) or sum(map(len, code)) > characters:
            continue
        try:
            source = path.read_text()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = source.split("\n")
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for node in [node for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]:
            prose.append(ast.get_docstring(node) or "")
            string = node.body[0]
            lines[string.lineno - 1 : string.end_lineno] = [""] * ((string.end_lineno or 0) - string.lineno + 1)
        code.append("\n".join(line for line in lines if line.strip()))
    return code, prose


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Dataset, Dataset]:
    """Sequences for training, and every tenth one held out."""
    rows = devinterp.tokenize_and_concatenate(Dataset.from_dict({"text": texts}), tokenizer, max_length=CONTEXT)
    held_out = rows.select(range(0, len(rows), 10))
    return rows.select([i for i in range(len(rows)) if i % 10]), held_out


def train(dataset: Dataset, tokenizer: PreTrainedTokenizerFast, checkpoints: list[int], folder: Path) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=CONTEXT, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    tokens = torch.as_tensor(dataset.with_format("numpy")[:]["input_ids"])
    for step in tqdm(range(checkpoints[-1] + 1), desc="training", disable=None):
        if step in checkpoints:
            model.save_pretrained(folder / f"step-{step:06d}")
            tokenizer.save_pretrained(folder / f"step-{step:06d}")
        batch = tokens[torch.randint(len(tokens), (BATCH,))]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def table(result: xr.Dataset, observables: list[str]) -> list[dict]:
    """One row for each checkpoint: loss and LLC, on the sampling data and on each observable."""
    rows = []
    for name in result.checkpoint.values:
        one = result.sel(checkpoint=name)
        row = {"step": int(one.step), "lr": float(one.lr), "llc": float(one.llc_mean), "sem": float(one.llc_sem)}
        row |= {"rhat": float(one.rhat), "ess": float(one.ess_bulk)}
        for observable in observables:
            row[f"loss {observable}"] = float(one.init_loss_observable.sel(observable=observable))
            row[f"llc {observable}"] = float(one.llc_observable.sel(observable=observable))
            row[f"sem {observable}"] = float(one.llc_observable_sem.sel(observable=observable))
        rows.append(row)
    return rows


def run(folder: Path, checkpoints: tuple[int, ...] = CHECKPOINTS, characters: int = 2_500_000, **changed: object) -> list[dict]:
    """The whole demonstration; returns the rows of its table."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    code, prose = read_standard_library(characters)
    tokenizer = train_tokenizer(code + prose)
    (code_rows, held_out_code), (prose_rows, held_out_prose) = tokenize(code, tokenizer), tokenize(prose, tokenizer)
    dataset = concatenate_datasets([code_rows, prose_rows])
    print(f"text: {len(code_rows)} sequences of code, {len(prose_rows)} of prose, {CONTEXT} tokens each")
    (folder / "code.txt").write_text("\n".join(code))
    (folder / "prose.txt").write_text("\n".join(prose))
    if not all((folder / "checkpoints" / f"step-{step:06d}" / "model.safetensors").exists() for step in checkpoints):
        train(dataset, tokenizer, list(checkpoints), folder / "checkpoints")
    trained = time.monotonic()
    settings = SAMPLING | changed
    observables = {"code": held_out_code, "prose": held_out_prose}
    sweep = devinterp.sweep(folder / "checkpoints", dataset, observables, output_path=folder / "runs", **settings)
    result = devinterp.compute_llc(sweep)
    rows = table(result, list(observables))
    print_rows(rows)
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 6.5), layout="constrained")
    plot_loss_over_checkpoints(result, ax=above).set_xlabel("")
    plot_llc_over_checkpoints(result, ax=below)
    length = f"{settings['num_chains']} chains x {settings['num_draws']} draws"
    figure.suptitle(f"GPT-NeoX, 231k parameters, on Python's standard library; {length}", fontsize=10)
    figure.savefig(folder / "llc_over_training.png", dpi=130)
    pyplot.close(figure)
    print(f"\npicture: {folder / 'llc_over_training.png'}")
    last = folder / "runs" / f"{sweep.checkpoint.values[-1]}.zarr"
    print(f"stores:  {folder / 'runs'} (look into one with: devinterp show {last})")
    print("LLCs depend on the sampler's settings, localization above all: compare them at one setting only, as here.")
    print(f"{trained - started:.0f} s for text and training, {time.monotonic() - trained:.0f} s for the LLCs")
    return rows


def print_rows(rows: list[dict]) -> None:
    print("\n  step  loss code  prose     LLC  ± sem    code   prose   R-hat   ESS        lr")
    for row in rows:
        print(
            f"{row['step']:>6} {row['loss code']:>10.2f} {row['loss prose']:>6.2f} {row['llc']:>7.2f} {row['sem']:>6.2f} "
            f"{row['llc code']:>7.2f} {row['llc prose']:>7.2f} {row['rhat']:>7.3f} {row['ess']:>5.0f} {row['lr']:>9.1e}"
        )


def folder_asked_for(description: str) -> Path:
    """The command line of both demonstrations; libraries are told to be quiet."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for checkpoints, stores, pictures")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("devinterp").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder: Path = arguments.output
    return folder


if __name__ == "__main__":
    run(folder_asked_for(__doc__.split("\n")[0]))
