"""The diagonal metric of samplers that take one: how stiff each weight is at the checkpoint, by random probes.

(H z)_i of random signs z has the mean square |H_i|^2, the norm of row i of the Hessian, for which a few products suffice: one
that is off by a quarter changes how fast a direction mixes, never the law that is sampled. A pure function of the plan, so a
run that is gone on with has the same one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from devinterp.engine.batch import Batch
from devinterp.engine.curvature import Curvature, check_curved, curvature_batches, spectrum
from devinterp.engine.posterior import Posterior
from devinterp.engine.seeds import noise_generator
from devinterp.engine.walker import Plan
from devinterp.samplers import TakesMetric

PROBES = 8


def with_metric(plan: Plan) -> Plan:
    """The plan with the metric that its sampler takes, if it takes one: scaled so that the largest eigenvalue of
    M (n_beta H + prior) is 1."""
    if not isinstance(plan.sampler, TakesMetric):
        return plan
    posterior, batches = Posterior.of(plan.settings), curvature_batches(plan)
    precision = row_norms(plan, batches).mul_(posterior.n_beta).add_(posterior.prior_precision)
    metric = plan.sampler.metric(precision)
    stiffest = spectrum(replace(plan, metric=metric), None, batches).precision if precision.any() else 0.0
    check_curved(f"sampling_method={plan.settings.sampling_method!r}", stiffest, "Try localization=300.")
    return replace(plan, metric=metric.div_(stiffest))


@torch.no_grad()
def row_norms(plan: Plan, batches: list[Batch]) -> Tensor:
    """Estimated norms of the rows of the Hessian of the mean loss at the checkpoint."""
    curvature = Curvature(plan, None, batches)
    rng = noise_generator(plan.selection.device, plan.settings.init_seed, "metric")
    squares = torch.zeros_like(curvature.gradient)
    for _ in range(PROBES):
        curvature.gradient.bernoulli_(0.5, generator=rng).mul_(2).sub_(1)
        curvature.apply()  # to the direction of length 1
        squares.addcmul_(curvature.gradient, curvature.gradient, value=plan.selection.size / PROBES)
    return squares.sqrt_()
