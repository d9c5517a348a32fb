"""What a run is made of, as fingerprints: two runs with equal identities have equal numbers."""

import importlib.metadata
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from devinterp.engine.batches import Batches
from devinterp.engine.observables import Observable
from devinterp.engine.settings import Settings
from devinterp.errors import InputTypeError, InputValueError, got, shown
from devinterp.store.fingerprints import Unreadable, architecture, fingerprint, ties

FORMAT = 1
"""Of the fingerprints; another one when they, or the numbers of equal inputs, change"""

ANOTHER = {
    "weights and buffers of the model": "other values",
    "architecture of the model": "other modules, hyperparameters or code (attributes set by a forward pass too: load it anew)",
    "param_masks": "other parameters or elements move",
    "dataset": "other values, or in another order or shape",
}
"""What differs, where only fingerprints are kept"""

UNREADABLE = "not comparable"
LONGEST_ID = 200


@dataclass(frozen=True)
class Source:
    """What is fingerprinted once for a whole suite, before anything runs: a function may hold what running it changes."""

    architecture: str
    ties: dict[str, str]
    loss_fn: str
    unreadable: str = ""
    """why two loss functions cannot be compared; empty where they can"""

    @classmethod
    def of(cls, model: nn.Module, loss_fn: Any, loss_fn_id: Any) -> "Source":
        check_loss_fn_id(loss_fn, loss_fn_id)
        tree, tied = architecture(model), ties(model)
        if loss_fn is None:
            return cls(tree, tied, "next-token cross-entropy")
        if loss_fn_id is not None:
            return cls(tree, tied, f"loss_fn_id {loss_fn_id!r}")
        try:
            return cls(tree, tied, f"fingerprint {fingerprint(loss_fn, model)}")
        except Unreadable as error:
            return cls(tree, tied, UNREADABLE, str(error))

    def warn_if_never_reused(self) -> None:
        if self.unreadable:
            warnings.warn(
                f"loss_fn: it holds something that cannot be compared ({self.unreadable}), so what is stored at output_path "
                "will not be recognised by the same call again. Pass loss_fn_id='my-loss-1', and another id whenever the "
                "function changes.",
                UserWarning,
                stacklevel=2,
            )


def check_loss_fn_id(loss_fn: Any, loss_fn_id: Any) -> None:
    if loss_fn_id is None:
        return
    allowed = f"a string of 1 to {LONGEST_ID} characters that stands for loss_fn"
    if not isinstance(loss_fn_id, str):
        raise InputTypeError(got("loss_fn_id", loss_fn_id, allowed, "Try loss_fn_id='focal-1'."))
    if not loss_fn_id.strip() or len(loss_fn_id) > LONGEST_ID:
        raise InputValueError(got("loss_fn_id", loss_fn_id, allowed, "Try loss_fn_id='focal-1'."))
    if loss_fn is None:
        raise InputValueError(got("loss_fn_id", loss_fn_id, "None without a loss_fn", "Pass loss_fn too, or neither."))


def identity(
    settings: Settings,
    source: Source,
    device_type: str,
    digest: str,
    masks: Mapping[str, Tensor | None],
    batches: Batches,
    observables: tuple[Observable, ...],
) -> dict[str, Any]:
    """Everything that changes the numbers of a run. Fingerprints protect against accident, not attack.

    Forward hooks of the model are not looked at: what they do cannot be told from what they only watch.
    """
    return {
        "format": FORMAT,
        **settings.stored(),
        "architecture of the model": source.architecture,
        "tied weights": source.ties,
        "weights and buffers of the model": digest,
        "param_masks": mask_digest(masks),
        **batches.rows.fingerprints("dataset"),
        **{name: digest for observable in observables for name, digest in observable.fingerprints().items()},
        "loss_fn": source.loss_fn,
        "device type": device_type,
    }


def mask_digest(masks: Mapping[str, Tensor | None]) -> str:
    total = xxhash.xxh3_128()
    for name, mask in masks.items():
        total.update(f"{len(name)} {name} {'whole' if mask is None else tuple(mask.shape)} ".encode())
        total.update(b"" if mask is None else mask.bool().cpu().contiguous().reshape(-1).numpy().data)
    return total.hexdigest()


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What differs, by name, as lines for a person."""
    lines = []
    for name in [*asked, *(name for name in stored if name not in asked)]:
        old, new = stored.get(name), asked.get(name)
        if name == "loss_fn" and UNREADABLE in (old, new):
            lines.append(
                "loss_fn: whether two functions are equal cannot be told, since one holds something that cannot be compared. "
                "Pass loss_fn_id='my-loss-1' with both calls"
            )
        elif name not in stored:
            lines.append(f"{name}: not in the stored run")
        elif name not in asked:
            lines.append(f"{name if name.isprintable() else shown(name)}: only in the stored run")
        elif old != new:
            lines.append(f"{name}: {_difference(name, old, new)}")
    return lines


def _difference(name: str, old: Any, new: Any) -> str:
    if name == "loss_fn" and all(str(value).startswith("fingerprint ") for value in (old, new)):
        return "another function (fingerprint)"
    if name in ANOTHER or name.startswith(("observable ", "dataset column ")):
        return ANOTHER.get(name, "other values")
    return f"stored {old!r}, asked {new!r}"


def versions() -> dict[str, str]:
    """Versions of what computes the numbers; a note, not part of the identity."""
    names = ("devinterp", "torch", "numpy", "transformers", "datasets", "zarr")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
