"""Mixtures of experts, most from `transformers`: stacked expert tensors behind a router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.base import BATCH, FFN, HEADS, HIDDEN, LAYERS, LENGTH, Entry, family, tokens
from tests.zoo.decoders import decoder_sizes


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.experts": 3,
        "width model.layers.*.mlp.shared_expert.gate_proj": 3,
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
def qwen2_moe() -> Entry:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **decoder_sizes(),
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=36,
        shared_expert_intermediate_size=52,
        decoder_sparse_step=1,
    )
    return Qwen2MoeForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 2,
        "width model.layers.*.mlp.experts": 1,
        "heads model.layers.*.self_attn.heads": 3,
        "experts model.layers.*.mlp.num_experts": 1,
        "experts model.layers.*.mlp.top_k": 1,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def qwen3_moe() -> Entry:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **decoder_sizes(),
        head_dim=10,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=36,
        decoder_sparse_step=2,
    )
    return Qwen3MoeForCausalLM(config), (), {"input_ids": tokens()}


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
def olmoe() -> Entry:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(**decoder_sizes(), num_experts=6, num_experts_per_tok=3)
    return OlmoeForCausalLM(config), (), {"input_ids": tokens()}


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
def gpt_oss() -> Entry:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **decoder_sizes(),
        head_dim=10,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )
    return GptOssForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.self_attn.q_a_proj": 3,
        "width model.layers.*.self_attn.kv_a_proj_with_mqa": 3,
        "width model.layers.*.mlp.gate_proj": 1,
        "width model.layers.*.mlp.experts": 2,
        "width model.layers.*.mlp.shared_experts.gate_proj": 2,
        "heads model.layers.*.self_attn.heads": 3,
        "experts model.layers.*.mlp.num_experts": 2,
        "experts model.layers.*.mlp.num_experts#2": 2,
        "experts model.layers.*.mlp.top_k": 2,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def deepseek_v3() -> Entry:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **{**decoder_sizes(), "num_key_value_heads": HEADS},
        moe_intermediate_size=36,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=18,
        q_lora_rank=22,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=14,
    )
    return DeepseekV3ForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.block_sparse_moe.experts": 3,
        "heads model.layers.*.self_attn.heads": 3,
        "experts model.layers.*.block_sparse_moe.num_experts": 3,
        "experts model.layers.*.block_sparse_moe.top_k": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def granite_moe() -> Entry:
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    config = GraniteMoeConfig(**decoder_sizes(), num_local_experts=6, num_experts_per_tok=3)
    return GraniteMoeForCausalLM(config), (), {"input_ids": tokens()}


class SoftMixture(nn.Module):
    """Every expert on every token, weighed by a sparse gate: no data-dependent shapes."""

    def __init__(self, width: int, inner: int, experts: int, visited: int) -> None:
        super().__init__()
        self.visited = visited
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, inner) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, inner, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores, chosen = self.router(y).topk(self.visited, dim=-1)
        empty = torch.zeros(*chosen.shape[:-1], self.up.shape[0], dtype=y.dtype)
        gate = empty.scatter(-1, chosen, scores.softmax(-1))
        hidden = torch.einsum("btd,edf->betf", y, self.up).relu()
        return x + torch.einsum("betf,efd,bte->btd", hidden, self.down, gate)


@family(
    sites={
        "width *": 4,
        "experts *.num_experts": 3,
        "experts *.top_k": 3,
        "depth depth": 1,
    },
    fixed={
        "*.weight[1]": "an input dimension",
        "*.weight[0]": "the model's output",
        "*": "it changes the shape",
    },
)
def soft_mixture() -> Entry:
    model = nn.Sequential(
        nn.Linear(23, HIDDEN),
        *(SoftMixture(HIDDEN, FFN, 6, 2) for _ in range(LAYERS)),
        nn.Linear(HIDDEN, 7),
    )
    return model, (torch.randn(BATCH, LENGTH, 23),), {}
