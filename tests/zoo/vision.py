"""Vision models, most from `transformers`."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.base import BATCH, CLASSES, FFN, HEADS, HIDDEN, LAYERS, Entry, family, image


@family(
    sites={
        "width vit.embeddings": 1,
        "width vit.layers.*.mlp.fc1": 3,
        "heads vit.layers.*.attention.heads": 3,
        "depth vit.layers.depth": 1,
    },
    fixed={
        "vit.embeddings.position_embeddings[1]": "a spatial size",
        "vit.embeddings.patch_embeddings.projection.weight[1]": "an input dimension",
        "vit.embeddings.patch_embeddings.projection.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def vit() -> Entry:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        image_size=24,
        patch_size=8,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config), (), {"pixel_values": image(24)}


@family(
    sites={
        "width swin.embeddings.patch_embeddings.projection": 1,
        "width swin.encoder.layers.*.blocks.*.mlp.fc1": 4,
        "width swin.encoder.layers.*.downsample.reduction": 1,
        "heads swin.encoder.layers.*.blocks.*.attention.heads": 4,
        "depth swin.encoder.layers.*.blocks.depth": 2,
    },
    fixed={
        "swin.embeddings.patch_embeddings.projection.weight[1]": "an input dimension",
        "swin.embeddings.patch_embeddings.projection.weight[2, 3]": "the kernel size",
        "*.relative_position_bias.relative_position_bias_table[0]": "looked up by index",
        "classifier.weight[0]": "the model's output",
    },
)
def swin() -> Entry:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        mlp_ratio=1.5,
        num_labels=CLASSES,
    )
    return SwinForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width convnext.embeddings.patch_embeddings": 1,
        "width convnext.encoder.stages.*.layers.*.pwconv1": 5,
        "width convnext.encoder.stages.*.downsampling_layer.*": 1,
        "depth convnext.encoder.stages.*.layers.depth": 2,
    },
    fixed={
        "convnext.embeddings.patch_embeddings.weight[1]": "an input dimension",
        "convnext.embeddings.patch_embeddings.weight[2, 3]": "the kernel size",
        "convnext.encoder.stages.*.layers.*.dwconv.weight[2, 3]": "the kernel size",
        "convnext.encoder.stages.*.downsampling_layer.*.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def convnext() -> Entry:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_stages=2, hidden_sizes=[24, 40], depths=[2, 3], image_size=32, num_labels=CLASSES
    )
    return ConvNextForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width resnet.embedder.embedder.convolution": 1,
        "width resnet.encoder.stages.*.layers.*.layer.*.convolution": 6,
        "width resnet.encoder.stages.*.layers.*.shortcut.convolution": 2,
        "depth resnet.encoder.stages.*.layers.depth": 3,
    },
    fixed={
        "resnet.embedder.embedder.convolution.weight[1]": "an input dimension",
        "resnet.embedder.embedder.convolution.weight[2, 3]": "the kernel size",
        "resnet.encoder.stages.*.layers.*.layer.*.convolution.weight[2, 3]": "the kernel size",
        "classifier.*.weight[0]": "the model's output",
        "resnet.encoder.stages.*.layers.*": "it changes the shape",
    },
)
def resnet_basic() -> Entry:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=20,
        hidden_sizes=[20, 36, 56],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width resnet.embedder.embedder.convolution": 1,
        "width resnet.encoder.stages.*.layers.*.shortcut.convolution": 3,
        "width resnet.encoder.stages.*.layers.*.layer.*.convolution": 14,
        "depth resnet.encoder.stages.*.layers.depth": 3,
    },
    fixed={
        "resnet.embedder.embedder.convolution.weight[1]": "an input dimension",
        "resnet.embedder.embedder.convolution.weight[2, 3]": "the kernel size",
        "resnet.encoder.stages.*.layers.*.layer.*.convolution.weight[2, 3]": "the kernel size",
        "classifier.*.weight[0]": "the model's output",
        "resnet.encoder.stages.*.layers.*": "it changes the shape",
    },
)
def resnet_bottleneck() -> Entry:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=20,
        hidden_sizes=[48, 80, 112],
        depths=[2, 3, 2],
        layer_type="bottleneck",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width mobilenet_v2.conv_stem.first_conv.convolution": 1,
        "width mobilenet_v2.conv_stem.reduce_1x1.convolution": 1,
        "width mobilenet_v2.layer.*.expand_1x1.convolution": 16,
        "width mobilenet_v2.layer.*.reduce_1x1.convolution": 6,
        "width mobilenet_v2.conv_1x1.convolution": 1,
        "depth mobilenet_v2.layer.depth": 1,
        "depth mobilenet_v2.layer.depth#2": 1,
        "depth mobilenet_v2.layer.depth#3": 1,
        "depth mobilenet_v2.layer.depth#4": 1,
        "depth mobilenet_v2.layer.depth#5": 1,
    },
    fixed={
        "mobilenet_v2.conv_stem.first_conv.convolution.weight[1]": "an input dimension",
        "mobilenet_v2.conv_stem.first_conv.convolution.weight[2, 3]": "the kernel size",
        "mobilenet_v2.conv_stem.conv_3x3.convolution.weight[2, 3]": "the kernel size",
        "mobilenet_v2.layer.*.conv_3x3.convolution.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
        "mobilenet_v2.layer.*": "it changes the shape",
    },
)
def mobilenet_v2() -> Entry:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=CLASSES)
    return MobileNetV2ForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width regnet.embedder.embedder.convolution": 1,
        "width regnet.encoder.stages.*.layers.*.shortcut.convolution": 2,
        "width regnet.encoder.stages.*.layers.*.layer.*.convolution": 10,
        "width regnet.encoder.stages.*.layers.*.layer.*.convolution#2": 5,
        "width regnet.encoder.stages.*.layers.*.layer.*.attention.*": 5,
        "depth regnet.encoder.stages.*.layers.depth": 2,
    },
    fixed={
        "regnet.embedder.embedder.convolution.weight[1]": "an input dimension",
        "regnet.embedder.embedder.convolution.weight[2, 3]": "the kernel size",
        "regnet.encoder.stages.*.layers.*.layer.*.convolution.weight[2, 3]": "the kernel size",
        "classifier.*.weight[0]": "the model's output",
        "regnet.encoder.stages.*.layers.*": "it changes the shape",
    },
)
def regnet() -> Entry:
    from transformers import RegNetConfig, RegNetForImageClassification

    config = RegNetConfig(
        embedding_size=20,
        hidden_sizes=[24, 40],
        depths=[2, 3],
        groups_width=8,
        layer_type="y",
        num_labels=CLASSES,
    )
    return RegNetForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width efficientnet.embeddings.convolution": 1,
        "width efficientnet.encoder.blocks.*.squeeze_excite.reduce": 5,
        "width efficientnet.encoder.blocks.*.projection.project_conv": 3,
        "width efficientnet.encoder.blocks.*.expansion.expand_conv": 4,
        "width efficientnet.encoder.top_conv": 1,
        "depth efficientnet.encoder.blocks.depth": 1,
        "depth efficientnet.encoder.blocks.depth#2": 1,
    },
    fixed={
        "efficientnet.embeddings.convolution.weight[1]": "an input dimension",
        "efficientnet.embeddings.convolution.weight[2, 3]": "the kernel size",
        "*.encoder.blocks.*.depthwise_conv.depthwise_conv.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
        "efficientnet.encoder.blocks.*": "it changes the shape",
    },
)
def efficientnet() -> Entry:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=32,
        width_coefficient=0.5,  # halves every width below, the stem's 32 and the head's 1280
        depth_coefficient=1.0,
        kernel_sizes=[3, 5, 3],
        in_channels=[32, 48, 80],
        out_channels=[48, 80, 112],
        depthwise_padding=[],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 2],
        expand_ratios=[1, 4, 6],
        hidden_dim=640,
        num_labels=CLASSES,
    )
    return EfficientNetForImageClassification(config), (), {"pixel_values": image(32)}


def encoder_of_patches() -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "image_size": 24,
        "patch_size": 8,
        "num_labels": CLASSES,
    }


@family(
    sites={
        "width deit.embeddings": 1,
        "width deit.layers.*.mlp.fc1": 3,
        "heads deit.layers.*.attention.heads": 3,
        "depth deit.layers.depth": 1,
    },
    fixed={
        "deit.embeddings.position_embeddings[1]": "a spatial size",
        "deit.embeddings.patch_embeddings.projection.weight[1]": "an input dimension",
        "deit.embeddings.patch_embeddings.projection.weight[2, 3]": "the kernel size",
        "cls_classifier.weight[0]": "the model's output",
    },
)
def deit() -> Entry:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    model = DeiTForImageClassificationWithTeacher(DeiTConfig(**encoder_of_patches()))
    return model, (), {"pixel_values": image(24)}


@family(
    sites={
        "width beit.embeddings": 1,
        "width beit.layers.*.mlp.fc1": 3,
        "heads beit.layers.*.attention.heads": 3,
        "depth beit.layers.depth": 1,
    },
    fixed={
        "beit.embeddings.patch_embeddings.projection.weight[1]": "an input dimension",
        "beit.embeddings.patch_embeddings.projection.weight[2, 3]": "the kernel size",
        "*.layers.*.relative_position_bias.relative_position_bias_table[0]": "a spatial size",
        "classifier.weight[0]": "the model's output",
    },
)
def beit() -> Entry:
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(
        **encoder_of_patches(), use_relative_position_bias=True, out_indices=[0, 1, 2, 3]
    )
    model, batch = BeitForImageClassification(config), {"pixel_values": image(24)}
    # The first run in a process fills a cache of positions that all models share: recorded with
    # it, the first block would own what the others read, and be fixed.
    with torch.no_grad():
        model(**batch)
    return model, (), batch


@family(
    sites={
        "width dinov2.embeddings": 1,
        "width dinov2.encoder.layer.*.mlp.fc1": 3,
        "heads dinov2.encoder.layer.*.attention.heads": 3,
        "depth dinov2.encoder.layer.depth": 1,
    },
    fixed={
        "dinov2.embeddings.mask_token[1]": "no other parameter depends on it",
        "dinov2.embeddings.position_embeddings[1]": "a spatial size",
        "dinov2.embeddings.patch_embeddings.projection.weight[1]": "an input dimension",
        "dinov2.embeddings.patch_embeddings.projection.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def dinov2() -> Entry:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(**encoder_of_patches(), mlp_ratio=2)
    return Dinov2ForImageClassification(config), (), {"pixel_values": image(24)}


@family(
    sites={
        "width dinov2.embeddings": 1,
        "width dinov2.encoder.layer.*.mlp.gate_proj": 3,
        "heads dinov2.encoder.layer.*.attention.heads": 3,
        "depth dinov2.encoder.layer.depth": 1,
    },
    fixed={
        "dinov2.embeddings.mask_token[1]": "no other parameter depends on it",
        "dinov2.embeddings.position_embeddings[1]": "a spatial size",
        "dinov2.embeddings.patch_embeddings.projection.weight[1]": "an input dimension",
        "dinov2.embeddings.patch_embeddings.projection.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def dinov2_swiglu() -> Entry:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(**encoder_of_patches(), mlp_ratio=2, use_swiglu_ffn=True)
    return Dinov2ForImageClassification(config), (), {"pixel_values": image(24)}


@family(
    sites={
        "width convnextv2.embeddings.patch_embeddings": 1,
        "width convnextv2.encoder.stages.*.layers.*.pwconv1": 5,
        "width convnextv2.encoder.stages.*.downsampling_layer.*": 1,
        "depth convnextv2.encoder.stages.*.layers.depth": 2,
    },
    fixed={
        "convnextv2.embeddings.patch_embeddings.weight[1]": "an input dimension",
        "convnextv2.embeddings.patch_embeddings.weight[2, 3]": "the kernel size",
        "convnextv2.encoder.stages.*.layers.*.dwconv.weight[2, 3]": "the kernel size",
        "convnextv2.encoder.stages.*.downsampling_layer.*.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def convnextv2() -> Entry:
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    config = ConvNextV2Config(
        num_stages=2, hidden_sizes=[24, 40], depths=[2, 3], image_size=32, num_labels=CLASSES
    )
    return ConvNextV2ForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width swinv2.embeddings.patch_embeddings.projection": 1,
        "width *.encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.0": 1,
        "width *.encoder.layers.0.blocks.1.attention.self.continuous_position_bias_mlp.0": 1,
        "width *.encoder.layers.1.blocks.0.attention.self.continuous_position_bias_mlp.0": 1,
        "width *.encoder.layers.1.blocks.1.attention.self.continuous_position_bias_mlp.0": 1,
        "width *.encoder.layers.*.blocks.*.attention.self.continuous_position_bias_mlp.0#2": 4,
        "width swinv2.encoder.layers.*.blocks.*.intermediate.dense": 4,
        "width swinv2.encoder.layers.*.downsample.reduction": 1,
        "heads swinv2.encoder.layers.*.blocks.*.attention.self.heads": 4,
        "depth swinv2.encoder.layers.*.blocks.depth": 2,
    },
    fixed={
        "swinv2.embeddings.patch_embeddings.projection.weight[1]": "an input dimension",
        "swinv2.embeddings.patch_embeddings.projection.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def swinv2() -> Entry:
    from transformers import Swinv2Config, Swinv2ForImageClassification

    config = Swinv2Config(
        image_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        mlp_ratio=1.5,
        num_labels=CLASSES,
    )
    return Swinv2ForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width segformer.stages.*.patch_embeddings.proj": 2,
        "width segformer.stages.*.blocks.*.mlp.fc1": 4,
        "width decode_head.linear_projections.*.proj": 2,
        "width decode_head.linear_fuse": 1,
        "heads segformer.stages.*.blocks.*.attention.heads": 4,
        "depth segformer.stages.*.blocks.depth": 2,
    },
    fixed={
        "segformer.stages.*.patch_embeddings.proj.weight[1]": "an input dimension",
        "segformer.stages.*.patch_embeddings.proj.weight[2, 3]": "the kernel size",
        "*.*.attention.sequence_reduction.sequence_reduction.weight[2, 3]": "the kernel size",
        "segformer.stages.*.blocks.*.mlp.dwconv.dwconv.weight[2, 3]": "the kernel size",
        "decode_head.classifier.weight[0]": "the model's output",
    },
)
def segformer() -> Entry:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[24, 40],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=52,
        num_labels=CLASSES,
    )
    return SegformerForSemanticSegmentation(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width pvt.encoder.patch_embeddings.*": 2,
        "width pvt.encoder.block.*.*.mlp.dense1": 4,
        "heads pvt.encoder.block.*.*.attention.self.heads": 4,
        "depth pvt.encoder.block.*.depth": 2,
    },
    fixed={
        "pvt.encoder.patch_embeddings.*.position_embeddings[1]": "a spatial size",
        "pvt.encoder.patch_embeddings.*.projection.weight[1]": "an input dimension",
        "pvt.encoder.patch_embeddings.*.projection.weight[2, 3]": "the kernel size",
        "*.encoder.block.*.*.attention.self.sequence_reduction.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def pvt() -> Entry:
    from transformers import PvtConfig, PvtForImageClassification

    config = PvtConfig(
        image_size=32,
        num_encoder_blocks=2,
        depths=[2, 2],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[24, 40],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        num_labels=CLASSES,
    )
    return PvtForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width mobilevit.conv_stem.convolution": 1,
        "width mobilevit.encoder.layer.*.layer.*.expand_1x1.convolution": 4,
        "width mobilevit.encoder.layer.*.layer.*.reduce_1x1.convolution": 2,
        "width mobilevit.encoder.layer.*.downsampling_layer.expand_1x1.convolution": 3,
        "width mobilevit.encoder.layer.*.downsampling_layer.reduce_1x1.convolution": 3,
        "width mobilevit.encoder.layer.*.conv_kxk.convolution": 3,
        "width mobilevit.encoder.layer.*.conv_1x1.convolution": 3,
        "width mobilevit.encoder.layer.*.transformer.layer.*.intermediate.dense": 9,
        "width mobilevit.encoder.layer.*.conv_projection.convolution": 3,
        "width mobilevit.encoder.layer.*.fusion.convolution": 3,
        "width mobilevit.conv_1x1_exp.convolution": 1,
        "heads mobilevit.encoder.layer.*.transformer.layer.*.attention.attention.heads": 9,
        "depth mobilevit.encoder.layer.1.layer.depth": 1,
        "depth mobilevit.encoder.layer.*.transformer.layer.depth": 3,
    },
    fixed={
        "mobilevit.conv_stem.convolution.weight[1]": "an input dimension",
        "mobilevit.conv_stem.convolution.weight[2, 3]": "the kernel size",
        "*.encoder.layer.*.layer.*.conv_3x3.convolution.weight[2, 3]": "the kernel size",
        "*.layer.*.downsampling_layer.conv_3x3.convolution.weight[2, 3]": "the kernel size",
        "mobilevit.encoder.layer.*.conv_kxk.convolution.weight[2, 3]": "the kernel size",
        "mobilevit.encoder.layer.*.fusion.convolution.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
        "mobilevit.encoder.layer.*.layer.*": "it changes the shape",
    },
)
def mobilevit() -> Entry:
    from transformers import MobileViTConfig, MobileViTForImageClassification

    config = MobileViTConfig(
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 12, 20, 28, 36, 44, 60],
        num_attention_heads=4,
        mlp_ratio=2.0,
        num_labels=CLASSES,
    )
    return MobileViTForImageClassification(config), (), {"pixel_values": image(64)}


@family(
    sites={
        "width poolformer.encoder.patch_embeddings.*.projection": 2,
        "width poolformer.encoder.block.*.*.output.conv1": 4,
        "depth poolformer.encoder.block.*.depth": 2,
    },
    fixed={
        "poolformer.encoder.patch_embeddings.*.projection.weight[1]": "an input dimension",
        "poolformer.encoder.patch_embeddings.*.projection.weight[2, 3]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def poolformer() -> Entry:
    from transformers import PoolFormerConfig, PoolFormerForImageClassification

    config = PoolFormerConfig(
        num_encoder_blocks=2,
        depths=[2, 2],
        hidden_sizes=[24, 40],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        num_labels=CLASSES,
    )
    return PoolFormerForImageClassification(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width model.backbone.model.embedder.embedder.convolution": 1,
        "width model.backbone.model.encoder.stages.*.layers.*.layer.*.convolution": 4,
        "width model.backbone.model.encoder.stages.*.layers.*.shortcut.convolution": 1,
        "width model.query_position_embeddings": 1,
        "width model.encoder.layers.*.mlp.fc1": 2,
        "width model.decoder.layers.*.mlp.fc1": 3,
        "width bbox_predictor.layers.*": 2,
        "heads model.encoder.layers.*.self_attn.heads": 2,
        "heads model.decoder.layers.*.self_attn.heads": 3,
        "heads model.decoder.layers.*.encoder_attn.heads": 3,
        "depth model.backbone.model.encoder.stages.*.layers.depth": 2,
        "depth model.encoder.layers.depth": 1,
        "depth model.decoder.layers.depth": 1,
    },
    fixed={
        "model.backbone.model.embedder.embedder.convolution.weight[1]": "an input dimension",
        "model.backbone.model.embedder.embedder.convolution.weight[2, 3]": "the kernel size",
        "*.model.encoder.stages.*.layers.*.layer.*.convolution.weight[2, 3]": "the kernel size",
        "model.query_position_embeddings.weight[0]": "the model's output",
        "model.input_projection.weight[0]": "counts positions",
        "class_labels_classifier.weight[0]": "the model's output",
        "bbox_predictor.layers.*.weight[0]": "the model's output",
        "model.backbone.model.encoder.stages.*.layers.*": "it changes the shape",
    },
)
def detr_resnet() -> Entry:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=20,
        hidden_sizes=[20, 36],
        depths=[2, 2],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=72,
        num_queries=9,
        num_labels=CLASSES,
    )
    return DetrForObjectDetection(config), (), {"pixel_values": image(32)}


@family(
    sites={
        "width videomae.encoder.layer.*.intermediate.dense": 3,
        "heads videomae.encoder.layer.*.attention.attention.heads": 3,
        "depth videomae.encoder.layer.depth": 1,
    },
    fixed={
        "*.embeddings.patch_embeddings.projection.weight[0]": "a tensor that is no parameter",
        "videomae.embeddings.patch_embeddings.projection.weight[1]": "an input dimension",
        "videomae.embeddings.patch_embeddings.projection.weight[2, 3, 4]": "the kernel size",
        "classifier.weight[0]": "the model's output",
    },
)
def videomae() -> Entry:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(**encoder_of_patches(), num_frames=4, tubelet_size=2)
    clip = torch.randn(BATCH, 4, 3, 24, 24)
    return VideoMAEForVideoClassification(config), (), {"pixel_values": clip}
