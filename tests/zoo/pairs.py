"""Encoder-decoders and two-tower models from `transformers`."""

from __future__ import annotations

from typing import Any

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


@family(
    sites={
        "width shared": 1,
        "width encoder.block.*.layer.*.DenseReluDense.wi": 3,
        "width decoder.block.*.layer.*.DenseReluDense.wi": 3,
        "heads encoder.block.*.layer.*.SelfAttention.heads": 1,
        "heads decoder.block.*.layer.*.SelfAttention.heads": 1,
        "heads decoder.block.*.layer.*.EncDecAttention.heads": 1,
        "depth encoder.block.depth": 1,
        "depth decoder.block.depth": 1,
    },
    fixed={
        "shared.weight[0]": "the model's output",
        "*.*.layer.*.SelfAttention.relative_attention_bias.weight[0]": "looked up by index",
        "encoder.block.*": "is used later",
        "decoder.block.*": "is used later",
    },
)
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


@family(
    sites={
        "width model.encoder.conv1": 1,
        "width model.encoder.conv2": 1,
        "width model.encoder.layers.*.fc1": 2,
        "width model.decoder.embed_tokens": 1,
        "width model.decoder.layers.*.fc1": 3,
        "heads model.encoder.layers.*.self_attn.heads": 2,
        "heads model.decoder.layers.*.self_attn.heads": 3,
        "heads model.decoder.layers.*.encoder_attn.heads": 3,
        "depth model.encoder.layers.depth": 1,
        "depth model.decoder.layers.depth": 1,
    },
    fixed={
        "model.encoder.conv1.weight[1]": "an input dimension",
        "model.encoder.conv1.weight[2]": "the kernel size",
        "model.encoder.conv2.weight[2]": "the kernel size",
        "model.encoder.embed_positions.weight[0]": "looked up by index",
        "model.decoder.embed_tokens.weight[0]": "the model's output",
        "model.decoder.embed_positions.weight[0]": "looked up by index",
    },
)
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


@family(
    sites={
        "width text_model.embeddings.token_embedding": 1,
        "width text_model.encoder.layers.*.mlp.fc1": 3,
        "width vision_model.embeddings": 1,
        "width vision_model.encoder.layers.*.mlp.fc1": 2,
        "width visual_projection": 1,
        "heads text_model.encoder.layers.*.self_attn.heads": 3,
        "heads vision_model.encoder.layers.*.self_attn.heads": 2,
        "depth text_model.encoder.layers.depth": 1,
        "depth vision_model.encoder.layers.depth": 1,
    },
    fixed={
        "text_model.embeddings.token_embedding.weight[0]": "looked up by index",
        "text_model.embeddings.position_embedding.weight[0]": "looked up by index",
        "vision_model.embeddings.patch_embedding.weight[1]": "an input dimension",
        "vision_model.embeddings.patch_embedding.weight[2, 3]": "the kernel size",
        "vision_model.embeddings.position_embedding.weight[0]": "looked up by index",
    },
)
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


def seq2seq_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "encoder_layers": 2,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": FFN,
        "decoder_ffn_dim": 72,
        "max_position_embeddings": 37,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
        "decoder_start_token_id": 3,
    }


def source_and_target() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


@family(
    sites={
        "width model.shared": 1,
        "width model.encoder.layers.*.fc1": 2,
        "width model.decoder.layers.*.fc1": 3,
        "heads model.encoder.layers.*.self_attn.heads": 2,
        "heads model.decoder.layers.*.self_attn.heads": 3,
        "heads model.decoder.layers.*.encoder_attn.heads": 3,
        "depth model.encoder.layers.depth": 1,
        "depth model.decoder.layers.depth": 1,
    },
    fixed={
        "model.shared.weight[0]": "the model's output",
        "model.encoder.embed_positions.weight[0]": "looked up by index",
        "model.decoder.embed_positions.weight[0]": "looked up by index",
    },
)
def bart() -> Entry:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(**seq2seq_sizes())), (), source_and_target()


@family(
    sites={
        "width model.shared": 1,
        "width model.encoder.layers.*.fc1": 2,
        "width model.decoder.layers.*.fc1": 3,
        "heads model.encoder.layers.*.self_attn.heads": 2,
        "heads model.decoder.layers.*.self_attn.heads": 3,
        "heads model.decoder.layers.*.encoder_attn.heads": 3,
        "depth model.encoder.layers.depth": 1,
        "depth model.decoder.layers.depth": 1,
    },
    fixed={
        "model.shared.weight[0]": "the model's output",
        "model.encoder.embed_positions.weight[0]": "looked up by index",
        "model.decoder.embed_positions.weight[0]": "looked up by index",
    },
)
def pegasus() -> Entry:
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    model = PegasusForConditionalGeneration(PegasusConfig(**seq2seq_sizes()))
    return model, (), source_and_target()


@family(
    sites={
        "width model.shared": 1,
        "width model.encoder.layers.*.fc1": 2,
        "width model.decoder.layers.*.fc1": 3,
        "heads model.encoder.layers.*.self_attn.heads": 2,
        "heads model.decoder.layers.*.self_attn.heads": 3,
        "heads model.decoder.layers.*.encoder_attn.heads": 3,
        "depth model.encoder.layers.depth": 1,
        "depth model.decoder.layers.depth": 1,
    },
    fixed={
        "model.shared.weight[0]": "the model's output",
        "model.encoder.embed_positions.weight[0]": "looked up by index",
        "model.decoder.embed_positions.weight[0]": "looked up by index",
    },
)
def marian() -> Entry:
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(**seq2seq_sizes(), decoder_vocab_size=VOCAB)
    return MarianMTModel(config), (), source_and_target()


