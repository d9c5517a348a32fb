"""Which head masks are right, for every causal-language-model type of the installed transformers.

python benchmarks/restrictions.py [--types llama,gpt2] [--variants gqa,odd] [--peer PYTHON] [--details FILE]

Builds each type small (`tests/zoo.py`), finds its heads, kills them one by one (`tests/dead_heads.py`) and writes
`benchmarks/restrictions.md`. PYTHON is an interpreter with devinterp 2.0.1, torch and the same transformers; it then masks the same
models, and the two are compared element by element.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import torch  # noqa: E402  (the interpreter may be the peer's, where only these exist)
import transformers  # noqa: E402
import zoo  # noqa: E402

RESTRICTIONS = ("full", "l0", "l1h1", "l0g0", "l0 attn", "l0 mlp", "embed", "unembed")
SECONDS = 120
"""Allowed for one type in one variant."""

NOT_BUILT = {
    "gemma3n": "needs timm (gemma3n_text is covered)",
    "gemma4_assistant": "its default configuration is invalid: a draft head",
    "gemma4_unified_assistant": "a draft head: needs a backbone's keys and values",
}

NO_HEADS = {"jetmoe": "a router chooses the query heads of each token"}
"""Attention whose heads are not indices of parameters."""

VERDICTS = ("identical", "superset", "differs", "peer empty", "peer error", "not in peer's table", "ours error")
REASONS = """Known reasons, by restriction (2.0.1 is the peer):

- `l1h1`, superset: in `odd` the peer takes a head's width to be hidden size / heads, so its head lacks rows of keys and values.
- `l1h1`, `l0g0`, superset: key biases, which the peer's table leaves out. Softmax cancels most of them, rotated ones (roformer) it does not.
- `l1h1`, `l0g0`, differs: codegen's fused layout depends on the number of heads. Error: falcon and gpt_bigcode raise.
- `l1h1`, peer empty: minimax's second layer is linear attention, which the table does not know.
- `l0 attn`, superset: norms of queries and keys, and norms before the output projection.
- `l0 mlp`, differs: in BERT-like types the peer's suffix `output.dense.weight` also matches the attention's output projection.
  Empty: renamed parameters (granitemoe, granitemoeshared, xlm). Superset: experts (aria_text), per-layer inputs (gemma4_text).
- `embed`, superset: per-layer tables (gemma4_text). Empty: camembert, xlm-roberta.
- `unembed`, peer empty: a tied matrix has no name of its own; ours gives the embedding. gpt_neox: renamed to `lm_head`.
  Superset: of the tied matrix and its bias the peer names one.
