"""Every option of `objective:` in whole runs: it trains, does something, and resumes to the same bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_kit.data import Batch, collate
from lora_kit.errors import ModelError, RecipeError
from lora_kit.inference import prepare
from lora_kit.models import load_bundle
from lora_kit.models.pipelines import scheduler_named
from lora_kit.recipe import ModelSection, ObjectiveSection, Recipe
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.objective import (
    adopt_schedule,
    build_objective,
    draw,
    latent_moments,
    noised_latents,
    sample_losses,
    wanted_prediction,
)
from lora_kit.training.objects import Run
from lora_kit.training.processes.launch import build_accelerator

MakeRecipe = Callable[..., Recipe]

OPTIONS = {
    "l1": ["objective.loss=l1"],
    "huber": ["objective.loss=huber"],
    "smooth_l1": ["objective.loss=smooth_l1", "objective.huber_schedule=exponential"],
    "constant": ["objective.loss=huber", "objective.huber_schedule=constant", "objective.huber_c=0.5"],
    "min-SNR": ["objective.min_snr_gamma=0.5"],
    "soft min-SNR": ["objective.soft_min_snr_gamma=4.0"],
    "debiased": ["objective.debiased=true"],
    "P2": ["objective.p2_gamma=0.5"],
    "offset": ["objective.noise_offset=0.1"],
    "adaptive": ["objective.adaptive_noise_scale=0.2"],
    "pyramid": ["objective.pyramid_levels=6"],
    "perturbation": ["objective.input_perturbation=0.1"],
    "range": ["objective.timesteps.min=100", "objective.timesteps.max=300"],
    "logit-normal": ["objective.timesteps.distribution=logit_normal"],
    "mode": ["objective.timesteps.distribution=mode"],
    "cubic": ["objective.timesteps.distribution=cubic"],
    "later": ["objective.timesteps.distribution=later"],
    "earlier": ["objective.timesteps.distribution=earlier"],
    "band": ["objective.timesteps.distribution=band", "objective.timesteps.bias_band=[200, 500]"],
    "stratified": ["objective.timesteps.stratified=true"],
}
EPSILON = [  # as many as go together
    "objective.loss=huber",
    "objective.soft_min_snr_gamma=4.0",
    "objective.noise_offset=0.05",
    "objective.adaptive_noise_scale=0.1",
    "objective.input_perturbation=0.1",
    "objective.timesteps={min: 50, max: 900, distribution: logit_normal, stratified: true}",
]
V = [
    "objective.loss=smooth_l1",
    "objective.zero_terminal_snr=true",
    "objective.v_as_epsilon=true",
    "objective.pyramid_levels=8",
    "objective.input_perturbation=0.1",
    "objective.timesteps={distribution: later, bias_factor: 3.0, stratified: true}",
]


def logged(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def run_of(recipe: Recipe) -> Run:
    return build_run(recipe, build_accelerator(recipe))


def batch_of(run: Run, count: int = 4) -> Batch:
    """One step's samples, whatever the recipe's batch size."""
    batch = collate([run.data[position] for position in range(count)])
    return batch._replace(positions=torch.arange(count), step_samples=count)


def losses_of(run: Run, batch: Batch, masks: torch.Tensor | None = None) -> torch.Tensor:
    moments = latent_moments(run.bundle, batch)
    draws = draw(run.learner.objective, 0, 0, batch, moments[0].shape[1:])
    noised = noised_latents(run.learner.objective, run.bundle, moments, draws)
    condition = run.learner.conditions(batch.captions)
    return sample_losses(
        run.learner.objective, run.bundle, noised, condition, wanted_prediction(run.bundle, noised), masks
    )


@torch.no_grad()
def test_every_option_changes_the_loss_and_stays_finite(make_recipe: MakeRecipe):
    run = run_of(make_recipe())
    batch = batch_of(run)
    plain = losses_of(run, batch)
    for name, overrides in OPTIONS.items():
        section = make_recipe(*overrides).objective
        other = run._replace(learner=run.learner._replace(objective=build_objective(section, run.bundle)))
        found = losses_of(other, batch)
        assert torch.isfinite(found).all(), name
        assert not torch.equal(found, plain), name


@pytest.mark.parametrize("options", [EPSILON, V], ids=["epsilon", "v"])
def test_runs_with_many_options_resume_to_the_same_bits(
    make_recipe: MakeRecipe, tiny_sd1_folder: Path, tiny_sd2_folder: Path, tmp_path: Path, options: list[str]
):
    base = tiny_sd1_folder if options is EPSILON else tiny_sd2_folder
    train(make_recipe(*options, base=base))
    path = tmp_path / "run" / "adapter.safetensors"
    whole = path.read_bytes()
    assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    path.unlink()
    train(make_recipe(*options, f"train.resume={tmp_path / 'run' / 'checkpoints' / 'step-000002'}", base=base))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("options", [EPSILON, V], ids=["epsilon", "v"])
def test_the_loss_does_not_depend_on_how_a_batch_is_cut(
    make_recipe: MakeRecipe, tiny_sd1_folder: Path, tiny_sd2_folder: Path, tmp_path: Path, options: list[str]
):
    base = tiny_sd1_folder if options is EPSILON else tiny_sd2_folder
    for name, overrides in {"whole": [], "cut": ["train.micro_batch_size=1"]}.items():
        train(make_recipe(*options, *overrides, "train.max_steps=1", name=name, base=base))
    # The same numbers, their mean taken in another order: 1024 fp32 terms.
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "whole"), rel=1e-5)


@torch.no_grad()
def test_the_loss_is_its_formula_with_masks_and_weights(make_recipe: MakeRecipe):
    """Pseudo-Huber, SNR schedule, min-SNR, half a mask: in plain float64 from the network's prediction."""
    overrides = ("objective.loss=huber", "objective.min_snr_gamma=5.0", "objective.unmasked_weight=0.25")
    run = run_of(make_recipe(*overrides, "objective.timesteps={max: 300, stratified: true}"))
    batch = batch_of(run)
    masks = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = losses_of(run, batch, masks)
    moments = latent_moments(run.bundle, batch)
    draws = draw(run.learner.objective, 0, 0, batch, moments[0].shape[1:])
    noised = noised_latents(run.learner.objective, run.bundle, moments, draws)
    condition = run.learner.conditions(batch.captions)
    predicted = run.bundle.family.predict(run.bundle, noised.noisy, noised.timesteps, condition).double()
    assert (draws.timesteps < 147).any() and (draws.timesteps >= 147).any()  # both sides of SNR = γ
    for row, t in enumerate(draws.timesteps.tolist()):
        roots = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * s / 999 for s in range(t + 1)]
        bar = math.prod(1 - root**2 for root in roots)
        snr, c = bar / (1 - bar), 0.9 / (1 + ((1 - bar) / bar) ** 0.5) ** 2 + 0.1
        e = predicted[row] - draws.noise[row].double()
        per_cell = (2 * c * ((e.square() + c * c).sqrt() - c)).mean(0)
        w = masks[row].double() + 0.25 * (1 - masks[row].double())
        wanted = (per_cell * w).sum() / w.sum() * min(snr, 5) / snr
        # fp32 elements, and a mean of 256 of them.
        assert found[row].item() == pytest.approx(wanted.item(), rel=256 * 2**-24)


