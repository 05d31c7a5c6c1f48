"""One quantizer on one network: a cell of `benchmarks.quantize`, in a process of its own.

`python -m benchmarks._quantize_arms NETWORK SETTING ARM SEED STEPS`; arms of peers are run by
the peers' Python. The last line printed is the cell, as JSON. Seconds are of quantizing alone;
the peak of memory is how much more the process held at once while quantizing than before.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import supple
from benchmarks._prune_llm_arms import held
from reproductions._minilm import encoder, tokenizer
from reproductions.prune import _llama, _resnet20
from supple.data.base import find
from supple.models.base import build
from supple.quantize import _qat
from supple.quantize.base import baseline
from supple.technique import technique
from supple.testing.outliers import outlier_twin
from supple.training.seeds import generator
from supple.weights import matrices

GROUP = 64
WINDOWS, TESTED = 64, 128
IMAGES, BATCHES = 2000, 8
SENTENCES, RANKED = 128, 400
STEPS = 100
"""Updates for each block, of what learns block by block."""

Batches = list[Any]
Arm = Callable[[nn.Module, Batches, int], nn.Module]

# ----------------------------------------------------------------------------------- arms


def named(name: str, **settings: Any) -> Arm:
    """A published quantizer without a key."""

    def arm(model: nn.Module, data: Batches, seed: int) -> nn.Module:
        made = baseline(name, **settings)
        return made.apply(model, calibration=data, generator=generator(seed, name))

    return arm


def keyed(key: str, **settings: Any) -> Arm:
    """A technique, by its key."""

    def arm(model: nn.Module, data: Batches, seed: int) -> nn.Module:
        method = technique(f"quantize/{key}")(**settings)
        return method.apply(  # type: ignore[no-any-return]
            model, calibration=data, loss=_llama.loss, generator=generator(seed, key)
        )

    return arm


def trained(make: Callable[[], Any], steps: int, lr: float) -> Arm:
    """A rule that rounds while the network trains."""

    def arm(model: nn.Module, data: Batches, seed: int) -> nn.Module:
        rule = make()
        net = rule.wrap(model, (data[0][0],))
        supple.train(
            net,
            _resnet20.images().train,
            _resnet20.loss,
            method=rule,
            steps=steps,
            optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-4),
            schedule="cosine",
            seed=seed,
            log_every=steps,
            progress=False,
        )
        done: nn.Module = rule.finished(net)
        return done

    return arm


def by_llm_compressor(method: str, bits: int, activations: int | None = None) -> Arm:
    """A modifier of llm-compressor: symmetric groups, as ours."""

    def arm(model: nn.Module, data: Batches, seed: int) -> nn.Module:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
        from llmcompressor.modifiers.transform import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
        }
        scheme: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
        if activations is not None:
            scheme["input_activations"] = {
                "num_bits": activations,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            }
        told = {"config_groups": {"group_0": scheme}, "ignore": ["re:.*lm_head"]}
        recipe = {
            "rtn": lambda: [QuantizationModifier(**told)],
            "gptq": lambda: [GPTQModifier(actorder=None, **told)],
            "awq": lambda: [AWQModifier(duo_scaling=False), QuantizationModifier(**told)],
        }[method]()
        # Its AWQ pins memory for a GPU, which fails where there is none.
        IntermediatesCache.pin_memory = lambda cache, index, names=None: None
        rows = [row for batch in data for row in batch["input_ids"].tolist()]
        columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        oneshot(
            model=model,
            dataset=Dataset.from_dict(columns),
            recipe=recipe,
            max_seq_length=len(rows[0]),
            num_calibration_samples=len(rows),
        )
        return model

    return arm


def by_hqq(bits: int) -> Arm:
    """HQQ's own layers, with zero points between numbers."""

    def arm(model: nn.Module, data: Batches, seed: int) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        for name in matrices(model):
            path = name.rpartition(".")[0]
            layer = HQQLinear(
                model.get_submodule(path),
                quant_config=config,
                compute_dtype=torch.float32,
                device="cpu",
            )
            model.set_submodule(path, layer)
        return model

    return arm


def by_torchao(bits: int) -> Arm:
    """Torchao's whole numbers in groups, weights only."""

    def arm(model: nn.Module, data: Batches, seed: int) -> nn.Module:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP)
        )
        wanted = {name.rpartition(".")[0] for name in matrices(model)}
        quantize_(model, config, filter_fn=lambda _, path: path in wanted)
        return model

    return arm


