"""Truths about configs, sites and spaces."""

from __future__ import annotations

import copy
import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.errors import SettingError
from supple.space import Config, Fixed, Site, Space, numpy_generator

few = settings(max_examples=40, deadline=None, derandomize=True)


def two_blocks() -> Space:
    """Two blocks that may be skipped; the second has a site inside a site, by hand."""
    return Space(
        [
            Site("stem", "width", (4, 8, 16), 16),
            Site("b1.depth", "depth", (0, 1), 1),
            Site("b1.width", "width", (8, 16), 16, (("b1.depth", frozenset({1})),)),
            Site("b2.depth", "depth", (0, 1), 1),
            Site("b2.op", "operator", (0, 1, 2), 0, (("b2.depth", frozenset({1})),)),
            Site("b2.rank", "rank", (2, 4, 6, 8), 8, (("b2.op", frozenset({1, 2})),)),
        ],
        [Fixed("head", "its output is the model's output")],
    )


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Small spaces with conditions, also several on one site and values that never occur."""
    sites: list[Site] = []
    for i in range(draw(st.integers(0, 6))):
        choices = tuple(sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3))))
        parents = draw(st.sets(st.sampled_from(range(i)), max_size=2)) if i else set()
        inside = tuple(
            (sites[p].name, frozenset(draw(st.sets(st.integers(0, 9), max_size=6))))
            for p in sorted(parents)
        )
        # Names run against the order, so that sorting by name shows.
        full = draw(st.sampled_from(choices))
        sites.append(Site(f"s{9 - i}", "width", choices, full, inside))
    order = draw(st.permutations(sites))
    return Space(order)


def exists(space: Space, assigned: dict[str, int], name: str) -> bool:
    """The definition of a site's existence, spelled out."""
    return all(
        exists(space, assigned, parent) and assigned[parent] in values
        for parent, values in space.site(name).inside
    )


def every_config(space: Space) -> set[Config]:
    """All canonical configs by brute force."""
    product = itertools.product(*(site.choices for site in space.sites))
    assigned = [dict(zip(space.names, values, strict=True)) for values in product]
    return {
        Config({name: one[name] for name in one if exists(space, one, name)})
        for one in assigned
    }


# --------------------------------------------------------------------------------- configs


def test_configs_are_equal_by_content_whatever_the_order() -> None:
    a, b = Config({"b": 1, "a": 2}), Config({"a": np.int64(2), "b": 1})
    assert a == b
    assert hash(a) == hash(b)
    assert list(a) == ["a", "b"]
    assert a != Config({"a": 2})
    assert a != {"a": 2, "b": 1}


def test_a_config_cannot_be_changed() -> None:
    config = Config({"a": 1})
    with pytest.raises(AttributeError, match="immutable"):
        config._choices = {}
    with pytest.raises(TypeError):
        config["a"] = 2  # type: ignore[index]


def test_copies_of_a_config_are_equal_to_it() -> None:
    config = Config({"b": 1, "a": 2})
    assert copy.deepcopy(config) == config == copy.copy(config)


@given(st.dictionaries(st.text(min_size=1), st.integers(), max_size=5))
@few
def test_json_gives_a_config_back(choices: dict[str, int]) -> None:
    config = Config(choices)
    assert Config.from_json(config.to_json()) == config
    shuffled = Config(dict(reversed(choices.items())))
    assert shuffled.to_json() == config.to_json()
    assert shuffled.digest == config.digest


def test_repr_stays_short() -> None:
    config = Config({f"layers.{i:02}.width": i for i in range(40)})
    assert repr(config).endswith("... 36 more})")
    assert len(repr(config)) < 120


@pytest.mark.parametrize("choices", [{"a": 1.5}, {"a": True}, {"a": "2"}, {3: 1}, {"": 1}])
def test_a_config_refuses_what_is_not_a_name_and_an_integer(choices: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=r"integer|name"):
        Config(choices)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1.5}', '{"a": null}'])
def test_json_that_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(SettingError):
        Config.from_json(text)


# ---------------------------------------------------------------------- sites and spaces


