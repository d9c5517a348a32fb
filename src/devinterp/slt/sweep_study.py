"""A sweep that is asked for, checked before anything is loaded, computed or made."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from devinterp.engine.origin import Origin, Pretrained, checkpoints_in, origin_of
from devinterp.engine.settings import Paths, Settings, choice, settings_and_paths
from devinterp.engine.tokens import check_observables, check_tokens
from devinterp.errors import InputTypeError, InputValueError, RunMismatchError, StoreError, got
from devinterp.slt.requests import Inputs, Request, check_stored
from devinterp.slt.susceptibilities import check_task
from devinterp.slt.weight_restrictions import check_restrictions, masks_of
from devinterp.store.identity import check_loss_fn_id, differences
from devinterp.store.runs import MORE, layout, plain
from devinterp.store.sweeps import RECORD, Sweep, check_names, file_name
from devinterp.store.writer import check_path, check_space

Requests = dict[str | None, Request]
"""The runs of one checkpoint: restriction -> request, None where there are no restrictions"""


@dataclass(frozen=True)
class Study:
    """Checkpoints, and all that is equal for all of them."""

    origins: dict[str, Origin]
    dataset: Any
    observables: Mapping[str, Any]
    restrictions: dict[str, Any]
    """{} = one run of the whole model (or of param_masks) for each checkpoint"""
    folder: Path
    settings: Settings
    paths: Paths
    on_diverged: str
    param_masks: Any
    inputs: dict[str, Any]
    """arguments of `Inputs.of` that are passed on as they are"""
    record: Sweep
    """of the checkpoints asked for"""

    @classmethod
    def of(
        cls,
        checkpoints: Any,
        dataset: Any,
        observables: Any,
        *,
        output_path: Any,
        weight_restrictions: Any = None,
        sampling_task: Any = None,
        executor: Any = None,
        devices: Any = None,
        on_diverged: str = "record",
        param_masks: Any = None,
        loss_fn: Callable[[nn.Module, Tensor], Tensor] | None = None,
        loss_fn_id: str | None = None,
        device: str | torch.device | None = None,
        **sampling: Any,
    ) -> "Study":
        origins = origins_of(checkpoints)
        settings, paths = settings_and_paths(**sampling)
        choice("record", "raise")("on_diverged", on_diverged)
        check_loss_fn_id(loss_fn, loss_fn_id)
        restrictions: dict[str, Any] = {}
        if weight_restrictions is not None:
            if param_masks is not None:
                fix = "Restrictions come from weight_restrictions."
                raise InputTypeError(got("param_masks", param_masks, "absent with weight_restrictions", fix))
            restrictions = {name: weight_restrictions[name] for name in check_restrictions(weight_restrictions, False)}
        _check_sampling_task(sampling_task, restrictions, observables)
        check_names("checkpoints", list(origins), list(restrictions))
        folder = check_path(output_path)
        tokens = check_tokens("dataset", dataset, at_least=settings.batch_size)
        seen = check_observables(observables, tokens.length, settings.batch_size, settings.batches_per_draw, settings.obs_seed)
        equal = {**settings.stored(), "dataset": tokens.digest, **{f"observable {o.name}": o.digest for o in seen}}
        record = Sweep(tuple(origins), tuple(restrictions), sampling_task, plain(equal))
        given = {"loss_fn": loss_fn, "loss_fn_id": loss_fn_id, "device": device, "executor": executor, "devices": devices}
        passed = {name: value for name, value in given.items() if value is not None}
        study = cls(
            origins, dataset, observables, restrictions, folder, settings, paths, on_diverged, param_masks, passed, record
        )
        study.known()
        check_space(folder, *layout(settings, tokens.length, seen), count=study.num_runs)
        return study

    @property
    def of_each(self) -> list[str | None]:
        """What is sampled at each checkpoint, the whole model first."""
        return list(self.restrictions) or [None]

    @property
    def num_runs(self) -> int:
        return len(self.origins) * len(self.of_each)

    def path(self, checkpoint: str, restriction: str | None) -> Path:
        return self.folder / file_name(checkpoint, restriction)

    def requests(self, checkpoint: str, model: nn.Module) -> Requests:
        """The runs of one checkpoint, checked against its model and against what is stored."""
        inputs = Inputs.of(
            model, self.dataset, self.observables, self.settings, paths=self.paths,
            on_diverged="record" if self.restrictions else self.on_diverged, origin=self._loaded_by_workers(checkpoint),
            **self.inputs,
        )  # fmt: skip
        made: Requests = {}
        for restriction in self.of_each:
            masks = self.param_masks if restriction is None else masks_of(model, restriction, self.restrictions[restriction])
            made[restriction] = Request.of(inputs, masks, self.path(checkpoint, restriction))
        first, *others = made.values()
        check_stored(first, others)
        return made

    def _loaded_by_workers(self, checkpoint: str) -> Origin | None:
        """Where the workers of an executor load it; None = they get the weights. What a function made is made once."""
        origin = self.origins[checkpoint]
        return origin if self.executor is not None and isinstance(origin, Pretrained) else None

    @property
    def executor(self) -> Any:
        return self.inputs.get("executor")

    def here(self) -> "Study":
        """The same, computed by this process and its own workers."""
        if self.executor is None:
            return self
        return replace(self, inputs={name: value for name, value in self.inputs.items() if name not in ("executor", "device")})

    def known(self) -> Sweep:
        """What the folder holds together with what is asked for; refuses a sweep with other settings.

        Raises:
            RunMismatchError: the folder's sweep has other settings, data or restrictions.
        """
        if not (self.folder / RECORD).exists():
            return self.record
        try:
            stored = Sweep.read(self.folder)
        except StoreError as error:
            fix = f"Remove {RECORD} from it if its stores are to be kept; they are recognised one by one."
            raise InputValueError(f"output_path={str(self.folder)!r}: {error} {fix}") from error
        asked, other = dict(self.record.settings), dict(stored.settings)
        for name in MORE:  # a larger value extends the runs, each of which checks it
            other.pop(name, None), asked.pop(name, None)
        lines = differences(other, asked)
        if stored.restrictions != self.record.restrictions:
            lines.append(f"weight_restrictions: stored {list(stored.restrictions)}, asked {list(self.record.restrictions)}")
        if lines:
            raise RunMismatchError(str(self.folder), lines)
        more = tuple(name for name in stored.checkpoints if name not in self.origins)
        merged = replace(self.record, checkpoints=self.record.checkpoints + more)
        check_names("checkpoints", merged.checkpoints, merged.restrictions)
        return replace(merged, failed=stored.failed)

    def is_asked_for(self, label: str) -> bool:
        """Whether what failed, a checkpoint or checkpoint/restriction, is of a checkpoint of this call."""
        return label in self.origins or label.rpartition("/")[0] in self.origins


def origins_of(checkpoints: Any) -> dict[str, Origin]:
    """name -> where it is loaded from, of a mapping, or of a folder of a training run."""
    if isinstance(checkpoints, str | os.PathLike):
        return dict(checkpoints_in(checkpoints))
    if not isinstance(checkpoints, Mapping):
        fix = "Try {'step512': 'EleutherAI/pythia-14m@step512'}, or the output_dir of a Trainer."
        raise InputTypeError(got("checkpoints", checkpoints, "a dict: name -> where it is, or a folder of checkpoints", fix))
    if not checkpoints:
        raise InputValueError(got("checkpoints", dict(checkpoints), "at least one", "Add a checkpoint."))
    return {name: origin_of(given, f"checkpoints[{name!r}]") for name, given in checkpoints.items()}


def _check_sampling_task(task: Any, restrictions: Mapping[str, Any], observables: Any) -> None:
    if task is None:
        return
    if not restrictions:
        fix = "It is the sampling task of susceptibilities, which need weight_restrictions."
        raise InputValueError(got("sampling_task", task, "None without weight_restrictions", fix))
    check_task(observables, task, True)
