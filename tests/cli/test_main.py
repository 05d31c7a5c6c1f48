import json

import pytest
from typer.testing import CliRunner

import supple
from supple.cli.main import app


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_all_commands_are_there():
    result = invoke("--help")
    assert result.exit_code == 0
    for name in (
        "run", "search", "inspect", "extract", "export", "techniques", "reproduce", "check",
        "version",
    ):  # fmt: skip
        assert f" {name} " in result.output
        assert invoke(name, "--help").exit_code == 0


def test_version_names_the_package_and_what_it_stands_on():
    lines = invoke("version").output.splitlines()
    assert lines[0] == f"supple {supple.__version__}"
    assert any(line.startswith("torch ") for line in lines)


def test_techniques_as_json_lists_every_key_with_its_facts():
    rows = json.loads(invoke("techniques", "--json").stdout)
    assert [row["key"] for row in rows] == supple.techniques()
    for row in rows:
        assert {"key", "room", "kind", "title", "status", "reproduction"} <= set(row)
        if row["reproduction"] is not None:
            assert {"holds", "claims", "seconds"} <= set(row["reproduction"])


def test_techniques_can_be_limited_to_a_room():
    rows = json.loads(invoke("techniques", "--room", "supernet", "--json").stdout)
    assert {row["room"] for row in rows} == {"supernet"}
    assert {row["key"] for row in rows} <= set(
        invoke("techniques", "--room", "supernet").stdout.split()
    )


def test_reproduce_ends_with_1_where_a_claim_does_not_hold(monkeypatch):
    told = []

    def run(key, *, tell):
        told.append(key)
        tell("the claim: no")
        return {"holds": key != "supernet/b", "seconds": 3.0}

    monkeypatch.setattr("supple.testing.reproduce.run_reproduction", run)
    monkeypatch.setattr(
        "supple.testing.reproduce.reproductions",
        lambda: ["supernet/a", "supernet/b", "supernet/c"],
    )
    states = {"supernet/a": "stale", "supernet/b": "not tried", "supernet/c": "reproduced"}
    monkeypatch.setattr("supple.testing.reproduce.status", states.get)
    assert invoke("reproduce", "supernet/a").exit_code == 0
    result = invoke("reproduce")
    assert result.exit_code == 1
    assert told == ["supernet/a", "supernet/a", "supernet/b"]
    assert "the claim: no" in result.output
    states.update(dict.fromkeys(states, "reproduced"))
    assert "up to date" in invoke("reproduce").output


def test_check_tells_each_check_and_ends_with_1_where_one_fails(monkeypatch):
    from supple.testing.checks import Check

    def fine():
        pass

    def wrong():
        raise AssertionError("it is not hashable")

    checks = [Check("good", fine), Check("bad", wrong), Check("skipped", wrong, "no graph")]
    monkeypatch.setattr("supple.testing.checks.yield_checks", lambda cls: checks)
    result = invoke("check", "search/random-search")
    assert result.exit_code == 1
    assert "✓ good" in result.output
    assert "✗ bad\n    it is not hashable" in result.output
    assert "✓ skipped" in result.output


def test_a_needless_skip_fails_the_check(monkeypatch):
    from supple.testing.checks import Check

    needless = Check("skipped", lambda: None, "no graph")
    monkeypatch.setattr("supple.testing.checks.yield_checks", lambda cls: [needless])
    assert invoke("check", "search/random-search").exit_code == 1


@pytest.mark.parametrize(
    "words",
    [
        ["digits-cnn", "widths=[8, 12]", "blocks=[1, 1]"],
        ["vit"],
        ["ViTForImageClassification", "--config", "{hidden_size: 16, num_hidden_layers: 1,"
         " num_attention_heads: 2, intermediate_size: 32, image_size: 16, patch_size: 8}"],
        ["tests.cli.models:bessel", "--input", "2x64"],
    ],
)  # fmt: skip
def test_inspect_prints_the_sites_of_any_kind_of_model(words):
    result = invoke("inspect", *words, "--no-verify")
    assert result.exit_code == 0, result.output
    assert "width" in result.stdout
    assert "proved" in result.stdout


def test_inspect_builds_no_weights_of_a_model_that_does_not_fit():
    config = '{"vocab_size": 999, "num_hidden_layers": 2, "hidden_size": 65536}'
    result = invoke("inspect", "LlamaForCausalLM", "--config", config, "--meta")
    assert result.exit_code == 0, result.output
    assert "proved, not verified" in result.output
    assert "model.layers.1.self_attn.heads" in result.output
