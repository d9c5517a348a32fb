"""What a run is made of, as fingerprints: two runs with equal identities have equal numbers."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from devinterp.engine.batches import Batches
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.settings import Settings
from devinterp.engine.tokens import Observable
from devinterp.errors import shown

UNSHOWABLE = "a loss_fn of the caller's"


def identity(
    settings: Settings,
    checkpoint: Checkpoint,
    digest: str,
    masks: Mapping[str, Tensor | None],
    batches: Batches,
    observables: tuple[Observable, ...],
) -> dict[str, Any]:
    """Everything that changes the numbers of a run. Fingerprints protect against accident, not attack."""
    return {
        **settings.stored(),
        "weights and buffers of the model": digest,
        "param_masks": mask_digest(masks),
        "dataset": batches.tokens.digest,
        **{f"observable {observable.name}": observable.digest for observable in observables},
        "loss_fn": "next-token cross-entropy" if checkpoint.loss_fn is None else UNSHOWABLE,
        "device type": checkpoint.device.type,
    }


def mask_digest(masks: Mapping[str, Tensor | None]) -> str:
    total = xxhash.xxh3_128()
    for name, mask in masks.items():
        total.update(name.encode())
        total.update(b"whole" if mask is None else mask.bool().cpu().contiguous().reshape(-1).numpy().data)
    return total.hexdigest()


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What differs, by name, as lines for a person."""
    lines = []
    for name in [*asked, *(name for name in stored if name not in asked)]:
        old, new = stored.get(name), asked.get(name)
        if name == "loss_fn" and UNSHOWABLE in (old, new):
            lines.append("loss_fn: whether two functions are equal cannot be shown, so a run with one is never reused")
        elif name not in stored:
            lines.append(f"{name}: not in the stored run")
        elif name not in asked:
            lines.append(f"{name if name.isprintable() else shown(name)}: only in the stored run")
        elif old != new:
            fingerprint = isinstance(new, str) and len(new) == 32
            lines.append(f"{name}: other values" if fingerprint else f"{name}: stored {shown(old)}, asked {shown(new)}")
    return lines


def versions() -> dict[str, str]:
    """Versions of what computes the numbers; a note, not part of the identity."""
    names = ("devinterp", "torch", "numpy", "transformers", "datasets", "zarr")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
