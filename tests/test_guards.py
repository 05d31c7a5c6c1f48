"""The guards against a zoo, tried on the tree and on bad source planted for them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from supple.technique import technique, techniques
from supple.testing.mutant import own_methods, survives
from tests.guards import GUARDS, ROOT, Guard, offences

PLANTED = {
    "hooks": [
        "layer.register_forward_hook(f)",
        "self.model[0].register_full_backward_hook(f)",
        "torch.nn.modules.module.register_module_forward_pre_hook(f)",
    ],
    "backward": ["loss.backward()", "(a + b).sum().backward(retain_graph=True)"],
    "optimizer_steps": ["optimizer.step()", "self.optimizer.step()", "self._opt.step(closure)"],
    "global_seeds": [
        "torch.manual_seed(0)",
        "torch.cuda.manual_seed_all(0)",
        "np.random.seed(0)",
        "random.seed(0)",
        "from torch import manual_seed",
    ],
    "pickles": [
        "torch.save(model, path)",
        "torch.load(path)",
        "import pickle",
        "from joblib import dump",
        "np.load(path, allow_pickle=True)",
    ],
    "vision_packages": ["import torchvision", "from timm.models import create_model"],
    "bisections": [
        "while high - low > 1:\n    mid = (low + high) // 2\n"
        "    if cost(mid) > budget:\n        high = mid\n    else:\n        low = mid",
        "for _ in range(60):\n    t = 0.5 * (a + b)\n    (a, b) = (t, b) if f(t) else (a, t)",
    ],
    "parameter_shares": [
        "share = kept / sum(p.numel() for p in model.parameters())",
        "for name, p in model.named_parameters():\n    total += p.numel()",
    ],
    "prints": ["print('done')"],
    "swallowed": [
        "try:\n    f()\nexcept:\n    g()",
        "for x in y:\n    try:\n        f()\n    except Exception:\n        continue",
    ],
}
HARMLESS = [
    "handle = tensor.register_hook(f)",
    "run.step(batch)",
    "generator = torch.Generator().manual_seed(0)",
    "program = torch.export.save(program, path)",
    "np.load(path, allow_pickle=False)",
    "for _ in range(3):\n    middle = (low + high) / 2\n    points.append(middle)",
    "sizes = [p.numel() for p in model.parameters()]",
    "try:\n    f()\nexcept Exception as error:\n    raise SettingError('why') from error",
    "try:\n    f()\nexcept OSError:\n    pass",
]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_the_tree_has_nothing_forbidden(guard: Guard) -> None:
    assert offences(guard) == []


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_finds_what_it_forbids(guard: Guard, tmp_path: Path) -> None:
    for number, source in enumerate(PLANTED[guard.name]):
        (tmp_path / "supple").mkdir(exist_ok=True)
        (tmp_path / "supple" / "planted.py").write_text(f"x = 1\n{source}\n", encoding="utf-8")
        found = offences(guard, tmp_path)
        assert len(found) == 1, f"planted source {number}: {found}"
        assert found[0].startswith("supple/planted.py:")


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_lets_pass_what_only_looks_like_it(guard: Guard) -> None:
    for source in HARMLESS:
        assert list(guard.finds(ast.parse(source))) == [], source


def test_a_guard_looks_away_only_from_files_that_exist_or_are_to_come() -> None:
    to_come = {"supple/calibrate.py", "supple/allocate.py"}
    named = {name for guard in GUARDS for name in guard.allowed}
    assert {name for name in named if not (ROOT / name).exists()} <= to_come


def _own_test(key: str) -> Path:
    room, _, name = key.replace("-", "_").partition("/")
    return ROOT / "tests" / room / f"test_{name}.py"


@pytest.mark.parametrize("key", techniques())
def test_a_technique_has_a_test_of_its_own(key: str) -> None:
    assert _own_test(key).exists()


@pytest.mark.parametrize("key", techniques())
def test_a_technique_is_tested_for_the_idea_that_makes_it(key: str) -> None:
    cls = technique(key)
    if not cls.distinguishing:
        assert own_methods(cls) == [], f"{cls.__name__} must name its `distinguishing` method"
        return
    assert not survives(cls, _own_test(key)), (
        f"{_own_test(key).name} passes with the default in the place of "
        f"{cls.__name__}.{cls.distinguishing}: it checks nothing of the idea"
    )
