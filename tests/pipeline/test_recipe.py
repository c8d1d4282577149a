"""Recipes: defaults, files, and one clear error for each kind of mistake."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from onnxpress.errors import RecipeError
from onnxpress.machine import cpu_target
from onnxpress.optimizers import PASSES
from onnxpress.recipe import DistilSection, PruneSection, Recipe, make_recipe, read_recipe, with_options

MODEL = {"model": {"source": "folder"}}


def test_everything_has_a_default_but_the_model() -> None:
    recipe = make_recipe(MODEL)
    assert recipe.precision("feature-extraction") == "int8"
    assert recipe.pass_names("feature-extraction")[-1] == "int8"
    assert recipe.pass_names("text-generation")[-1] == "int4-weights"
    assert recipe.build.target == cpu_target()
    dual = make_recipe({**MODEL, "build": {"precision": "dual", "cache": "int8"}})
    assert dual.pass_names("text-generation")[-3:] == ("int4-weights", "int8-cache", "int8-prompts")
    with pytest.raises(RecipeError, match="Precision 'dual' does not go with feature-extraction"):
        dual.pass_names("feature-extraction")
    with pytest.raises(RecipeError, match=r"'model' is missing"):
        make_recipe({})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({**MODEL, "speed": 3}, r"unknown key 'speed' \(allowed here: model, build, quality, prune, distil, passes\)"),
        ({"model": {"source": "x", "tsk": "y"}}, r"unknown key 'model.tsk' \(allowed here: source, task"),
        ({"model": {"source": 3}}, r"'model.source': input should be a valid string, not 3"),
        ({**MODEL, "build": {"keep_all": "yes"}}, r"'build.keep_all': input should be a valid boolean, not 'yes'"),
        ({**MODEL, "quality": {"samples": 2}}, r"'quality.samples': input should be greater than or equal to 8, not 2"),
        ({**MODEL, "build": {"target": "tpu"}}, r"Unknown target 'tpu'; the targets are: cpu"),
        (
            {**MODEL, "build": {"target": "cpu", "precision": "int3"}},
            r"precision 'int3' does not go with target 'cpu'; it takes: int8",
        ),
        (
            {**MODEL, "build": {"target": "tensorrt", "precision": "int4-weights"}},
            r"does not go with target 'tensorrt'",
        ),
        (
            {**MODEL, "prune": {"ffn": 1.0}},
            r"ffn is 1.0; it takes a share below 1, e.g. 0.5, or a whole number written",
        ),
        ({**MODEL, "prune": {"layers": 2.5}}, r"layers is 2.5; it takes a share below 1"),
        ({**MODEL, "prune": {"heads": True}}, r"heads is True; it takes a share below 1"),
        ({**MODEL, "prune": {"ffn": "half"}}, r"ffn is 'half'; it takes a share below 1"),
        ({**MODEL, "build": {"only": ["int9"]}}, r"Unknown pass 'int9'; the passes are: fold"),
        ({**MODEL, "build": {"only": ["fold"], "precision": "int8"}}, r"`only` names the passes itself"),
        ({**MODEL, "build": {"only": ["fold"], "cache": "int8"}}, r"leave `cache` out, or put int8-cache last"),
        ({**MODEL, "build": {"only": ["int8", "fold"]}}, r"lossless passes go before lossy ones"),
        ({**MODEL, "build": {"only": ["int8-cache", "int8-weights"]}}, r"after int8-cache, which goes last"),
        ({**MODEL, "build": {"only": ["int8-prompts", "int8-cache"]}}, r"after int8-prompts, which goes last"),
        ({**MODEL, "passes": {"int8": {"bits": 3}}}, r"Pass 'int8' does not take 'bits'; its options are"),
        (
            {**MODEL, "passes": {"int8": {"minimum_elements": "lots"}}},
            r"minimum_elements is 'lots'; it takes whole numbers, and is 1",
        ),
        (
            {**MODEL, "passes": {"int8": {"minimum_elements": -5}}},
            r"minimum_elements is -5; it takes whole numbers from 0 on",
        ),
        ({**MODEL, "build": {"name": "../evil"}}, r"'build.name': .* not '../evil'"),
        ({**MODEL, "build": {"prefer": "size"}}, r"`prefer` is for builds that choose the precision themselves"),
        ({**MODEL, "build": {"prefer": "size", "precision": "int8"}, "quality": {"budget": 0.9}}, r"`prefer` is for"),
        ({**MODEL, "build": {"prefer": "beauty"}, "quality": {"budget": 0.9}}, r"'build.prefer'"),
        ({**MODEL, "quality": {"budget": 0.9}, "passes": {"fp16": {}}, "build": {"target": "cpu"}}, r"does not run"),
        ({**MODEL, "passes": {"fp16": {}}}, r"a pass that this recipe does not run"),
        (
            {"model": {"source": "m", "task": "token-classification"}, "passes": {"int4-weights": {}}},
            r"this recipe does not run",
        ),
    ],
)
def test_mistakes_are_named(content: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make_recipe(content)


def test_a_budget_alone_is_an_automatic_plan() -> None:
    recipe = make_recipe({**MODEL, "quality": {"budget": "0.5%"}, "passes": {"int4-weights": {"block_size": 64}}})
    assert recipe.automatic
    assert "int8" not in recipe.pass_names("feature-extraction")
    assert next(iter(recipe.plans("feature-extraction").items())) == ("int8", ("int8",))
    assert list(recipe.plans("text-generation"))[0] == "int4-weights"  # noqa: RUF015
    assert set(recipe.plans("text-generation")) - set(recipe.plans("feature-extraction")) == {"dual"}
    assert set(recipe.plans("feature-extraction")) < set(recipe.plans("text-generation"))
    cached = make_recipe({**MODEL, "quality": {"budget": "0.5%"}, "build": {"cache": "int8"}})
    assert "dual" not in cached.plans("text-generation")  # int8-prompts has to come after int8-cache
    for build in ({"precision": "int8"}, {"only": ["fold"]}, {"keep_all": True}):
        assert not make_recipe({**MODEL, "quality": {"budget": "0.5%"}, "build": build}).automatic
    assert not make_recipe(MODEL).automatic


def test_what_is_pruned_is_a_share_or_a_whole_number(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[model]\nsource = "x"\n[prune]\nffn = 0.5\nlayers = 1\n')
    prune = read_recipe(path).prune
    assert prune is not None
    assert (prune.ffn, prune.heads, prune.layers) == (0.5, 0, 1)
    assert type(prune.layers) is int
    path.write_text('[model]\nsource = "x"\n[prune]\nlayers = 1.0\n')
    with pytest.raises(RecipeError, match=r"layers is 1\.0"):
        read_recipe(path)


def test_a_recipe_with_all_its_keys_is_the_same_recipe() -> None:
    """As a manifest has it: what was not said is not said there either."""
    recipe = make_recipe({**MODEL, "prune": {"layers": 1}})
    whole = make_recipe(recipe.model_dump(mode="json"))
    whole.check("text-classification")
    assert whole == recipe


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    (folder / "weights").mkdir(parents=True)
    path = folder / "recipe.toml"
    path.write_text('[model]\nsource = "weights"\n[quality]\nfile = "pairs.csv"\n')
    recipe = read_recipe(path)
    assert recipe.model.source == str(folder / "weights")
    assert recipe.quality.file == str(folder / "pairs.csv")
    assert recipe.build.name == "tiny"


@pytest.mark.parametrize(("content", "said"), [("[model", "not valid TOML"), (None, "cannot be read")])
def test_unreadable_files(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=said):
        read_recipe(path)


def test_the_repository_s_recipes_are_valid() -> None:
    for path in (Path(__file__).parents[2] / "models").glob("*/recipe.toml"):
        assert read_recipe(path).model.task is not None


def test_files_may_be_paths() -> None:
    recipe = with_options(
        make_recipe({"model": {"source": "x"}}), {"file": Path("a.csv"), "calibration": Path("b.csv")}
    )
    assert (recipe.quality.file, recipe.quality.calibration) == ("a.csv", "b.csv")


def test_every_key_and_every_option_of_a_pass_is_in_the_documents() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    named = set(re.findall(r"`\"?([\w.-]+)\"?`", page))
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    keys = {key for name in ("model", "build", "quality") for key in sections[name].model_fields}  # type: ignore[union-attr]
    keys |= {key for section in (PruneSection, DistilSection) for key in section.model_fields}
    options = {option.name for kind in PASSES.values() for option in dataclasses.fields(kind) if option.init}
    assert (keys | options | set(PASSES)) - named == set()
