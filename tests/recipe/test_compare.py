import pytest

from supple.recipe.bench import Materials
from supple.recipe.compare import _fresh, learning_rates
from supple.recipe.load import apply_overrides, parse_source, validate
from supple.recipe.models import ModelSource
from tests.recipe.small_recipe import SMALL


def recipe(*overrides):
    return validate(apply_overrides(parse_source(SMALL), overrides))


def test_three_learning_rates_around_the_recipes_own_are_tried():
    assert learning_rates(recipe("compare={}", "train.lr=3e-3")) == pytest.approx(
        (1e-3, 3e-3, 9e-3)
    )
    assert learning_rates(recipe("compare.lrs=[1e-2, '5e-3']")) == (1e-2, 5e-3)


@pytest.mark.parametrize(
    ("wanted", "pretrained", "expected"),
    [
        ("null", False, True),
        ("null", True, False),
        ("true", True, True),
        ("false", False, False),
    ],
)
def test_sizes_alone_start_anew_unless_the_supernet_started_from_trained_weights(
    wanted, pretrained, expected
):
    source = ModelSource("x", {}, lambda: None, pretrained)
    materials = Materials(recipe(f"compare.fresh={wanted}"), None, None, source)
    assert _fresh(materials) is expected
