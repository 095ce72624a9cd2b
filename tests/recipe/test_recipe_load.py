from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.errors import RecipeError
from lora_kit.recipe import PresetRules, Recipe, dump_recipe, load_recipe, recipe_schema

Write = Callable[[str], Path]
DATA = "data: {sources: [{path: some/pictures}]}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe into a folder of its own; `some/pictures` is a hub id there."""

    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipes" / "r.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def message(path: Path | str, overrides: list[str] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides or [])
    return str(caught.value)


def test_a_recipe_is_read(write: Write) -> None:
    recipe = load_recipe(write(DATA + "optimizer: {lr: 1e-3}\ntrain: {mixed_precision: no}"))
    assert recipe.optimizer.lr == 1e-3
    assert recipe.train.mixed_precision == "no"


# Overrides


def test_overrides_set_nested_values(write: Write) -> None:
    recipe = load_recipe(write(DATA), ["optimizer.lr=1e-3", "validation.prompts=[a, b]", "data.sources.0.repeats=2"])
    assert recipe.optimizer.lr == 1e-3
    assert recipe.validation.prompts == ["a", "b"]
    assert recipe.data.sources[0].repeats == 2


def test_the_last_of_equal_overrides_counts(write: Write) -> None:
    assert load_recipe(write(DATA), ["seed=1", "seed=2"]).seed == 2


def test_an_override_may_hold_equal_signs(write: Write) -> None:
    assert load_recipe(write(DATA), ["data.trigger=a=b"]).data.trigger == "a=b"


def test_an_override_makes_the_mapping_it_needs(write: Write) -> None:
    recipe = load_recipe(write(DATA + "validation: {held_out: null}"), ["validation.held_out.path=x"])
    assert recipe.validation.held_out is not None


def test_an_override_of_targets_starts_from_the_default(write: Write) -> None:
    assert load_recipe(write(DATA), ["targets.rank=8"]).targets == PresetRules(preset="attention", rank=8)


def test_an_override_leaves_the_other_end_of_an_alias_alone(write: Write) -> None:
    text = "data: {sources: [&one {path: a}, *one]}"
    recipe = load_recipe(write(text), ["data.sources.0.repeats=3"])
    assert [source.repeats for source in recipe.data.sources] == [3, 1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "override `seed`: an override reads key.path=value"),
        ("a..b=1", "override `a..b=1`: an override reads key.path=value"),
        ("=1", "override `=1`: an override reads key.path=value"),
        ("seed=[", "override `seed=[`, line 1"),
        ("seed=x", 'seed: got "x"; must be a whole number. (Set by an override.)'),
        ("data.sources.1.path=x", "data.sources.1.path: got `1` for an item of the list data.sources, which takes"),
        ("data.sources.-1.path=x", "got `-1` for an item"),
        ("data.sources.path=x", "got `path` for an item"),
        ("validation.prompts.0=x", "validation.prompts has no items in the recipe; set it whole"),
        ("seed.x=1", "seed.x: seed is the single value 3 and has no `x` in it; set seed itself."),
        ("optimzer.lr=1", "optimzer: unknown key. Did you mean optimizer?"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key. Did you mean lr"),
    ],
)
def test_wrong_overrides(write: Write, override: str, said: str) -> None:
    text = message(write(DATA + "seed: 3"), [override])
    assert text.startswith("1 error in ")
    assert said in text


