"""The demo's last checkpoint and its tokens, for the benchmarks (run `make demo` first)."""

import platform
import sys
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer

import devinterp

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo_output"
CHECKPOINT = DEMO / "checkpoints" / "step-001200"
SETTINGS = {"n_beta": 30.0, "localization": 1000.0, "batch_size": 16, "num_init_loss_batches": 8}


def load() -> tuple[torch.nn.Module, Dataset]:
    """The model, and code and prose in the proportion of its training."""
    if not CHECKPOINT.exists():
        sys.exit(f"{CHECKPOINT} is missing: run make demo first")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    parts = [
        devinterp.tokenize_and_concatenate(Dataset.from_dict({"text": [(DEMO / name).read_text()]}), tokenizer, max_length=64)
        for name in ("code.txt", "prose.txt")
    ]
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT), concatenate_datasets(parts).shuffle(seed=0).select(range(8000))


def machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"


def record(section: str, text: str) -> None:
    """Replace one section of RESULTS.md, and print it."""
    print(text)
    path = ROOT / "benchmarks" / "RESULTS.md"
    old = path.read_text() if path.exists() else "# Results\n\nMeasured with `make figures`; each section names its command.\n"
    head, _, rest = old.partition(f"\n## {section}\n")
    _, separator, after = rest.partition("\n## ")
    path.write_text(f"{head.rstrip()}\n\n## {section}\n\n{text.strip()}\n{separator}{after}")
