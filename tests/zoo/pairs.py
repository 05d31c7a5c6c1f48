"""Encoder-decoders and two-tower models from `transformers`."""

from __future__ import annotations

import torch

from tests.zoo.base import (
    BATCH,
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    Entry,
    family,
    image,
    tokens,
)


@family()
def t5() -> Entry:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=10,
        num_heads=HEADS,
        d_ff=FFN,
        num_layers=LAYERS,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    return model, (), {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


@family()
def whisper() -> Entry:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=20,
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=72,
        max_source_positions=13,
        max_target_positions=37,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = WhisperForConditionalGeneration(config)
    features = torch.randn(BATCH, 20, 26)
    return model, (), {"input_features": features, "decoder_input_ids": tokens(7)}


@family()
def clip() -> Entry:
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 37,
        "bos_token_id": 1,
        "eos_token_id": 96,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "image_size": 24,
        "patch_size": 8,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=26))
    ids = tokens()
    ids[:, -1] = 96  # the pooled token
    return model, (), {"input_ids": ids, "pixel_values": image(24)}
