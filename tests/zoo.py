"""Small model families on which the elastic core is tested.

`ZOO` maps a name to a function without arguments that returns `(module, args, kwargs)`: a
freshly built float32 network in eval mode with example inputs. Building is seeded (the same
weights and inputs at each call) and leaves the global random state as it was.

Widths are distinct numbers on purpose: a dimension that is confused with another one then
shows as a wrong size rather than as a wrong value.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Entry = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

ZOO: dict[str, Callable[[], Entry]] = {}

# Shared sizes of the transformers: 4 heads of 12 make 48.
BATCH, LENGTH, VOCAB, HIDDEN, HEADS, FFN, LAYERS = 2, 11, 97, 48, 4, 80, 3
CLASSES = 7


def family(build: Callable[[], Entry]) -> Callable[[], Entry]:
    """Registers a builder under its own name, seeded by that name."""

    @functools.wraps(build)
    def seeded() -> Entry:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(build.__name__.encode()))
            module, args, kwargs = build()
        return module.eval(), args, kwargs

    ZOO[build.__name__] = seeded
    return seeded


def tokens(length: int = LENGTH, vocab: int = VOCAB) -> Tensor:
    """Random token ids that avoid the special ids 0 to 4, shape (batch, length)."""
    return torch.randint(5, vocab, (BATCH, length))


def image(size: int, channels: int = 3) -> Tensor:
    return torch.randn(BATCH, channels, size, size)


# --------------------------------------------------------------- transformers: encoders


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


@family
def bert() -> Entry:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**encoder_sizes()))
    return (
        model,
        (),
        {"input_ids": tokens(), "attention_mask": torch.ones(BATCH, LENGTH).long()},
    )


@family
def roberta() -> Entry:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(**encoder_sizes()))
    return model, (), {"input_ids": tokens()}


@family
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


@family
def albert() -> Entry:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(**encoder_sizes(), embedding_size=28)
    return AlbertForSequenceClassification(config), (), {"input_ids": tokens()}


@family
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


# --------------------------------------------------------------- transformers: decoders


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


@family
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


@family
def llama() -> Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder_sizes())), (), {"input_ids": tokens()}


@family
def llama_tied() -> Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**decoder_sizes(), tie_word_embeddings=True)
    return LlamaForCausalLM(config), (), {"input_ids": tokens()}


@family
def qwen2() -> Entry:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**decoder_sizes())), (), {"input_ids": tokens()}


@family
def gemma() -> Entry:
    from transformers import GemmaConfig, GemmaForCausalLM

    # Gemma's heads need not fill the hidden width: 4 x 10 = 40 inside a width of 48.
    config = GemmaConfig(**decoder_sizes(), head_dim=10)
    return GemmaForCausalLM(config), (), {"input_ids": tokens()}


@family
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


@family
def mixtral() -> Entry:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**decoder_sizes(), num_local_experts=5, num_experts_per_tok=2)
    return MixtralForCausalLM(config), (), {"input_ids": tokens()}


@family
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


# ----------------------------------------------------- transformers: encoder-decoder, pairs


@family
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


@family
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


@family
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


# ----------------------------------------------------------------- transformers: vision


@family
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


@family
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


@family
def convnext() -> Entry:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_stages=2, hidden_sizes=[24, 40], depths=[2, 3], image_size=32, num_labels=CLASSES
    )
    return ConvNextForImageClassification(config), (), {"pixel_values": image(32)}


@family
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


@family
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


@family
def mobilenet_v2() -> Entry:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=CLASSES)
    return MobileNetV2ForImageClassification(config), (), {"pixel_values": image(32)}


@family
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


@family
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


# --------------------------------------------------------------------- by hand: vision


class DenseBlock(nn.Module):
    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        widths = [channels + i * growth for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, growth, 3, padding=1, bias=False) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 18, 3, padding=1, bias=False)
        self.first = DenseBlock(18, 10, 3)  # 18 + 3 x 10 = 48
        self.norm = nn.BatchNorm2d(48)
        self.transition = nn.Conv2d(48, 26, 1, bias=False)
        self.second = DenseBlock(26, 14, 2)  # 26 + 2 x 14 = 54
        self.last = nn.BatchNorm2d(54)
        self.head = nn.Linear(54, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(F.relu(self.norm(self.first(self.stem(x)))))
        x = F.relu(self.last(self.second(F.avg_pool2d(x, 2))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@family
def densenet() -> Entry:
    return DenseNet(), (image(16),), {}


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, squeezed)
        self.up = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.shape
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gate.view(batch, channels, 1, 1)


class SqueezeExciteBlock(nn.Module):
    def __init__(self, channels: int, inner: int, squeezed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.gate = SqueezeExcite(channels, squeezed)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.gate(self.norm2(self.conv2(inner))))


@family
def squeeze_excite() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1),
        SqueezeExciteBlock(24, 40, 6),
        SqueezeExciteBlock(24, 32, 10),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )
    return model, (image(16),), {}


class OptionABlock(nn.Module):
    """CIFAR residual block whose shortcut is a strided slice and zero padding."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + x)


