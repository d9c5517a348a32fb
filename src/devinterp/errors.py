"""Every error of the library: what happened, where, and what to try."""

from collections.abc import Sequence
from typing import Any


class DevinterpError(Exception):
    """Base of every error that DevInterp raises on purpose."""


class DevinterpInputError(DevinterpError):
    """An argument cannot be used. Raised before any compute, and before any file is made."""


class InputValueError(DevinterpInputError, ValueError):
    """The type is right, the value is not."""


class InputTypeError(DevinterpInputError, TypeError):
    """The type is wrong."""


def shown(value: Any, longest: int = 80) -> str:
    """A value in a message: as a repr, so that no control character of it reaches a terminal, and of bounded length."""
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def got(argument: str, value: Any, allowed: str, fix: str) -> str:
    """The one form of an input error: argument and value, what is allowed, what to try."""
    return f"{argument}={shown(value)}: must be {allowed}. {fix}"


class RunMismatchError(DevinterpInputError, ValueError):
    """The store at `output_path` belongs to other inputs than those asked for."""

    def __init__(self, path: str, differences: Sequence[str]):
        listed = "\n".join(f"  - {line}" for line in differences)
        super().__init__(
            f"{path!r} holds a run with other inputs than those asked for:\n{listed}\n"
            "Nothing was changed. Choose another output_path, or ask for the run that is stored."
        )
        self.differences = list(differences)


class ChainDiverged(DevinterpError, RuntimeError):
    """The loss of a chain stopped being finite."""

    def __init__(self, chain: int, step: int, lr: float):
        super().__init__(
            f"chain {chain} left the finite range at step {step} with lr={lr:.3g}. "
            "Try a smaller lr (or lr='auto'), or a larger localization."
        )
        self.chain, self.step, self.lr = chain, step, lr

    def __reduce__(self) -> tuple[Any, ...]:
        return ChainDiverged, (self.chain, self.step, self.lr)


class ChainFailed(DevinterpError, RuntimeError):
    """A chain ended in an error of the model, the machine or the disk. The others were run to their end and are stored."""


class ChainsUnusable(DevinterpError, RuntimeError):
    """An estimate was asked of chains that diverged, failed or are not finished."""


class StoreError(DevinterpError, RuntimeError):
    """A store cannot be read: not one of ours, not complete, or damaged."""


class PackageMissing(DevinterpError, ImportError):
    """What is asked for needs a package that is not installed."""

    def __init__(self, package: str, purpose: str, install: str):
        super().__init__(f"{purpose} needs {package}, which is not installed. Install it with: pip install {install}")
        self.package, self.purpose, self.install = package, purpose, install

    def __reduce__(self) -> tuple[Any, ...]:
        return PackageMissing, (self.package, self.purpose, self.install)


class RunLocked(DevinterpError, RuntimeError):
    """Another process writes the run at `output_path`."""

    def __init__(self, path: str, owner: str):
        super().__init__(
            f"{path!r} is being written by {owner}. Wait for it, or choose another output_path. Nothing was changed."
        )
        self.path, self.owner = path, owner

    def __reduce__(self) -> tuple[Any, ...]:
        return RunLocked, (self.path, self.owner)


class StorageError(DevinterpError, OSError):
    """The disk did not take what was to be written. What was committed before is kept."""
