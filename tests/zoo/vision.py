"""Vision models from `transformers`."""

from __future__ import annotations

from tests.zoo.base import CLASSES, FFN, HEADS, HIDDEN, LAYERS, Entry, family, image


@family()
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


@family()
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


@family()
def convnext() -> Entry:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_stages=2, hidden_sizes=[24, 40], depths=[2, 3], image_size=32, num_labels=CLASSES
    )
    return ConvNextForImageClassification(config), (), {"pixel_values": image(32)}


@family()
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


@family()
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


@family()
def mobilenet_v2() -> Entry:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=CLASSES)
    return MobileNetV2ForImageClassification(config), (), {"pixel_values": image(32)}


@family()
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


@family()
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
