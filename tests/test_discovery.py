"""Components found by autograd, against an independent look: kill a component in the whole model, see which gradients die."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from devinterp.engine.discovery import Mask, structure
from devinterp.engine.discovery.masks import runs, union
from devinterp.engine.discovery.probe import frozen_norm, is_norm
from devinterp.errors import InputValueError

pytestmark = pytest.mark.filterwarnings("ignore")

HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 50}
GQA = {**HIDDEN, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
ODD = {**GQA, "hidden_size": 48}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 40, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1}
FALCON = {**HIDDEN, "ffn_hidden_size": 40, "bos_token_id": 1, "eos_token_id": 1}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 50, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 50}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
NEXT = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA2 = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 2,
    "vocab_size": 50,
}


def tiny(kind: str, auto=AutoModelForCausalLM, **config):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **config)
    return auto.from_config(config, attn_implementation="eager") if kind != "mamba2" else auto.from_config(config)


HF = {
    "gpt_neox": (lambda: tiny("gpt_neox", **HIDDEN), 4, 4),
    "gpt2": (lambda: tiny("gpt2", **GPT2), 4, 4),
    "llama odd": (lambda: tiny("llama", **ODD, attention_bias=True), 4, 2),
    "llama tied": (lambda: tiny("llama", **GQA, tie_word_embeddings=True), 4, 2),
    "gpt_bigcode multi-query": (lambda: tiny("gpt_bigcode", **GPT2), 4, 1),
    "gpt_bigcode": (lambda: tiny("gpt_bigcode", **GPT2, multi_query=False), 4, 4),
    "falcon multi-query": (lambda: tiny("falcon", **FALCON), 4, 1),
    "falcon per head": (lambda: tiny("falcon", **FALCON, multi_query=False, alibi=True), 4, 4),
    "falcon grouped": (lambda: tiny("falcon", **FALCON, new_decoder_architecture=True, num_kv_heads=2), 4, 2),
    "olmo2": (lambda: tiny("olmo2", **GQA), 4, 2),
    "gpt_oss": (lambda: tiny("gpt_oss", **GQA, **EXPERTS, layer_types=["sliding_attention", "full_attention"]), 4, 2),
    "qwen3_next": (lambda: tiny("qwen3_next", **GQA, **EXPERTS, **NEXT), 4, 2),
    "deepseek_v3": (lambda: tiny("deepseek_v3", **{**HIDDEN, **MLA, **EXPERTS}), 4, 4),
    "mamba2": (lambda: tiny("mamba2", **MAMBA2, pad_token_id=1, bos_token_id=1, eos_token_id=1), 4, 2),
    "bert": (lambda: tiny("bert", AutoModelForMaskedLM, **HIDDEN), 4, 4),
    "xlnet": (lambda: tiny("xlnet", d_model=32, n_layer=2, n_head=4, d_inner=40, vocab_size=50), 4, 4),
    "bart": (lambda: tiny("bart", AutoModelForSeq2SeqLM, **BART), 4, 4),
    "t5": (lambda: tiny("t5", AutoModelForSeq2SeqLM, **T5), 4, 4),
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Einsum(nn.Module):
    """Parameters of its own, no Linear anywhere."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        size = width // heads - 1
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.randn(heads, width, size)) for _ in range(3))
        self.b_q, self.b_k, self.b_v = (nn.Parameter(torch.randn(heads, size)) for _ in range(3))
        self.w_o, self.b_o = nn.Parameter(torch.randn(heads, size, width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        pairs = ((self.w_q, self.b_q), (self.w_k, self.b_k), (self.w_v, self.b_v))
        q, k, v = (torch.einsum("btd,hde->bthe", x, w) + b for w, b in pairs)
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) + torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
        return torch.einsum("bhqk,bkhe,hed->bqd", scores.softmax(-1), v, self.w_o) + self.b_o


class Torch(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
        return super().forward(x, x, x, attn_mask=mask, need_weights=False)[0]


class Separate(nn.Module):
    """One module per head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        size = width // heads
        self.heads = nn.ModuleList(nn.ModuleDict({n: nn.Linear(width, size) for n in "qkv"}) for _ in range(heads))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        made = [scaled_dot_product_attention(h["q"](x), h["k"](x), h["v"](x), is_causal=True) for h in self.heads]
        return self.out(torch.cat(made, -1))


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Flat(nn.Module):
    """Queries, keys, values and the feed-forward part are all children of the block; one key and value for two heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        size = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.o, self.up, self.down, self.size = nn.Linear(width, width), nn.Linear(width, 40), nn.Linear(40, width), size

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class LM(nn.Module):
    def __init__(self, blocks: list[nn.Module], width: int, tied: bool = False):
        super().__init__()
        self.token, self.position = nn.Embedding(50, width), nn.Parameter(0.1 * torch.randn(64, width))
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(width)
        self.out = None if tied else nn.Linear(width, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return linear(self.norm(x), self.token.weight) if self.out is None else self.out(self.norm(x))


def custom(make, heads: int, **options) -> LM:
    torch.manual_seed(0)
    return LM([make(24, heads) for _ in range(2)], 24, **options)


CUSTOM = {
    "plain": (lambda: custom(lambda w, h: Block(w, Attention(w, h)), 3), 3, 3),
    "plain tied": (lambda: custom(lambda w, h: Block(w, Attention(w, h)), 3, tied=True), 3, 3),
    "one head": (lambda: custom(lambda w, h: Block(w, Attention(w, h)), 1), 1, 1),
    "einsum": (lambda: custom(lambda w, h: Block(w, Einsum(w, h)), 3), 3, 3),
    "torch": (lambda: custom(lambda w, h: Block(w, Torch(w, h, batch_first=True)), 3), 3, 3),
    "torch layer": (lambda: custom(lambda w, h: nn.TransformerEncoderLayer(w, h, 40, batch_first=True), 3), 3, 3),
    "one module per head": (lambda: custom(lambda w, h: Block(w, Separate(w, h)), 3), 3, 3),
    "flat": (lambda: custom(Flat, 4), 4, 2),
}
MODELS = {**HF, **CUSTOM}


def randomised(model: nn.Module) -> nn.Module:
    """Weights of size one, so that no gradient vanishes by accident."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        made = torch.rand(p.shape, generator=generator)
        fresh = (made - 0.5) * math.sqrt(12 / max(p.shape[-2:])) if p.dim() > 1 else (p if p.any() else 0.2) * (made + 0.5)
        p.data.copy_(fresh)
    return model.eval()


def run(model: nn.Module) -> Tensor:
    ids = torch.tensor([[7, 31, 12, 45, 9, 3, 28, 40, 17]])
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    output = model(input_ids=ids, decoder_input_ids=ids.flip(1)[:, :6]) if encoder_decoder else model(ids)
    return getattr(output, "logits", output)


def gradients(model: nn.Module, names) -> dict[str, Tensor]:
    logits = run(model)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    parameters = [model.get_parameter(name) for name in names]
    found = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def dense(mask: Mask | None, shape) -> Tensor:
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask.dense()


def assert_dies(model: nn.Module, names, base: dict[str, Tensor], killed: dict[str, Tensor], mine, others, where) -> None:
    """The elements that lost their gradient are those of the component, but for what it shares."""
    scale = 1e-5 * max(g.abs().max() for g in base.values())  # a key's bias has rounding noise for a gradient
    for name in names:
        shape = base[name].shape
        expected = dense(mine[name], shape) if name in mine else torch.zeros(shape, dtype=torch.bool)
        if name in others:
            expected = expected & ~dense(others[name], shape)
        live = base[name].abs() > scale
        lost = live & (killed[name] == 0)
        assert torch.equal(lost, expected & live), (where, name, int((lost ^ (expected & live)).sum()))


class Killed:
    """Within the context a slice of a module's input is zero; for a bare parameter its own elements are."""

    def __init__(self, model: nn.Module, mixer, heads):
        self.model, self.mixer, self.heads = model, mixer, heads

    def __enter__(self) -> None:
        if self.mixer.o_path is None:
            self.parameter = self.model.get_parameter(self.mixer.o_param)
            self.kept = self.parameter.data.clone()
            for head in self.heads:
                self.parameter.data[self.mixer.roles[head]["o"][self.mixer.o_param].dense()] = 0
            return

        def zeroed(module: nn.Module, args):
            x = args[0].clone()
            size = x.shape[-1] // len(self.mixer.heads)
            for head in self.heads:
                x[..., head * size : (head + 1) * size] = 0
            return (x, *args[1:])

        self.handle = self.model.get_submodule(self.mixer.o_path).register_forward_pre_hook(zeroed)

    def __exit__(self, *_) -> None:
        if self.mixer.o_path is None:
            self.parameter.data.copy_(self.kept)
        else:
            self.handle.remove()


@pytest.fixture
def freeze_norms():
    """A norm over all heads couples them in any direct test: let it act elementwise backward, as it does forward."""
    handles = []

    def freeze(model: nn.Module) -> None:
        for module in filter(is_norm, model.modules()):
            before, after = frozen_norm()
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))

    yield freeze
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", MODELS)
def test_a_dead_head_takes_its_mask_with_it(kind, freeze_norms):
    make, heads, groups = MODELS[kind]
    model = randomised(make())
    found = structure(model)
    if kind in ("olmo2", "mamba2"):
        freeze_norms(model)
    tested = 0
    for stack, layers in found.stacks.items():
        for layer in layers:
            for mixer in layer.mixers:
                assert len(mixer.heads) == heads, (stack, mixer.path)
                assert max(mixer.group_of) + 1 == groups
                names = [name for name in mixer.params if "relative_attention_bias" not in name]  # all layers read it
                base = gradients(model, names)
                for killed in [[h] for h in range(heads)] + [[h for h in range(heads) if mixer.group_of[h] == 0]]:
                    if len(killed) == heads:
                        continue  # nothing of the mixer is left then
                    others = union(mixer.heads[h] for h in range(heads) if h not in killed)
                    with Killed(model, mixer, killed):
                        dead = gradients(model, names)
                    checked = [name for name in names if mixer.o_path or name != mixer.o_param]
                    mine = union(mixer.heads[h] for h in killed)
                    assert_dies(model, checked, base, dead, mine, others, (kind, mixer.path, killed))
                    tested += 1
    assert tested or heads == 1


@pytest.mark.parametrize("kind", MODELS)
def test_parts_partition_the_model(kind):
    model = MODELS[kind][0]()
    found = structure(model)
    everything = [name for name, _ in model.named_parameters()]
    inside = [name for layers in found.stacks.values() for layer in layers for name in layer.params]
    for layers in found.stacks.values():
        for layer in layers:
            parts = [name for mixer in layer.mixers for name in mixer.params] + [*layer.mlp, *layer.norm]
            assert sorted(parts) == sorted(layer.params)
            assert all(is_norm(model.get_submodule(name.rpartition(".")[0])) for name in layer.norm)
    outside = [*found.embed, *found.pos, *found.rest, *(name for name in found.unembed if name not in found.embed)]
    assert sorted(inside + outside) == sorted(everything)
    assert found.embed
    assert found.unembed


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama odd", "bert", "t5", "flat", "torch layer", "deepseek_v3"])
def test_a_dead_neuron_takes_its_mask_with_it(kind):
    model = randomised(MODELS[kind][0]())
    layer = structure(model).layers[0]
    neurons = layer.neurons
    assert len(neurons) == 40
    assert union(neurons) == neurons.select(range(40))
    (down,) = [name for name in layer.mlp if name in neurons[5] and neurons[5][name].shape[::-1] != neurons[6][name].shape
               and any(term in neurons[5][name].terms for term in ({0: (5,)}, {1: (5,)})) and _is_last(name)]  # fmt: skip
    base = gradients(model, layer.mlp)
    weight = model.get_parameter(down)
    kept = weight.data.clone()
    weight.data[neurons[5][down].dense()] = 0
    dead = gradients(model, layer.mlp)
    weight.data.copy_(kept)
    assert_dies(model, [name for name in layer.mlp if name != down], base, dead, neurons[5], {}, kind)


def _is_last(name: str) -> bool:
    return any(part in name for part in ("4h_to_h", "mlp.c_proj", "down", "output.dense", "wo", "linear2"))


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_next", "deepseek_v3"])
def test_experts_are_those_the_router_skips(kind):
    model = randomised(MODELS[kind][0]())
    layer = structure(model).layers[1]
    assert len(layer.experts) == 4
    for number, expert in enumerate(layer.experts):
        base = gradients(model, list(expert))
        last = list(expert)[-1] if kind != "gpt_oss" else next(name for name in expert if name.endswith("down_proj"))
        weight = model.get_parameter(last)
        kept = weight.data.clone()
        weight.data[number] = 0
        dead = gradients(model, list(expert))
        weight.data.copy_(kept)
        reached = [name for name in expert if name != last and "down" not in name]
        assert reached
        assert_dies(model, reached, base, dead, expert, {}, kind)


def test_roles():
    model = tiny("gpt_neox", **HIDDEN)
    roles = structure(model).layers[0].mixers[0].roles[1]
    fused = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert {role: roles[role][fused].boxes() for role in "qkv"} == {
        "q": ((slice(24, 32), slice(None)),),
        "k": ((slice(32, 40), slice(None)),),
        "v": ((slice(40, 48), slice(None)),),
    }
    for kind in ("torch", "einsum", "gpt2", "llama odd", "bert", "falcon grouped", "deepseek_v3"):
        for mixer in structure(MODELS[kind][0]()).layers[0].mixers:
            for parts, head in zip(mixer.roles, mixer.heads, strict=True):
                assert all(parts[role] for role in "qkvo"), kind
                assert union(parts.values()) == head
                pairs = [(a, b) for a in "qkvo" for b in "qkvo" if a < b]
                for a, b in pairs:
                    for name in parts[a].keys() & parts[b].keys():
                        assert not (dense(parts[a][name], ()) & dense(parts[b][name], ())).any(), (kind, a, b)


class Cross(nn.Module):
    """A decoder block of torch's own, which reads a second sequence."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn, self.norm1 = Torch(width, heads, batch_first=True), nn.LayerNorm(width)
        self.cross_attn, self.norm2 = nn.MultiheadAttention(width, heads, batch_first=True), nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        return x + self.cross_attn(self.norm2(x), memory, memory, need_weights=False)[0]


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.blocks, self.out = nn.Embedding(50, 24), nn.ModuleList([Cross(24, 3)]), nn.Linear(24, 50)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        x, memory = self.token(decoder_input_ids), self.token(input_ids)
        for block in self.blocks:
            x = block(x, memory)
        return self.out(x)


def test_roles_in_one_matrix_for_queries_of_one_sequence_and_keys_of_another():
    torch.manual_seed(0)
    own, cross = structure(Translator()).layers[0].mixers
    assert (own.kind, cross.kind) == ("self", "cross")
    for mixer in (own, cross):
        for head, roles in enumerate(mixer.roles):
            rows = {role: roles[role][f"{mixer.path}.in_proj_weight"].terms for role in "qkv"}
            starts = {"q": 8 * head, "k": 24 + 8 * head, "v": 48 + 8 * head}
            assert rows == {role: ({0: tuple(range(start, start + 8))},) for role, start in starts.items()}


class Bare(nn.Module):
    """A feed-forward part of bare parameters, with a rectifier."""

    def __init__(self, width: int):
        super().__init__()
        self.w_in, self.b_in = nn.Parameter(torch.randn(width, 40)), nn.Parameter(torch.zeros(40))
        self.w_out, self.b_out = nn.Parameter(torch.randn(40, width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w_in + self.b_in).relu() @ self.w_out + self.b_out


def test_neurons_of_bare_parameters():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.feed = Attention(24, 3), Bare(24)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x)
            return x + self.feed(x)

    torch.manual_seed(0)
    neurons = structure(LM([Both()], 24)).layers[0].neurons
    assert {name.rpartition(".")[2]: mask.terms for name, mask in neurons[7].items()} == {
        "w_in": ({1: (7,)},),
        "b_in": ({0: (7,)},),
        "w_out": ({0: (7,)},),
    }


class Decaying(nn.Module):
    """Attention whose heads have a decay, clamped for good at these weights: one draw cannot see what it reads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.inner, self.rate, self.shift = Attention(width, heads), nn.Linear(width, heads), nn.Parameter(torch.zeros(heads))
        self.shift.data += torch.tensor([0.0, -50.0, 0.0][:heads])

    def forward(self, x: Tensor) -> Tensor:
        rate = (self.rate(x) + self.shift).clamp(min=-20).sigmoid()
        q, k, v = (t.unflatten(-1, (rate.shape[-1], -1)) for t in self.inner.qkv(x).chunk(3, -1))
        mixed = scaled_dot_product_attention(*((t * rate[..., None]).transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.inner.out(mixed.transpose(1, 2).flatten(2))


def test_what_is_saturated_at_these_weights_is_found_nevertheless():
    heads = structure(custom(Decaying, 3)).layers[0].mixers[0].heads
    for number, head in enumerate(heads):
        assert head["blocks.0.rate.weight"].terms == ({0: (number,)},)
        assert head["blocks.0.shift"].terms == ({0: (number,)},)


def test_heads_of_cross_attention_and_both_stacks():
    found = structure(HF["t5"][0]())
    assert list(found.stacks) == ["encoder.block", "decoder.block"]
    assert found.layers == found.stacks["decoder.block"]
    assert [mixer.kind for mixer in found.layers[0].mixers] == ["self", "cross"]


def test_layers_without_heads_are_layers():
    config = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50, "time_step_rank": 4}
    found = structure(tiny("mamba", **config, pad_token_id=1, bos_token_id=1, eos_token_id=1))
    assert [len(mixer.heads) for layer in found.layers for mixer in layer.mixers] == [0, 0]
    assert all(layer.attn for layer in found.layers)


def test_a_model_without_blocks_has_tables():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 50))
    found = structure(model)
    assert (found.stacks, list(found.embed), list(found.unembed)) == ({}, ["0.weight"], ["3.weight", "3.bias"])


