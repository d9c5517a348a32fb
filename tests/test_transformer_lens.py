"""TransformerLens models, where TransformerLens 2 or 3 is installed (`pip install devinterp[lens]`)."""

import numpy as np
import pytest
import torch
from cases import random_tokens

import devinterp

lens = pytest.importorskip("transformer_lens", reason="needs the extra 'lens'")


@pytest.mark.skipif(not hasattr(lens, "HookedTransformer"), reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.filterwarnings("ignore")
def test_hooked_transformer():
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=12, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", seed=0
    )
    model, tokens = lens.HookedTransformer(config), random_tokens(40, 12, 50)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    samples = devinterp.sample(
        model, tokens, {"x": tokens}, lr="auto", n_beta=10.0, localization=50.0, sampling_method="leimkuhler_matthews",
        batch_size=4, num_draws=5, num_chains=2, num_init_loss_batches=1, progress=False,
    )  # fmt: skip
    expected = model(torch.as_tensor(samples.input_ids_x.values), return_type="loss", loss_per_token=True)
    np.testing.assert_allclose(samples.init_loss_x, expected.detach(), rtol=1e-4, atol=1e-5)
    assert np.isfinite(samples.sampling_loss).all()
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in before.items())