@pytest.mark.parametrize("choices", [(), (2, 1), (1, 1)])
def test_choices_must_ascend(choices: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="ascending"):
        Site("a", "width", choices, 1)


def test_the_full_choice_must_be_on_offer() -> None:
    with pytest.raises(SettingError, match="one of"):
        Site("a", "width", (1, 2), 3)


def test_a_space_refuses_repeated_names_unknown_conditions_and_circles() -> None:
    a = Site("a", "width", (1, 2), 2)
    with pytest.raises(SettingError, match="'a' twice"):
        Space([a, a])
    with pytest.raises(SettingError, match="did you mean 'depth1'"):
        Space(
            [
                Site("depth1", "depth", (0, 1), 1),
                Site("b", "width", (1,), 1, (("depth2", frozenset({1})),)),
            ]
        )
    with pytest.raises(SettingError, match="circle"):
        Space(
            [
                Site("x", "width", (1, 2), 2, (("y", frozenset({1})),)),
                Site("y", "width", (1, 2), 2, (("x", frozenset({1})),)),
            ]
        )


def test_size_counted_by_hand() -> None:
    # stem 3; block 1: skipped 1 + kept 2; block 2: skipped 1 + op 0: 1 + ops 1, 2: 2 x 4.
    assert two_blocks().size() == 3 * (1 + 2) * (1 + 1 + 2 * 4)


@given(spaces())
@few
def test_size_equals_the_brute_force_count(space: Space) -> None:
    assert space.size() == len(every_config(space))


@given(spaces())
@few
def test_every_lists_all_configs_once(space: Space) -> None:
    listed = space.decode_many(space.every())
    assert len(listed) == space.size()
    assert set(listed) == every_config(space)


def test_a_large_space_is_not_listed() -> None:
    space = Space([Site(f"s{i}", "width", (1, 2), 2) for i in range(40)])
    with pytest.raises(SettingError, match="at most 10,000,000"):
        space.every()


def test_size_is_exact_where_conditions_are_many() -> None:
    # 40 blocks of 3 sites, and one site that exists only if all blocks do.
    sites, kept = [], []
    for i in range(40):
        sites.append(Site(f"d{i}", "depth", (0, 1), 1))
        kept.append((f"d{i}", frozenset({1})))
        sites += [Site(f"w{i}{k}", "width", (1, 2, 3), 3, (kept[-1],)) for k in range(3)]
    sites.append(Site("all", "width", (1, 2), 2, tuple(kept)))
    assert Space(sites).size() == (1 + 27) ** 40 + 27**40


def test_largest_and_smallest() -> None:
    space = two_blocks()
    assert dict(space.smallest()) == {"stem": 4, "b1.depth": 0, "b2.depth": 0}
    assert dict(space.largest()) == {
        "stem": 16,
        "b1.depth": 1,
        "b1.width": 16,
        "b2.depth": 1,
        "b2.op": 0,
    }


def test_an_empty_space_has_one_config() -> None:
    space = Space([])
    assert space.size() == 1
    assert space.largest() == space.random(0) == Config({})
    assert space.encode_many([Config({})]).shape == (1, 0)
    assert "1 configs" in str(space)


def test_printing_shows_sites_choices_and_what_is_fixed_and_why() -> None:
    text = str(two_blocks())
    for part in (
        "90 configs",
        "b1.width",
        "8 16*",
        "b1.depth in [1]",
        "head",
        "model's output",
    ):
        assert part in text


def test_a_space_comes_back_from_json_and_its_digest_tells_spaces_apart() -> None:
    space = two_blocks()
    assert Space.from_json(space.to_json()) == space
    assert Space.from_json(space.to_json()).digest == space.digest
    assert space.subspace({"stem": (4, 16)}).digest != space.digest
    with pytest.raises(SettingError, match="does not describe a space"):
        Space.from_json('{"sites": [{"name": "a"}], "fixed": []}')


# -------------------------------------------------------------------------- canonical form


