"""A report: one HTML file for people, which opens without a network."""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from devinterp.engine.settings import choice, integer
from devinterp.errors import DevinterpError, InputTypeError, InputValueError, StorageError, got
from devinterp.pictures.page.body import body
from devinterp.pictures.page.charts import script, specifications
from devinterp.pictures.page.html import MARK, page
from devinterp.pictures.style import NEGATIVE, POSITIVE
from devinterp.pictures.training import Steps
from devinterp.slt.report_numbers import NOT_KNOWN, Numbers, settings_of
from devinterp.slt.report_runs import Run, Runs, runs_of
from devinterp.store.reader import metadata_of, observable_names
from devinterp.store.samples import Samples
from devinterp.store.sweeps import FULL


def report(
    samples: Samples | Sequence[str | os.PathLike[str]] | Mapping[Any, Samples],
    output_path: str | os.PathLike[str] = "report.html",
    *,
    tokenizer: Any = None,
    sampling_task: str | None = None,
    estimator: str = "one_chain",
    sequences: int = 4,
    title: str | None = None,
) -> Path:
    """Write what runs found as one HTML file: verdicts in sentences, charts, tables that sort, text with a value on each token.

    The file holds all that it needs (Vega's scripts among it) and opens no connection: its own policy forbids a browser to. All
    text of stores and tokenizers is shown as text. Numbers are those of `compute_llc`, `diagnose`, `compute_bif` and
    `compute_susceptibilities`, in five digits; influences between single tokens in hundredths.

    Args:
        samples: one run (what `sample()` returned, or the path of its store); what `sweep()` returned, or its folder; a folder
            of stores named as `susceptibilities` names them, or a list of their paths; or a dict: checkpoint, or (checkpoint,
            restriction), -> run. Restrictions are components; "full" is the whole model. All at one `n_beta`, `localization`
            and `llc_weight_decay`.
        output_path: the file. An earlier report there is replaced; any other file is refused.
        tokenizer: what has `decode(ids)`; None shows tokens by their numbers.
        sampling_task: with restrictions, the observable that holds sampling data, as in `compute_susceptibilities`. None =
            the one that a sweep was told, if any; without one there are no susceptibilities in the report.
        estimator: of susceptibilities, "one_chain" or "two_chain"; they are standardised.
        sequences: of each observable whose text is shown.
        title: of the page; None = the name of the model's class.

    Returns:
        The path of the file.

    Raises:
        DevinterpInputError: an argument cannot be used, or the runs' settings differ.
        StoreError: there is no run that can be used.
        PackageMissing: altair or vl-convert-python are not installed: `pip install 'devinterp[report]'`.
        StorageError: the file cannot be written.
    """
    path = _check_path(output_path)
    choice("one_chain", "two_chain")("estimator", estimator)
    integer(1)("sequences", sequences)
    if title is not None and not isinstance(title, str):
        raise InputTypeError(got("title", title, "a string", "Leave it out to take the model's name."))
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        fix = "Try AutoTokenizer.from_pretrained(name)."
        raise InputTypeError(got("tokenizer", tokenizer, "what has decode(ids), or None", fix))
    charts, library = specifications(), script()
    runs = runs_of(samples)
    task = _check_task(sampling_task, runs)
    numbers = Numbers(runs, tokenizer, task, estimator, sequences)
    values, missing = values_of(numbers)
    values["charts"] = charts
    first = runs.runs[0]
    named = title or _model_of(first)[0]
    text = page(
        named,
        body(named, _subtitle(runs), values, _facts(runs), settings_of(runs), [*_notes(runs, numbers), *missing]),
        values,
        library,
    )
    _write(path, text)
    return path


def values_of(numbers: Numbers) -> tuple[dict[str, Any], list[str]]:
    """All numbers and texts of the page, and why some are not there."""
    runs, missing = numbers.runs, []

    def tried(compute: Callable[[str], Any], what: str, checkpoint: str, otherwise: Any) -> Any:
        try:
            return compute(checkpoint)
        except DevinterpError as error:
            missing.append(f"No {what} at {checkpoint}: {error}")
            return otherwise

    names = runs.checkpoints
    steps = Steps.of(names)
    values = {
        "full": FULL, "not_known": NOT_KNOWN, "colours": [NEGATIVE, POSITIVE], "checkpoints": names,
        "steps": list(steps.at) if steps.is_training else None,
        "runs": [numbers.of_run(run) for run in runs.runs],
        "texts": [tried(numbers.texts, "text", name, []) for name in names],
        "influences": [tried(numbers.influences, "influences", name, None) for name in names],
        "responses": [tried(numbers.responses, "susceptibilities", name, None) for name in names],
    }  # fmt: skip
    return values, missing


