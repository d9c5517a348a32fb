"""The attributes that analyses use, checked before they do: a store's text can hold anything."""

from collections.abc import Callable, Mapping
from typing import Any

from devinterp.errors import StoreError, shown

Check = tuple[Callable[[Any], bool], str]
"""Whether a value can be used, and what it must be"""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()


NUMBER: Check = (lambda value: is_number(value) and value >= 0, "a finite number, not negative")
NUMBER_OR_NULL: Check = (lambda value: value is None or is_number(value), "a finite number or null")
COUNT: Check = (_is_count, "a whole number, not negative")
LINE: Check = (_is_line, "a short text without control characters")
WAY: Check = (lambda value: value in ("processes", "vmap", "sequential"), "processes, vmap or sequential")
THREADS: Check = (lambda value: type(value) is int and 1 <= value <= 4096, "a whole number from 1 to 4096")
SHIFT: Check = (lambda value: value is None or (type(value) is int and value in (0, 1)), "0, 1 or null")
SWITCH: Check = (lambda value: isinstance(value, bool), "true or false")
NAMES: Check = (
    lambda value: isinstance(value, dict) and all(_is_line(text) for pair in value.items() for text in pair),
    "an object of short texts",
)
OBJECT: Check = (lambda value: isinstance(value, dict), "a JSON object")

SAMPLER = {
    "n_beta": NUMBER, "localization": NUMBER, "llc_weight_decay": NUMBER, "num_burnin_steps": COUNT,
    "num_steps_bw_draws": COUNT, "num_chains": COUNT, "num_draws": COUNT, "sampling_method": LINE,
}  # fmt: skip
MEASURED = ("h_max_checkpoint", "h_max_pilot", "trace_checkpoint", "trace_pilot", "pilot_steps", "stiffest")
STEP_SIZE = {"lr": NUMBER, **dict.fromkeys(MEASURED, NUMBER_OR_NULL)}
PARTS: dict[str, tuple[dict[str, Check], set[str]]] = {
    "identity": ({}, set()),
    "step_size": (STEP_SIZE, {"lr"}),
    "computed": ({"way": WAY, "threads": THREADS}, {"way", "threads"}),
    "data": ({"shift": SHIFT, "masked": SWITCH, "columns": OBJECT, "stored_columns": NAMES}, {"shift", "masked", "columns"}),
    "model": ({"class": LINE, "parameters": COUNT}, {"class", "parameters"}),
}
"""Parts that may be absent: the members that are looked at, and those that a part must have"""


def check_metadata(metadata: Any) -> dict[str, Any]:
    """The metadata of a run, of devinterp 2.0 or of ours, when all that analyses take from it has its type."""
    if not isinstance(metadata, dict) or not isinstance(metadata.get("config"), dict):
        raise StoreError("the samples carry no run metadata: they were not made by sample(), or their attributes were lost.")
    config = metadata["config"]
    _check("config.sampler", config.get("sampler"), OBJECT)
    _check_members("config.sampler", config["sampler"], SAMPLER)
    _check_observables(config.get("observables", []))
    for name, (known, needed) in PARTS.items():
        if name in metadata:
            _check(name, metadata[name], OBJECT)
            _check(name, metadata[name], (needed.issubset, f"an object with {sorted(needed)}"))
            _check_members(name, metadata[name], known)
    _check(
        "step_size", metadata.get("step_size", {}), (lambda value: set(value) <= set(STEP_SIZE), f"made of {list(STEP_SIZE)}")
    )
    return metadata


def _check_observables(listed: Any) -> None:
    ok = isinstance(listed, list) and all(isinstance(item, dict) and _is_line(item.get("obs_id")) for item in listed)
    names = [item["obs_id"] for item in listed] if ok else []
    ok = ok and len(set(names)) == len(names)
    _check("config.observables", listed, (lambda _: ok, "a list of objects with different names as obs_id"))


def _check_members(where: str, values: Mapping[str, Any], known: Mapping[str, Check]) -> None:
    for name, check in known.items():
        if name in values:
            _check(f"{where}.{name}", values[name], check)


def _check(where: str, value: Any, check: Check) -> None:
    usable, allowed = check
    if not usable(value):
        raise StoreError(
            f"the samples' metadata cannot be used: {where} is {shown(value)} and must be {allowed}. They were damaged, or "
            "not made by sample(); ask for another copy."
        )