@given(spaces(), st.integers(0, 2**31))
@few
def test_encoding_decoding_and_canonicalising_agree(space: Space, seed: int) -> None:
    rows = space.random_many(5, seed)
    configs = space.decode_many(rows)
    members = every_config(space)
    for row, config in zip(rows, configs, strict=True):
        assert config in members
        assert config in space
        assert space.decode(row) == config
        assert (space.encode(config) == row).all()
        assert space.canonical(config) == config == space.canonical(space.canonical(config))
        assert Config.from_json(config.to_json()) == config
    assert (space.canonical_many(rows) == rows).all()
    assert (space.encode_many(configs) == rows).all()


@given(spaces(), st.integers(0, 2**31))
@few
def test_two_rows_are_one_config_exactly_if_canonically_equal(space: Space, seed: int) -> None:
    raw = space._uniform(8, np.random.default_rng(seed))
    canonical = space.canonical_many(raw)
    configs = space.decode_many(raw)
    for i, j in itertools.combinations(range(8), 2):
        assert (configs[i] == configs[j]) == bool((canonical[i] == canonical[j]).all())


def test_a_skipped_block_drops_its_sites_also_those_further_inside() -> None:
    space = two_blocks()
    written = {"stem": 8, "b1.depth": 0, "b1.width": 8, "b2.depth": 0, "b2.op": 1, "b2.rank": 2}
    config = space.canonical(written)
    assert dict(config) == {"stem": 8, "b1.depth": 0, "b2.depth": 0}
    assert space.encode(config).tolist() == [1, 0, 1, 0, 0, 3]
    assert not space.contains(written)
    assert space.contains(config)
    assert not space.contains({"stem": 8})
    assert not space.contains({"nothing": 1})


def test_sites_left_out_take_the_full_choice() -> None:
    space = two_blocks()
    assert space.config() == space.largest()
    assert space.config({"b1.width": 8}, stem=4)["b1.width"] == 8
    assert space.config(stem=4)["b2.op"] == 0


def test_wrong_names_and_choices_are_refused_with_the_nearest() -> None:
    space = two_blocks()
    with pytest.raises(SettingError, match="did you mean 'stem'"):
        space.config(stemm=4)
    with pytest.raises(SettingError, match=r"no choice 7.*is 8"):
        space.config(stem=7)
    with pytest.raises(SettingError, match="'head' is fixed: its output"):
        space.config(head=7)
    with pytest.raises(SettingError, match="must be an integer"):
        space.config(stem=8.5)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"no choice 5"):
        space.encode({"stem": 5})


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 5), int), np.zeros(6, int), np.full((1, 6), 9), np.full((1, 6), -1)]
)
def test_rows_of_a_wrong_shape_or_range_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(SettingError, match="encoded configs"):
        two_blocks().decode_many(rows)


def test_rows_of_fractions_are_refused() -> None:
    with pytest.raises(SettingError, match="integers"):
        two_blocks().decode(np.zeros(6))


def test_one_hot_marks_the_choice_and_leaves_absent_sites_empty() -> None:
    space = two_blocks()
    config = space.config({"stem": 8, "b1.depth": 0, "b2.op": 2, "b2.rank": 4})
    expected = [*(0, 1, 0), *(1, 0), *(0, 0), *(0, 1), *(0, 0, 1), *(0, 1, 0, 0)]
    assert space.one_hot([config]).tolist() == [expected]
    assert (space.one_hot(space.encode(config)[None]) == space.one_hot([config])).all()


def test_choices_of_gives_the_values() -> None:
    space = two_blocks()
    assert space.choices_of(space.encode(space.smallest())[None]).tolist() == [
        [4, 0, 16, 0, 0, 8]
    ]


# ------------------------------------------------------------------------ random, nearby


def test_random_takes_every_kind_of_generator_and_repeats_for_one_seed() -> None:
    space = two_blocks()
    assert space.random(3) == space.random(3) == space.random(np.random.default_rng(3))
    first = space.random(torch.Generator().manual_seed(5))
    assert first == space.random(torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    assert len({space.random(generator) for _ in range(20)}) > 5
    with pytest.raises(SettingError, match="generator must be"):
        space.random("seed")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="at least 0"):
        space.random_many(-1, 0)


