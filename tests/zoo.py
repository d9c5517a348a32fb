"""Tiny random models of every causal-language-model type that the installed transformers knows.

Nothing here knows an architecture. A configuration is shrunk by the *names* of its attributes: whatever ends in
`head_dim` is the width of a head, whatever is called `hidden_size` or `n_embd` is the width of the model. Lists with one
entry per layer are cut so that each distinct entry survives. The few types whose numbers depend on each other in ways
that no name tells are listed in OVERRIDES.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

TOKENS = 11
"""Length of the test sequences; longer than every window, so that windows matter."""
VOCABULARY = 64
FIRST_TOKEN, LAST_TOKEN = 4, 40
"""Plain tokens. Those below are padding, start and end; those above may stand for images or sounds."""


@dataclass(frozen=True)
class Variant:
    hidden: int
    heads: int
    groups: int
    head: int = 8
    """Width of one head, where the type lets us choose it; elsewhere hidden / heads."""


VARIANTS = {
    "gqa": Variant(hidden=32, heads=4, groups=2),
    "mha": Variant(hidden=32, heads=4, groups=4),
    "h8": Variant(hidden=64, heads=8, groups=2),
    "odd": Variant(hidden=48, heads=4, groups=2),  # heads x head != hidden
}

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

LAYERS = r"(.*_)?(num_hidden_layers|n_layers?|num_layers(_per_stack)?|num_blocks|encoder_layers|decoder_layers)"
TOKEN = r".*(token_id|token_index|mask_index|unk_index)"
"""Attributes that hold one token."""

# First match wins. A rule gives a number or, given the variant, computes it; None leaves the attribute alone.
RULES: list[tuple[str, int | Callable[[Variant], int] | None]] = [
    # Mamba: heads x width must be expand x hidden, and expand is 2.
    (r"mamba_(n|num)_heads|mamba2_num_heads", lambda v: 2 * v.hidden // 8),
    (r"n_mamba_heads|n_groups|mamba_n_?groups|mamba_ngroups", 2),
    (r"mamba_(d_head|head_dim|headdim)", 8),
    (r"(mamba_)?expand", 2),
    (r"(mamba_)?(d_state|ssm_state_size|state_size)|mamba_dt_rank|time_step_rank", 8),
    (r".*(d_conv|conv_kernel|conv_kernel_dim|conv_l_cache|conv1d_width|conv_kernel_size|cca_time\d)", None),
    # heads
    (r"(.*_)?(num_key_value_heads|kv_n_heads|num_kv_heads|num_query_groups|num_key_heads)", lambda v: v.groups),
    (r"(.*_)?(n_heads?|num_heads|attention_heads|num_value_heads)|num_attention_heads.*", lambda v: v.heads),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_head_dim", lambda v: v.head + 4),
    (r"(.*_)?(head_dim|d_head|dim_head|kv_channels|d_kv|attention_head_size)", lambda v: v.head),
    (r".*head_dim", lambda v: v.head),
    (r".*lora_rank|.*_rank|.*lowrank", 12),
    # layers
    (LAYERS, 2),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp.*layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"attn_layer_period|expert_layer_period|.*sliding_window_pattern|layer_group_size|global_attn_every_n_layers", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    # experts
    (r".*(experts_per_tok(en)?|topk|top_k|moe_k)", 2),
    (r"n_group|num_expert_group|topk_group", 1),
    (r".*shared_experts|zero_expert_num", 1),
    (r".*(num_experts|n_routed_experts|num_local_experts)", 4),
    # widths
    (
        r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|d_inner|dim_ff|dff|d_ff|n_inner|feed_forward_size|mlp_dim)",
        lambda v: v.hidden + 8,
    ),
    (
        r"(.*_)?(hidden_size.*|n_embd|d_model|emb_dim|embed_dim|embedding_(size|dim)|lru_width|word_embed_proj_dim|dim_model)",
        lambda v: v.hidden,
    ),
    (r".*(vocab_size.*|codebook_size)|n_codes|unpadded_vocab_size", VOCABULARY),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|model_max_length|context_length|max_seq_len",
        64,
    ),
    # windows
    (r".*(sliding_window(_size)?|window_size|local_attention|attention_chunk_size|chunk_size)", 4),
]

FILLED = ("head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
"""Set even where the default is None."""

HYBRID = ["linear_attention", "full_attention"]
# What no name tells, by the model type of the configuration or sub-configuration.
OVERRIDES: dict[str, Callable[[Variant], dict[str, Any]]] = {
    "bamba": lambda v: {"attn_layer_indices": [1]},
    "blt": lambda v: {"encoder_hash_byte_group_vocab": 50, "cross_attn_k": 2},
    "blt_global_transformer": lambda v: {"hidden_size": 2 * v.hidden, "head_dim": 2 * v.hidden // v.heads},
    "blt_local_encoder": lambda v: {"hidden_size_global": 2 * v.hidden},
    "blt_local_decoder": lambda v: {"hidden_size_global": 2 * v.hidden},
    "cohere_compass_text": lambda v: {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": lambda v: {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 50.0},
    "dots3_note_text": lambda v: {
        "head_dim": 16,
        "per_layer_config": {
            2: dict.fromkeys(("num_attention_heads", "num_key_value_heads"), v.heads // 2) | {"qk_nope_head_dim": 12}
        },
    },
    "deepseek_v4": lambda v: {"o_groups": 2},
    "dory": lambda v: {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
    },
    "falcon_h1": lambda v: {"mamba_d_ssm": 2 * v.hidden},
    "gpt_neo": lambda v: {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": lambda v: {"layer_types": HYBRID, "num_hidden_layers": 2},
    "laguna": lambda v: {"num_attention_heads_per_layer": [v.heads, 2 * v.heads]},
    "lfm2_moe": lambda v: {"layer_types": ["conv", "full_attention"]},
    "mamba2": lambda v: {"num_heads": 2 * v.hidden // 8},
    "musicgen_decoder": lambda v: {"num_codebooks": 1},
    "musicgen_melody_decoder": lambda v: {"num_codebooks": 1},
    "qwen4_exp_text": lambda v: {
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "recurrent_gemma": lambda v: {"block_types": ["recurrent", "attention"]},
    # It trains on one length only, and hashes anew at every call unless told otherwise.
    "reformer": lambda v: {
        "axial_pos_shape": (1, TOKENS),
        "axial_pos_embds_dim": (v.hidden // 2, v.hidden // 2),
        "local_attn_chunk_length": TOKENS,
        "lsh_attn_chunk_length": TOKENS,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "xmod": lambda v: {"default_language": "en_XX"},
    "zamba": lambda v: {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 2 * v.hidden,
        "attention_head_dim": 2 * v.hidden // v.heads,
    },
    "zamba2": lambda v: {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
        "n_mamba_heads": 2 * v.hidden // 8,
        "attention_hidden_size": 2 * v.hidden,
        "attention_head_dim": 2 * v.hidden // v.heads,
    },
}
TRAIN_ONLY = ("reformer",)
"""Types whose backward pass refuses evaluation mode; dropout is off in every configuration anyway."""


def causal_lm_types() -> list[str]:
    """Every model type that AutoModelForCausalLM can build."""
    return sorted(TASKS["causal"])


def tiny_config(model_type: str, variant: str = "gqa", task: str = "causal") -> PretrainedConfig:
    """The type's default configuration, or the part of it that the language model is made of, with small numbers."""
    config = CONFIG_MAPPING[model_type]()
    _shrink(config, VARIANTS[variant])
    wanted = _model_class(model_type, task).config_class
    parts = [config, *vars(config).values()]
    return next((part for part in parts if isinstance(part, wanted)), config)


