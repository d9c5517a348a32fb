"""The loop, in data-flow order: settings, tokens, checkpoint, selection, batches, curvature, posterior, chain, placement."""
