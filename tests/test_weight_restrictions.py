"""Restrictions by name: the language, its errors, the preview, and a model handed back as it was."""

import gc

import pytest
import torch
from test_discovery import BART, FALCON, GPT2, GQA, HF, HIDDEN, ODD, dense, tiny
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from devinterp.engine.discovery import Mask, structure
from devinterp.engine.discovery import structure as discover
from devinterp.engine.selection import check_masks
from devinterp.errors import InputTypeError, InputValueError
from devinterp.slt.weight_restrictions import create_param_masks, preview_weight_restriction

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **ODD)


@pytest.fixture(scope="module")
def neox():
    return tiny("gpt_neox", **HIDDEN)


def elements(masks, model) -> int:
    return sum(model.get_parameter(n).numel() if m is None else int(m.sum()) for n, m in masks.items())


def same(a, b, model) -> bool:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    as_tensor = [{n: torch.ones(shapes[n], dtype=torch.bool) if m is None else m for n, m in x.items()} for x in (a, b)]
    return a.keys() == b.keys() and all(torch.equal(as_tensor[0][n], as_tensor[1][n]) for n in a)


def test_full_and_parameter_names(neox):
    assert create_param_masks(neox, "full") == {name: None for name, _ in neox.named_parameters()}
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"
    assert create_param_masks(neox, name) == {name: None}


def test_a_head_in_a_fused_projection(neox):
    masks = create_param_masks(neox, "l1h2")
    prefix = "gpt_neox.layers.1.attention."
    rows = torch.zeros(96, dtype=torch.bool)
    rows[48:72] = True
    assert list(masks) == [f"{prefix}{name}" for name in ("query_key_value.weight", "query_key_value.bias", "dense.weight")]
    assert torch.equal(masks[prefix + "query_key_value.weight"], rows[:, None].expand(96, 32))
    assert torch.equal(masks[prefix + "query_key_value.bias"], rows)
    assert torch.equal(masks[prefix + "dense.weight"].any(0).nonzero().flatten(), torch.arange(16, 24))


def test_the_parts_of_a_layer(llama):
    size = {
        what: elements(create_param_masks(llama, what), llama) for what in ("l0", "l0 attn", "l0 mixer", "l0 mlp", "l0 norm")
    }
    assert size["l0"] == size["l0 attn"] + size["l0 mlp"] + size["l0 norm"]
    assert size["l0 attn"] == size["l0 mixer"] == 32 * 48 * 2 + 16 * 48 * 2
    assert size["l0 norm"] == 96
    heads = create_param_masks(llama, [f"l0h{h}" for h in range(4)])
    assert same(heads, create_param_masks(llama, "l0 attn"), llama)
    assert set(heads.values()) == {None}  # whole parameters become None
    neurons = create_param_masks(llama, "l0n0:40")
    assert same(neurons, create_param_masks(llama, "l0 mlp"), llama)
    assert elements(create_param_masks(llama, "l0n3"), llama) == 3 * 48


def test_groups_and_roles(llama):
    group = create_param_masks(llama, "l0g1")
    assert same(group, create_param_masks(llama, ["l0h2", "l0h3"]), llama)
    parts = [create_param_masks(llama, f"l0h3 {role}") for role in "qkvo"]
    assert [len(part) for part in parts] == [1, 1, 1, 1]
    assert same({k: v for part in parts for k, v in part.items()}, create_param_masks(llama, "l0h3"), llama)
    assert same(create_param_masks(llama, "l0h3 qk"), create_param_masks(llama, ["l0h3 q", "l0h3k"]), llama)
    assert same(create_param_masks(llama, "l0h3 ov"), create_param_masks(llama, ["l0h3 o", "l0h3 v"]), llama)


@pytest.mark.parametrize("spelled", ["L0 H1", "l0 h1", " l0h1 ", "L0H1", ("l0h1",), ["l0h1", "l0h1 q"]])
def test_spelling(neox, spelled):
    assert same(create_param_masks(neox, spelled), create_param_masks(neox, "l0h1"), neox)


def test_tied_weights_go_by_their_first_name():
    model = tiny("gpt2", **GPT2)
    assert create_param_masks(model, "unembed") == create_param_masks(model, "embed") == {"transformer.wte.weight": None}
    assert create_param_masks(model, "lm_head.weight") == {"transformer.wte.weight": None}
    assert create_param_masks(model, "pos") == {"transformer.wpe.weight": None}
    check_masks(model, create_param_masks(model, ["unembed", "l0h1"]))