def tiny_model(model_type: str, variant: str = "gqa", seed: int = 0, task: str = "causal", **changes: Any) -> PreTrainedModel:
    """A random model in float32, evaluation mode and plain attention, in which no parameter has its initial value.
    `changes` go into the tiny configuration."""
    config = tiny_config(model_type, variant, task)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model_class(model_type, task)._from_config(config, attn_implementation="eager").float()
        model.train(model_type in TRAIN_ONLY)
        with torch.no_grad():
            for parameter in model.parameters():  # zero biases and zero-initialised gates would hide structure
                own = float(parameter.square().mean().sqrt()) if parameter.dim() < 2 else 1.0
                parameter.add_(0.2 * (own or 1.0) * torch.randn(parameter.shape))
    return model


def tiny_tokens(rows: int = 2, seed: int = 0) -> torch.Tensor:
    """Token ids `(rows, TOKENS)` that mean nothing special to any type."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, (rows, TOKENS), generator=rng)


def _model_class(model_type: str, task: str) -> type[PreTrainedModel]:
    names = TASKS[task][model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0])


# -- shrinking --


def _shrink(config: PretrainedConfig, variant: Variant) -> None:
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    latent = values.get("kv_lora_rank") is not None
    if latent:  # one key and value per query head
        variant = replace(variant, groups=variant.heads)
    depth = _depth(values)
    kept = _kept_layers(values, depth)
    special = iter(range(LAST_TOKEN + 1, VOCABULARY))
    for name, value in values.items():
        if hasattr(value, "to_dict"):
            _shrink(value, variant)
        elif isinstance(value, float) and re.fullmatch(r".*(dropout|pdrop|layerdrop|_prob)", name):
            _assign(config, name, 0.0)
        elif isinstance(value, bool | dict | float | str) or (value is None and name not in FILLED):
            continue
        elif isinstance(value, list | tuple):
            _assign(config, name, _small_list(name, value, depth, kept, variant))
        elif re.fullmatch(TOKEN, name):
            plain = 2 if re.match("eos|bos|pad|decoder_start|sep|cls", name) else next(special)
            _assign(config, name, min(value, plain))
        elif kept and re.fullmatch(LAYERS, name):
            _assign(config, name, len(kept))
        elif (small := _small(name, variant)) is not None:
            _assign(config, name, small)
    if values.get("is_decoder") is False and not config.is_encoder_decoder:
        config.is_decoder = True  # causal, where the type can be either
    if latent and values.get("head_dim"):
        config.head_dim = values.get("qk_rope_head_dim") and config.qk_rope_head_dim  # what the rotation covers
    config.use_cache = False
    for name, value in OVERRIDES.get(config.model_type, lambda _: {})(variant).items():
        *parent, last = name.split(".")
        setattr(getattr(config, parent[0]) if parent else config, last, value)


def _assign(config: PretrainedConfig, name: str, value: Any) -> None:
    with contextlib.suppress(AttributeError, NotImplementedError):  # a read-only alias of another attribute
        setattr(config, name, value)


def _small(name: str, variant: Variant) -> int | None:
    for pattern, value in RULES:
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return value(variant) if callable(value) else value
    return None


def _depth(values: dict[str, Any]) -> int:
    return next((v for n, v in values.items() if re.fullmatch(LAYERS, n) and isinstance(v, int)), 0)


def _kept_layers(values: dict[str, Any], depth: int) -> list[int]:
    """The first layer that shows each distinct entry of a list with one entry per layer; at least two layers."""
    lists = {name: value for name, value in values.items() if isinstance(value, list | tuple) and len(value) == depth > 0}
    per_layer = [value for name, value in lists.items() if not _holds_layers(name, value)]
    seen: set[tuple[int, str]] = set()
    kept = []
    for layer in range(depth) if per_layer else []:
        new = {(i, str(entries[layer])) for i, entries in enumerate(per_layer)} - seen
        if new:
            kept.append(layer)
            seen |= new
    if len(kept) == 1:
        kept.append(1)
    return kept


def _holds_layers(name: str, value: Any) -> bool:
    """Entries are layers' numbers, rather than something about each layer in turn."""
    numbers = all(type(v) is int for v in value) and list(value) == sorted(set(value))
    return bool(value) and numbers and re.fullmatch(r".*(_ids|_idxs|_indices|_layers|_indexes)", name) is not None


def _small_list(name: str, value: Any, depth: int, kept: list[int], variant: Variant) -> Any:
    if _holds_layers(name, value):
        return list(range(len(kept) or 2)) if len(value) == depth else [1]
    if len(value) == depth > 0:
        small = _small(name, variant) if type(value[0]) is int else None
        return [value[layer] if small is None else small for layer in kept]
    return 2 if re.fullmatch(TOKEN, name) else value