# Messages


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("optimzer: {}", "optimzer: unknown key. Did you mean optimizer? Allowed here: model, targets, data,"),
        ("optimizer: {lrr: 1}", "optimizer.lrr: unknown key. Did you mean lr, lr_ratio? Allowed here: name, lr,"),
        ("validation: {held_out: {pth: x, path: y}}", "validation.held_out.pth: unknown key. Did you mean path,"),
        ("targets: {preset: all, rnk: 1}", "targets.rnk: unknown key. Did you mean rank? Allowed here: method,"),
        ("targets: [{match: unet, rnk: 1}]", "targets.0.rnk: unknown key. Did you mean rank? Allowed here: method,"),
        ("targets: {preset: all, rules: [{match: a, rnk: 1}]}", "targets.rules.0.rnk: unknown key. Did you mean rank?"),
        ("targets: {preset: atention}", 'targets.preset: got "atention"; allowed: attention, kohya, kohya-conv,'),
        ("targets: {preset: atention}", "Did you mean attention?"),
        ("targets: [5]", "targets.0: got 5; needs the key `preset`"),
        ("targets: {rank: 8}", 'targets: got {"rank": 8}; needs the key `preset`'),
        ("train: {max_steps: 4e2}", "train.max_steps: got 400.0; must be a whole number. Write 400."),
        ('train: {max_steps: "400"}', 'train.max_steps: got "400"; must be a whole number. Write 400 without quotes.'),
        ("train: {max_steps: 0}", "train.max_steps: got 0; must be above 0."),
        ("train: {max_steps: true}", "train.max_steps: got true; must be a whole number."),
        ('optimizer: {lr: "1e-4"}', 'optimizer.lr: got "1e-4"; must be a number. Write 1e-4 without quotes.'),
        ("optimizer: {lr: .nan}", "optimizer.lr: got NaN; must be a finite number."),
        ("optimizer: {betas: 0.9}", "optimizer.betas: got 0.9; must be a list. Write [0.9]."),
        ("optimizer: {betas: [0.9]}", "optimizer.betas.1: needed, but not given."),
        ("optimizer: {weight_decay: -1}", "optimizer.weight_decay: got -1; must be at least 0."),
        (
            "optimizer: {name: adam8bit}",
            'optimizer.name: got "adam8bit"; allowed: adamw, adam, sgd, adamw8',
        ),
        ("save: {captions: yes}", 'save.captions: got "yes"; must be true or false. Write true.'),
        ("save: {captions: off}", 'save.captions: got "off"; must be true or false. Write false.'),
        ("save: []", "save: got []; must be a mapping"),
        (
            "validation: {prompts: red apple}",
            'validation.prompts: got "red apple"; must be a list. Write ["red apple"].',
        ),
        ("validation: {prompts: [12]}", 'validation.prompts.0: got 12; must be text. Write it in quotes: "12".'),
        ("validation: {strengths: []}", "validation.strengths: got []; must have at least 1 item(s)."),
        ("output_dir: ''", 'output_dir: got ""; must not be empty.'),
    ],
)
def test_each_mistake_has_its_message(write: Write, line: str, said: str) -> None:
    text = message(write(DATA + line))
    assert text.startswith("1 error in ")
    assert said in text


@pytest.mark.parametrize("resolution", ["500", "511"])
def test_resolution_is_a_multiple_of_eight(write: Write, resolution: str) -> None:
    said = f"data.resolution: got {resolution}; must be a multiple of 8."
    assert said in message(write(DATA), [f"data.resolution={resolution}"])


def test_data_is_needed(write: Write) -> None:
    assert "data: needed, but not given: the pictures to train on" in message(write("seed: 0"))
    assert "data.sources: needed, but not given: the pictures to train on" in message(write("data: {flip: true}"))


def test_a_long_value_is_cut(write: Write) -> None:
    assert len(message(write(f"{DATA}seed: {'x' * 5000}"))) < 300


def test_braces_in_a_message_stay(write: Write) -> None:
    assert "`re:(?P<x{1}>` is not a regular expression" in message(write(DATA + 'targets: {match: "re:(?P<x{1}>"}'))


def test_every_error_at_once(write: Write) -> None:
    text = (
        "optimzer: {}\noptimizer: {lrr: 1}\nmodel: {base: ./x}\nseed: no\ndata: {sources: [{path: $NOT_SET_ANYWHERE}]}"
    )
    said = message(write(text), ["foo", "train.max_steps=0"])
    assert said.startswith("7 errors in ")
    for path in (
        "override `foo`",
        "optimzer",
        "optimizer.lrr",
        "model.base",
        "seed",
        "data.sources.0.path",
        "train.max",
    ):
        assert f"\n  {path}" in said


# Files


def test_a_missing_recipe_names_its_neighbour(write: Write) -> None:
    path = write(DATA)
    said = message(path.with_name("q.yaml"))
    assert "q.yaml: no such recipe; looked for /" in said
    assert "Did you mean r.yaml?" in said


