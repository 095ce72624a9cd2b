"""Loading a base: is it ever held twice? Peak resident memory and seconds, each a process of its own.

    python scripts/bench/loading.py [--folder DIR] [--quick]

Stable Diffusion 1.5's shapes in fp32 with random weights, as a single file (`.safetensors`, `.ckpt`: the names of the
tests' own list, tests/ldm_reference.py) and as a diffusers folder, loaded as a run loads its base (U-Net and text
encoder in the run's precision, VAE in fp32), beside diffusers' pipeline reading that folder, its VAE in the same
precision as the rest. `held`: bytes of all weights as they were asked for. `loading`: how far the process's high-water
mark rose while it loaded; the file's own pages count while they are mapped, which the system can take back. `read
once`: the same after every weight was read once, as the first step does: held twice, it would be twice `held`.
`--folder` keeps the bases (8 GB and more); `--quick`: narrow networks, to see that the script runs. Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from families import TOKENIZER, stable_diffusion

TESTS = Path(__file__).resolve().parents[2] / "tests"
FORMS = ("base.safetensors", "base.ckpt", "folder")
SINGLE_FILES = """
import sys
import torch
from ldm_reference import SD15, checkpoint_shapes, small
from safetensors.torch import save_file
torch.manual_seed(0)
shapes = checkpoint_shapes(small(1, 49408) if sys.argv[2] == "True" else SD15)
tensors = {name: torch.empty(shape).normal_(0, 0.02) for name, shape in shapes.items()}
save_file(tensors, f"{sys.argv[1]}/base.safetensors", metadata={"format": "pt"})
torch.save({"state_dict": tensors}, f"{sys.argv[1]}/base.ckpt")
"""
PIPELINE = "folder, diffusers' pipeline"


def main() -> None:
    options = _options()
    if options.row:
        print(json.dumps(_loaded(*options.row)))
        return
    with tempfile.TemporaryDirectory() as place:
        bases = Path(options.folder or place)
        _build(bases, options.quick)
        print("| base, fp32 | loaded in | held, MiB | loading | read once | of held | seconds |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for precision in ("no", "bf16"):
            for form in (*FORMS, PIPELINE):
                print(_line(form, bases / form.split(",")[0], precision), flush=True)


def _line(form: str, base: Path, precision: str) -> str:
    command = [sys.executable, __file__, "--row", form, str(base), precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{form} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    held, loading, read = (found[name] / 2**20 for name in ("held", "loading", "read"))
    name = form.removeprefix("base")
    dtype = "fp32" if precision == "no" else precision
    cells = [name, dtype, f"{held:,.0f}", f"{loading:,.0f}", f"{read:,.0f}", f"{read / held:.2f}"]
    cells.append(f"{found['seconds']:.1f}")
    return f"| {' | '.join(cells)} |"


def _loaded(form: str, base: str, precision: str) -> dict[str, Any]:
    """Bytes of the weights and of the high-water mark above what this process held before; seconds."""
    import torch

    from lora_kit.allocator import keep_freed_blocks
    from lora_kit.models.loading import load_bundle
    from lora_kit.recipe.sections import ModelSection
    from lora_kit.training.peak_memory import peak_memory, reset_peak, resident_memory

    dtype = torch.float32 if precision == "no" else torch.bfloat16
    device = torch.device("cpu")
    load: Any
    if form == PIPELINE:
        from diffusers import StableDiffusionPipeline

        def load() -> list[Any]:
            pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=dtype, local_files_only=True)
            return [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    else:
        keep_freed_blocks()  # as `lora-kit train` does
        section = ModelSection(base=base, tokenizer=str(TOKENIZER))

        def load() -> list[Any]:
            return load_bundle(section, dtype).networks

    reset_peak(device)
    before, began = _known(resident_memory()), time.perf_counter()
    networks = load()
    seconds, loading = time.perf_counter() - began, _known(peak_memory(device))
    weights = [weight for network in networks for weight in network.parameters()]
    for weight in weights:
        weight.amax()  # every page, and no copy
    return {
        "held": sum(weight.nbytes for weight in weights),
        "loading": loading - before,
        "read": _known(peak_memory(device)) - before,
        "seconds": seconds,
    }


def _known(size: int | None) -> int:
    if size is None:
        raise SystemExit("This system does not tell what is resident: the script needs Linux.")
    return size


def _build(bases: Path, quick: bool) -> None:
    """The three forms, where they are not there yet."""
    bases.mkdir(parents=True, exist_ok=True)
    if not (bases / "folder" / "model_index.json").is_file():
        pipeline = stable_diffusion("SD 1.5", {}, {}, quick)
        for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            network.float()
        pipeline.save_pretrained(bases / "folder")
    if not (bases / "base.ckpt").is_file():
        command = [sys.executable, "-c", SINGLE_FILES, str(bases), str(quick)]
        subprocess.run(command, check=True, cwd=TESTS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the bases are, or are kept")
    parser.add_argument("--quick", action="store_true", help="narrow networks")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