def test_stacks():
    model = tiny("bart", AutoModelForSeq2SeqLM, **BART)
    assert all(name.startswith("model.encoder.") for name in create_param_masks(model, "encoder/l0h1"))
    assert same(create_param_masks(model, "Decoder/l0h1"), create_param_masks(model, "l0h1"), model)
    cross = create_param_masks(model, "l1 cross")
    assert len(cross) == 8
    assert all("encoder_attn." in name for name in cross)
    assert set(create_param_masks(model, "l1 cross h2")) < set(cross)
    for wrong in ("code/l0", "nothing/l0"):
        with pytest.raises(InputValueError, match=r"model\.encoder\.layers"):
            create_param_masks(model, wrong)


def test_experts():
    model = HF["qwen3_next"][0]()
    masks = create_param_masks(model, "l1e3", dense=False)
    assert [mask.terms for mask in masks.values()] == [({0: (3,)},)] * 2


@pytest.mark.parametrize(
    ("restriction", "says"),
    [
        ("l2", "no layer 2. The model has layers 0-1; each with heads 0-3, groups 0-1, neurons 0-39"),
        ("l0h4", "head 4 of 4"),
        ("l0g2", "group 2 of 2"),
        ("l0e0", "no experts"),
        ("l0n40", "neurons 40:41 of 40"),
        ("l0n4:4", "neurons 4:4"),
        ("l0n4:99", "neurons 4:99"),
        ("l0 cross", "no cross"),
        ("l0 cross h0", "no cross-attention heads"),
        ("pos", "no 'pos'"),
        ("l0x1", "one of the forms"),
        ("", "one of the forms"),
        ("model.embed_token.weight", "model.embed_tokens.weight"),
        ("decoder/l0", r"STACK/... with STACK part of one of \['model.layers'\]"),
        ("model/embed", "without a stack"),
        ([], "at least one member"),
        (["full", "l0"], "without 'full'"),
        (["l0h1", "l9"], "no layer 9"),
    ],
)
def test_errors_say_what_there_is(llama, restriction, says):
    with pytest.raises(InputValueError, match=says):
        create_param_masks(llama, restriction)


@pytest.mark.parametrize("restriction", [None, 0, [0], {"l0"}, b"l0"])
def test_restrictions_are_strings(llama, restriction):
    with pytest.raises(InputTypeError, match="restriction="):
        create_param_masks(llama, restriction)


def test_no_model_and_no_parameters():
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module"):
        create_param_masks("gpt2", "l0")
    with pytest.raises(InputValueError, match="with parameters"):
        create_param_masks(nn.ReLU(), "embed")


def test_heads_that_do_not_exist_are_an_error():
    config = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50, "time_step_rank": 4}
    model = tiny("mamba", **config, pad_token_id=1, bos_token_id=1, eos_token_id=1)
    with pytest.raises(InputValueError, match="layer 0 has no heads"):
        create_param_masks(model, "l0h0")
    assert create_param_masks(model, "l0 attn") == create_param_masks(model, "l0 mixer")


def test_masks_without_tensors(neox):
    masks = create_param_masks(neox, "l0h1", dense=False)
    assert all(isinstance(mask, Mask) for mask in masks.values())
    for name, mask in masks.items():
        views = [neox.get_parameter(name).data[box] for box in mask.boxes()]
        assert sum(view.numel() for view in views) == mask.numel
        assert all(view.data_ptr() for view in views)
        assert torch.equal(mask.dense(), create_param_masks(neox, "l0h1")[name])


@pytest.mark.parametrize("change", ["bfloat16", "frozen", "zeroed", "pruned", "no_grad", "inference", "train"])
def test_weights_do_not_matter(change):
    plain, changed = tiny("llama", **ODD), tiny("llama", **ODD)
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(change, torch.enable_grad)
    if change == "bfloat16":
        changed = changed.to(torch.bfloat16)
    elif change == "frozen":
        changed.requires_grad_(False)
    elif change == "train":
        changed.train()
    for p in changed.parameters():
        if change == "zeroed":
            p.data.zero_()
        elif change == "pruned":
            p.data[..., ::2] = 0
    for restriction in ("l0h1", "l1g0", "l0 attn", "l0n3:9", "embed", "unembed", "l1 norm"):
        with context():
            found = create_param_masks(changed, restriction)
        assert same(found, create_param_masks(plain, restriction), plain), restriction


