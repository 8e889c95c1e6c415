"""Recipes: what is accepted, how it is read, and what a mistake is answered with."""

import itertools
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from hafrm.errors import ConfigError
from hafrm.recipe import LoraSection, Recipe, describe_keys
from hafrm.recipe_file import build_recipe, dump_recipe, load_recipe, with_values

SMALLEST = "model: {path: base}\ndata: {train: pairs.jsonl}\n"


def recipe_of(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def complaint(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe_of(folder, text, *overrides)
    return str(caught.value)


def values(**sections: object) -> dict[str, object]:
    return {"model": {"path": "base"}, "data": {"train": ["pairs.jsonl"]}, **sections}


def test_a_recipe_has_few_enough_keys_to_be_read_and_each_says_what_it_means():
    keys = describe_keys().values()
    assert len(keys) <= 59
    for key in keys:
        assert key.meaning, f"{key.name} has no line of explanation"
        assert key.allowed
        assert len(key.meaning) <= 100


@pytest.mark.parametrize("written", ["1e-5", "1E-5", "1.0e-5", "0.00001", "+1e-5", ".1e-4"])
def test_every_usual_way_to_write_a_number_is_a_number(tmp_path: Path, written: str):
    recipe = recipe_of(tmp_path, SMALLEST + f"training: {{learning_rate: {written}}}")
    assert recipe.training.learning_rate == pytest.approx(1e-5, rel=1e-12)


@pytest.mark.parametrize(
    "word", ["off", "no", "yes", "on", "y", "2026-11-24", "1:30", "0x1f", "1_0"]
)
def test_plain_words_stay_words_where_yaml_1_1_would_change_them(tmp_path: Path, word: str):
    recipe = recipe_of(
        tmp_path, SMALLEST + f"tracking: {{project: {word}}}", f"lora.targets={word}"
    )
    assert recipe.tracking.project == recipe.lora.targets == word


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("training.batch_size", "0", "whole number >= 1"),
        ("training.learning_rate", "'1e-5'", "number > 0"),
        ("training.warmup_fraction", "100", "number >= 0 and <= 1"),
        ("training.schedule", "cosin", "cosine or linear or constant"),
        ("training.betas", "[0.9, 1.0]", "list of 2 x number >= 0 and < 1"),
        ("lora.targets", "[]", "text or list of text"),
        ("training.seed", "-1", "whole number >= 0 and < 4294967296"),
        ("training.max_tokens", "automatic", "whole number > 0 or auto"),
        ("data.train", "[a, 1]", "text or list of text"),
        ("model.path", "~", "text"),
        ("model.revision", "12345", "text or null (as text it needs quotes)"),
        ("tracking.report_to", "tensorbord", "list of tensorboard or wandb or trackio or mlflow"),
        ("method.label_smoothing", "0.5", "number >= 0 and < 0.5 or null"),
    ],
)
def test_a_wrong_value_is_answered_with_key_place_value_and_what_is_allowed(
    tmp_path: Path, key: str, value: str, allowed: str
):
    message = complaint(tmp_path, SMALLEST, f"{key}={value}")
    assert f"{key} (override '{key}={value}'): got " in message.replace('"', "'")
    assert f"; allowed: {allowed}" in message
    assert "a problem:" in message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lerning_rate", "did you mean learning_rate?"),
        ("training.max_length", "did you mean data.max_length?"),
        ("trainig.steps", "did you mean training?"),
        ("batch_size", "did you mean training.batch_size?"),
        ("lora.dropout", "unknown key; allowed here: rank, alpha, targets"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(
    tmp_path: Path, key: str, meant: str
):
    assert meant in complaint(tmp_path, SMALLEST, f"{key}=3")


def test_all_problems_of_file_and_overrides_come_in_one_message(tmp_path: Path):
    text = "model: {}\ntraining:\n  seed: x\n  seed: y\n  epochs: 0\nextra: 1\n"
    message = complaint(
        tmp_path, text, "nonsense", "a.b.c=1", "method.alpha=[", "evaluation.every=-1"
    )
    assert message.startswith(f"{tmp_path / 'recipe.yaml'} has 10 problems:")
    for part in (
        "model.path: missing; needed: text.",
        "data: missing; needed: keys and values, with train",
        "training.seed (line 4): written twice, first line 3; keep one",
        'training.seed (line 4): got "y"',
        "training.epochs (line 5): got 0",
        "extra (line 6): unknown section",
        "override 'nonsense': not of the form section.key=value",
        "override 'a.b.c=1': not of the form section.key=value",
        "override 'method.alpha=[': not plain YAML",
        "evaluation.every (override 'evaluation.every=-1'): got -1",
    ):
        assert f"\n  - {part}" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "model: missing"),
        ("- model\n", "needed: sections"),
        ("model: [", "not plain YAML"),
        ("model: &a {path: x}\ndata: *a\n", "anchors, aliases and tags are not allowed"),
        ("model: !!python/object/apply:os.getcwd []\n", "anchors, aliases and tags"),
        ("[" * 700, "not plain YAML"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_in_words(tmp_path: Path, text: str, reason: str):
    message = complaint(tmp_path, text)
    assert reason in message
    assert str(tmp_path / "recipe.yaml") in message


def test_a_recipe_that_cannot_be_read_says_why_and_windows_line_ends_do_no_harm(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: \xe9}")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "w.yaml").write_bytes(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode())
    assert load_recipe(tmp_path / "w.yaml").model.path == "base"


def test_overrides_and_null_sections_switch_lora_on_and_off(tmp_path: Path):
    bare = recipe_of(tmp_path, "", "model.path=a", "data.train=hub:org/set:train", "lora.rank=8")
    assert (bare.data.train, bare.lora) == (("hub:org/set:train",), LoraSection(rank=8))
    assert recipe_of(tmp_path, SMALLEST + "lora: {rank: 4}", "lora=null").lora is None
    assert recipe_of(tmp_path, SMALLEST, "lora={}").lora == LoraSection()
    commented = recipe_of(tmp_path, SMALLEST + "training:\n  # seed: 1\nlora:\n")
    assert (commented.training.seed, commented.lora) == (0, None)


def test_overrides_win_over_the_file_and_the_last_over_the_first(tmp_path: Path):
    recipe = recipe_of(
        tmp_path,
        SMALLEST + "training: {seed: 1, epochs: 3}",
        "training.seed=2",
        "training.seed=3",
        "data.train=[a.jsonl, 'b c.jsonl#split=train&limit=5']",
        "tracking.report_to=wandb",
        "training.betas=[0.8, 0.9]",
    )
    assert (recipe.training.seed, recipe.training.epochs) == (3, 3.0)
    assert recipe.data.train == ("a.jsonl", "b c.jsonl#split=train&limit=5")
    assert recipe.tracking.report_to == ("wandb",)
    assert recipe.training.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("section", "keys", "fix"),
    [
        ("data", {"max_prompt_length": 1024}, "must be below data.max_length"),
        ("data", {"validation_fraction": 0}, "set data.validation_fraction to 0.05"),
        ("data", {"validation": "b", "validation_fraction": 0.1}, "remove one of them"),
        ("data", {"test": ["b", "a"]}, "remove it from one of them"),
        ("data", {"train": ["a", "b"], "validation": "b"}, "remove it from one of them"),
        ("training", {"max_tokens": 1024}, "raise it to 2048, or lower data.max_length to 512"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_with_the_fix(section, keys, fix):
    keys = {"train": "a"} | keys if section == "data" else keys
    with pytest.raises(ConfigError, match="the recipe has a problem") as caught:
        build_recipe(values(**{section: keys}))
    assert fix in str(caught.value)


def test_a_home_directory_is_expanded_and_other_paths_stay_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = recipe_of(
        tmp_path, "", "model.path=~/base", "data.train=[~/a.jsonl#split=train, ../b, hub:x:y]"
    )
    assert recipe.model.path == "/home/someone/base"
    assert recipe.data.train == ("/home/someone/a.jsonl#split=train", "../b", "hub:x:y")


WORDS = (
    *("1e5", "off", "null", "~x/y", "12", "0.5", "true", "a: b", "#x", "\u00e9", "- a"),
    *("'", "1e-5 ", "*", "a\u2028b\x85\U0001f642"),
)


@pytest.mark.parametrize("word", WORDS)
def test_a_recipe_written_out_is_read_back_equal_whatever_its_words(tmp_path: Path, word: str):
    recipe = build_recipe(
        {
            "model": {"path": word, "revision": word},
            "data": {"train": [word, "z"], "test": ["t"], "max_prompt_length": 9},
            "training": {"learning_rate": 1e-5, "eps": 1e-8, "sharing": "off", "betas": [0.5, 0.6]},
            "lora": {"targets": ["q_proj", word], "alpha": 1e22},
            "tracking": {"report_to": ["wandb", "mlflow"], "project": word},
        }
    )
    assert recipe_of(tmp_path, dump_recipe(recipe)) == recipe
    assert dump_recipe(recipe_of(tmp_path, dump_recipe(recipe))) == dump_recipe(recipe)


@pytest.mark.parametrize("version", [(1, 1), (1, 2)])
def test_a_recipe_written_out_has_every_key_and_means_the_same_in_both_versions_of_yaml(version):
    """In YAML 1.1 a bare off is false and a bare 1e-05 is text."""
    recipe = build_recipe(values(training={"sharing": "off"}, lora={"targets": "yes \u2028\x85"}))
    reader = YAML(typ="safe", pure=True)
    reader.version = version
    plain = reader.load(dump_recipe(recipe))
    assert plain == recipe.model_dump(mode="json")
    written = {f"{section}.{key}" for section, keys in plain.items() for key in keys}
    assert written == {*describe_keys()}


def test_some_values_of_a_recipe_are_changed_without_the_others():
    plain = values(training={"seed": 1, "betas": [0.8, 0.9]})
    before = repr(plain)
    recipe = build_recipe(plain)
    assert repr(plain) == before
    changed = with_values(recipe, {"training.seed": 2, "lora.rank": 8, "method": {"name": "bt"}})
    assert (changed.training.seed, changed.training.betas) == (2, (0.8, 0.9))
    assert (changed.lora, changed.method.name) == (LoraSection(rank=8), "bt")
    assert recipe.training.seed == 1
    assert with_values(changed, {"lora": None, "training.seed": 1, "method": {}}) == recipe
    with pytest.raises(ConfigError, match=r"training\.sed: unknown key; did you mean seed"):
        with_values(recipe, {"training.sed": 2})


def test_garbage_in_any_place_is_a_config_error_and_nothing_else():
    """Every key, and every section, with values of every other kind: refused in words or accepted."""
    garbage = (None, True, -1, 1e308, "", "\x00", [[]], {"a": 1}, b"x")
    places = [key.split(".") for key in describe_keys()] + [[name] for name in Recipe.model_fields]
    for place, value in itertools.product(places, garbage):
        raw = {"model": {"path": "b"}, "data": {"train": "a"}}
        if len(place) == 1:
            raw[place[0]] = value
        else:
            raw.setdefault(place[0], {})[place[1]] = value
        message = ".".join(place)
        try:
            build_recipe(raw)
        except ConfigError as error:
            message = str(error)
        assert ".".join(place) in message


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "9" * 5000 + ".5"])
def test_a_number_of_thousands_of_digits_is_refused_in_a_short_message(tmp_path, number):
    (tmp_path / "r.yaml").write_text(f"{SMALLEST}training: {{steps: {number}}}\n")
    with pytest.raises(ConfigError, match=r"training\.steps") as refused:
        load_recipe(tmp_path / "r.yaml")
    assert len(str(refused.value)) < 1000


def test_a_home_folder_of_nobody_is_refused():
    with pytest.raises(ConfigError, match="no such user's home folder"):
        load_recipe("~nobody-has-this-name/r.yaml")
