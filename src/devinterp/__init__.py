"""DevInterp: what a network has learned, read from the geometry of its loss around a checkpoint.

The public names are loaded when first used, so that `import devinterp` imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devinterp import pictures as pictures
    from devinterp.engine.origin import revisions
    from devinterp.slt.bif import bif, compute_bif
    from devinterp.slt.calibration import calibrate
    from devinterp.slt.diagnosis import describe, diagnose
    from devinterp.slt.llc import compute_llc, llc
    from devinterp.slt.patterning import compute_patterning
    from devinterp.slt.report import report
    from devinterp.slt.sampling import sample
    from devinterp.slt.susceptibilities import compute_susceptibilities, susceptibilities
    from devinterp.slt.sweeps import sweep
    from devinterp.slt.weight_restrictions import create_param_masks, preview_weight_restriction
    from devinterp.store.sweeps import open_sweep
    from devinterp.store.verification import verify
    from devinterp.utils import default_nbeta, tokenize_and_concatenate

_HOMES = {
    "sample": "devinterp.slt.sampling",
    "llc": "devinterp.slt.llc",
    "compute_llc": "devinterp.slt.llc",
    "bif": "devinterp.slt.bif",
    "compute_bif": "devinterp.slt.bif",
    "susceptibilities": "devinterp.slt.susceptibilities",
    "compute_susceptibilities": "devinterp.slt.susceptibilities",
    "compute_patterning": "devinterp.slt.patterning",
    "report": "devinterp.slt.report",
    "create_param_masks": "devinterp.slt.weight_restrictions",
    "preview_weight_restriction": "devinterp.slt.weight_restrictions",
    "calibrate": "devinterp.slt.calibration",
    "diagnose": "devinterp.slt.diagnosis",
    "describe": "devinterp.slt.diagnosis",
    "sweep": "devinterp.slt.sweeps",
    "open_sweep": "devinterp.store.sweeps",
    "revisions": "devinterp.engine.origin",
    "verify": "devinterp.store.verification",
    "default_nbeta": "devinterp.utils",
    "tokenize_and_concatenate": "devinterp.utils",
}

__all__ = [
    "bif",
    "calibrate",
    "compute_bif",
    "compute_llc",
    "compute_patterning",
    "compute_susceptibilities",
    "create_param_masks",
    "default_nbeta",
    "describe",
    "diagnose",
    "llc",
    "open_sweep",
    "preview_weight_restriction",
    "report",
    "revisions",
    "sample",
    "susceptibilities",
    "sweep",
    "tokenize_and_concatenate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "pictures":
        return importlib.import_module("devinterp.pictures")
    if name not in _HOMES:
        raise AttributeError(f"module 'devinterp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