def test_a_folder_lists_its_recipes(write: Write) -> None:
    assert "is a folder; name the recipe's YAML file. In it: r.yaml." in message(write(DATA).parent)


def test_other_bytes_than_utf8(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"seed: 0 # \xff")
    assert "is not UTF-8 text (byte 10); save it as UTF-8." in message(path)


def test_a_byte_order_mark_is_skipped(write: Write) -> None:
    assert load_recipe(write("\ufeff" + DATA)).seed == 0


@pytest.mark.parametrize("text", ["", "# only this\n", "---\n"])
def test_an_empty_recipe(write: Write, text: str) -> None:
    assert "is empty. A recipe needs at least `data:" in message(write(text))


@pytest.mark.parametrize(("text", "kind"), [("- a", "a list"), ("hello", 'the single value "hello"')])
def test_a_recipe_is_a_mapping(write: Write, text: str, kind: str) -> None:
    assert f"got {kind} at the top; a recipe is a mapping" in message(write(text))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b" " * 2_000_000)
    assert "is 2.0 MB large; a recipe is a small YAML file" in message(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read every file")
def test_an_unreadable_file(write: Write) -> None:
    path = write(DATA)
    path.chmod(0)
    assert "cannot be read: Permission denied." in message(path)


def test_a_syntax_error_shows_its_line(write: Write) -> None:
    said = message(write("data: 1\nmodel: a: b"))
    assert "r.yaml, line 2, column 9: mapping values are not allowed here" in said
    assert "\n    model: a: b\n            ^" in said


# Dump and schema

TEXT = st.text(max_size=12)
POSITIVE = st.integers(1, 10**9)
RULE = st.fixed_dictionaries({"match": st.sampled_from(["unet.**", "unet.**.to_{q,k}", "re:unet.*", "1e-4"])})
LORA = {"rank": POSITIVE, "alpha": st.floats(1e-6, 1e6), "dropout": st.floats(0, 0.9), "kind": st.just("conv")}
RULES = st.builds(lambda rule, more: {**rule, **more}, RULE, st.fixed_dictionaries({}, optional=LORA))
TARGETS = st.one_of(
    st.builds(lambda rules: {"preset": "kohya", "rules": rules}, st.lists(RULES, max_size=2)),
    st.lists(RULES, min_size=1, max_size=3),
)
SOURCE = st.fixed_dictionaries(
    {"path": st.sampled_from(["org/name", "/", "name"])},
    optional={"where": st.dictionaries(TEXT, st.lists(TEXT, max_size=2), max_size=2), "caption_column": TEXT},
)
RECIPES = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {"sources": st.lists(SOURCE, min_size=1, max_size=2), "trigger": TEXT}, optional={"flip": st.booleans()}
        ),
        "targets": TARGETS,
        "output_dir": st.sampled_from(["/runs/no", "/runs/$x", "/runs/${y}$$", "/runs/a b: c"]),
    },
    optional={
        "validation": st.fixed_dictionaries({"prompts": st.lists(TEXT, max_size=3), "negative_prompt": TEXT}),
        "optimizer": st.fixed_dictionaries({"lr": st.floats(1e-12, 1e3), "eps": st.floats(1e-30, 1)}),
        "seed": st.integers(0, 2**63),
    },
)


@given(tree=RECIPES)
@settings(deadline=None, max_examples=50)
def test_a_dumped_recipe_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]) -> None:
    recipe = Recipe.model_validate(tree)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_dump_loads_back_from_another_folder(write: Write, tmp_path: Path) -> None:
    recipe = load_recipe(write(DATA + "output_dir: runs/x"))
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(elsewhere) == recipe


def test_a_dump_of_a_full_run_loads_back(write: Write, tmp_path: Path) -> None:
    recipe = load_recipe(write(DATA), ["targets={preset: all, method: full}"])
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(elsewhere) == recipe


def test_the_schema_describes_each_field() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["data"]
    for name, section in schema["$defs"].items():
        assert section["additionalProperties"] is False, name
        for field, facts in section["properties"].items():
            assert facts.get("description"), f"{name}.{field}"
    assert "output_dir" in schema["properties"]
