"""Not kept: the samplers are chosen by name."""

raise ImportError(
    "devinterp.optim (SGLD, SGMCMC and their kind as optimisers) is not part of this version. Choose the sampler by name: "
    "devinterp.sample(..., sampling_method='sgmcmc_sgld' | 'leimkuhler_matthews' | ...); docs/guide.md lists them."
)
