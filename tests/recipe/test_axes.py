import pytest

from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.errors import SettingError
from supple.recipe.axes import axes_of, axis_names


def test_every_axis_file_is_an_axis_of_that_name():
    needed = {
        "exit": {"classifier": "head"},
        "tokens": {"at": ["blocks.1"]},
        "patch_size": {"choices": [4], "at": "embed"},
        "placement": {"places": ["places.0", "places.1"], "number": 1},
        "scale_depth": {"early": 2},
    }
    for name in axis_names():
        [axis] = axes_of({name: needed.get(name)})
        assert axis.name == name
    assert {"width", "heads", "depth", "resolution"} <= set(axis_names())
    assert not {"copies", "routed"} & set(axis_names())  # a training method's business


def test_settings_become_fields_and_nothing_leaves_the_choice_to_elastic():
    axes = axes_of({"width": {"choices": ["0.5", 1.0], "divisor": 4}, "depth": {}})
    assert axes == [Width((0.5, 1.0), divisor=4), Depth()]
    assert axes_of({}) is None


def test_an_unknown_axis_is_told_with_the_nearest():
    with pytest.raises(SettingError, match="no axis 'dept', did you mean 'depth'"):
        axes_of({"dept": {}})