def _check_task(given: str | None, runs: Runs) -> str | None:
    task = given if given is not None else runs.sampling_task
    known = observable_names(runs.runs[0].ds)
    if task is not None and (not isinstance(task, str) or task not in known):
        raise InputValueError(
            got("sampling_task", task, f"one of the observables {known}", "It holds more of the sampling data.")
        )
    return task


def _check_path(output_path: Any) -> Path:
    if not isinstance(output_path, str | os.PathLike):
        raise InputTypeError(got("output_path", output_path, "a path", "Try 'report.html'."))
    path = Path(output_path).expanduser().absolute()
    try:
        if "\0" in str(path):
            raise ValueError("it holds a null byte")
        if not path.parent.is_dir():
            raise InputValueError(got("output_path", str(path), "in a folder that is there", "Make the folder first."))
        if path.is_symlink() or (path.exists() and not _is_report(path)):
            raise InputValueError(got("output_path", str(path), "a new file, or an earlier report", "Choose another name."))
    except (OSError, ValueError) as error:
        if isinstance(error, InputValueError):
            raise
        raise InputValueError(got("output_path", str(output_path), "a path that can be used", str(error))) from error
    return path


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    written = path.with_name(f".{path.stem[:50]}.{secrets.token_hex(8)}")
    try:
        try:
            with written.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.replace(written, path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"{str(path)!r} cannot be written: {error}. Nothing was changed.") from error


def _model_of(run: Run) -> tuple[str, int | None]:
    model = (metadata_of(run.ds) if "metadata" in run.ds.attrs else {}).get("model", {})
    return str(model.get("class", "A run of devinterp")), model.get("parameters")


def _subtitle(runs: Runs) -> str:
    _, parameters = _model_of(runs.runs[0])
    size = f"{parameters:,} parameters. " if parameters else ""
    count, checkpoints, restrictions = len(runs.runs), len(runs.checkpoints), len(runs.restrictions)
    if count == 1:
        return f"{size}One run: {runs.runs[0].name}."
    of = f"{checkpoints} checkpoint{'s' * (checkpoints > 1)}"
    return f"{size}{count} runs: {of}" + (f", the whole model and {restrictions - 1} components." if restrictions > 1 else ".")


def _facts(runs: Runs) -> list[tuple[str, Any]]:
    """On what: model, data, sizes, versions."""
    run = runs.runs[0]
    metadata = metadata_of(run.ds) if "metadata" in run.ds.attrs else {}
    name, parameters = _model_of(run)
    sizes = run.ds.sizes
    observables = ", ".join(f"{o} ({sizes[f'batch_{o}']} sequences)" for o in observable_names(run.ds)) or "none"
    versions = metadata.get("versions", {})
    found: list[tuple[str, Any]] = [
        ("model", name + (f", {parameters:,} parameters" if parameters else "")),
        ("checkpoints", ", ".join(runs.checkpoints)),
        ("components", ", ".join(name for name in runs.restrictions if name != FULL) or "none: the whole model moves"),
        ("chains and draws", f"{sizes['chain']} chains of {sizes['draw']} draws"),
        ("observables", observables),
        ("losses per sequence", str(sizes["token_pos"])),
        ("computed on", str(metadata.get("device", "not known"))),
        (
            "versions",
            ", ".join(f"{package} {version}" for package, version in versions.items() if package != "threads")
            or "devinterp 2.0",
        ),
    ]
    return found


def _notes(runs: Runs, numbers: Numbers) -> list[str]:
    """What a reader would miss otherwise."""
    notes = [f"Left out: {name} ({reason})" for name, reason in runs.left_out.items()]
    if numbers.tokenizer is None and any(observable_names(run.ds) for run in runs.runs):
        notes.append("No tokenizer was given: tokens are shown by their numbers.")
    return notes