def weights_only(bits: int) -> dict[str, Arm]:
    """Ways to round the weights of a language model, all with groups of 64."""
    both = {"bits": bits, "group_size": GROUP}
    arms = {
        "rtn": named("rtn", **both),
        "rtn, least error": named("rtn-mse", **both),
        "hqq": named("hqq", **both),
        "gptq": named("gptq", symmetric=True, **both),
        "gptq, zero points": named("gptq", **both),
        "gptq, least error, largest inputs first": named(
            "gptq", observer="mse", order="activation", **both
        ),
        "quantize/awq": keyed("awq", **both),
        "quantize/flexround": keyed("flexround", steps=STEPS, **both),
        "quantize/flatquant": keyed("flatquant", activations=None, steps=STEPS, **both),
        "quantize/vptq": keyed("vptq", bits=bits, **({"vector": 2} if bits > 2 else {})),
        "quantize/pvq": keyed("pvq", bits=bits),
        "llm-compressor rtn": by_llm_compressor("rtn", bits),
        "llm-compressor gptq": by_llm_compressor("gptq", bits),
        "llm-compressor awq": by_llm_compressor("awq", bits),
        "hqq's own": by_hqq(bits),
        "torchao rtn": by_torchao(bits),
    }
    if bits == 4:
        arms |= {
            "nf4": named("nf4"),
            "mxfp4": named("mxfp4"),
            "nvfp4": named("nvfp4"),
            "quantize/finequant": keyed("finequant"),
            "quantize/zeroquant-fp": keyed("zeroquant-fp", activations=None),
            "quantize/mr-gptq": keyed("mr-gptq", activations=None),
        }
    if bits < 4:
        arms["quantize/slim-llm"] = keyed("slim-llm", **both)
    if bits == 2:
        arms["quantize/fast-2bit"] = keyed("fast-2bit", group_size=GROUP)
    return arms


def both_of(bits: int) -> dict[str, Arm]:
    """Ways to round weights and what linear layers are given, both to so many bits."""
    each = {"bits": bits, "activations": bits, "group_size": GROUP}
    return {
        "rtn": named("rtn", **each),
        "gptq": named("gptq", symmetric=True, **each),
        "quarot": named("quarot", **each),
        "quarot, gptq": named("quarot", solver="gptq", **each),
        "quantize/awq": keyed("awq", **each),
        "quantize/flatquant": keyed("flatquant", steps=STEPS, **each),
        "quantize/svdquant": keyed("svdquant", **each),
        "quantize/mr-gptq": keyed("mr-gptq"),
        "llm-compressor rtn": by_llm_compressor("rtn", bits, bits),
        "llm-compressor gptq": by_llm_compressor("gptq", bits, bits),
    }


def convolutions(bits: int, steps: int) -> dict[str, Arm]:
    """Ways to round a ResNet: at once, and while it trains."""
    each = {"bits": bits, "activations": bits}
    rules: dict[str, Callable[[], Any]] = {
        f"trained, {name}": partial(_qat.baseline, name, **each)
        for name in ("lsq", "pact", "int8")
    }
    for key in ("quest", "ofq"):
        rules[f"trained, quantize/{key}"] = partial(technique(f"quantize/{key}"), **each)
    return {
        "quantize/int8-whitepaper": keyed("int8-whitepaper", **each),
        "quantize/int8-whitepaper, least error": keyed(
            "int8-whitepaper", observer="mse", **each
        ),
        "quantize/flexround": keyed("flexround", group_size=None, steps=2 * STEPS, **each),
        **{name: trained(make, steps, 0.01) for name, make in rules.items()},
    }


def sentences(bits: int, activations: int | None) -> dict[str, Arm]:
    """Ways to round an encoder of sentences."""
    each = {"bits": bits, "activations": activations}
    grouped = {**each, "group_size": None if activations else GROUP}
    return {
        "rtn": named("rtn", **grouped),
        "gptq": named("gptq", **grouped),
        "quantize/awq": keyed("awq", **grouped),
        "quarot": named("quarot", **grouped),
    }


def arms(network: str, steps: int) -> dict[str, dict[str, Arm]]:
    """All arms of a network, by setting."""
    found: dict[str, dict[str, Arm]]
    if network.startswith("llama"):
        found = {f"W{bits}": weights_only(bits) for bits in (4, 3, 2)} | {"W4A4": both_of(4)}
    elif network.startswith("resnet"):
        found = {f"W{bits}A{bits}": convolutions(bits, steps) for bits in (8, 4, 3, 2)}
    else:
        found = {"W8A8": sentences(8, 8), "W4": sentences(4, None)}
    return {"none": {"none": lambda model, data, seed: model}, **found}


