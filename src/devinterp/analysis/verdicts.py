"""Verdicts on chains, in words: what is wrong, how it shows, what to change. Bare arrays in.

The verdicts, in the order in which they are looked for; the first that fits is given:

    diverged, failed         the run said so
    too little signal        a chain that does not move, or a mean not three standard errors from zero
    fell below the start     the second half lies below zero by more than three standard errors
    spiky                    draws further up than the posterior puts any
    still climbing, falling  the halves differ surely (Student's t, 2 of 1000 runs), and by 5 % of the level
    chains disagree          levels further apart than chains of one law have them, or R-hat above 1.2
    step too large           for the curvature known: `analysis.step_size`
    too short                fewer than 20 draws, or a drift of 30 % of the level would not show
    healthy                  none of these
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from devinterp.analysis.chains import FALSE_ALARM, Change, disagreement, spikes, without_common
from devinterp.analysis.uncertainty import Trace, rhat, standard_error

SURE = 3.0
"""standard errors"""
LEAST_DRIFT = 0.05
HIDDEN_DRIFT = 0.3
"""of the level: what must have shown for a run to be long enough"""
FEWEST_DRAWS = 20
"""from which effective sample sizes mean something"""
LARGEST_RHAT = 1.2
LEAST_SPREAD = 0.1
"""of the level: chains closer than this agree well enough"""
UNMOVED = 1e-6
"""of the loss: excess losses below this are rounding"""


@dataclass(frozen=True)
class Judgement:
    verdict: str
    reason: str
    advice: str = ""


@dataclass(frozen=True)
class Run:
    """Completed chains of one run."""

    trace: Trace
    """n_beta times the paired excess loss, shape (chain, draw)"""
    rounding: float
    """size of a trace that is nothing but rounding"""
    coarse: str
    """why the step size is too large for the curvature known; empty where it is not, or nothing is known"""

    @property
    def level(self) -> float:
        return float(self.trace.mean())

    @property
    def looks(self) -> int:
        """taken for a drift: at all chains together and at each"""
        return len(self.trace) + (len(self.trace) > 1)

    def judge(self) -> list[Judgement]:
        """A verdict for each chain."""
        looks: tuple[Callable[[Run], dict[int, Judgement]], ...] = (
            Run._still, Run._below, Run._spiky, Run._drifting, Run._apart, Run._coarse, Run._short
        )  # fmt: skip
        found: dict[int, Judgement] = {}
        for look in looks:
            found = look(self) | found
        healthy = Judgement("healthy", "level, without spikes" + (", and with the others" if len(self.trace) > 1 else ""))
        return [found.get(chain, healthy) for chain in range(len(self.trace))]

    def _of_all(self, judgement: Judgement) -> dict[int, Judgement]:
        return dict.fromkeys(range(len(self.trace)), judgement)

    def _still(self) -> dict[int, Judgement]:
        still = [chain for chain, row in enumerate(self.trace) if np.abs(row).max() <= self.rounding or not np.ptp(row)]
        found = {
            chain: Judgement("too little signal", "its loss does not change", "a larger lr, or lr='auto'") for chain in still
        }
        error = standard_error(self.trace)
        # chains that each have a signal, at levels far apart, have no sure mean either
        alone = all(abs(float(row.mean())) > SURE * standard_error(row[None]) for row in self.trace)
        if abs(self.level) < SURE * error and not Change.of(self.trace).is_sure(self.looks) and not alone:
            reason = f"the LLC is {self.level:.3g} with a standard error of {error:.2g}"
            weak = Judgement("too little signal", reason, "more draws, larger batches, or a larger n_beta")
            found = self._of_all(weak) | found
        return found

    def _below(self) -> dict[int, Judgement]:
        found, half = {}, self.trace.shape[1] // 2
        for chain, row in enumerate(self.trace):
            late = row[None, -half:]
            level, error = float(late.mean()), standard_error(late)
            if level < -SURE * error:
                reason = f"its loss falls below the checkpoint's: LLC {level:.3g} ± {error:.2g} over the second half of draws"
                advice = "a larger localization; if the checkpoint is no minimum (early in training), report the value as it is"
                found[chain] = Judgement("fell below the start", reason, advice)
        return found

    def _spiky(self) -> dict[int, Judgement]:
        found, draws = {}, self.trace.shape[1]
        for chain, count in enumerate(spikes(self.trace)):
            if count:
                highest = self.trace[chain].max()
                reason = f"{count} of {draws} draws lie further up than the posterior puts any, the highest at {highest:.3g}"
                found[chain] = Judgement("spiky", reason, "a smaller lr, or lr='auto'; larger batches")
        return found

    def _drifting(self) -> dict[int, Judgement]:
        """All together, which shows less, and each on its own."""
        together = self._drift(self.trace)
        each = {chain: self._drift(row[None]) for chain, row in enumerate(self.trace)}
        alone = {chain: judgement for chain, judgement in each.items() if judgement}
        return (self._of_all(together) if together else {}) | alone

    def _drift(self, trace: Trace) -> Judgement | None:
        change = Change.of(trace)
        if not (change.is_sure(self.looks) and abs(change.size) > LEAST_DRIFT * abs(float(trace.mean()))):
            return None
        reason = f"from the first half of the draws to the second the LLC changes by {change.size:+.3g} ± {change.error:.2g}"
        if change.size > 0:
            return Judgement("still climbing", reason, "more burn-in steps, or a larger localization (or a smaller n_beta)")
        return Judgement("still falling", reason, "more burn-in steps; without init_noise, a smaller lr")

    def _apart(self) -> dict[int, Judgement]:
        probability, distances = disagreement(self.trace)
        levels = self.trace.mean(axis=1)
        far = np.abs(levels - np.median(levels)) > LEAST_SPREAD * abs(self.level)
        largest = max(rhat(self.trace), rhat(without_common(self.trace)))
        if not far.any() or not (probability < FALSE_ALARM or largest > LARGEST_RHAT):
            return {}
        those = [chain for chain in np.flatnonzero(far) if abs(distances[chain]) > SURE] or range(len(levels))
        reason = f"the chains level off between {levels.min():.3g} and {levels.max():.3g} (R-hat {largest:.3f})"
        apart = Judgement("chains disagree", reason, "more burn-in steps and draws, or a smaller lr")
        return {int(chain): apart for chain in those}

    def _coarse(self) -> dict[int, Judgement]:
        advice = "lr='auto' with sampling_method='leimkuhler_matthews', or a smaller lr"
        return self._of_all(Judgement("step too large", self.coarse, advice)) if self.coarse else {}

    def _short(self) -> dict[int, Judgement]:
        # that of the mean over chains; or twice the error where their levels lie apart, which leaves no degrees of freedom
        hidden = max(2 * Change.of(self.trace).error, Change.of(self.trace.mean(axis=0, keepdims=True)).smallest_sure())
        few = self.trace.shape[1] < FEWEST_DRAWS
        if hidden <= HIDDEN_DRIFT * abs(self.level) and not few:
            return {}
        reason = f"a drift of {hidden:.2g} would not show in an LLC of {self.level:.3g}"
        if few:
            reason = f"{self.trace.shape[1]} draws are too few to tell (at least {FEWEST_DRAWS})"
        return self._of_all(Judgement("too short", reason, "more draws, or more chains"))


def counted(judgements: list[Judgement]) -> Iterator[tuple[Judgement, list[int]]]:
    """Each different judgement, with the chains that have it."""
    for judgement in dict.fromkeys(judgements):
        yield judgement, [chain for chain, other in enumerate(judgements) if other == judgement]