@family
def resnet_option_a() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        OptionABlock(16, 16, 1),
        OptionABlock(16, 16, 1),
        OptionABlock(16, 32, 2),
        OptionABlock(32, 32, 1),
        OptionABlock(32, 64, 2),
        OptionABlock(64, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )
    return model, (image(16),), {}


@family
def mobilenet_v3() -> Entry:
    from supple.models.base import build

    stages = [
        {"channels": 16, "blocks": 2, "expansion": 3, "stride": 2, "squeeze": True},
        {"channels": 24, "blocks": 3, "expansion": 4, "kernel": 5, "stride": 2},
        {"channels": 40, "blocks": 2, "expansion": 3, "squeeze": True, "hard_swish": True},
    ]
    model = build("mobilenet-v3", stages=stages, hidden=88, image_size=32, classes=CLASSES)
    return model, (image(32),), {}


class ResNeXtBlock(nn.Module):
    def __init__(self, channels: int, inner: int, groups: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.grouped = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.expand = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.reduce(x)))
        inner = F.relu(self.norm2(self.grouped(inner)))
        return F.relu(x + self.norm3(self.expand(inner)))


@family
def resnext() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 28, 3, padding=1),
        ResNeXtBlock(28, 40, 5),
        ResNeXtBlock(28, 48, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(28, CLASSES),
    )
    return model, (image(16),), {}


class UNetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = UNetBlock(3, 20, 4)
        self.down2 = UNetBlock(20, 36, 4)
        self.middle = UNetBlock(36, 48, 6)
        self.up2 = UNetBlock(48 + 36, 32, 4)
        self.up1 = UNetBlock(32 + 20, 24, 4)
        self.head = nn.Conv2d(24, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2.0), second], 1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2.0), first], 1))
        return self.head(x)


@family
def unet() -> Entry:
    return UNet(), (image(16),), {}


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleBlock(nn.Module):
    """ShuffleNetV2 unit: half of the channels pass, the others are transformed, then mixed."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        half = channels // 2
        self.expand = nn.Conv2d(half, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, half, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.norm1(self.expand(right)))
        right = self.norm2(self.depthwise(right))
        right = F.relu(self.norm3(self.project(right)))
        return channel_shuffle(torch.cat([left, right], 1), 2)


@family
def shufflenet() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        ShuffleBlock(24, 20),
        ShuffleBlock(24, 28),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )
    return model, (image(16),), {}


@family
def conv_transposed_decoder() -> Entry:
    model = nn.Sequential(
        nn.Linear(13, 40 * 4 * 4),
        nn.Unflatten(1, (40, 4, 4)),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.ConvTranspose2d(40, 24, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 18, 4, stride=2, padding=1, groups=2),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(18, 3, 3, padding=1),
        nn.Tanh(),
    )
    return model, (torch.randn(BATCH, 13),), {}


# ------------------------------------------------------------------- by hand: sequences


class EncoderClassifier(nn.Module):
    """Classifier on `nn.TransformerEncoder`, PyTorch's own stack."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, FFN, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)).mean(1))


@family
def transformer_encoder() -> Entry:
    return EncoderClassifier(), (tokens(),), {}


class TimmAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape  # noqa: N806 (as in timm)
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(B, N, C))


class TimmBlock(nn.Module):
    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TimmAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, HIDDEN, 8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, HIDDEN) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 10, HIDDEN) * 0.02)
        self.blocks = nn.ModuleList(TimmBlock(HIDDEN, HEADS, FFN) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@family
def timm_vit() -> Entry:
    return TimmViT(), (image(24),), {}


class NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()  # noqa: N806 (as in nanoGPT)
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=False)
        self.attn = NanoAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        self.wpe = nn.Embedding(37, HIDDEN)
        self.h = nn.ModuleList(NanoBlock(HIDDEN, HEADS, FFN) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(HIDDEN, bias=False)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.wte(ids) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


@family
def nanogpt() -> Entry:
    return NanoGPT(), (tokens(),), {}


class GatedMLP(nn.Module):
    """Residual GLU block: one projection whose output is cut in two halves."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(value * F.silu(gate))


@family
def glu_mlp() -> Entry:
    model = nn.Sequential(
        nn.Linear(23, HIDDEN), GatedMLP(HIDDEN, 36), GatedMLP(HIDDEN, 52), nn.Linear(HIDDEN, 7)
    )
    return model, (torch.randn(BATCH, LENGTH, 23),), {}


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 28)
        self.lstm = nn.LSTM(28, 20, num_layers=2, batch_first=True)
        self.hidden = nn.Linear(20, 34)
        self.head = nn.Linear(34, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(ids))
        return self.head(F.relu(self.hidden(states[:, -1])))


@family
def lstm() -> Entry:
    return LSTMClassifier(), (tokens(),), {}