def test_learned_positions_and_tied_tables():
    assert list(structure(tiny("gpt2", **GPT2)).pos) == ["transformer.wpe.weight"]
    assert list(structure(tiny("gpt2", **GPT2)).unembed) == ["transformer.wte.weight"]
    assert list(structure(CUSTOM["plain tied"][0]()).unembed) == ["token.weight"]
    assert list(structure(CUSTOM["plain"][0]()).pos) == ["position"]


def test_what_cannot_run_is_said():
    class Broken(LM):
        def forward(self, ids, features):
            return super().forward(ids) + features

    torch.manual_seed(0)
    model = Broken([Block(24, Attention(24, 3))], 24)
    with pytest.raises(InputValueError, match="Pass inputs="):
        structure(model)
    ids = torch.randint(0, 50, (1, 9))
    assert len(structure(model, {"ids": ids, "features": torch.zeros(())}).layers[0].mixers[0].heads) == 3
    with pytest.raises(InputValueError, match="inputs: the model failed"):
        structure(Broken([Block(24, Attention(24, 3))], 24), {"ids": ids})


@pytest.mark.parametrize("seed", range(30))
def test_unions_of_masks_are_exact(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = [(7,), (5, 6), (4, 3, 5)][seed % 3]
    mask, expected = None, torch.zeros(shape, dtype=torch.bool)
    for _ in range(1 + seed % 4):
        picks = {
            axis: (torch.rand(n, generator=generator) < 0.6).nonzero().flatten().tolist() or [0]
            for axis, n in enumerate(shape)
            if torch.rand((), generator=generator) < 0.7
        }
        one = Mask.of(shape, picks)
        mask = one if mask is None else mask | one
        expected = expected | one.dense()
    boxed = torch.zeros(shape, dtype=torch.int)
    for box in mask.boxes():
        boxed[box] += 1
    assert torch.equal(mask.dense(), expected)
    assert torch.equal(boxed, expected.int())  # disjoint
    assert mask.numel == int(expected.sum())


def test_runs_cover_their_indices():
    for indices in ([3], [0, 1, 2], [0, 2, 4, 6], [0, 5, 6, 7], [1, 4, 5, 9, 13, 17]):
        covered = [i for run in runs(indices) for i in range(20)[run]]
        assert covered == indices


def test_a_head_is_a_view_of_one_axis():
    mask = structure(tiny("llama", **ODD)).layers[0].mixers[0].heads[1]["model.layers.0.self_attn.q_proj.weight"]
    assert mask.dense().untyped_storage().nbytes() == mask.shape[0]


def test_inputs_of_many_long_sequences():
    model = tiny("bart", AutoModelForSeq2SeqLM, **BART)
    ids = torch.randint(3, 50, (3, 24))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.flip(1)}
    found = structure(model, given)
    assert [(mixer.kind, len(mixer.heads)) for mixer in found.layers[0].mixers] == [("self", 4), ("cross", 4)]
    assert found == structure(tiny("bart", AutoModelForSeq2SeqLM, **BART))
