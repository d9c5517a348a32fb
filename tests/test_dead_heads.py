"""Discovered head masks, against heads killed in the running model. All types: `benchmarks/restrictions.py`."""

from types import SimpleNamespace

import pytest
import torch
from dead_heads import check_heads
from zoo import VARIANTS, causal_lm_types, tiny_model, tiny_tokens

from devinterp.engine.discovery import structure

CASES = [
    ("gpt2", "gqa", {}),  # fused, transposed matrices
    ("gpt_neox", "h8", {}),  # fused, interleaved by head
    ("llama", "odd", {}),
    ("qwen3", "gqa", {}),  # norms inside each head
    ("qwen3_next", "gqa", {}),  # gated attention and gated DeltaNet
    ("deepseek_v3", "gqa", {}),  # latent attention
    ("deepseek_v4", "gqa", {}),  # grouped output projection
    ("gpt_bigcode", "gqa", {}),  # one key and value for all
    ("gpt_bigcode", "gqa", {"multi_query": False}),
    ("falcon", "gqa", {}),
    ("falcon", "gqa", {"new_decoder_architecture": True}),  # fused by group
    ("falcon", "mha", {"multi_query": False}),
    ("codegen", "h8", {}),  # fused for a number of devices
    ("bert", "mha", {}),
    ("xlnet", "gqa", {}),  # bare tensors
    ("mamba2", "gqa", {}),
    ("olmo2", "gqa", {}),  # norms over all heads
    ("gpt_oss", "odd", {}),  # sinks
    ("bloom", "h8", {}),
    ("laguna", "gqa", {}),  # layers differ in their number of heads
]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


@pytest.mark.parametrize(("model_type", "variant", "changes"), CASES)
def test_what_dies_with_a_head_is_its_mask(model_type, variant, changes):
    model = tiny_model(model_type, variant, **changes)
    report = check_heads(model, structure(model))
    assert report.ok, report.failures
    assert report.mixers >= 2
    assert report.heads >= report.mixers * min(VARIANTS[variant].heads, 4)


def test_the_zoo_knows_the_cases():
    assert {model_type for model_type, *_ in CASES} <= set(causal_lm_types())


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_and_decoder(model_type):
    model = tiny_model(model_type, task="seq2seq")
    inputs = {"input_ids": tiny_tokens(), "decoder_input_ids": tiny_tokens(seed=1)}
    found = structure(model, inputs)
    report = check_heads(model, found, inputs)
    assert report.ok, report.failures
    assert len(found.stacks) == 2
    assert report.mixers == 6  # two layers each: self; self and cross
    assert report.heads == 6 * 4


@pytest.mark.filterwarnings("ignore")
def test_hooked_transformer():
    lens = pytest.importorskip("transformer_lens", reason="needs the extra 'lens'")
    if not hasattr(lens, "HookedTransformer"):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=24, n_ctx=16, d_head=8, n_heads=4, n_key_value_heads=2, d_vocab=64, act_fn="gelu", seed=0
    )
    model = lens.HookedTransformer(config)
    with torch.random.fork_rng(), torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    report = check_heads(model, structure(model))
    assert report.ok, report.failures
    assert report.heads == 8


class Plain:
    """A mask that can be changed."""

    def __init__(self, elements):
        self.elements = elements

    def dense(self):
        return self.elements


def by_hand(heads=4, groups=2, width=8, hidden=32):
    """The structure of a tiny llama, written down."""

    def part(head, of, transposed=False):
        rows = torch.zeros(of * width, hidden, dtype=torch.bool)
        rows[head * width : (head + 1) * width] = True
        return Plain(rows.T if transposed else rows)

    layers = []
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn"
        group_of = tuple(head * groups // heads for head in range(heads))
        masks = tuple(
            {
                f"{path}.q_proj.weight": part(head, heads),
                f"{path}.k_proj.weight": part(group_of[head], groups),
                f"{path}.v_proj.weight": part(group_of[head], groups),
                f"{path}.o_proj.weight": part(head, heads, transposed=True),
            }
            for head in range(heads)
        )
        mixer = SimpleNamespace(
            path=path, kind="self", heads=masks, group_of=group_of, o_path=f"{path}.o_proj",
            o_param=f"{path}.o_proj.weight", params=list(masks[0]),
        )  # fmt: skip
        layers.append(SimpleNamespace(mixers=[mixer]))
    return SimpleNamespace(stacks={"model.layers": layers}, layers=layers)


def test_the_checker_passes_masks_written_by_hand():
    report = check_heads(tiny_model("llama"), by_hand())
    assert (report.ok, report.heads, report.groups, report.unseen) == (True, 8, 4, 0)


@pytest.mark.parametrize("matrix", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize(("row", "value"), [(9, False), (0, True)])
def test_the_checker_sees_one_wrong_row(matrix, row, value):
    """Row 9 is the second head's (for keys and values the second group's), row 0 is not."""
    found = by_hand()
    mixer = found.layers[1].mixers[0]
    heads = [1] if matrix == "q_proj" else [2, 3]
    for head in heads:
        mixer.heads[head][f"{mixer.path}.{matrix}.weight"].elements[row] = value
    report = check_heads(tiny_model("llama"), found)
    assert not report.ok
    assert any(matrix in words and f"[{row}]" in words for words in report.failures), report.failures
    assert all("layers.1" in words for words in report.failures)


def test_the_checker_sees_what_no_head_needs():
    found = by_hand()
    mixer = found.layers[0].mixers[0]
    for head in mixer.heads:
        head["model.layers.0.post_attention_layernorm.weight"] = Plain(torch.ones(32, dtype=torch.bool))
    report = check_heads(tiny_model("llama"), found)
    assert not report.ok


def test_the_checker_sees_heads_that_were_not_found():
    found = by_hand()
    found.layers[0].mixers[0].heads = ()
    report = check_heads(tiny_model("llama"), found)
    assert [words for words in report.failures if "layers.0" in words and "4 heads" in words], report.failures
