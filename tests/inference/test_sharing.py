"""What a grid shares: captions, the unconditional half, equal pictures, folded weights; and that no cell changes by it.

Pictures are compared in 8-bit levels: fp32 rounding is far below one, but a value on the edge may fall either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_samples import adapter_file, bundle_of, random_state
from live_samples import digests
from PIL import Image

from lora_kit.adapters import AdapterState, write_kohya
from lora_kit.cli.main import main
from lora_kit.errors import RecipeError
from lora_kit.inference import (
    PictureInputs,
    Prepared,
    SamplingSettings,
    batching,
    draw,
    generate,
    generate_columns,
    prepare,
    strengths,
)
from lora_kit.inference.strengths import at_strengths, can_fold, folding_pays

SMALL = SamplingSettings(steps=3, guidance=3.0, negative_prompt="grey house", width=16, height=16)
PROMPTS = ["red apple", "blue boat", "black cat"]


@pytest.fixture
def unet_file(tiny_sd1_folder: Path, tmp_path: Path) -> Path:
    """An adapter that leaves the text encoder alone."""
    updates = random_state(bundle_of(tiny_sd1_folder).components).updates
    of_unet = {name: update for name, update in updates.items() if name.startswith("unet.")}
    write_kohya(tmp_path / "unet.safetensors", AdapterState(of_unet, {}))
    return tmp_path / "unet.safetensors"


@pytest.fixture
def whole_file(tiny_sd1_folder: Path, tmp_path: Path) -> Path:
    """An adapter of UNet and text encoder."""
    return adapter_file(tmp_path / "whole.safetensors", bundle_of(tiny_sd1_folder).components)


@pytest.fixture(params=[True, False], ids=["folded", "live"])
def folding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways, whatever the rule would choose for pictures as small as these."""
    monkeypatch.setattr(strengths, "folding_pays", lambda *_: request.param)
    return request.param


def calls_of(network: Any, run: Callable[[], object]) -> list[int]:
    """Rows of every call of the network while `run` runs."""
    rows: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    run()
    hook.remove()
    return rows


