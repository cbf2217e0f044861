"""Rules files are closed, and what is wrong has a file, a line and a remedy."""

import pytest

from llmos_jax.errors import RuleError
from llmos_jax.ir import Rules
from llmos_jax.rules import load_axes, load_rules

GOOD = """\
family = "mine"
[mesh]
fsdp = "shards"
data = "replicas"
[weights]
embed = ["fsdp"]
norm = []
[activations]
batch = ["data", "fsdp"]
"""


@pytest.fixture
def write(tmp_path):
    def _write(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return _write


def test_llama_rules_name_their_source():
    rules = load_rules("llama")
    assert rules.source == "sharding_rules/llama.toml"
    assert rules.weights["embed"] == ("fsdp",)
    assert rules.activations["batch"] == ("data", "fsdp")


def test_every_axis_has_a_letter_and_a_meaning():
    assert all(len(a.letter) == 1 and a.meaning for a in load_axes().values())
    assert {name: a.letter for name, a in load_axes().items()}["kv_heads"] == "K"


def test_fingerprint_does_not_depend_on_the_path(write):
    here, there = load_rules(write(GOOD)), load_rules(write(GOOD, "other.toml"))
    assert here.source != there.source and here.fingerprint == there.fingerprint


def test_rules_survive_json():
    rules = load_rules("llama")
    assert Rules.from_json(rules.to_json()) == rules


def test_decode_section_overrides_only_decode(write):
    path = write(GOOD + "[decode.weights]\nembed = []\n")
    assert load_rules(path).weights["embed"] == ("fsdp",)
    assert load_rules(path, "decode").weights["embed"] == ()
    assert load_rules(path, "decode").weights["norm"] == ()


def test_inherit_takes_the_rest_from_below(write):
    path = write('inherit = "llama"\n[weights]\nvocab = []\n')
    rules = load_rules(path)
    assert rules.weights["vocab"] == () and rules.weights["ffn"] == ("tensor",)
    assert rules.family == "llama"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("embed = [", "embde = ["), r"toml:6: unknown logical axis 'embde'. Did you"),
        (('["fsdp"]', '["fdsp"]'), r"toml:6: embed: no mesh axis 'fdsp'. Did you mean"),
        (('["fsdp"]', '"fsdp"'), r'toml:6: embed takes a list, as in \["fsdp"\]'),
        (('["fsdp"]', '["fsdp", "fsdp"]'), "a mesh axis is listed twice"),
        (("family", "famly"), r"unknown key 'famly'. Did you mean 'family'"),
        (('family = "mine"', ""), "needs family"),
        (('"mine"', '"mine"\nuneven = "pad"'), "say 'error' or 'replicate'"),
        (('fsdp = "shards"', ""), "mesh axis 'fsdp' is used but .mesh. does not say"),
        (("[weights]", 'stage = "x"\n[weights]'), "no rule uses mesh axis 'stage'"),
        (("[weights]", 'fsdpp = "x"\n[weights]'), "no mesh axis 'fsdpp'"),
        (("[activations]", "[activation]"), "unknown key 'activation'. Did you mean"),
        (("norm = []", "norm = ["), "is not TOML"),
        (
            ("[weights]", '[decode]\nrepeat = ["head"]\n[weights]'),
            r"toml:\d+: unknown logical axis 'head'. Did you mean 'heads'",
        ),
        (
            ("[weights]", "[decode.weight]\n[weights]"),
            "unknown section .decode",
        ),
    ],
)
def test_wrong_file_gives_the_line(write, change, message):
    path = write(GOOD.replace(*change))
    with pytest.raises(RuleError, match=message):
        load_rules(path)


def test_missing_section_is_named(write):
    with pytest.raises(RuleError, match=r"section \[activations\] is missing"):
        load_rules(write(GOOD.split("[activations]")[0]))


def test_inherit_goes_one_level(write):
    middle = write('inherit = "llama"\n', "middle.toml")
    with pytest.raises(RuleError, match="one level is all there is"):
        load_rules(write(f'inherit = "{middle}"\n'))


@pytest.mark.parametrize("name", ["lama", "axes", "nowhere.toml"])
def test_unknown_rules_are_named(name):
    with pytest.raises(RuleError, match="there (is|are) no rules"):
        load_rules(name)
