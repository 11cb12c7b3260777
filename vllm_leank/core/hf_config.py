"""Reads fields of a transformers config: an object, or the mapping of a `config.json`."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_leank.errors import UserError

Get = Callable[[str], Any]
"""Gives a field by name, or None."""

_KV_HEADS = ("num_key_value_heads", "multi_query_group_num", "num_attention_groups")

_FALCON = ("falcon", "RefinedWeb", "RefinedWebModel")
"""Model types with numbers of KV heads that do not count for all of their models."""


def fields_of(config: Any) -> Get:
    """The fields of a config, of a multimodal one those of its text part.

    Where layers differ in a field, it is what most of them have: see `layer_fields`.
    """
    if isinstance(config, Mapping):
        return (config.get("text_config") or config).get
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if getattr(config, "is_heterogeneous", False):
        # These refuse to tell what layers differ in, but write it down.
        whole = config.to_dict()
        return lambda name: whole[name] if name in whole else getattr(config, name, None)
    return lambda name: getattr(config, name, None)


def layer_fields(config: Any, layer: int) -> Get:
    """The fields of one layer of a decoder, which `per_layer_config` may give values of its own."""
    get = fields_of(config)
    own = get("per_layer_config")
    if not isinstance(own, Mapping):
        return get
    # Keys are numbers, which JSON writes as text.
    values = own.get(layer) or own.get(str(layer)) or {}
    return lambda name: values[name] if name in values else get(name)


def required(get: Get, name: str) -> int:
    """A number that every config must have.

    Raises:
        UserError: it is missing.
    """
    value = get(name)
    if value is None:
        raise UserError(f"the model's config has no {name}")
    return int(value)


def head_size(get: Get) -> int:
    """Channels of a head; 0 where a config does not say."""
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    size = get("head_dim") or get("hidden_size_per_head")
    return int(size or (hidden // heads if hidden and heads else 0))


def kv_heads(get: Get) -> int:
    """KV heads of a layer, which some models call by names of their own; without any, as many as
    query heads.

    Raises:
        UserError: a config does not say.
    """
    if get("model_type") in _FALCON:
        own = get("num_kv_heads") if get("new_decoder_architecture") else get("multi_query") and 1
    else:
        own = next((value for name in _KV_HEADS if (value := get(name)) is not None), None)
    return int(own or required(get, "num_attention_heads"))


def longest_request(get: Get, rope_scaling: Mapping[str, Any] | None) -> int | None:
    """Tokens of the longest request that vLLM takes for this config; None where it does not say.

    Linear and dynamic scaling of RoPE make it longer than `max_position_embeddings`. With other
    kinds, and in Gemma 3, that is the scaled length already (`_get_and_verify_max_len` of vLLM).
    """
    length, scaling = get("max_position_embeddings"), rope_scaling or {}
    if length is None:
        return None
    kind, family = scaling.get("rope_type"), get("model_type") or ""
    if kind not in ("linear", "dynamic") or "gemma3" in family:
        return int(length)
    return int(length * (scaling.get("factor") or 1))