- `l0`, superset: xlm keeps a block in several parallel lists."""


class OutOfTime(Exception):
    pass


@contextlib.contextmanager
def limited(seconds: int):
    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Row:
    verdict: str  # pass, no heads, fail, not built
    words: str = ""
    layers: int = 0
    heads: str = ""
    groups: str = ""
    frozen: bool = False
    structure_seconds: float = 0.0
    seconds: float = 0.0


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--types", default="")
    arguments.add_argument("--variants", default=",".join(zoo.VARIANTS))
    arguments.add_argument("--peer", default="")
    arguments.add_argument("--details", default="")
    arguments.add_argument("--output", default=str(HERE / "restrictions.md"))
    arguments.add_argument("--peer-worker", default="", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    types = chosen.types.split(",") if chosen.types else zoo.causal_lm_types()
    variants = chosen.variants.split(",")
    if chosen.peer_worker:
        peer_masks(types, variants, Path(chosen.peer_worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        if chosen.peer:
            worker = [chosen.peer, __file__, "--types", ",".join(types), "--variants", chosen.variants, "--peer-worker", folder]
            subprocess.run(worker, check=True)
        rows, comparison, details = run(types, variants, Path(folder) if chosen.peer else None)
    if chosen.details:
        Path(chosen.details).write_text("\n".join(details) + "\n")
    command = "python benchmarks/restrictions.py" + " --peer PYTHON" * bool(chosen.peer)
    text = "\n\n".join([heading(command), summary(rows, variants), *peer_table(comparison), per_type(rows, types, variants)])
    Path(chosen.output).write_text(text + "\n")
    print(summary(rows, variants))


def run(types: list[str], variants: list[str], peer: Path | None):
    rows: dict[tuple[str, str], Row] = {}
    comparison: dict[str, dict[str, list[str]]] = {r: defaultdict(list) for r in RESTRICTIONS}
    details = []
    for i, model_type in enumerate(types):
        for variant in variants:
            started = time.time()
            row, lines = attempt(model_type, variant, peer, comparison)
            row.seconds = time.time() - started
            rows[model_type, variant] = row
            details += [f"{model_type} {variant}: {line}" for line in lines]
        verdicts = "  ".join(f"{v}: {rows[model_type, v].verdict} {rows[model_type, v].words[:150]}" for v in variants)
        print(f"{i + 1:3}/{len(types)} {model_type:26} {verdicts}", flush=True)
    return rows, comparison, details


def attempt(
    model_type: str, variant: str, peer: Path | None, comparison: dict[str, dict[str, list[str]]]
) -> tuple[Row, list[str]]:
    """One type in one variant; nothing it does can stop the run."""
    from dead_heads import check_heads

    from devinterp.engine.discovery import structure

    try:
        with limited(SECONDS):
            model = zoo.tiny_model(model_type, variant)
            output = model(input_ids=zoo.tiny_tokens())
            output.logits.sum().backward()
            model.zero_grad()
    except Exception as error:
        return Row("not built", NOT_BUILT.get(model_type) or one_line(error)), []
    row = Row("fail")
    try:
        with limited(SECONDS):
            started = time.time()
            found = structure(model)
            row.structure_seconds = time.time() - started
            mixers = [m for layers in found.stacks.values() for layer in layers for m in layer.mixers if m.heads]
            row.layers = sum(len(layers) for layers in found.stacks.values())
            row.heads = " / ".join(str(n) for n in dict.fromkeys(len(m.heads) for m in mixers))
            row.groups = " / ".join(str(n) for n in dict.fromkeys(len(set(m.group_of)) for m in mixers))
            report = check_heads(model, found)
            row.verdict = "fail" if not report.ok else "pass" if report.mixers else "no heads"
            row.words = "" if report.ok else str(report)
            if report.silent:
                row.words += f"(no gradient reaches {', '.join(report.silent)})"
            if row.verdict == "fail" and not report.mixers and model_type in NO_HEADS:
                row.verdict, row.words = "no heads", NO_HEADS[model_type]
            row.frozen = any(how.frozen for how in report.how.values())
            lines = list(report.failures)
    except Exception as error:
        row.words = one_line(error)
        lines = [row.words, *traceback.format_exc().splitlines()[-6:]]
    if peer is not None:
        with contextlib.suppress(Exception):
            compare(model, torch.load(peer / f"{model_type}.{variant}.pt"), f"{model_type} {variant}", comparison)
    return row, lines


def one_line(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({Path(where.filename).name}:{where.lineno})"


# -- the peer --


def peer_masks(types: list[str], variants: list[str], folder: Path) -> None:
    """Run by the peer's interpreter: its masks of each model, or the words of its error, one file per model."""
    from devinterp.slt.weight_restrictions import create_param_masks

    for model_type in types:
        for variant in variants:
            with contextlib.suppress(Exception), limited(SECONDS):
                model = zoo.tiny_model(model_type, variant)
                masks: dict[str, Any] = {}
                for restriction in RESTRICTIONS:
                    try:
                        masks[restriction] = create_param_masks(model, restriction)
                    except Exception as error:
                        masks[restriction] = one_line(error)
                torch.save(masks, folder / f"{model_type}.{variant}.pt")
        print(f"peer {model_type}", flush=True)


def compare(model: torch.nn.Module, peer: dict[str, Any], name: str, comparison: dict[str, dict[str, list[str]]]) -> None:
    from devinterp.slt.weight_restrictions import create_param_masks

    shapes = {n: p.shape for n, p in model.named_parameters()}
    for restriction in RESTRICTIONS:
        theirs = peer[restriction]
        try:
            ours = elements(create_param_masks(model, restriction), shapes)
        except Exception as error:
            ours = f"{type(error).__name__}: {error}"
        comparison[restriction][verdict(ours, theirs if isinstance(theirs, str) else elements(theirs, shapes))].append(name)


