"""Runs with compiled blocks (`train.compile`): traced without a gap, the numbers of the run that is not compiled.

Most tests compile with torch's `eager` or `aot_eager`: the same tracing, guards and wiring, without a C++ compiler.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from lora_kit.errors import RecipeError, TrainingError
from lora_kit.models import skeleton
from lora_kit.models.repeated_blocks import repeated_blocks
from lora_kit.recipe import ModelSection
from lora_kit.targeting import module_tree
from lora_kit.training import compiling, train
from lora_kit.training.build import build_run
from lora_kit.training.probe import made_up
from lora_kit.training.processes.sharding import check_sharding
from lora_kit.training.step import training_step

COMPILED = "train.compile=true"


class Traced:
    """Stands for a compiler: runs each graph as it is, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    kept = Traced()
    monkeypatch.setattr(compiling, "BACKEND", kept)
    yield kept
    torch.compiler.reset()


@pytest.fixture
def aot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    yield
    torch.compiler.reset()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def digest(path: Path) -> str:
    data = path.read_bytes()  # without the header, which names the run's folder
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def close(got: list[float], wanted: list[float]) -> bool:
    """Within what fp32's rounding makes of a few steps: 2^-24 for each of some thousand additions in a row."""
    return got == pytest.approx(wanted, rel=1e-4)


