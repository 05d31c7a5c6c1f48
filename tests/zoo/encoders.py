"""Encoders from `transformers`."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.base import (
    BATCH,
    CLASSES,
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    VOCAB,
    Entry,
    family,
    tokens,
)


def encoder_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "max_position_embeddings": 37,
        "num_labels": CLASSES,
    }


@family()
def bert() -> Entry:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**encoder_sizes()))
    return (
        model,
        (),
        {"input_ids": tokens(), "attention_mask": torch.ones(BATCH, LENGTH).long()},
    )


@family()
def roberta() -> Entry:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(**encoder_sizes()))
    return model, (), {"input_ids": tokens()}


@family()
def distilbert() -> Entry:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=VOCAB,
        dim=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=FFN,
        max_position_embeddings=37,
        num_labels=CLASSES,
    )
    return DistilBertForSequenceClassification(config), (), {"input_ids": tokens()}


@family()
def albert() -> Entry:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(**encoder_sizes(), embedding_size=28)
    return AlbertForSequenceClassification(config), (), {"input_ids": tokens()}


@family()
def deberta_v2() -> Entry:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        **encoder_sizes(),
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        max_relative_positions=16,
    )
    return DebertaV2ForSequenceClassification(config), (), {"input_ids": tokens()}