@torch.no_grad()
@pytest.mark.parametrize("loss", ["l1", "huber", "smooth_l1"])
def test_halves_of_a_picture_share_every_loss_between_them(make_recipe: MakeRecipe, loss: str):
    run = run_of(make_recipe(f"objective.loss={loss}"))
    batch = batch_of(run)
    left = torch.zeros(4, 8, 8)
    left[:, :, :4] = 1
    halves = losses_of(run, batch, left) + losses_of(run, batch, 1 - left)
    torch.testing.assert_close(halves, 2 * losses_of(run, batch), rtol=1e-5, atol=0)


def test_strata_share_a_whole_step_out_whatever_its_micro_batches(make_recipe: MakeRecipe):
    run = run_of(make_recipe("objective.timesteps.stratified=true"))
    batch = batch_of(run)
    times = draw(run.learner.objective, 0, 5, batch, (4, 8, 8)).timesteps
    assert sorted(t // 250 for t in times.tolist()) == [0, 1, 2, 3]
    part = batch._replace(positions=batch.positions[2:])
    assert torch.equal(draw(run.learner.objective, 0, 5, part, (4, 8, 8)).timesteps, times[2:])


def test_one_option_moves_no_other_draw(make_recipe: MakeRecipe):
    run = run_of(make_recipe())
    batch = batch_of(run)

    def draws(*overrides: str):
        objective = build_objective(make_recipe(*overrides).objective, run.bundle)
        return draw(objective, 0, 3, batch, (4, 8, 8))

    plain = draws()
    for name in ("pyramid", "perturbation", "logit-normal", "stratified", "adaptive", "offset"):
        with_one = draws(*OPTIONS[name])
        moved = {
            field
            for field in ("noise", "posterior_noise", "timesteps", "offsets")
            if not torch.equal(getattr(with_one, field), getattr(plain, field))
        }
        its_own = {
            "pyramid": {"noise"},
            "offset": {"noise"},
            "logit-normal": {"timesteps"},
            "stratified": {"timesteps"},
        }
        assert moved == its_own.get(name, set()), name
    # Nor do two of them move one another.
    both = draws(*OPTIONS["perturbation"], *OPTIONS["stratified"])
    assert torch.equal(both.timesteps, draws(*OPTIONS["stratified"]).timesteps)
    assert torch.equal(both.perturbation, draws(*OPTIONS["perturbation"]).perturbation)  # pyright: ignore


@torch.no_grad()
def test_the_target_stays_while_the_input_is_perturbed(make_recipe: MakeRecipe):
    run = run_of(make_recipe("objective.input_perturbation=0.1"))
    batch = batch_of(run)
    moments = latent_moments(run.bundle, batch)
    draws = draw(run.learner.objective, 0, 0, batch, moments[0].shape[1:])
    noised = noised_latents(run.learner.objective, run.bundle, moments, draws)
    plain = noised_latents(run.learner.objective, run.bundle, moments, draws._replace(perturbation=None))
    assert torch.equal(wanted_prediction(run.bundle, noised), draws.noise)
    root = (1 - noised.alpha_bar).sqrt().float().view(-1, 1, 1, 1)
    # Both inputs are near 1 and rounded: a few times 2^-24 of that.
    torch.testing.assert_close(noised.noisy - plain.noisy, 0.1 * root * draws.perturbation, rtol=0, atol=8 * 2**-23)


def test_a_base_that_predicts_clean_latents_is_trained_and_drawn(make_recipe: MakeRecipe, tmp_path: Path):
    train(make_recipe("model.prediction_type=sample", "train.max_steps=1", "validation.prompts=[red apple]"))
    told = header(tmp_path / "run" / "adapter.safetensors")
    assert told["modelspec.prediction_type"] == "sample"
    assert json.loads(told["lora_kit.scheduler"]) == {"prediction_type": "sample"}
    assert (tmp_path / "run" / "samples" / "final_grid.png").exists()


ZERO = ["objective.zero_terminal_snr=true", "train.max_steps=1"]


def test_zero_terminal_snr_is_known_to_objective_samplers_header_and_generate(
    make_recipe: MakeRecipe, tiny_sd2_folder: Path, tmp_path: Path
):
    recipe = make_recipe(*ZERO, "validation.prompts=[red apple]", base=tiny_sd2_folder)
    run = run_of(recipe)
    assert run.learner.objective.alpha_bars[-1] == 0
    sampler = scheduler_named("ddim", run.bundle.scheduler_config)
    sampler.set_timesteps(4)
    assert sampler.alphas_cumprod[-1] == 0 and sampler.timesteps[0] == 999
    train(recipe)
    path = tmp_path / "run" / "adapter.safetensors"
    told = header(path)
    assert told["ss_zero_terminal_snr"] == "True"
    wanted = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert json.loads(told["lora_kit.scheduler"]) == wanted
    prepared = prepare(str(tiny_sd2_folder), [path])
    assert wanted.items() <= {**prepared.bundle.scheduler_config, "prediction_type": "v_prediction"}.items()
    (warning,) = prepared.warnings
    assert "with zero terminal SNR" in warning and "pictures follow the adapter" in warning


def test_a_full_fine_tune_with_zero_terminal_snr_is_a_base_that_has_it(
    make_recipe: MakeRecipe, tiny_sd2_folder: Path, tmp_path: Path
):
    outcome = train(make_recipe(*ZERO, 'targets=[{match: "unet.**", method: full}]', base=tiny_sd2_folder))
    bundle = load_bundle(ModelSection(base=str(outcome.path)))
    assert bundle.scheduler_config["timestep_spacing"] == "trailing"
    assert build_objective(ObjectiveSection(), bundle).alpha_bars[-1] == 0


def test_zero_terminal_snr_is_refused_of_a_base_that_predicts_the_noise(make_recipe: MakeRecipe, tiny_sd1_folder: Path):
    with pytest.raises(RecipeError, match=r"tiny-sd1, which predicts epsilon:\n  objective\.zero_terminal_snr: `true`"):
        train(make_recipe(*ZERO))
    with pytest.raises(
        RecipeError, match=r"objective\.zero_terminal_snr: `true` with a network that predicts the noise"
    ):
        make_recipe(*ZERO, "model.prediction_type=epsilon")
    bundle = load_bundle(ModelSection(base=str(tiny_sd1_folder)))
    bundle.scheduler_config["rescale_betas_zero_snr"] = True
    with pytest.raises(ModelError, match=r"rescale_betas_zero_snr.*model\.prediction_type"):
        adopt_schedule(ObjectiveSection(), bundle)


def test_all_that_does_not_fit_the_base_is_named_at_once(make_recipe: MakeRecipe):
    recipe = make_recipe("objective.v_as_epsilon=true", "objective.timesteps={min: 1000, max: 1200}")
    with pytest.raises(RecipeError) as caught:
        train(recipe)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("  objective.v_as_epsilon: `true` is for networks that predict v")
    assert lines[2].startswith("  objective.timesteps.min: got 1000, but the base's schedule has the timesteps 0 … 999")


def test_a_weight_that_is_zero_at_the_terminal_timestep_is_told(make_recipe: MakeRecipe, tiny_sd2_folder: Path):
    run = run_of(make_recipe(*ZERO, "objective.min_snr_gamma=5.0", base=tiny_sd2_folder))
    assert any("min_snr_gamma has weight 0 at the last timestep" in notice for notice in run.notices)
    run = run_of(make_recipe(*ZERO, base=tiny_sd2_folder))
    assert not any("weight 0" in notice for notice in run.notices)


def test_held_out_noise_is_plain_whatever_is_trained_with(
    make_recipe: MakeRecipe, picture_folder: Path, tmp_path: Path
):
    """Noise options and ranges change what is learned, not what is measured: an untrained adapter measures the same."""
    recipe = make_recipe("train.max_steps=1")
    held_out = recipe.validation.model_copy(update={"held_out": recipe.data.sources[0]})
    noisy = ["objective.pyramid_levels=6", "objective.input_perturbation=0.1", "objective.timesteps.max=300"]
    found = []
    for name, overrides in {"plain": [], "noisy": noisy}.items():
        one = make_recipe("train.max_steps=1", *overrides, name=name)
        train(one.model_copy(update={"validation": held_out}))
        found.append(json.loads((tmp_path / name / "result.json").read_text())["held_out_base_loss"])
    assert found[0] == found[1]