def snapshot(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), sorted(vars(m))) for m in model.modules()
    ]
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    return (
        hooks,
        flags,
        weights,
        [id(p) for p in model.parameters()],
        torch.get_rng_state(),
        [p.grad for p in model.parameters()],
    )


def assert_untouched(model, before) -> None:
    after = snapshot(model)
    assert before[:2] == after[:2]
    assert all(torch.equal(t, after[2][name]) for name, t in before[2].items())
    assert before[3] == after[3]
    assert torch.equal(before[4], after[4])
    assert after[5] == before[5]


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_next", "t5", "xlnet", "bert"])
def test_the_model_comes_back_as_it_was(kind):
    model = HF[kind][0]()
    model.train()
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_()
    next(iter(model.children())).eval()
    before = snapshot(model)
    structure(model)
    assert_untouched(model, before)


def test_the_model_comes_back_after_an_error():
    model = tiny("gpt_neox", **HIDDEN)

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = model.gpt_neox.layers[1].mlp, 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("only once")
            return self.inner(x)

    model.gpt_neox.layers[1].mlp = Failing()
    before = snapshot(model)
    with pytest.raises(InputValueError, match=r"layers\.1\.mlp \(Failing\) could not be run alone.*only once"):
        structure(model)
    assert_untouched(model, before)
    assert len(create_param_masks(model, "full")) == len(before[3])  # needs no discovery


def test_found_once_per_model():
    model = tiny("gpt_neox", **HIDDEN)
    first = structure(model)
    assert structure(model) is first
    model.gpt_neox.layers[0].mlp.extra = nn.Linear(3, 3)
    assert structure(model) is not first
    cache = discover.__globals__["_CACHE"]
    assert model in cache
    size = len(cache)
    del model, first
    gc.collect()
    assert len(cache) < size


def test_preview(neox, capsys):
    preview_weight_restriction(neox, create_param_masks(neox, "l0h1"))
    assert capsys.readouterr().out.splitlines() == [
        "parameter                    shape    selected     elements  of parameter",
        "gpt_neox.layers.0.attention",
        "  query_key_value.weight     96 x 32  24:48 x all       768  25 %",
        "  query_key_value.bias       96       24:48              24  25 %",
        "  dense.weight               32 x 32  all x 8:16        256  25 %",
        f"total: 3 parameters                                   1,048  {104800 / neox.num_parameters():.2g} % of all weights",
    ]


def test_preview_of_every_form_of_mask(neox, capsys):
    dense_masks, masks = (create_param_masks(neox, ["l0h1", "l1h0", "embed"], dense=form) for form in (True, False))
    preview_weight_restriction(neox, dense_masks)
    first = capsys.readouterr().out
    preview_weight_restriction(neox, masks)
    assert capsys.readouterr().out == first
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    diagonal = torch.zeros(40, 32, dtype=torch.bool).fill_diagonal_(True)
    preview_weight_restriction(neox, {name: diagonal})
    assert "scattered        32  2.5 %" in capsys.readouterr().out
    preview_weight_restriction(neox, masks, plain=True)
    assert capsys.readouterr().out.splitlines() == list(masks)


def test_preview_refuses_what_does_not_fit(neox):
    for masks, error in (
        ({"nothing": None}, InputValueError),
        ({"gpt_neox.embed_in.weight": torch.ones(2, 2, dtype=torch.bool)}, InputValueError),
        ({"gpt_neox.embed_in.weight": 1}, InputTypeError),
        (["gpt_neox.embed_in.weight"], InputTypeError),
    ):
        with pytest.raises(error, match="masks"):
            preview_weight_restriction(neox, masks)


def test_masks_fit_the_sampler():
    for model in (tiny("llama", **GQA, tie_word_embeddings=True), tiny("falcon", **FALCON)):
        for restriction in ("l0h1", "l0h1 q", "l1", "embed", "unembed", "l0n0:8", ["l0h0", "l1 mlp"]):
            masks = create_param_masks(model, restriction)
            checked = check_masks(model, masks)
            assert checked.keys() == masks.keys()
            assert all(mask is None or 0 < int(mask.sum()) < mask.numel() for mask in masks.values())


def test_multi_query_keys_belong_to_every_head():
    model = tiny("gpt_bigcode", **GPT2)
    first, second = (create_param_masks(model, f"l0h{h} {role}", dense=False) for h, role in ((0, "k"), (1, "k")))
    name = "transformer.h.0.attn.c_attn.weight"
    assert first[name] == second[name] == Mask.of((48, 32), {0: range(32, 40)})
    assert dense(first[name], ()).sum() == 8 * 32
