"""Speech models from `transformers`."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.base import BATCH, CLASSES, FFN, HEADS, HIDDEN, LAYERS, VOCAB, Entry, family


def waveform_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "conv_dim": [20, 28, 36],
        "conv_kernel": [5, 3, 3],
        "conv_stride": [4, 2, 2],
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 6,
        "num_conv_pos_embedding_groups": 4,
        "num_labels": CLASSES,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@family(
    sites={
        "width wav2vec2.feature_extractor.conv_layers.*.conv": 3,
        "width wav2vec2.feature_projection.projection": 1,
        "width wav2vec2.feature_projection.projection#2": 1,
        "width wav2vec2.encoder.layers.*.feed_forward.intermediate_dense": 3,
        "heads wav2vec2.encoder.layers.*.attention.heads": 3,
        "depth wav2vec2.encoder.layers.depth": 1,
    },
    fixed={
        "wav2vec2.masked_spec_embed[0]": "no other parameter depends on it",
        "wav2vec2.feature_extractor.conv_layers.*.conv.weight[2]": "the kernel size",
        "*.encoder.pos_conv_embed.conv.parametrizations.weight.original0[2]": "the kernel size",
        "lm_head.weight[0]": "the model's output",
    },
)
def wav2vec2() -> Entry:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC(Wav2Vec2Config(**waveform_sizes()))
    return model, (), {"input_values": torch.randn(BATCH, 400)}


@family(
    sites={
        "width hubert.feature_extractor.conv_layers.*.conv": 3,
        "width hubert.feature_projection.projection": 1,
        "width hubert.feature_projection.projection#2": 1,
        "width hubert.encoder.layers.*.feed_forward.intermediate_dense": 3,
        "width projector": 1,
        "heads hubert.encoder.layers.*.attention.heads": 3,
        "depth hubert.encoder.layers.depth": 1,
    },
    fixed={
        "hubert.masked_spec_embed[0]": "no other parameter depends on it",
        "hubert.feature_extractor.conv_layers.*.conv.weight[2]": "the kernel size",
        "*.encoder.pos_conv_embed.conv.parametrizations.weight.original0[2]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def hubert() -> Entry:
    from transformers import HubertConfig, HubertForSequenceClassification

    config = HubertConfig(**waveform_sizes(), classifier_proj_size=26)
    model = HubertForSequenceClassification(config)
    return model, (), {"input_values": torch.randn(BATCH, 400)}


@family(
    sites={
        "width wavlm.feature_extractor.conv_layers.*.conv": 3,
        "width wavlm.encoder.layers.*.feed_forward.intermediate_dense": 3,
        "heads wavlm.feature_projection.heads": 1,
        "depth wavlm.encoder.layers.depth": 1,
    },
    fixed={
        "wavlm.masked_spec_embed[0]": "no other parameter depends on it",
        "wavlm.feature_extractor.conv_layers.*.conv.weight[2]": "the kernel size",
        "*.encoder.pos_conv_embed.conv.parametrizations.weight.original0[2]": "the kernel size",
        "*.encoder.layers.*.attention.gru_rel_pos_linear.weight[0]": "the code fixes a size",
        "wavlm.encoder.layers.*.attention.rel_attn_embed.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
        "wavlm.encoder.layers.*": "is used later",
    },
)
def wavlm() -> Entry:
    from transformers import WavLMConfig, WavLMForCTC

    model = WavLMForCTC(WavLMConfig(**waveform_sizes(), num_buckets=20, max_bucket_distance=30))
    return model, (), {"input_values": torch.randn(BATCH, 400)}


@family(
    sites={
        "width audio_spectrogram_transformer.embeddings": 1,
        "width audio_spectrogram_transformer.layers.*.mlp.fc1": 3,
        "heads audio_spectrogram_transformer.layers.*.attention.heads": 3,
        "depth audio_spectrogram_transformer.layers.depth": 1,
    },
    fixed={
        "audio_spectrogram_transformer.embeddings.position_embeddings[1]": "a spatial size",
        "*.embeddings.patch_embeddings.projection.weight[2, 3]": "the kernel size",
        "classifier.dense.weight[0]": "the model's output",
    },
)
def audio_spectrogram() -> Entry:
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=32,
        num_mel_bins=16,
        num_labels=CLASSES,
    )
    return ASTForAudioClassification(config), (), {"input_values": torch.randn(BATCH, 32, 16)}