def levels(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


def test_every_cell_is_the_picture_that_generate_draws_alone(
    tiny_sd1_folder: Path, whole_file: Path, folding: bool
) -> None:
    prepared = prepare(str(tiny_sd1_folder), [whole_file], torch.float32)
    columns = generate_columns(prepared, PROMPTS[:2], [0, 1], [0.0, 1.0], SMALL)
    for strength, pictures in columns.items():
        assert [(one.prompt, one.seed) for one in pictures] == [(p, s) for p in PROMPTS[:2] for s in (0, 1)]
        for picture in pictures:
            (alone,) = generate(prepared, [picture.prompt], [picture.seed], [strength], SMALL)
            assert levels(picture.image, alone.image) <= 1
    assert levels(columns[0.0][0].image, columns[1.0][0].image) > 1  # the adapter shows


def test_folded_pictures_are_the_live_ones(
    tiny_sd1_folder: Path, whole_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(str(tiny_sd1_folder), [whole_file], torch.float32)
    drawn = []
    for folds in (True, False):
        monkeypatch.setattr(strengths, "folding_pays", lambda *_, folds=folds: folds)
        drawn.append([one.image for one in generate(prepared, PROMPTS, [0], [0.7], SMALL)])
    assert max(map(levels, *drawn)) <= 1


def test_captions_are_encoded_once_for_all_strengths(tiny_sd1_folder: Path, unet_file: Path) -> None:
    prepared = prepare(str(tiny_sd1_folder), [unet_file], torch.float32)

    def grid() -> None:
        generate_columns(prepared, [*PROMPTS, PROMPTS[0]], [0, 1], [0.0, 0.5, 1.0], SMALL)

    assert calls_of(prepared.bundle.text_encoder, grid) == [1, 1, 1, 1]  # three prompts and the negative one


def test_an_adapted_text_encoder_encodes_them_at_each_strength(tiny_sd1_folder: Path, whole_file: Path) -> None:
    prepared = prepare(str(tiny_sd1_folder), [whole_file], torch.float32)

    def grid() -> None:
        generate_columns(prepared, PROMPTS, [0, 1], [0.0, 0.5, 0.5], SMALL)

    assert calls_of(prepared.bundle.text_encoder, grid) == [1] * 4 * 2


def test_the_unconditional_half_of_the_first_step_is_computed_once_a_seed(tiny_sd1_folder: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    prompts, seeds = [prompt for prompt in PROMPTS for _ in range(2)], [0, 1] * 3
    rows = calls_of(bundle.unet, lambda: draw(bundle, prompts, seeds, settings=SMALL))
    assert rows == [2 + 6, 12, 12]
    apart = replace(SMALL, batch_size=1)
    assert calls_of(bundle.unet, lambda: draw(bundle, PROMPTS, [0] * 3, settings=apart)) == [2, 2, 2] * 3
    whole = replace(SMALL, guidance=1.0)
    assert calls_of(bundle.unet, lambda: draw(bundle, PROMPTS, [0] * 3, settings=whole)) == [3, 3, 3]


def test_pictures_with_other_inputs_begin_apart(tiny_sd1_folder: Path) -> None:
    """One seed, two pictures to begin at: two starts, though the noise is the same."""
    bundle = bundle_of(tiny_sd1_folder)
    given = [PictureInputs(Image.new("RGB", (16, 16), colour)) for colour in ("red", "blue")]
    inputs, wished = [given[0], given[0], given[1]], replace(SMALL, strength=1.0)
    together = draw(bundle, PROMPTS, [0] * 3, settings=wished, inputs=inputs)
    rows = calls_of(bundle.unet, lambda: draw(bundle, PROMPTS, [0] * 3, settings=wished, inputs=inputs))
    assert rows == [2 + 3, 6, 6]
    for prompt, own, picture in zip(PROMPTS, inputs, together, strict=True):
        (alone,) = draw(bundle, [prompt], [0], settings=wished, inputs=[own])
        assert levels(picture, alone) <= 1


def test_equal_requests_are_drawn_once_and_given_back_in_their_places(tiny_sd1_folder: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    prompts, seeds = ["red apple", "blue boat", "red apple", "red apple"], [1, 0, 1, 0]
    pictures = draw(bundle, prompts, seeds, settings=SMALL)
    assert pictures[0].tobytes() == pictures[2].tobytes() != pictures[3].tobytes()
    for prompt, seed, picture in zip(prompts, seeds, pictures, strict=True):
        assert levels(picture, draw(bundle, [prompt], [seed], settings=SMALL)[0]) <= 1
    rows = calls_of(bundle.unet, lambda: draw(bundle, prompts, seeds, settings=SMALL))
    assert rows[-1] == 2 * 3


def modules_of(prepared: Prepared) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in prepared.bundle.unet.named_modules()]


def test_folded_the_network_is_the_bases_own_modules(tiny_sd1_folder: Path, whole_file: Path, folding: bool) -> None:
    bare = prepare(str(tiny_sd1_folder), [], torch.float32)
    prepared = prepare(str(tiny_sd1_folder), [whole_file], torch.float32)
    with at_strengths(prepared, [0.7], SMALL, 1):
        assert (modules_of(prepared) == modules_of(bare)) == folding
    assert modules_of(prepared) != modules_of(bare)


def test_a_grid_leaves_every_weight_bit_for_bit(tiny_sd1_folder: Path, whole_file: Path, folding: bool) -> None:
    prepared = prepare(str(tiny_sd1_folder), [whole_file], torch.float32)
    before = digests(prepared.bundle.components)
    generate_columns(prepared, PROMPTS[:1], [0], [0.3, -1.7], SMALL)
    assert digests(prepared.bundle.components) == before


def test_so_does_one_that_is_interrupted(tiny_sd1_folder: Path, whole_file: Path, folding: bool) -> None:
    prepared = prepare(str(tiny_sd1_folder), [whole_file], torch.float32)
    before = digests(prepared.bundle.components)

    def interrupted(items: Iterable[Any], what: str, total: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_columns(prepared, PROMPTS[:1], [0], [0.3], SMALL, interrupted)
    assert digests(prepared.bundle.components) == before


def test_sixteen_bits_stay_live_and_so_does_what_memory_does_not_hold_twice(
    tiny_sd1_folder: Path, whole_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_fold(prepare(str(tiny_sd1_folder), [whole_file], torch.float32).bundle)
    for dtype in (torch.bfloat16, torch.float16):
        assert not can_fold(prepare(str(tiny_sd1_folder), [whole_file], dtype).bundle)
    monkeypatch.setattr(strengths, "memory_at_hand", lambda _: 0)
    assert not can_fold(prepare(str(tiny_sd1_folder), [whole_file], torch.float32).bundle)
    assert not can_fold(bundle_of(tiny_sd1_folder))  # nothing to fold


def test_folding_is_for_work_enough(tiny_sd1_folder: Path) -> None:
    """192 cells a channel of the first block, which has 32: 96 rows of 8 x 8 cells, 48 pictures' with guidance."""
    bundle = bundle_of(tiny_sd1_folder)
    one = replace(SMALL, steps=1)
    assert not folding_pays(bundle, one, 47)
    assert folding_pays(bundle, one, 48)
    assert not folding_pays(bundle, replace(one, guidance=1.0), 48)
    assert folding_pays(bundle, replace(one, steps=48), 1)


def test_the_batch_is_what_half_of_the_memory_holds(tiny_sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    each = batching.picture_bytes(bundle, SMALL)
    for free, expected in ((None, 64), (2 * 64 * each, 64), (2 * 5 * each, 5), (0, 1)):
        monkeypatch.setattr(batching, "memory_at_hand", lambda _, free=free: free)
        assert batching.fitting_batch_size(bundle, SMALL) == expected
    large = replace(SMALL, width=1024, height=512)
    monkeypatch.setattr(batching, "memory_at_hand", lambda _: None)
    assert batching.fitting_batch_size(bundle, large) == batching.usual_batch_size(large) == 2
    monkeypatch.setattr(batching, "memory_at_hand", lambda _: 0)
    assert batching.fitting_batch_size(bundle, replace(large, batch_size=7)) == 7
    with pytest.raises(RecipeError, match=r"batch_size: got 0, allowed: 1 and more"):
        draw(bundle, ["x"], [0], settings=replace(SMALL, batch_size=0))


def test_generate_and_grid_take_a_batch_size(tiny_sd1_folder: Path, whole_file: Path, tmp_path: Path) -> None:
    common = [str(tiny_sd1_folder), "--adapter", str(whole_file), "--prompt", "red apple", "--prompt", "blue boat"]
    common += ["--steps", "2", "--size", "16x16", "--dtype", "fp32"]
    for size in ("1", "2"):
        for command, out in (("generate", size), ("grid", f"{size}.png")):
            with pytest.raises(SystemExit, match=r"^0$"):
                main([command, *common, "--batch-size", size, "--out", str(tmp_path / out)])
    names = [path.name for path in (tmp_path / "1").iterdir()]
    assert len(names) == 2
    for one, other in [
        *((tmp_path / "1" / name, tmp_path / "2" / name) for name in names),
        (tmp_path / "1.png", tmp_path / "2.png"),
    ]:
        with Image.open(one) as first, Image.open(other) as second:
            assert levels(first, second) <= 1
