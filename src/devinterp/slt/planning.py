"""Runs planned, here or by a worker of an executor: fast paths, placement, metric and step size."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from devinterp.engine.batches import Batches
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.dispatch import Site, elsewhere
from devinterp.engine.forward import Forward
from devinterp.engine.metric import with_metric
from devinterp.engine.observables import Observable
from devinterp.engine.placement import Placement, decide, threads
from devinterp.engine.proof import find_forward, precision_error, steps_together
from devinterp.engine.selection import Selection
from devinterp.engine.settings import Paths, Settings
from devinterp.engine.step_size import StepSize, choose_step_size, given_step_size
from devinterp.engine.trials import check_loss
from devinterp.engine.walker import Plan


@dataclass(frozen=True)
class Question:
    """What a plan is made from."""

    checkpoint: Checkpoint
    settings: Settings
    paths: Paths
    batches: Batches
    observables: tuple[Observable, ...]
    masks: dict[str, Tensor | None]
    stored: Mapping[str, Any]
    """metadata of the run that is gone on with; empty for a new one"""
    is_first: bool
    """neither model nor data have been seen by another run of the suite"""
    num_runs: int
    largest_id: int | None
    """of the tokens, where a batch is yet to be tried; chains are handed out then"""

    def plan(self, found: "Planned") -> Plan:
        """The plan, around this process's checkpoint."""
        selection = Selection.of(self.checkpoint.parameters, self.masks)
        sampler = self.settings.sampler(found.step_size.lr)
        return Plan(self.settings, sampler, found.forward, selection, self.batches, self.observables, metric=found.metric)


@dataclass(frozen=True)
class Planned:
    """What had to be computed to plan a run."""

    forward: Forward
    placement: Placement
    step_size: StepSize
    metric: Tensor | None
    described: dict[str, Any]
    """for the store's record"""


Forwards = dict[frozenset[str], Forward]
"""Fast paths by the parameters that move, so that restrictions of the same parameters are proven once"""


def plan_all(questions: Sequence[Question], site: Site) -> list[Planned | Exception]:
    """Plans of the runs of a suite; of one that cannot be planned, why."""
    if site.workers.are_known or not questions:
        return _answers(questions)
    answers, told = elsewhere(_told_answers, list(questions), site)
    for message in told:
        warnings.warn(message, UserWarning, stacklevel=2)
    return list(answers)


def _told_answers(questions: Sequence[Question]) -> tuple[list[Planned | Exception], list[str]]:
    """With what was warned about, where nobody would see it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = _answers(questions)
    return answers, [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


def _answers(questions: Sequence[Question]) -> list[Planned | Exception]:
    forwards: Forwards = {}
    found: list[Planned | Exception] = []
    for question in questions:
        try:
            with question.checkpoint.ready():
                found.append(_planned(question, forwards))
        except Exception as error:  # whatever it is, the other runs are not lost
            found.append(error)
    return found


def _planned(question: Question, forwards: Forwards) -> Planned:
    settings, paths, checkpoint, told = question.settings, question.paths, question.checkpoint, question.stored
    batch = question.batches.micro(0, 0)
    if question.is_first and question.largest_id is not None:
        check_loss(checkpoint, question.batches.objective, checkpoint.placed(batch), question.largest_id)
    selection = Selection.of(checkpoint.parameters, question.masks)
    moving = frozenset(piece.name for piece in selection.pieces)
    if moving not in forwards:
        forwards[moving] = find_forward(
            checkpoint, selection, batch, reuse_prefix=paths.reuse_prefix, compiled=paths.compile, precision=settings.precision,
        )  # fmt: skip
    plan = Plan(settings, settings.sampler(1.0), forwards[moving], selection, question.batches, question.observables)
    computed = told.get("computed")
    # a store that is gone on with, as it began
    placement = (
        Placement(computed["way"], computed["threads"])
        if computed
        else decide(paths.chains_together, plan, question.num_runs, question.largest_id is not None)
    )
    with threads(placement.threads):  # of the chains: a run that is gone on with has the same metric
        plan = with_metric(plan)
    step_size = StepSize(**told["step_size"]) if told else _step_size(plan, measured=question.is_first)
    plan = replace(plan, sampler=settings.sampler(step_size.lr))
    plan, placement = _placed(plan, placement, is_new=not told)
    described: dict[str, Any] = {"computed": asdict(placement) | plan.forward.described()}
    if settings.precision is not None:
        described["precision_error"] = precision_error(plan.forward, plan.observables, settings.batch_size)
    return Planned(plan.forward, placement, step_size, plan.metric, described)


def _placed(plan: Plan, placement: Placement, is_new: bool) -> tuple[Plan, Placement]:
    """One after another, where they cannot be in one vmap."""
    if placement.way != "vmap":
        return plan, placement
    together = replace(plan, forward=replace(plan.forward, head=None))  # its gradients are made outside of autograd
    if not is_new or steps_together(together):
        return together, placement
    return plan, replace(placement, way="sequential")


def _step_size(plan: Plan, *, measured: bool) -> StepSize:
    if plan.settings.lr == "auto":
        return choose_step_size(plan)
    return given_step_size(plan) if measured else StepSize(float(plan.settings.lr))