def test_random_draws_each_site_uniformly() -> None:
    space = Space([Site("a", "width", (1, 2, 3), 3), Site("b", "width", tuple(range(300)), 0)])
    rows = space.random_many(30_000, 0)
    shares = np.bincount(rows[:, 0], minlength=3) / len(rows)
    assert np.abs(shares - 1 / 3).max() < 4 * np.sqrt(2 / 9 / len(rows))
    assert rows[:, 1].max() == 299
    assert abs(rows[:, 1].mean() - 149.5) < 2


@given(spaces(), st.integers(0, 2**31), st.floats(0, 1))
@few
def test_mutation_and_crossover_stay_inside(
    space: Space, seed: int, probability: float
) -> None:
    random = np.random.default_rng(seed)
    a, b = space.random(random), space.random(random)
    assert space.contains(space.mutate(a, random, probability))
    child = space.crossover(a, b, random)
    assert space.contains(child)
    for name, value in child.items():
        assert value in {one[name] for one in (a, b) if name in one} | {space.site(name).full}
        if (name in a) != (name in b):
            assert value == (a if name in a else b)[name]


def test_mutation_of_probability_zero_and_one() -> None:
    space = two_blocks()
    config = space.config({"b2.op": 1})
    assert space.mutate(config, 0, probability=0.0) == config
    for seed in range(20):
        moved = space.mutate(config, seed, probability=1.0)
        assert all(moved[name] != config[name] for name in moved if name in config)
    with pytest.raises(SettingError, match=r"\[0, 1\]"):
        space.mutate(config, 0, probability=1.5)


def test_a_block_that_comes_back_by_mutation_takes_random_choices() -> None:
    space = two_blocks()
    seen = {space.mutate(space.smallest(), seed, 0.5).get("b1.width") for seed in range(60)}
    assert seen == {None, 8, 16}


def test_neighbours_by_hand() -> None:
    space = two_blocks()
    config = space.config({"stem": 8, "b1.depth": 0, "b2.depth": 0})
    assert [dict(n) for n in space.neighbours(config)] == [
        {"stem": 4, "b1.depth": 0, "b2.depth": 0},
        {"stem": 16, "b1.depth": 0, "b2.depth": 0},
        {"stem": 8, "b1.depth": 1, "b1.width": 16, "b2.depth": 0},
        {"stem": 8, "b1.depth": 0, "b2.depth": 1, "b2.op": 0},
    ]


@given(spaces(), st.integers(0, 2**31))
@few
def test_neighbours_are_distinct_members_and_not_the_config_itself(
    space: Space, seed: int
) -> None:
    config = space.random(seed)
    around = space.neighbours(config)
    assert len(set(around)) == len(around)
    assert config not in around
    assert all(space.contains(one) for one in around)


def test_a_subspace_holds_configs_of_the_space_and_only_its_choices() -> None:
    space = two_blocks()
    small = space.subspace({"stem": (4, 8), "b1.depth": 1})
    assert small.size() == 2 * 2 * 10
    assert every_config(small) < every_config(space)
    assert small.largest()["stem"] == 8
    assert {c["b1.depth"] for c in every_config(small)} == {1}
    assert space.subspace({}) == space
    with pytest.raises(SettingError, match="at least one choice"):
        space.subspace({"stem": ()})
    with pytest.raises(SettingError, match="no choice 5"):
        space.subspace({"stem": 5})


def test_a_space_without_some_choices_has_all_others() -> None:
    space = two_blocks()
    assert space.without({"stem": (16,), "b1.depth": 0}) == space.subspace(
        {"stem": (4, 8), "b1.depth": 1}
    )
    assert space.without({"stem": ()}) == space
    with pytest.raises(SettingError, match="at least one choice"):
        space.without({"stem": (4, 8, 16)})
    with pytest.raises(SettingError, match="no choice 5"):
        space.without({"stem": 5})


def test_a_million_configs_are_drawn_in_a_second_or_so() -> None:
    space = Space([Site(f"s{i}", "width", (1, 2, 3, 4), 4) for i in range(20)])
    n, best = 200_000, np.inf
    for seed in range(5):
        start = time.process_time()
        rows = space.random_many(n, numpy_generator(seed))
        best = min(best, time.process_time() - start)
    assert rows.shape == (n, 20)
    assert n / best > 1e6