def elements(masks: dict[str, Any], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    full = {n: torch.ones(shapes[n], dtype=torch.bool) if m is None else m.bool().expand(shapes[n]) for n, m in masks.items()}
    return {n: m for n, m in full.items() if m.any()}


def verdict(ours: dict[str, torch.Tensor] | str, theirs: dict[str, torch.Tensor] | str) -> str:
    if isinstance(theirs, str):
        return "not in peer's table" if "HEAD_STRUCTURES" in theirs else "peer error"
    if isinstance(ours, str):
        return "ours error" if theirs else "peer empty"
    if not theirs:
        return "peer empty" if ours else "identical"
    if not all(n in ours and bool((ours[n] | ~m).all()) for n, m in theirs.items()):
        return "differs"
    return "identical" if ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours) else "superset"


# -- the report --


def heading(command: str) -> str:
    return (
        "# Heads of every model type\n\n"
        f"`{command}`, {datetime.date.today()}, transformers {transformers.__version__}, torch {torch.__version__}, {platform.processor() or platform.machine()}.\n\n"
        "Every type that `AutoModelForCausalLM` knows, built small with random weights. `pass`: every head and group was killed inside the "
        "running model, and the elements that lost their loss gradient were exactly the mask. Variants: "
        + ", ".join(f"`{n}` hidden {v.hidden}, {v.heads} heads, {v.groups} groups" for n, v in zoo.VARIANTS.items())
        + ". \\* = with the statistics of norms held constant in the backward pass, because a norm over all heads couples them."
    )


def summary(rows: dict[tuple[str, str], Row], variants: list[str]) -> str:
    lines = [
        "| variant | pass | of these with constant norms | no heads | fail | not built | seconds, discovery | seconds, all |",
        "|---|" + "---|" * 7,
    ]
    for variant in variants:
        these = [row for (_, v), row in rows.items() if v == variant]
        count = Counter(row.verdict for row in these)
        frozen = sum(row.frozen for row in these if row.verdict == "pass")
        lines.append(
            f"| {variant} | {count['pass']} | {frozen} | {count['no heads']} | {count['fail']} | {count['not built']} "
            f"| {sum(r.structure_seconds for r in these):.0f} | {sum(r.seconds for r in these):.0f} |"
        )
    return "\n".join(lines)


def peer_table(comparison: dict[str, dict[str, list[str]]]) -> list[str]:
    if not any(comparison.values()):
        return []
    lines = [
        "## Against devinterp 2.0.1",
        "",
        "| restriction | " + " | ".join(VERDICTS) + " |",
        "|---|" + "---|" * len(VERDICTS),
    ]
    for restriction, found in comparison.items():
        lines.append(f"| `{restriction}` | " + " | ".join(str(len(found[v])) for v in VERDICTS) + " |")
    lines += ["", REASONS, "", "Which models (all variants of a type together):", ""]
    for restriction, found in comparison.items():
        for word in ("superset", "differs", "peer empty", "peer error", "ours error"):
            types: dict[str, list[str]] = defaultdict(list)
            for name in found[word]:
                types[name.split()[0]].append(name.split()[1])
            if types:
                names = ", ".join(t if len(v) == len(zoo.VARIANTS) else f"{t} ({' '.join(v)})" for t, v in types.items())
                lines.append(f"- `{restriction}` {word}: {names}")
    return ["\n".join(lines)]


def cell(row: Row) -> str:
    words = row.words if row.words.startswith("(") or not row.words else f": {row.words}"
    star = "\\*" * row.frozen
    return f"{row.verdict}{star}{words}".replace("|", "/")


def per_type(rows: dict[tuple[str, str], Row], types: list[str], variants: list[str]) -> str:
    lines = [
        "## Every type",
        "",
        "| type | built | layers | heads | groups | " + " | ".join(variants) + " | seconds |",
        "|---|" + "---|" * (5 + len(variants)),
    ]
    for model_type in types:
        these = [rows[model_type, v] for v in variants]
        built = [row for row in these if row.verdict != "not built"]
        first = built[0] if built else these[0]
        cells = [cell(row) for row in these]
        counts = f"{len(built)}/{len(these)} | {first.layers or ''} | {first.heads} | {first.groups}"
        lines.append(f"| {model_type} | {counts} | {' | '.join(cells)} | {sum(r.seconds for r in these):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
