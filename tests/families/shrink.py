"""Tiny configurations of any transformers family, by the field names that families share.

A rule is only used where the family's default configuration has the field with a value of the same
kind, so that a table of names serves all families. What the rules get wrong stands in overrides.py.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 64, 4, 2, 16, 2, 256
WINDOW = 4  # shorter than any text, so that a sliding window masks something
MOST_LAYERS = 4

_GROUPS: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        "attention_hidden_size backbone_hidden_size conv_channels d_model "
        "decoder_hidden_size dim emb_dim embed_dim embedding_dim embedding_size "
        "encoder_hidden_dim encoder_hidden_size fpn_hidden_size hidden_dim hidden_size "
        "hidden_size_per_layer_input lru_width n_embd out_hidden_size output_hidden_size "
        "pooler_output_size projection_dim projector_hidden_size text_hidden_size "
        "vision_output_dim word_embed_proj_dim",
    ),
    (
        96,
        "d_ff d_inner decoder_ffn_dim decoder_intermediate_size dff dim_feedforward "
        "encoder_ffn_dim expert_ffn_hidden_size ffn_dim ffn_hidden_size intermediate_size "
        "intermediate_size_mlp mlp_dim moe_intermediate_size "
        "moe_shared_expert_intermediate_size shared_expert_intermediate_size "
        "shared_intermediate_size",
    ),
    (
        HEADS,
        "attention_heads decoder_num_attention_heads encoder_attention_heads "
        "encoder_num_attention_heads index_n_heads linear_num_heads "
        "linear_num_value_heads mamba_d_conv moe_num_experts n_head n_heads "
        "n_routed_experts num_attention_heads num_encoder_attention_heads num_experts "
        "num_heads num_local_experts",
    ),
    (
        2,
        "attention_layers decoder_attention_heads decoder_layers "
        "decoder_num_hidden_layers decoder_num_key_value_heads decoder_num_layers depth "
        "encoder_layers encoder_num_hidden_layers encoder_num_key_value_heads "
        "linear_num_key_heads memory_attention_num_layers moe_k moe_topk n_group n_layer "
        "n_layers num_adapter_layers num_blocks num_codebooks num_decoder_attention_heads "
        "num_decoder_layers num_encoder_layers num_experts_per_tok num_experts_per_token "
        "num_hidden_groups num_hidden_layers num_key_value_heads num_kv_heads num_layers "
        "num_query_groups num_register_tokens pred_num_hidden_layers resampler_depth "
        "speech_encoder_layers temporal_patch_size top_k_experts",
    ),
    (
        HEAD_DIM,
        "attention_head_dim attention_head_size chunk_length d_head d_kv dim_head "
        "head_dim index_head_dim kv_channels linear_head_dim linear_key_head_dim "
        "linear_value_head_dim mamba_chunk_size mamba_d_head mamba_d_state mamba_head_dim "
        "mamba_headdim num_mel_bins qk_nope_head_dim qk_rope_head_dim resampler_head_dim "
        "rotary_dim ssm_state_size state_size swa_head_dim",
    ),
    (
        32,
        "base_channels image_size kv_lora_rank latent_size o_lora_rank "
        "pretrain_image_size q_lora_rank qk_head_dim time_step_rank "
        "upsample_initial_channel",
    ),
    (
        12,
        "num_queries v_head_dim",
    ),
    (
        8,
        "encoder_stride mamba_dt_rank mamba_n_heads mamba_num_heads max_text_len "
        "n_mamba_heads num_conv_pos_embeddings num_image_tokens num_latents "
        "num_query_tokens patch_size resampler_n_latents",
    ),
    (
        WINDOW,
        "attention_chunk_size attention_window attention_window_size index_topk "
        "local_attention num_conv_pos_embedding_groups sliding_window sliding_window_size "
        "window_size",
    ),
    (
        1,
        "first_k_dense_replace mamba_n_groups max_window_layers moe_layer_start_index "
        "moe_num_shared_experts n_groups n_shared_experts num_dense_layers "
        "num_residual_layers num_shared_experts topk_group",
    ),
    (
        VOCABULARY,
        "audio_vocab_size codebook_size decoder_vocab_size num_embeddings src_vocab_size "
        "text_vocab_size tgt_vocab_size vocab_size vocab_size_per_layer_input",
    ),
    (
        128,
        "max_2d_position_embeddings max_position_embeddings max_seq_len "
        "max_target_positions n_ctx n_positions num_position_embeddings",
    ),
    (
        20,
        "max_source_positions",
    ),
)
# Fields that some families leave unset and cannot do without.
UNSET = set(
    "head_dim num_key_value_heads n_routed_experts num_experts vocab_size "
    "moe_intermediate_size num_experts_per_tok n_shared_experts top_k_experts".split()
)
SIZES = {name: size for size, names in _GROUPS for name in names.split()}

LISTS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "depths": lambda old: [2] * len(old),
    "num_heads": lambda old: [2**i for i in range(len(old))],
    "num_attention_heads": lambda old: [2 ** min(i, 2) for i in range(len(old))],
    "hidden_sizes": lambda old: [16 * 2**i for i in range(len(old))],
    "neck_hidden_sizes": lambda old: [16 * 2**i for i in range(len(old))],
    "embed_dim": lambda old: [16 * 2**i for i in range(len(old))],
    "image_size": lambda old: [32] * len(old),
    "patch_size": lambda old: [8] * len(old),
    "conv_dim": lambda _: [32, 32, 32],
    "conv_stride": lambda _: [4, 2, 2],
    "conv_kernel": lambda _: [8, 3, 3],
    "sliding_window": lambda old: [WINDOW] * len(old),
}
_TOKENS = {
    "pad": 0,
    "bos": 1,
    "eos": 2,
    "cls": 1,
    "sep": 2,
    "unk": 3,
    "mask": 4,
    "decoder_start": 1,
}
_ABSENT = object()
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")


def shrink(
    config_class: type[PreTrainedConfig],
    overrides: dict[str, dict[str, Any]] | None = None,
    family: str | None = None,
) -> PreTrainedConfig:
    """Return a tiny configuration of a family.

    Args:
        config_class: the family's class.
        overrides: by model type, the fields that the rules get wrong. They hold for a part of that
            type too; a dictionary for a part of the configuration adds to those of that part.
        family: the model type, unless the class says it.
    """
    overrides = overrides or {}
    default = config_class()
    return _shrunk(default, overrides.get(family or default.model_type, {}), overrides)


def _shrunk(
    default: PreTrainedConfig, own: dict[str, Any], overrides: dict[str, dict[str, Any]]
) -> PreTrainedConfig:
    fields = {
        name: value for name, value in vars(default).items() if not name.startswith(("_", "transf"))
    }
    handed_out = list(getattr(default, "_out_indices", None) or [])
    layers = _kept_layers(fields, len(handed_out))
    given: dict[str, Any] = {}
    if handed_out:
        given["out_indices"] = _small_stages(handed_out, {**fields, **own}, layers)
    usual = vars(type(default)())  # what is not given; the whole may have set something else
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            of_part = {**overrides.get(value.model_type, {}), **own.get(name, {})}
            given[name] = _shrunk(value, of_part, overrides)
        elif name not in own:
            small = _small(name, value, fields, layers)
            if small != value or value != usual.get(name, _ABSENT):
                given[name] = small
    parts = {name for name, value in given.items() if isinstance(value, PreTrainedConfig)}
    given.update({name: value for name, value in own.items() if name not in parts})
    return type(default)(**given)


def _small(name: str, value: Any, fields: dict[str, Any], layers: list[int]) -> Any:
    """Return the small value of one field; the same value if no rule speaks of it."""
    if name.endswith(("_token_id", "_token_index", "_token_ids")):
        return _token(name, value)
    if value is None:
        return SIZES[name] if name in UNSET else value
    if isinstance(value, int) and not isinstance(value, bool):
        return _small_number(name, value, fields, layers)
    if isinstance(value, list | tuple):
        if name in LISTS:
            return LISTS[name](list(value))
        if value and len(value) == _layer_count(fields):
            return [value[layer] for layer in layers]
    if isinstance(value, dict):
        return _small_rope(value)
    return value


def _small_number(name: str, value: int, fields: dict[str, Any], layers: list[int]) -> int:
    if name in _LAYER_COUNTS:
        return len(layers)
    if name == "num_key_value_heads" and "kv_lora_rank" in fields:
        return HEADS  # latent attention makes the keys of every head
    return SIZES.get(name, value)


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Fit the sections of a rotary embedding of several axes to half the head's dimension."""
    small = {k: _small_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if isinstance(small.get("mrope_section"), list):
        small["mrope_section"] = [2, 3, 3]
    return small


def _token(name: str, value: Any) -> Any:
    """Return an identifier inside the vocabulary, the same in every part of a configuration."""
    if value is None or isinstance(value, list | tuple):
        return value if value is None else [_token(name, value[0])]
    stem = name.rsplit("_token_", 1)[0]
    if stem not in _TOKENS:
        _TOKENS[stem] = 100 + len(_TOKENS)
    return _TOKENS[stem]


def _layer_count(fields: dict[str, Any]) -> int | None:
    counts = (fields.get(name) for name in _LAYER_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def _small_stages(handed_out: list[int], fields: dict[str, Any], layers: list[int]) -> list[int]:
    """Return the stages that a backbone hands out; a stage may be a layer, and few are left."""
    depths = fields.get("depths")
    if depths:
        return [stage for stage in handed_out if stage <= len(depths)]
    if len(fields.get("stage_names") or []) != (_layer_count(fields) or 0) + 1:
        return handed_out
    return list(range(len(layers) + 1))[-len(handed_out) :]


def _kept_layers(fields: dict[str, Any], at_least: int) -> list[int]:
    """Return which layers of the default are kept: one of every kind that a list names."""
    count = _layer_count(fields)
    kept: set[int] = set()
    for name, value in fields.items():
        if isinstance(value, list) and value and len(value) == count and name not in LISTS:
            kinds = [repr(entry) for entry in value]
            if len(set(kinds)) <= MOST_LAYERS:
                kept |= {kinds.index(kind) for kind in kinds}
    for layer in range(count or LAYERS):
        if len(kept) >= max(LAYERS, at_least):
            break
        kept.add(layer)
    return sorted(kept)