@family(
    sites={
        "width model.shared": 1,
        "width model.encoder.layers.*.fc1": 2,
        "width model.decoder.layers.*.fc1": 3,
        "heads model.encoder.layers.*.self_attn.heads": 2,
        "heads model.decoder.layers.*.self_attn.heads": 3,
        "heads model.decoder.layers.*.encoder_attn.heads": 3,
        "depth model.encoder.layers.depth": 1,
        "depth model.decoder.layers.depth": 1,
    },
    fixed={
        "model.shared.weight[0]": "the model's output",
    },
)
def m2m_100() -> Entry:
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    model = M2M100ForConditionalGeneration(M2M100Config(**seq2seq_sizes()))
    return model, (), source_and_target()


@family(
    sites={
        "width text_model.embeddings.token_embedding": 1,
        "width text_model.encoder.layers.*.mlp.fc1": 3,
        "width text_model.head": 1,
        "width vision_model.embeddings.patch_embedding": 1,
        "width vision_model.encoder.layers.*.mlp.fc1": 2,
        "width vision_model.head.mlp.fc1": 1,
        "heads text_model.encoder.layers.*.self_attn.heads": 3,
        "heads vision_model.encoder.layers.*.self_attn.heads": 2,
        "depth text_model.encoder.layers.depth": 1,
        "depth vision_model.encoder.layers.depth": 1,
    },
    fixed={
        "text_model.embeddings.token_embedding.weight[0]": "looked up by index",
        "text_model.embeddings.position_embedding.weight[0]": "looked up by index",
        "vision_model.embeddings.patch_embedding.weight[1]": "an input dimension",
        "vision_model.embeddings.patch_embedding.weight[2, 3]": "the kernel size",
        "vision_model.embeddings.position_embedding.weight[0]": "looked up by index",
        "vision_model.head.heads": "the code computes a size as",
    },
)
def siglip() -> Entry:
    from transformers import SiglipConfig, SiglipModel

    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 37,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "projection_size": HIDDEN,
    }
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": 24,
        "patch_size": 8,
    }
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    return model, (), {"input_ids": tokens(), "pixel_values": image(24)}


@family(
    sites={
        "width vision_model.embeddings": 1,
        "width vision_model.encoder.layers.*.mlp.fc1": 2,
        "width text_decoder.bert.embeddings.word_embeddings": 1,
        "width text_decoder.bert.encoder.layer.*.intermediate.dense": 3,
        "heads text_decoder.bert.encoder.layer.*.attention.self.heads": 3,
        "heads text_decoder.bert.encoder.layer.*.crossattention.self.heads": 3,
        "depth vision_model.encoder.layers.depth": 1,
        "depth text_decoder.bert.encoder.layer.depth": 1,
    },
    fixed={
        "vision_model.embeddings.position_embedding[1]": "a spatial size",
        "vision_model.embeddings.patch_embedding.weight[1]": "an input dimension",
        "vision_model.embeddings.patch_embedding.weight[2, 3]": "the kernel size",
        "vision_model.encoder.layers.*.self_attn.heads": "the code computes a size as",
        "text_decoder.bert.embeddings.word_embeddings.weight[0]": "the model's output",
        "text_decoder.bert.embeddings.position_embeddings.weight[0]": "looked up by index",
    },
)
def blip() -> Entry:
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "encoder_hidden_size": 40,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 37,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sep_token_id": 3,
        "projection_dim": 26,
    }
    vision = {
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "image_size": 24,
        "patch_size": 8,
    }
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=26)
    model = BlipForConditionalGeneration(config)
    return model, (), {"input_ids": tokens(), "pixel_values": image(24)}


@family(
    sites={
        "width model.encoder.value_embedding.value_projection": 1,
        "width model.encoder.layers.*.fc1": 2,
        "width model.decoder.value_embedding.value_projection": 1,
        "width model.decoder.layers.*.fc1": 3,
        "heads model.encoder.layers.*.self_attn.heads": 2,
        "heads model.decoder.layers.*.self_attn.heads": 3,
        "heads model.decoder.layers.*.encoder_attn.heads": 3,
        "depth model.encoder.layers.depth": 1,
        "depth model.decoder.layers.depth": 1,
    },
    fixed={
        "model.encoder.value_embedding.value_projection.weight[1]": "stacked along it",
        "model.encoder.embed_positions.weight[0]": "looked up by index",
        "model.decoder.embed_positions.weight[0]": "looked up by index",
    },
)
def time_series() -> Entry:
    from transformers import TimeSeriesTransformerConfig, TimeSeriesTransformerForPrediction

    config = TimeSeriesTransformerConfig(
        prediction_length=4,
        context_length=9,
        lags_sequence=[1, 2],
        num_time_features=2,
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=72,
    )
    past = config.context_length + max(config.lags_sequence)
    return (
        TimeSeriesTransformerForPrediction(config),
        (),
        {
            "past_values": torch.randn(BATCH, past),
            "past_time_features": torch.randn(BATCH, past, 2),
            "past_observed_mask": torch.ones(BATCH, past),
            "future_values": torch.randn(BATCH, 4),
            "future_time_features": torch.randn(BATCH, 4, 2),
        },
    )
