"""The families of decoders: what sets each apart from the others."""

from __future__ import annotations

import functools

from hyperadapt_jax.models.decoder.config import Dialect, read, write
from hyperadapt_jax.models.decoder.model import Decoder
from hyperadapt_jax.models.decoder.tensors import as_stored, ignored, tensors
from hyperadapt_jax.models.family import Family


def _family(dialect: Dialect) -> Family:
    return Family(
        name=dialect.family,
        architectures=(dialect.architecture,),
        module=Decoder,
        read=functools.partial(read, dialect),
        write=functools.partial(write, dialect),
        tensors=tensors,
        ignored=ignored,
        as_stored=as_stored,
    )


LLAMA = _family(
    Dialect(
        "llama",
        "LlamaForCausalLM",
        max_length=2048,
        windows="none",
        switches=("attention_bias", "mlp_bias"),
        constants=(("is_llama_config", True), ("rope_interleaved", False)),
    )
)
MISTRAL = _family(
    Dialect("mistral", "MistralForCausalLM", max_length=131072, num_kv_heads=8, window=4096)
)
QWEN2 = _family(
    Dialect(
        "qwen2",
        "Qwen2ForCausalLM",
        max_length=32768,
        num_kv_heads=32,
        qkv_bias=True,
        windows="some",
        window=4096,
        constants=(("use_mrope", False),),
    )
)
QWEN3 = _family(
    Dialect(
        "qwen3",
        "Qwen3ForCausalLM",
        max_length=32768,
        num_kv_heads=32,
        head_dim=128,
        qk_norm=True,
        windows="some",
        window=4096,
        switches=("attention_bias",),
        constants=(("use_mrope", False),),
    )
)
PHI3 = _family(
    Dialect(
        "phi3",
        "Phi3ForCausalLM",
        max_length=4096,
        norm_epsilon=1e-5,
        fused=True,
        constants=(("full_attn_mod", 1), ("interpolate_factor", 1), ("lm_head_bias", False)),
        rope_kinds=("default", "longrope"),
        rope_aliases=(("su", "longrope"),),
        partial_rope=True,
        original_length=4096,
        recomputes=True,
    )
)
