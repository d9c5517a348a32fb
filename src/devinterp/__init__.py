"""DevInterp: what a network has learned, read from the geometry of its loss around a checkpoint.

The public names are loaded when first used, so that `import devinterp` imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devinterp.slt.llc import compute_llc, llc
    from devinterp.slt.sampling import sample
    from devinterp.utils import default_nbeta, tokenize_and_concatenate

_HOMES = {
    "sample": "devinterp.slt.sampling",
    "llc": "devinterp.slt.llc",
    "compute_llc": "devinterp.slt.llc",
    "default_nbeta": "devinterp.utils",
    "tokenize_and_concatenate": "devinterp.utils",
}

__all__ = ["compute_llc", "default_nbeta", "llc", "sample", "tokenize_and_concatenate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'devinterp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
