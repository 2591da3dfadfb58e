"""Llama 2, 3.x and what is shaped like them (2407.21783): optional biases, Llama 3's rope scaling."""

from jaxrl_fp16.models.families import llama_like

FAMILY = llama_like.family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults=dict(rope_theta=10000.0, norm_eps=1e-6, tie_embeddings=False, qkv_bias=False, output_bias=False,
                  mlp_bias=False, qk_norm=False, max_positions=2048),
    absent=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=2048),
    switches={"attention_bias": ("qkv_bias", "output_bias"), "mlp_bias": ("mlp_bias",)},
)
