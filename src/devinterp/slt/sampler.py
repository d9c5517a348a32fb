"""Not kept: chains are run by `devinterp.sample`."""

raise ImportError(
    "devinterp.slt.sampler (sample_single_chain, and estimate_learning_coeff of 1.x) is not part of this version. Use "
    "devinterp.sample(..., num_chains=1), and devinterp.llc or devinterp.compute_llc for the learning coefficient."
)
