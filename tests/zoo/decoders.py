"""Decoders from `transformers`."""

from __future__ import annotations

from typing import Any

from tests.zoo.base import FFN, HEADS, HIDDEN, LAYERS, VOCAB, Entry, family, tokens


def decoder_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "intermediate_size": FFN,
        "max_position_embeddings": 37,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


@family(
    sites={
        "width transformer.wte": 1,
        "width transformer.h.*.mlp.c_fc": 3,
        "heads transformer.h.*.attn.heads": 3,
        "depth transformer.h.depth": 1,
    },
    fixed={
        "transformer.wte.weight[0]": "the model's output",
        "transformer.wpe.weight[0]": "looked up by index",
    },
)
def gpt2() -> Entry:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=FFN,
        n_positions=37,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def llama() -> Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder_sizes())), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "the model's output",
    },
)
def llama_tied() -> Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**decoder_sizes(), tie_word_embeddings=True)
    return LlamaForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def qwen2() -> Entry:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**decoder_sizes())), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "the model's output",
    },
)
def gemma() -> Entry:
    from transformers import GemmaConfig, GemmaForCausalLM

    # Gemma's heads need not fill the hidden width: 4 x 10 = 40 inside a width of 48.
    config = GemmaConfig(**decoder_sizes(), head_dim=10)
    return GemmaForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.decoder.embed_tokens": 1,
        "width model.decoder.layers.*.fc1": 3,
        "heads model.decoder.layers.*.self_attn.heads": 3,
        "depth model.decoder.layers.depth": 1,
    },
    fixed={
        "model.decoder.embed_tokens.weight[0]": "the model's output",
        "model.decoder.embed_positions.weight[0]": "looked up by index",
    },
)
def opt() -> Entry:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_dim=FFN,
        max_position_embeddings=37,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return OPTForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.experts": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "experts model.layers.*.mlp.num_experts": 3,
        "experts model.layers.*.mlp.top_k": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def mixtral() -> Entry:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**decoder_sizes(), num_local_experts=5, num_experts_per_tok=2)
    return MixtralForCausalLM(config), (), {"input_ids": tokens()}


def _without(sizes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if name not in names}


@family(
    sites={
        "width transformer.word_embeddings": 1,
        "width transformer.h.*.mlp.dense_h_to_4h": 3,
        "heads transformer.h.*.self_attention.heads": 3,
        "depth transformer.h.depth": 1,
    },
    fixed={
        "transformer.word_embeddings.weight[0]": "the model's output",
    },
)
def falcon() -> Entry:
    from transformers import FalconConfig, FalconForCausalLM

    sizes = _without(decoder_sizes(), "num_key_value_heads", "intermediate_size")
    config = FalconConfig(**sizes, ffn_hidden_size=FFN, multi_query=True, bias=False)
    return FalconForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width transformer.wte": 1,
        "width transformer.h.*.mlp.c_fc": 3,
        "heads transformer.h.*.attn.heads": 3,
        "depth transformer.h.depth": 1,
    },
    fixed={
        "transformer.wte.weight[0]": "the model's output",
        "transformer.wpe.weight[0]": "looked up by index",
    },
)
def gpt_bigcode() -> Entry:
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    config = GPTBigCodeConfig(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=FFN,
        n_positions=37,
        multi_query=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPTBigCodeForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width gpt_neox.embed_in": 1,
        "width gpt_neox.layers.*.mlp.dense_h_to_4h": 3,
        "heads gpt_neox.layers.*.attention.heads": 3,
        "depth gpt_neox.layers.depth": 1,
    },
    fixed={
        "gpt_neox.embed_in.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def gpt_neox() -> Entry:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**_without(decoder_sizes(), "num_key_value_heads"))
    return GPTNeoXForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width transformer.word_embeddings": 1,
        "width transformer.h.*.mlp.dense_h_to_4h": 3,
        "depth transformer.h.depth": 1,
    },
    fixed={
        "transformer.word_embeddings.weight[0]": "the model's output",
        "transformer.h.*.self_attention.heads": "counts positions",
    },
)
def bloom() -> Entry:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return BloomForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width transformer.wte": 1,
        "width transformer.h.*.mlp.fc_in": 3,
        "heads transformer.h.*.attn.heads": 3,
        "depth transformer.h.depth": 1,
    },
    fixed={
        "transformer.wte.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def gptj() -> Entry:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=FFN,
        n_positions=37,
        rotary_dim=6,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPTJForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width transformer.wte": 1,
        "width transformer.h.*.mlp.c_fc": 3,
        "heads transformer.h.*.attn.attention.heads": 3,
        "depth transformer.h.depth": 1,
    },
    fixed={
        "transformer.wte.weight[0]": "the model's output",
        "transformer.wpe.weight[0]": "looked up by index",
    },
)
def gpt_neo() -> Entry:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        attention_types=[[["global", "local", "global"], 1]],
        num_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=37,
        window_size=5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPTNeoForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width transformer.wte": 1,
        "width transformer.blocks.*.ffn.up_proj": 3,
        "depth transformer.blocks.depth": 1,
    },
    fixed={
        "transformer.wte.weight[0]": "the model's output",
        "transformer.blocks.*.attn.heads": "counts positions",
    },
)
def mpt() -> Entry:
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(
        vocab_size=VOCAB, d_model=HIDDEN, n_layers=LAYERS, n_heads=HEADS, max_seq_len=37
    )
    return MptForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.fc1": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def phi() -> Entry:
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(**decoder_sizes(), partial_rotary_factor=0.5)
    return PhiForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_up_proj": 3,
        "heads model.layers.*.self_attn.heads": 1,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def phi3() -> Entry:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**decoder_sizes())), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def stablelm() -> Entry:
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(**decoder_sizes(), partial_rotary_factor=0.5, use_qkv_bias=True)
    return StableLmForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def olmo2() -> Entry:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return Olmo2ForCausalLM(Olmo2Config(**decoder_sizes())), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def olmo() -> Entry:
    from transformers import OlmoConfig, OlmoForCausalLM

    return OlmoForCausalLM(OlmoConfig(**decoder_sizes())), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def qwen3() -> Entry:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**decoder_sizes(), head_dim=10)
    return Qwen3ForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "the model's output",
    },
)
def gemma2() -> Entry:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**decoder_sizes(), head_dim=10, sliding_window=5)
    return Gemma2ForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "the model's output",
    },
)
def gemma3() -> Entry:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **decoder_sizes(),
        head_dim=10,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return Gemma3ForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "the model's output",
    },
)
def cohere() -> Entry:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**decoder_sizes())), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.fc1": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "the model's output",
    },
)
def xglm() -> Entry:
    from transformers import XGLMConfig, XGLMForCausalLM

    config = XGLMConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        num_layers=LAYERS,
        attention_heads=HEADS,
        ffn_dim=FFN,
        max_position_embeddings=37,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return XGLMForCausalLM(config), (), {"input_ids": tokens()}