def test_losses_weights_and_keys_are_those_of_the_run_that_is_not_compiled(make_recipe, tmp_path, aot):
    own = ("train.gradient_checkpointing=true", "train.micro_batch_size=2", "validation.prompts=['red circle']")
    train(make_recipe(*own, name="plain"))
    train(make_recipe(*own, COMPILED, name="compiled"))
    assert close(losses(tmp_path / "compiled"), losses(tmp_path / "plain"))
    plain, made = (load_file(tmp_path / name / "adapter.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == made.keys()
    # AdamW's first steps are of the learning rate's size whatever the gradient: rounding decides where it is near zero.
    far = [float((made[key] - value).norm() / value.norm()) for key, value in plain.items() if value.norm() > 0]
    assert max(far) < 1e-2


@pytest.mark.slow
def test_a_compiled_run_that_was_stopped_and_resumed_is_the_same_run(make_recipe, tmp_path, traced):
    train(make_recipe(COMPILED, name="whole"))
    train(make_recipe(COMPILED, "train.max_steps=2", name="parted"))
    train(make_recipe(COMPILED, "train.resume=latest", name="parted"))
    name = "adapter.safetensors"
    assert digest(tmp_path / "whole" / name) == digest(tmp_path / "parted" / name)
    assert traced.graphs


def mixed(*settings: str) -> str:
    """Rules that give each settings a linear layer of every transformer block: one tracing for all."""
    places = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k")
    rules = [f"{{match: 'unet.**.{place}', {one}}}" for place, one in zip(places, settings, strict=False)]
    return f"[{', '.join(rules)}]"


METHODS = {
    "factors": mixed(
        "rank: 2, dropout: 0.2",
        "rank: 3, method: rslora, rank_dropout: 0.2",
        "rank: 2, init: pissa",
        "rank: 2, method: dora",
        "rank: 2, method: loha",
        "rank: 2, method: lokr",
    ),
    "others": mixed("method: oft", "method: boft", "method: diff"),
    "convolutions": "{match: 'unet.**.resnets.*.conv1', rank: 2, method: loha, rank_dropout: 0.2}",
    "full": "{match: 'unet.**', method: full}",
    "text encoder": "{preset: attention, rank: 2, text_encoder: true}",
}


@pytest.mark.slow
@pytest.mark.parametrize("rules", METHODS.values(), ids=METHODS)
def test_every_method_is_traced_without_a_gap(make_recipe, traced, rules):
    """One graph a piece (a gap is an error), as many as were counted, and the plain step's loss and gradients."""

    def stepped(*overrides: str) -> tuple[float, float, Any]:
        run = build_run(make_recipe(f"targets={rules}", *overrides), Accelerator(cpu=True))
        done = training_step(run.learner, made_up(run, run.accelerator), 0)
        return done.loss, done.grad_norm, run

    loss, norm, _ = stepped()
    assert traced.graphs == 0
    made, made_norm, run = stepped(COMPILED)
    assert made == pytest.approx(loss, rel=1e-6)
    assert made_norm == pytest.approx(norm, rel=1e-4)
    assert run.compiled is not None
    assert run.compiled.different <= traced.graphs <= run.compiled.limit


@pytest.mark.slow
def test_each_bucket_and_length_is_compiled_once_and_none_too_many(make_recipe, make_picture_folder, tmp_path, traced):
    pictures = make_picture_folder(tmp_path / "wide", count=3, size=(48, 24))
    make_picture_folder(tmp_path / "square", count=4, size=(32, 32))
    recipe = make_recipe(
        COMPILED,
        f"data.sources=[{{path: {pictures}}}, {{path: {tmp_path / 'square'}}}]",
        "data.buckets={step: 8}",
        "data.batch_size=3",
        "train.micro_batch_size=2",
        "train.max_steps=6",
    )
    run = build_run(recipe, Accelerator(cpu=True))
    assert run.compiled is not None
    assert run.compiled.shapes == 2 * len(run.data.places.sizes)  # micro-batches of two and of one
    assert len(run.data.places.sizes) == 2
    torch.compiler.reset()
    train(recipe)
    # "About": sizes that the small base halves to one latent can share a piece, and first blocks may need two.
    assert run.compiled.different < traced.graphs <= run.compiled.limit


def test_only_steps_are_compiled(make_recipe, traced):
    run = build_run(make_recipe(COMPILED), Accelerator(cpu=True))
    bundle = run.bundle
    with torch.no_grad():
        condition = bundle.family.condition(bundle, ["red circle"])
        bundle.family.predict(bundle, torch.zeros(1, 4, 2, 2), torch.tensor([10]), condition)
    bundle.unet.eval()
    bundle.family.predict(bundle, torch.zeros(1, 4, 2, 2), torch.tensor([10]), condition)
    assert traced.graphs == 0
    bundle.unet.train()
    bundle.family.predict(bundle, torch.zeros(1, 4, 2, 2), torch.tensor([10]), condition)
    assert traced.graphs


@pytest.mark.slow
def test_a_source_of_the_bases_predictions_runs_the_base_as_it_is(make_recipe, picture_folder, tmp_path, traced):
    own = f"data.sources=[{{path: {picture_folder}, target: base}}]"
    train(make_recipe(own, name="plain"))
    train(make_recipe(own, COMPILED, name="compiled"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4, abs=1e-9)
    assert traced.graphs


@pytest.mark.parametrize(
    "name", ["tiny_sd1_folder", "tiny_sd2_folder", "tiny_text2im_folder", "tiny_inpainting_folder"]
)
def test_the_blocks_are_diffusers_resnets_and_transformer_blocks(request, name):
    unet = skeleton(ModelSection(base=str(request.getfixturevalue(name)))).unet
    assert blocks_of(unet) == by_class(unet, {"ResnetBlock2D", "BasicTransformerBlock"})


def test_a_unet_without_text_has_attention_blocks(tiny_super_resolution_folder):
    unet = skeleton(ModelSection(base=str(tiny_super_resolution_folder))).unet
    assert blocks_of(unet) == by_class(unet, {"ResnetBlock2D", "Attention"})


@pytest.mark.slow
def test_what_is_compiled_is_told(make_recipe, capsys, tmp_path, traced):
    train(make_recipe(COMPILED, "train.max_steps=1"))
    said = capsys.readouterr().err
    for listed in ("8 resnets", "4 transformer blocks", " of the UNet, ", " for 1 shape of micro-batches"):
        assert listed in said
    assert "The first step of each shape takes longer" in said


def blocks_of(unet: Any) -> set[str]:
    return {block.name.removeprefix("unet.") for block in repeated_blocks(module_tree({"unet": unet}))}


def by_class(unet: Any, classes: set[str]) -> set[str]:
    return {name for name, module in unet.named_modules() if type(module).__name__ in classes}


REFUSED = {
    "nf4": ("model.quantize=nf4",),
    "chunks": ("data.captions.long=chunks",),
    "xformers": ("model.attention=xformers",),
    "module dropout": ("targets={preset: attention, module_dropout: 0.1}",),
}


@pytest.mark.parametrize("overrides", REFUSED.values(), ids=REFUSED)
def test_what_compiled_blocks_cannot_do_is_refused_in_the_recipe(make_recipe, overrides):
    with pytest.raises(RecipeError, match=r"set `train\.compile: false`"):
        make_recipe(COMPILED, *overrides)
    make_recipe(*overrides)


def test_sharded_weights_are_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"train\.compile"):
        check_sharding(make_recipe(COMPILED))
    check_sharding(make_recipe())


def broken(_graph: Any, _inputs: Any) -> Callable[..., Any]:
    raise RuntimeError("no g++ was found")


def test_a_machine_without_a_compiler_is_told_before_anything_is_touched(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", broken)
    with pytest.raises(RecipeError, match=r"train\.compile: .*no g\+\+ was found.*a C\+\+ compiler") as caught:
        train(make_recipe(COMPILED))
    assert "train.compile: false" in str(caught.value)
    assert not (tmp_path / "run").exists()
    torch.compiler.reset()


def test_a_block_that_torch_cannot_compile_stops_the_run_and_is_named(make_recipe, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", broken)
    run = build_run(make_recipe(COMPILED), Accelerator(cpu=True))
    with pytest.raises(TrainingError, match=r"could not compile unet\.down_blocks\.0\.resnets\.0: .*no g\+\+"):
        training_step(run.learner, made_up(run, run.accelerator), 0)
    torch.compiler.reset()


@pytest.mark.slow
def test_inductors_code_gives_the_plain_runs_losses(make_recipe, tmp_path):
    own = ("targets={preset: all, rank: 2, dropout: 0.2}", "train.max_steps=3")
    compiling.check_compile(make_recipe(COMPILED), torch.device("cpu"))
    train(make_recipe(*own, name="plain"))
    train(make_recipe(*own, COMPILED, name="compiled"))
    assert close(losses(tmp_path / "compiled"), losses(tmp_path / "plain"))
    torch.compiler.reset()