# ------------------------------------------------------------------------------ networks


def llama(twin: bool) -> nn.Module:
    """The small Llama, or its twin with outliers."""
    model = _llama.llama()
    if twin:
        ids = {"input_ids": _llama.unseen(1)[0]["input_ids"]}
        model = outlier_twin(model, (), ids, generator=generator(0, "twin"))
    return model


def resnet(depth: int) -> nn.Module:
    """A published ResNet for CIFAR-10."""
    return build(
        "cifar-resnet", depth=depth, weights=find(f"resnet-cifar10/resnet{depth}.safetensors")
    )


@cache
def texts(first: int, count: int) -> dict[str, Tensor]:
    """Lines of WikiText that are long enough to be told apart, as tokens."""
    path = Path(_llama.folder()).parent / "text" / "wikitext2-valid.txt"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 400]
    halves = [
        part for line in lines[first : first + count] for part in (line[:200], line[200:400])
    ]
    return dict(
        tokenizer()(halves, padding=True, truncation=True, max_length=64, return_tensors="pt")
    )


@torch.no_grad()
def embeddings(model: nn.Module) -> Tensor:
    """Mean embeddings of both halves of each text, one after the other."""
    batch = texts(SENTENCES, RANKED)
    parts = []
    for start in range(0, len(batch["input_ids"]), 64):
        part = {name: rows[start : start + 64] for name, rows in batch.items()}
        hidden = model(**part).last_hidden_state
        mask = part["attention_mask"][..., None].float()
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(parts), dim=1)


def calibration(network: str, seed: int) -> Batches:
    """What quantizers may look at."""
    if network.startswith("llama"):
        return _llama.windows(seed, WINDOWS)
    if network.startswith("resnet"):
        train = _resnet20.images().train.epoch(0, seed=seed)
        return [batch for batch, _ in zip(train, range(BATCHES), strict=False)]
    batch, order = (
        texts(0, SENTENCES),
        torch.randperm(2 * SENTENCES, generator=generator(seed, "texts")),
    )
    return [{name: rows[part] for name, rows in batch.items()} for part in order.split(32)]


def made(network: str) -> nn.Module:
    """A network as it is given."""
    if network.startswith("llama"):
        return llama(network.endswith("twin"))
    return resnet(int(network[6:])) if network.startswith("resnet") else encoder()


def judged(network: str, model: nn.Module) -> dict[str, float]:
    """How good a network is."""
    if network.startswith("llama"):
        return {"perplexity": round(_llama.perplexity(model, _llama.unseen(TESTED)), 4)}
    if network.startswith("resnet"):
        test = _resnet20.images().test
        return {"accuracy": round(100 * _resnet20.accuracy(model, test, IMAGES), 3)}
    found, before = embeddings(model), embeddings(made(network))
    ranks = (found[::2] @ found[1::2].T).argmax(1) == torch.arange(len(found) // 2)
    return {
        "cosine": round(float((found * before).sum(1).mean()), 5),
        "retrieved": round(100 * float(ranks.double().mean()), 3),
    }


def bits_of(before: Mapping[str, nn.Module], model: nn.Module) -> float | None:
    """Bits that a weight takes, everything counted; None where a peer's are not packed."""
    bits = numbers = 0
    for name, layer in before.items():
        module = model.get_submodule(name.rpartition(".")[0])
        state = module.state_dict()
        if any(tuple(one.shape) == tuple(layer.weight.shape) for one in state.values()):
            return None
        bits += 8 * sum(one.nbytes for key, one in state.items() if not key.endswith("bias"))
        numbers += layer.weight.numel()  # type: ignore[operator]
    return round(bits / numbers, 4)


def cell(network: str, setting: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Quantizes a network, and tells how good and how small it is."""
    torch.set_num_threads(1)
    model, data = made(network), calibration(network, seed)
    layers = dict(matrices(made(network)))
    judged(network, model) if setting == "none" else None
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before, start = held(), time.process_time()
    small = arms(network, steps)[setting][arm](model, data, seed)
    seconds, peak = time.process_time() - start, held() - before
    return {
        **judged(network, small.eval()),
        "bits": bits_of(layers, small),
        "seconds": round(seconds, 2),
        "peak_bytes": peak,
    }


if __name__ == "__main__":
    _network, _setting, _arm, *_numbers = sys.argv[1:]
    print(json.dumps(cell(_network, _setting, _arm, *map(int, _numbers))))
