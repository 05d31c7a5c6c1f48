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


@family(
    sites={
        "width bert.embeddings.word_embeddings": 1,
        "width bert.encoder.layer.*.intermediate.dense": 3,
        "width bert.pooler.dense": 1,
        "heads bert.encoder.layer.*.attention.self.heads": 3,
        "depth bert.encoder.layer.depth": 1,
    },
    fixed={
        "bert.embeddings.word_embeddings.weight[0]": "looked up by index",
        "bert.embeddings.position_embeddings.weight[0]": "looked up by index",
        "bert.embeddings.token_type_embeddings.weight[0]": "looked up by index",
        "classifier.weight[0]": "the model's output",
    },
)
def bert() -> Entry:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**encoder_sizes()))
    return (
        model,
        (),
        {"input_ids": tokens(), "attention_mask": torch.ones(BATCH, LENGTH).long()},
    )


@family(
    sites={
        "width roberta.embeddings.word_embeddings": 1,
        "width roberta.encoder.layer.*.intermediate.dense": 3,
        "width classifier.dense": 1,
        "heads roberta.encoder.layer.*.attention.self.heads": 3,
        "depth roberta.encoder.layer.depth": 1,
    },
    fixed={
        "roberta.embeddings.word_embeddings.weight[0]": "looked up by index",
        "roberta.embeddings.token_type_embeddings.weight[0]": "looked up by index",
        "roberta.embeddings.position_embeddings.weight[0]": "looked up by index",
        "classifier.out_proj.weight[0]": "the model's output",
    },
)
def roberta() -> Entry:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(**encoder_sizes()))
    return model, (), {"input_ids": tokens()}


@family(
    sites={
        "width distilbert.embeddings.word_embeddings": 1,
        "width distilbert.transformer.layer.*.ffn.lin1": 3,
        "width pre_classifier": 1,
        "heads distilbert.transformer.layer.*.attention.heads": 3,
        "depth distilbert.transformer.layer.depth": 1,
    },
    fixed={
        "distilbert.embeddings.word_embeddings.weight[0]": "looked up by index",
        "distilbert.embeddings.position_embeddings.weight[0]": "looked up by index",
        "classifier.weight[0]": "the model's output",
    },
)
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


@family(
    sites={
        "width albert.embeddings.word_embeddings": 1,
        "width albert.encoder.embedding_hidden_mapping_in": 1,
        "width albert.encoder.albert_layer_groups.*.albert_layers.*.ffn": 1,
        "width albert.pooler": 1,
        "heads albert.encoder.albert_layer_groups.*.albert_layers.*.attention.heads": 1,
        "depth albert.encoder.albert_layer_groups.*.calls": 1,
    },
    fixed={
        "albert.embeddings.word_embeddings.weight[0]": "looked up by index",
        "albert.embeddings.position_embeddings.weight[0]": "looked up by index",
        "albert.embeddings.token_type_embeddings.weight[0]": "looked up by index",
        "classifier.weight[0]": "the model's output",
    },
)
def albert() -> Entry:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(**encoder_sizes(), embedding_size=28)
    return AlbertForSequenceClassification(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width deberta.embeddings.word_embeddings": 1,
        "width deberta.encoder.layer.*.attention.self.pos_key_proj": 1,
        "width deberta.encoder.layer.*.intermediate.dense": 3,
        "width pooler.dense": 1,
        "heads deberta.encoder.layer.*.attention.self.heads": 3,
        "depth deberta.encoder.layer.depth": 1,
    },
    fixed={
        "deberta.embeddings.word_embeddings.weight[0]": "looked up by index",
        "deberta.embeddings.position_embeddings.weight[0]": "looked up by index",
        "deberta.encoder.rel_embeddings.weight[0]": "looked up by index",
        "classifier.weight[0]": "the model's output",
    },
)
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


@family(
    sites={
        "width classifier": 1,
        "width roberta.encoder.layer.*.intermediate.dense": 3,
        "heads roberta.encoder.layer.*.attention.self.heads": 3,
        "depth roberta.encoder.layer.depth": 1,
    },
    fixed={
        "classifier.weight[0]": "the model's output",
        "roberta.embeddings.word_embeddings.weight[0]": "looked up by index",
        "roberta.embeddings.token_type_embeddings.weight[0]": "looked up by index",
        "roberta.embeddings.position_embeddings.weight[0]": "looked up by index",
    },
)
def xlm_roberta() -> Entry:
    from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

    model = XLMRobertaForTokenClassification(XLMRobertaConfig(**encoder_sizes()))
    return model, (), {"input_ids": tokens()}


