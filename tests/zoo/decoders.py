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


@family()
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


@family()
def llama() -> Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder_sizes())), (), {"input_ids": tokens()}


@family()
def llama_tied() -> Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**decoder_sizes(), tie_word_embeddings=True)
    return LlamaForCausalLM(config), (), {"input_ids": tokens()}


@family()
def qwen2() -> Entry:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**decoder_sizes())), (), {"input_ids": tokens()}


@family()
def gemma() -> Entry:
    from transformers import GemmaConfig, GemmaForCausalLM

    # Gemma's heads need not fill the hidden width: 4 x 10 = 40 inside a width of 48.
    config = GemmaConfig(**decoder_sizes(), head_dim=10)
    return GemmaForCausalLM(config), (), {"input_ids": tokens()}


@family()
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


@family()
def mixtral() -> Entry:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**decoder_sizes(), num_local_experts=5, num_experts_per_tok=2)
    return MixtralForCausalLM(config), (), {"input_ids": tokens()}


@family()
def mamba() -> Entry:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=6,
        conv_kernel=4,
        time_step_rank=9,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return MambaForCausalLM(config), (), {"input_ids": tokens()}
