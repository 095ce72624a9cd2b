"""A recipe's cache holds what its run would compute, and computes it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_kit.data import TrainingSet
from lora_kit.data.cache import CacheStore
from lora_kit.data.crops import cut_picture, pixels_of
from lora_kit.data.pictures import read_picture
from lora_kit.errors import DataError
from lora_kit.models import ModelBundle, load_bundle
from lora_kit.progress import no_progress
from lora_kit.recipe import Recipe
from lora_kit.training.caching import FilledCache, data_sets, fill_cache, open_cache, wanted_keys
from lora_kit.training.encoders import load_encoders, trains_text_encoder
from lora_kit.training.processes.launch import build_accelerator

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_sd1_folder: Path, make_picture_folder: Callable[..., Path]) -> MakeRecipe:
    pictures = make_picture_folder(tmp_path / "pictures", count=5)

    def make(base: Path = tiny_sd1_folder, **data: Any) -> Recipe:
        section = {"sources": [{"path": str(pictures)}], "resolution": 16, "cache": "disk", **data}
        section["cache_dir"] = str(tmp_path / "cache")
        return Recipe.model_validate({"model": {"base": str(base)}, "data": section})

    return make


def fill(recipe: Recipe, bundle: ModelBundle | None = None) -> tuple[TrainingSet, FilledCache]:
    """Fill the cache of the recipe's training set."""
    bundle = bundle or load_encoders(recipe)
    cache = open_cache(recipe, bundle, trains_text_encoder(recipe, bundle))
    data = data_sets(recipe, cache.hints, no_progress)[0]
    return data, fill_cache(cache, data, bundle, build_accelerator(recipe), no_progress)


def counts(recipe: Recipe) -> tuple[int, int]:
    """Views and captions that filling encodes."""
    _, filled = fill(recipe)
    return filled.encoded, filled.captions_encoded


def check(recipe: Recipe, data: TrainingSet, filled: FilledCache) -> None:
    """Latents and states against those of the whole base, to the rounding of other batch sizes."""
    bundle = load_bundle(recipe.model)
    assert filled.latents is not None and filled.texts is not None
    for place in range(len(data.places.record)):
        image = read_picture(data.records[data.places.record[place]]).image
        pixels = pixels_of(cut_picture(image, data.places.size(place)))
        for mirrored in (False, True)[: filled.latents.versions]:
            mean, std = bundle.family.encode(bundle, (pixels.flip(-1) if mirrored else pixels)[None])
            found = filled.latents.read(place, mirrored)
            assert found is not None
            torch.testing.assert_close(found.mean, mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.std, std[0], rtol=1e-4, atol=1e-5)
    for caption in data.captions():
        states = filled.texts.read(caption)
        assert states is not None
        wanted = bundle.family.caption_states(bundle, [caption])[0]
        torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-5)


def test_the_cache_holds_what_the_base_computes(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(flip=True, caption_dropout=0.1)
    data, filled = fill(recipe)
    check(recipe, data, filled)
    assert filled.texts is not None and filled.texts.read("") is not None
    assert (filled.encoded, filled.captions_encoded) == (10, 6)
    assert [(fact.width, fact.height) for fact in filled.facts] == [(40, 48)] * 5


def test_pictures_of_several_sizes_are_found_at_their_places(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(buckets={"step": 8, "resolutions": [16, 24]}, flip=True)
    Image.new("RGB", (90, 50), (9, 99, 200)).save(Path(recipe.data.sources[0].path) / "003.png")
    data, filled = fill(recipe)
    assert len(data.places.sizes) > 2 and filled.latents is not None
    assert len(filled.latents) == len(data.places.record) == 10
    check(recipe, data, filled)


def test_with_everything_kept_nothing_is_encoded(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe()
    fill(recipe)
    bundle = load_encoders(recipe)

    def unwanted(*_: object) -> None:
        raise AssertionError

    for name in ("encode", "condition", "caption_states"):
        monkeypatch.setattr(type(bundle.family), name, unwanted)
    monkeypatch.setattr(bundle.vae, "to", unwanted)
    monkeypatch.setattr(bundle.text_encoder, "to", unwanted)
    data, filled = fill(recipe, bundle)
    assert (filled.encoded, filled.captions_encoded) == (0, 0)
    assert filled.latents is not None and len(filled.latents) == data.record_count


def test_only_what_changed_is_encoded_anew(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    assert counts(recipe) == (5, 5)
    folder = Path(recipe.data.sources[0].path)
    Image.new("RGB", (40, 48), (1, 2, 3)).save(folder / "002.png")
    assert counts(recipe) == (1, 0)
    table = folder / "metadata.jsonl"
    table.write_text(table.read_text().replace("red apple", "green apple"))
    assert counts(recipe) == (0, 1)
    assert counts(make_recipe(resolution=24)) == (5, 0)
    assert counts(make_recipe(flip=True)) == (5, 0)
    assert counts(make_recipe(trigger="zwx")) == (0, 5)
    assert counts(make_recipe(cache_dtype="fp16")) == (5, 0)
    assert counts(recipe) == (0, 0)


def test_another_base_has_other_entries(make_recipe: MakeRecipe, tiny_sd2_folder: Path) -> None:
    recipe = make_recipe()
    fill(recipe)
    assert counts(make_recipe(base=tiny_sd2_folder)) == (5, 5)
    assert counts(recipe) == (0, 0)


def test_a_trained_text_encoder_keeps_no_states(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    trained = Recipe.model_validate({**recipe.model_dump(), "targets": {"preset": "attention", "text_encoder": True}})
    _, filled = fill(trained)
    assert filled.texts is None
    assert filled.encoded == 5


def test_random_crops_keep_captions_alone(make_recipe: MakeRecipe) -> None:
    _, filled = fill(make_recipe(crop="random"))
    assert (filled.latents, filled.facts, filled.encoded, filled.captions_encoded) == (None, [], 0, 5)


def test_broken_pictures_are_named_or_left_out(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(flip=True)
    (Path(recipe.data.sources[0].path) / "001.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)1 record of the data set .*001\.png: not a readable picture"):
        fill(make_recipe(flip=True, on_error="raise"))
    data, filled = fill(recipe)
    assert [flaw.id for flaw in data.skipped] == ["pictures/001.png"]
    assert filled.latents is not None and len(filled.latents) == 4
    check(recipe, data, filled)


def test_wanted_keys_are_those_of_the_filled_cache(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(flip=True, caption_dropout=0.5)
    fill(recipe)
    store = CacheStore(Path(str(recipe.data.cache_dir)))
    wanted = wanted_keys(recipe, no_progress)
    assert wanted == {store.entry(row)[1].key for row in store.rows()}
    assert len(wanted) == 10 + 6
