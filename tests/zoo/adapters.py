"""Models wrapped in low-rank adapters, with the structure that `peft` gives them."""

from __future__ import annotations

from torch import Tensor, nn

from tests.zoo.base import Entry, family, tokens
from tests.zoo.decoders import decoder_sizes


class AdaptedLinear(nn.Module):
    """A frozen layer and, beside it, the product of two narrow ones (`lora.Linear`)."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        into, out = base_layer.in_features, base_layer.out_features
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(into, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
        self.r = {"default": rank}
        self.scaling = {"default": alpha / rank}

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        for name, narrow in self.lora_A.items():
            wide = self.lora_B[name]
            result = result + wide(narrow(self.lora_dropout[name](x))) * self.scaling[name]
        return result


@family(
    sites={
        "width model.embed_tokens": 1,
        "width model.layers.*.mlp.gate_proj": 3,
        "width model.layers.*.self_attn.q_proj.lora_A.default": 3,
        "width model.layers.*.self_attn.v_proj.lora_A.default": 3,
        "heads model.layers.*.self_attn.*heads": 3,
        "depth model.layers.depth": 1,
    },
    fixed={
        "model.embed_tokens.weight[0]": "looked up by index",
        "lm_head.weight[0]": "the model's output",
    },
)
def llama_lora() -> Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**decoder_sizes()))
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj = AdaptedLinear(attention.q_proj, rank=6, alpha=12)
        attention.v_proj = AdaptedLinear(attention.v_proj, rank=6, alpha=12)
    return model, (), {"input_ids": tokens()}
