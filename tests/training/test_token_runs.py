"""Textual inversion and pivotal tuning, as whole runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lora_kit.adapters import read_adapter
from lora_kit.adapters.token_files import read_embedding
from lora_kit.data import open_training_set
from lora_kit.errors import LoraKitError
from lora_kit.inference import prepare
from lora_kit.models import load_bundle
from lora_kit.recipe import ModelSection, Recipe
from lora_kit.training.learned_tokens import TokenRows, start_tokens
from lora_kit.training.run import train

MakeRecipe = Callable[..., Recipe]
TOKENS = 'tokens=[{token: "<toy>", initializer: cat, vectors: 2}]'
TRIGGER = 'data.trigger="<toy>"'
PLAIN = (TOKENS, TRIGGER, "targets=none", "data.caption_dropout=0")


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _vectors(outcome: Any) -> torch.Tensor:
    return read_embedding(outcome.paths[-1]).vectors


def _initial(folder: Path) -> torch.Tensor:
    bundle = load_bundle(ModelSection(base=str(folder)))
    (cat,) = bundle.tokenizer("cat", add_special_tokens=False).input_ids
    return bundle.text_encoder.get_input_embeddings().weight[[cat, cat]].detach()


@pytest.mark.parametrize("base", ["tiny_sd1_folder", "tiny_sd2_folder"])
def test_plain_textual_inversion_writes_what_diffusers_loads(
    make_recipe: MakeRecipe, request: pytest.FixtureRequest, base: str
) -> None:
    folder = request.getfixturevalue(base)
    outcome = train(make_recipe(*PLAIN, "train.max_steps=2", base=folder))
    assert outcome.paths == [outcome.path] and outcome.path.parent.name == "embeddings"
    embedding = read_embedding(outcome.path)
    assert embedding.token == "<toy>" and embedding.vectors.shape == (2, 32)
    assert bool((embedding.vectors != _initial(folder)).any(dim=1).all())  # both learned, from the initializer
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_textual_inversion(str(outcome.path))
    ids = pipe.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1"])
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[ids], embedding.vectors)


def test_ldm_learns_words_too(make_recipe: MakeRecipe, tiny_text2im_folder: Path) -> None:
    random = 'tokens=[{token: "<toy>", vectors: 2}]'
    recipe = make_recipe(*PLAIN, random, "data.resolution=32", "train.max_steps=2", base=tiny_text2im_folder)
    outcome = train(recipe)
    (begun,) = start_tokens(load_bundle(recipe.model), recipe.tokens, recipe.seed).embeddings()
    learned = read_embedding(outcome.path)
    assert bool((learned.vectors != begun.vectors).any(dim=1).all())
    prepared = prepare(str(tiny_text2im_folder), [], torch.float32, embeddings=[learned])
    with torch.no_grad():
        said, unsaid = (prepared.bundle.family.condition(prepared.bundle, [text]) for text in ("a <toy>", "a toy"))
    assert not torch.equal(said, unsaid)


def test_a_base_without_text_learns_no_words(make_recipe: MakeRecipe, tiny_super_resolution_folder: Path) -> None:
    with pytest.raises(LoraKitError, match="tokens: is about text, and this base reads none"):
        train(make_recipe(TOKENS, "targets=none", base=tiny_super_resolution_folder))


@torch.no_grad()
def test_a_prompt_with_the_token_is_encoded_as_diffusers_does(make_recipe: MakeRecipe, tiny_sd1_folder: Path) -> None:
    with torch.enable_grad():
        outcome = train(make_recipe(*PLAIN, "train.max_steps=1"))
    prepared = prepare(str(tiny_sd1_folder), [], torch.float32, embeddings=[read_embedding(outcome.path)])
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_sd1_folder, safety_checker=None)
    pipe.load_textual_inversion(str(outcome.path))
    state = prepared.bundle.family.condition(prepared.bundle, ["a red <toy> here"])
    theirs, _ = pipe.encode_prompt("a red <toy> here", "cpu", 1, False)
    # The same ids through the same weights: whatever differs is rounding of two batch layouts.
    assert torch.allclose(state, theirs, rtol=0, atol=16 * torch.finfo(torch.float32).eps * float(theirs.abs().max()))


def test_only_the_new_rows_change(make_recipe: MakeRecipe, tiny_sd1_folder: Path) -> None:
    recipe = make_recipe(TOKENS, "targets=none")
    bundle = load_bundle(ModelSection(base=str(tiny_sd1_folder)))
    own = bundle.text_encoder.get_input_embeddings().weight.clone()
    plain = bundle.family.condition(bundle, ["red apple"])
    tokens = start_tokens(bundle, recipe.tokens, 0)
    tokens.unfreeze(0)
    assert torch.equal(bundle.family.condition(bundle, ["red apple"]), plain)
    bundle.family.condition(bundle, ["a <toy>"]).square().sum().backward()
    (rows,) = [one.rows for one in tokens.tokens]
    assert rows.grad is not None and bool((rows.grad.abs().sum(1) > 0).all())  # both vectors are said
    table: Any = bundle.text_encoder.get_input_embeddings()
    assert isinstance(table, TokenRows)
    assert torch.equal(table.weight, own) and not table.weight.requires_grad
    assert [name for name, one in bundle.text_encoder.named_parameters() if one.requires_grad] == [
        next(name for name, one in bundle.text_encoder.named_parameters() if one is rows)
    ]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("train.ema_decay=0.9", "save.bundle_tokens=true", "data.captions.templates=object"),
        ("targets=none", "train.ema_decay=0.9", "validation.prompts=[a <toy>]"),
    ],
    ids=["pivotal", "averaged and bundled", "alone"],
)
def test_a_resumed_run_is_the_run_never_stopped(
    make_recipe: MakeRecipe, tmp_path: Path, options: tuple[str, ...]
) -> None:
    whole = train(make_recipe(TOKENS, TRIGGER, *options, name="whole"))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    resumed = train(make_recipe(TOKENS, TRIGGER, *options, f"train.resume={checkpoint}", name="resumed"))
    assert len(whole.paths) == len(resumed.paths) > 0
    for left, right in zip(whole.paths, resumed.paths, strict=True):
        if left.parent.name.startswith("embeddings"):
            assert _sha(left) == _sha(right), left
        else:  # the header has the run's name
            own, other = load_file(left), load_file(right)
            assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own), left


def test_pivotal_tuning_trains_both_and_the_adapter_file_can_carry_the_tokens(
    make_recipe: MakeRecipe, tiny_sd1_folder: Path
) -> None:
    outcome = train(make_recipe(TOKENS, TRIGGER, "save.bundle_tokens=true"))
    adapter, embedding = outcome.paths
    bundle = load_bundle(ModelSection(base=str(tiny_sd1_folder)))
    state = read_adapter(adapter, bundle.components)
    assert set(state.embeddings) == {"<toy>"}
    assert torch.equal(state.embeddings["<toy>"], read_embedding(embedding).vectors)
    assert any(bool(update.parts()["up"].abs().sum() > 0) for update in state.updates.values())
    prepared = prepare(str(tiny_sd1_folder), [adapter], torch.float32)
    bare, token = adapter_without_tokens(adapter), read_embedding(embedding)
    beside = prepare(str(tiny_sd1_folder), [bare], torch.float32, embeddings=[token])
    states = [one.bundle.family.condition(one.bundle, ["a <toy>"]) for one in (prepared, beside)]
    assert torch.equal(*states)


def adapter_without_tokens(path: Path) -> Path:
    """The file without the tokens in it."""
    from safetensors.torch import save_file

    plain = path.with_name("plain.safetensors")
    save_file({key: one for key, one in load_file(path).items() if not key.startswith("bundle_emb")}, plain)
    return plain


@pytest.mark.parametrize(
    "options",
    [
        ("train.gradient_checkpointing=true",),
        ("train.mixed_precision=bf16", "train.ema_decay=0.9"),
        ("optimizer.name=prodigy",),
        ("optimizer.name=adamw_schedulefree",),
    ],
)
def test_gradients_reach_the_rows(make_recipe: MakeRecipe, tiny_sd1_folder: Path, options: tuple[str, ...]) -> None:
    outcome = train(make_recipe(*PLAIN, "train.max_steps=1", *options))
    start = _initial(tiny_sd1_folder)
    assert bool((read_embedding(outcome.path).vectors != start).any(dim=1).all())


def test_a_disk_cache_keeps_latents_only(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    cached = train(make_recipe(*PLAIN, "data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}", name="cached"))
    plain = train(make_recipe(*PLAIN, name="plain"))
    assert torch.equal(_vectors(cached), _vectors(plain))
    assert not torch.equal(_vectors(cached)[0], _vectors(cached)[1])  # both began as `cat`


def test_a_token_stays_as_it_is_after_until(make_recipe: MakeRecipe) -> None:
    phased = 'tokens=[{token: "<toy>", initializer: cat, until: 2}, {token: "<hat>", initializer: dog}]'
    both = (phased, 'data.trigger="<toy> <hat>"', "save.keep=4", "save.every=1", "data.caption_dropout=0")
    outcome = train(make_recipe(*both))
    root = outcome.path.parent
    steps = [load_file(root / "checkpoints" / f"step-{step:06d}" / "trainable.safetensors") for step in (1, 2, 3, 4)]
    toy, hat = (next(key for key in steps[0] if key.endswith(f"rows.{index}")) for index in (0, 1))
    assert not torch.equal(steps[0][toy], steps[1][toy])
    assert torch.equal(steps[1][toy], steps[2][toy]) and torch.equal(steps[2][toy], steps[3][toy])
    assert not torch.equal(steps[2][hat], steps[3][hat])
    others = [key for key in steps[0] if key not in (toy, hat)]
    assert any(not torch.equal(steps[2][key], steps[3][key]) for key in others)


def test_norms_are_held_at_the_vocabularys(make_recipe: MakeRecipe, tiny_sd1_folder: Path) -> None:
    held = 'tokens=[{token: "<toy>", initializer: cat, norm_decay: 1.0}]'
    vectors = _vectors(train(make_recipe(*PLAIN, held, "train.max_steps=3")))
    table = load_bundle(ModelSection(base=str(tiny_sd1_folder))).text_encoder.get_input_embeddings().weight
    mean = float(table.double().norm(dim=1).mean())
    assert vectors.double().norm(dim=1).tolist() == pytest.approx([mean], rel=1e-6)  # fp32 rounding of 32 terms


def test_rates_are_each_tokens_own(make_recipe: MakeRecipe, tiny_sd1_folder: Path) -> None:
    two = 'tokens=[{token: "<toy>", initializer: cat}, {token: "<hat>", initializer: cat, lr: 0.002}]'
    sgd = ("optimizer.name=sgd", "optimizer.token_lr=0.001", "optimizer.max_grad_norm=0", "train.max_steps=1")
    alike = ('data.trigger="<toy> <hat>"', "targets=none", "data.caption_dropout=0")
    outcome = train(make_recipe(two, *sgd, *alike))
    start = _initial(tiny_sd1_folder)[:1]
    moved = [(read_embedding(path).vectors - start).norm() for path in outcome.paths]
    again = train(make_recipe(two.replace("0.002", "0.004"), *sgd, *alike, name="again"))
    moved += [(read_embedding(path).vectors - start).norm() for path in again.paths]
    # After one step of plain SGD a vector moved by rate x gradient; the differences of two fp32 numbers round.
    assert float(moved[3] / moved[1]) == pytest.approx(2, rel=1e-3)
    assert float(moved[2] / moved[0]) == pytest.approx(1, rel=1e-6)


def test_one_goes_on_from_a_file(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = train(make_recipe(*PLAIN, name="first"))
    on = f'tokens=[{{token: "<toy>", initializer: "{first.path}"}}]'
    recipe = make_recipe(*PLAIN, on, name="second")
    bundle = load_bundle(ModelSection(base=recipe.model.base))
    (started,) = start_tokens(bundle, recipe.tokens, 0).embeddings()
    assert torch.equal(started.vectors, _vectors(first))
    narrow = tmp_path / "narrow.pt"
    torch.save({"string_to_param": {"*": torch.zeros(1, 8)}, "name": "toy"}, narrow)
    with pytest.raises(LoraKitError, match="8 wide, the text encoder's 32"):
        train(make_recipe(*PLAIN, f'tokens=[{{token: "<toy>", initializer: "{narrow}"}}]', name="third"))


def test_templates_stand_for_captions(make_recipe: MakeRecipe, picture_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in picture_folder.glob("*.png"):
        (bare / path.name).write_bytes(path.read_bytes())
    own = 'data.captions.templates=["a drawing of {}", "one {}, small"]'
    recipe = make_recipe(*PLAIN, own, pictures=bare)
    data = open_training_set(recipe.data, recipe.seed)
    assert set(data.possible_captions(0, 8) or []) == {"a drawing of <toy>", "one <toy>, small"}
    assert train(recipe).path.is_file()


@pytest.mark.slow
def test_learning_lowers_the_loss_on_one_picture(make_recipe: MakeRecipe, picture_folder: Path, tmp_path: Path) -> None:
    picture = sorted(picture_folder.glob("*.png"))[0]
    for name in ("one", "same"):
        (tmp_path / name).mkdir()
        (tmp_path / name / picture.name).write_bytes(picture.read_bytes())
    data = ("data.captions.templates=object", "data.batch_size=8", "train.max_steps=40", "optimizer.token_lr=0.05")
    held = (f"validation.held_out={{path: {tmp_path / 'same'}}}", "validation.held_out_timesteps=8", "save.best=false")
    outcome = train(make_recipe(*PLAIN, *data, *held, pictures=tmp_path / "one", base="tiny"))
    assert outcome.figures["held_out_loss"] < outcome.figures["held_out_base_loss"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("tokens=[{token: cat}]",), "has 'cat' already"),
        (('tokens=[{token: "<toy>", initializer: "red apple", vectors: 1}]',), "is 2 tokens"),
        (('tokens=[{token: "my toy"}]',), "no blanks"),
        (('tokens=[{token: "<toy>"}, {token: "<toy>_1"}]',), "contains the other"),
        (('tokens=[{token: "<toy!>"}, {token: "<toy?>"}]',), "one file, toy.safetensors"),
        (("tokens=[]",), "trains nothing"),
        (('tokens=[{token: "<toy>", until: 2}]',), "no token is learned after step 2"),
        (('tokens=[{token: "<toy>"}]', "save.bundle_tokens=true"), "no adapter file"),
        (('tokens=[{token: "<toy>"}]', "optimizer.lr_ratio=16"), "`targets: none` has none"),
        (('tokens=[{token: "<toy>"}]', "data.captions.templates=[a cat]"), "says with .. where"),
        (('tokens=[{token: "<toy>"}]', "data.captions.templates=style"), "there is none; write the word"),
        (('tokens=[{token: "<toy>", initializer: gone.pt}]',), "no such file"),
    ],
)
def test_tokens_that_cannot_be_learned_are_refused(
    make_recipe: MakeRecipe, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(LoraKitError, match=said):
        train(make_recipe(*overrides, "targets=none"))


def test_tokens_are_refused_beside_a_full_fine_tune(make_recipe: MakeRecipe) -> None:
    with pytest.raises(LoraKitError, match="cannot hold new tokens"):
        make_recipe(TOKENS, TRIGGER, "targets={preset: attention, method: full}")
