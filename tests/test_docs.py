"""Every Python block of the README, of CONTRIBUTING and of the docs runs, page by page, in a folder of its own, on a tiny model.

A block that cannot run here says so in the line above it, which readers of the page do not see:

    <!-- not run: needs two GPUs -->

Blocks of one page share their names. What pages take for granted (`model`, `tokens`, `samples` ...) is `given` below; what one
page needs besides is in PREPARED. Runs are shortened: numbers in a block by SHORTER, defaults by DEFAULTS; nothing else is changed.
Ids of the hub load the tiny model, and its datasets are the same text.
"""

import dataclasses
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from datasets import Dataset
from test_cli import TEXT
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

import devinterp
from devinterp.engine.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_SKIPPED = 9
"""blocks that are not run; a new one is a decision to be seen in this file"""

BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
SHORTER = [
    (r'(num_draws"?[=:] ?)\d+', r"\g<1>6"),
    (r'(num_burnin_steps"?[=:] ?)\d+', r"\g<1>2"),
    (r'(batch_size"?[=:] ?)32', r"\g<1>4"),
    (r"(max_length=)256", r"\g<1>16"),
    (r'(localization"?[=:] ?)300', r"\g<1>3000"),
]
DEFAULTS = {"num_chains": 2, "num_draws": 6, "num_init_loss_batches": 1}
CALIBRATION = {"localization": 3000.0}
SETTINGS = {"lr": 1e-4, "sampling_method": "leimkuhler_matthews", "n_beta": 30.0, "localization": 3000.0, "num_chains": 2,
            "num_draws": 6, "num_burnin_steps": 2, "batch_size": 4, "num_init_loss_batches": 1, "progress": False}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    code: str
    reason: str | None

    @property
    def shortened(self) -> str:
        code = self.code
        for pattern, short in SHORTER:
            code = re.sub(pattern, short, code)
        return code


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page.name, text.count("\n", 0, found.start("code")) + 1, found["code"], found["reason"])
        for found in BLOCK.finditer(text)
    ]


BLOCKS = {page: found for page in PAGES if (found := blocks_of(page))}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Any]:
    """What pages take for granted."""
    torch.manual_seed(0)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    tokens, code, prose = (tokens_of(kind, tokenizer) for kind in (str, str.upper, str.title))
    model = trained(tokens)
    saved = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    observables = {"code": (code, 2), "prose": (prose, 2)}
    samples = devinterp.sample(model, tokens, observables, **SETTINGS)
    restrictions = {"full": None} | {name: name for name in ("l0h0", "l0h1", "l1 mlp", "l1h0")}
    return {
        "devinterp": devinterp, "torch": torch, "np": np, "saved": saved,
        "model": model, "tokenizer": tokenizer, "dataset": tokens, "tokens": tokens, "code": code, "prose": prose,
        "observables": observables, "settings": SETTINGS, "restrictions": restrictions, "samples": samples,
        "result": devinterp.compute_llc(samples), "my_function": lambda: model,
    }  # fmt: skip


def tokens_of(kind: Callable[[str], str], tokenizer: Any) -> Dataset:
    text = Dataset.from_dict({"text": [kind(line) for line in TEXT.split("\n")]})
    return devinterp.tokenize_and_concatenate(text, tokenizer, max_length=16)


def trained(tokens: Dataset) -> GPTNeoXForCausalLM:
    """A model of four layers after a little training: at random weights there is nothing to measure."""
    config = GPTNeoXConfig(vocab_size=300, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
                           max_position_embeddings=64)  # fmt: skip
    model, ids = GPTNeoXForCausalLM(config), torch.as_tensor(np.array(tokens["input_ids"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 100)
    for _ in range(100):
        batch = ids[torch.randint(len(ids), (32,))]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


def stored_runs(given: dict[str, Any]) -> None:
    """Runs of three checkpoints, as pages read them."""
    observables = {"pile": (given["tokens"], 2), **given["observables"]}
    for step in (1000, 10000, 143000):
        devinterp.sample(given["model"], given["tokens"], observables, output_path=f"runs/step{step}", **SETTINGS)


def checkpoints(given: dict[str, Any]) -> None:
    """A folder as a Trainer leaves it."""
    for step in (500, 1000):
        shutil.copytree(given["saved"], f"training/checkpoint-{step}")


def classifier(given: dict[str, Any]) -> None:
    given["x"], given["y"] = torch.randn(128, 3), torch.randint(0, 2, (128,))
    given["model"] = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def tree(given: dict[str, Any]) -> None:
    observables = {"pile": (given["tokens"], 2), "code": (given["code"], 2)}
    given["tree"] = devinterp.susceptibilities(
        given["model"], given["tokens"], observables, given["restrictions"], sampling_task="pile", **SETTINGS
    )


PREPARED: dict[str, tuple[Callable[[dict[str, Any]], None], ...]] = {
    "guide.md": (classifier,),
    "store.md": (stored_runs,),
    "other_languages.md": (stored_runs,),
    "sweeps.md": (checkpoints,),
    "pictures.md": (stored_runs, tree),
    "report.md": (stored_runs,),
}


@pytest.fixture
def hub(given, monkeypatch):
    """The hub as the docs see it: every model is the tiny one, every dataset the same text."""
    text = Dataset.from_dict({column: TEXT.split("\n") for column in ("text", "content")})
    found = {loader: loader.from_pretrained for loader in (AutoConfig, AutoModelForCausalLM, AutoTokenizer)}
    for loader, load in found.items():
        monkeypatch.setattr(
            loader,
            "from_pretrained",
            lambda name, *_, revision=None, load=load, **more: load(name if Path(name).exists() else given["saved"], **more),
        )
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: text)


@pytest.fixture
def short(monkeypatch):
    """Calls that leave the defaults as they are take seconds too."""
    for call, values in ((devinterp.sample, DEFAULTS), (Settings.__init__, DEFAULTS), (devinterp.calibrate, CALIBRATION)):
        for name, value in values.items():
            assert name in call.__kwdefaults__
            monkeypatch.setitem(call.__kwdefaults__, name, value)


@pytest.mark.parametrize("page", BLOCKS, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore::UserWarning")  # runs this short are warned about
def test_the_code_of_a_page_runs(page, given, hub, short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    module = ModuleType("page_of_the_docs")  # dataclasses look for the module of their class
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    names.update(given)
    for prepare in PREPARED.get(page.name, ()):
        prepare(names)
    for block in BLOCKS[page]:
        if block.reason is None:
            exec(compile("\n" * (block.line - 1) + block.shortened, str(page), "exec"), names)


def test_blocks_that_are_not_run_are_few_and_say_why():
    found = [block for blocks in BLOCKS.values() for block in blocks]
    skipped = [block for block in found if block.reason is not None]
    print(f"{len(found)} blocks, {len(skipped)} not run:")
    print("\n".join(f"  {block.page}:{block.line}: {block.reason}" for block in skipped))
    assert len(found) > 20
    assert len(skipped) <= MOST_SKIPPED


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    """Anchors, and links between pages, are the site's to check (`make docs`)."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
        assert "://" in target or target.startswith("mailto:") or (page.parent / target).exists(), target


def test_every_block_is_found():
    """A fence in a list, or a comment one line too far away, would be passed over."""
    for page in PAGES:
        text = page.read_text()
        blocks = BLOCKS.get(page, [])
        assert text.count("```python") + text.count("```py\n") == len(blocks), page
        assert text.count("<!-- not run") == sum(block.reason is not None for block in blocks), page