@family(
    sites={
        "width electra.embeddings.word_embeddings": 1,
        "width electra.embeddings_project": 1,
        "width electra.encoder.layer.*.intermediate.dense": 3,
        "width discriminator_predictions.dense": 1,
        "heads electra.encoder.layer.*.attention.self.heads": 3,
        "depth electra.encoder.layer.depth": 1,
    },
    fixed={
        "electra.embeddings.word_embeddings.weight[0]": "looked up by index",
        "electra.embeddings.position_embeddings.weight[0]": "looked up by index",
        "electra.embeddings.token_type_embeddings.weight[0]": "looked up by index",
    },
)
def electra() -> Entry:
    from transformers import ElectraConfig, ElectraForPreTraining

    config = ElectraConfig(**encoder_sizes(), embedding_size=28)
    return ElectraForPreTraining(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width mpnet.embeddings.word_embeddings": 1,
        "width mpnet.encoder.layer.*.intermediate.dense": 3,
        "width classifier.dense": 1,
        "heads mpnet.encoder.layer.*.attention.attn.heads": 1,
        "depth mpnet.encoder.layer.depth": 1,
    },
    fixed={
        "mpnet.embeddings.word_embeddings.weight[0]": "looked up by index",
        "mpnet.embeddings.position_embeddings.weight[0]": "looked up by index",
        "mpnet.encoder.relative_attention_bias.weight[0]": "looked up by index",
        "classifier.out_proj.weight[0]": "the model's output",
    },
)
def mpnet() -> Entry:
    from transformers import MPNetConfig, MPNetForSequenceClassification

    model = MPNetForSequenceClassification(MPNetConfig(**encoder_sizes()))
    return model, (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embeddings.tok_embeddings": 1,
        "width model.layers.*.mlp.Wi": 3,
        "width head.dense": 1,
        "heads model.layers.*.attn.heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embeddings.tok_embeddings.weight[0]": "looked up by index",
        "classifier.weight[0]": "the model's output",
    },
)
def modernbert() -> Entry:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    config = ModernBertConfig(
        **encoder_sizes(), local_attention=6, pad_token_id=0, global_attn_every_n_layers=2
    )
    return ModernBertForSequenceClassification(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width roformer.embeddings.word_embeddings": 1,
        "width roformer.encoder.layer.*.intermediate.dense": 3,
        "width classifier.dense": 1,
        "heads roformer.encoder.layer.*.attention.self.heads": 3,
        "depth roformer.encoder.layer.depth": 1,
    },
    fixed={
        "roformer.embeddings.word_embeddings.weight[0]": "looked up by index",
        "roformer.embeddings.token_type_embeddings.weight[0]": "looked up by index",
        "roformer.encoder.embed_positions.weight[0]": "looked up by index",
        "classifier.out_proj.weight[0]": "the model's output",
    },
)
def roformer() -> Entry:
    from transformers import RoFormerConfig, RoFormerForSequenceClassification

    model = RoFormerForSequenceClassification(RoFormerConfig(**encoder_sizes()))
    return model, (), {"input_ids": tokens()}


@family(
    sites={
        "width nystromformer.embeddings.word_embeddings": 1,
        "width nystromformer.encoder.layer.*.intermediate.dense": 3,
        "width classifier.dense": 1,
        "heads nystromformer.encoder.layer.*.attention.self.heads": 3,
        "depth nystromformer.encoder.layer.depth": 1,
    },
    fixed={
        "nystromformer.embeddings.word_embeddings.weight[0]": "looked up by index",
        "nystromformer.embeddings.position_embeddings.weight[0]": "looked up by index",
        "nystromformer.embeddings.token_type_embeddings.weight[0]": "looked up by index",
        "nystromformer.encoder.layer.*.attention.self.conv.weight[2]": "the kernel size",
        "classifier.out_proj.weight[0]": "the model's output",
    },
)
def nystromformer() -> Entry:
    from transformers import NystromformerConfig, NystromformerForSequenceClassification

    config = NystromformerConfig(**encoder_sizes(), num_landmarks=4, segment_means_seq_len=12)
    model = NystromformerForSequenceClassification(config)
    return model, (), {"input_ids": tokens(12)}


@family(
    sites={
        "width bert.embeddings.word_embeddings": 1,
        "width bert.encoder.layer.*.intermediate.dense": 3,
        "width bert.pooler": 1,
        "width classifier.dense": 1,
        "heads bert.encoder.layer.*.attention.self.heads": 3,
        "depth bert.encoder.layer.depth": 1,
    },
    fixed={
        "bert.embeddings.word_embeddings.weight[0]": "looked up by index",
        "bert.embeddings.position_embeddings.weight[0]": "looked up by index",
        "bert.embeddings.token_type_embeddings.weight[0]": "looked up by index",
        "classifier.out_proj.weight[0]": "the model's output",
    },
)
def big_bird() -> Entry:
    from transformers import BigBirdConfig, BigBirdForSequenceClassification

    config = BigBirdConfig(**encoder_sizes(), attention_type="original_full")
    return BigBirdForSequenceClassification(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width perceiver.input_preprocessor.embeddings": 1,
        "width perceiver.embeddings": 1,
        "width perceiver.encoder.cross_attention.mlp.dense1": 1,
        "width perceiver.encoder.self_attends.*.mlp.dense1": 3,
        "width perceiver.decoder.decoder.output_position_encodings": 1,
        "width perceiver.decoder.decoder.decoding_cross_attention.attention.self.query": 1,
        "width perceiver.decoder.decoder.decoding_cross_attention.attention.self.value": 1,
        "width perceiver.decoder.decoder.decoding_cross_attention.mlp.dense1": 1,
        "heads perceiver.encoder.cross_attention.attention.self.heads": 1,
        "heads perceiver.encoder.self_attends.*.attention.self.heads": 3,
        "depth perceiver.encoder.self_attends.depth": 1,
    },
    fixed={
        "perceiver.input_preprocessor.embeddings.weight[0]": "looked up by index",
        "perceiver.input_preprocessor.position_embeddings.weight[0]": "looked up by index",
        "perceiver.embeddings.latents[0]": "counts positions",
        "perceiver.decoder.decoder.final_layer.weight[0]": "the model's output",
    },
)
def perceiver() -> Entry:
    from transformers import PerceiverConfig, PerceiverForSequenceClassification

    config = PerceiverConfig(
        vocab_size=VOCAB,
        num_latents=9,
        d_latents=32,
        d_model=HIDDEN,
        num_blocks=1,
        num_self_attends_per_block=LAYERS,
        num_self_attention_heads=HEADS,
        num_cross_attention_heads=HEADS,
        max_position_embeddings=37,
        num_labels=CLASSES,
    )
    return PerceiverForSequenceClassification(config), (), {"inputs": tokens()}
