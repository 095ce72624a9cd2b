"""Labelled sheets of pictures: strength × prompt × seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

INK = (20, 20, 20)
PAPER = (255, 255, 255)
GAP = 4
SMALLEST_CELL = 128
"""Pictures below this many pixels a side are enlarged by a whole factor."""


class Text(NamedTuple):
    """Wrapped lines in a font, and the room they need."""

    lines: tuple[str, ...]
    width: int
    height: int


def compose_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """A sheet with `rows` of pictures, labels at the left and above, wrapped and never cut.

    Small pictures are enlarged by whole pixels (nearest neighbour), so that what the network drew is what is seen.
    Raises ValueError if the labels do not match the pictures.
    """
    columns = len(column_labels)
    if not rows or len(rows) != len(row_labels) or any(len(row) != columns for row in rows):
        raise ValueError(f"{len(rows)} rows need as many labels, and {columns} column labels as many pictures a row")
    cells = [[enlarged(picture) for picture in row] for row in rows]
    width = max(cell.width for row in cells for cell in row)
    height = max(cell.height for row in cells for cell in row)
    font = ImageFont.load_default(size=max(12, min(28, width // 10)))
    left = [wrapped(label, font, max(width, 120)) for label in row_labels]
    top = [wrapped(label, font, width) for label in column_labels]
    margin_x = max(text.width for text in left) + 2 * GAP
    margin_y = max(text.height for text in top) + 2 * GAP
    heights = [max(height, text.height) + GAP for text in left]
    widths = [max(width, text.width) + GAP for text in top]
    sheet = Image.new("RGB", (margin_x + sum(widths), margin_y + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(top):
        x = margin_x + sum(widths[:column])
        _write(pen, font, text, (x + (widths[column] - GAP - text.width) // 2, margin_y - GAP - text.height))
    for row, text in enumerate(left):
        y = margin_y + sum(heights[:row])
        _write(pen, font, text, (GAP, y + (heights[row] - GAP - text.height) // 2))
        for column, cell in enumerate(cells[row]):
            sheet.paste(cell, (margin_x + sum(widths[:column]), y))
    return sheet


def enlarged(picture: Image.Image) -> Image.Image:
    """The picture, or its whole multiple of at least SMALLEST_CELL pixels on the shorter side."""
    factor = -(-SMALLEST_CELL // min(picture.size))
    if factor <= 1:
        return picture.convert("RGB")
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Text:
    """The label in lines of at most `width` pixels; a word longer than that is broken."""
    lines: list[str] = []
    for paragraph in label.splitlines() or [""]:
        lines += _lines(paragraph, font, width)
    used = max(round(font.getlength(line) + 0.5) for line in lines)
    return Text(tuple(lines), used, len(lines) * _line_height(font))


def _lines(paragraph: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in paragraph.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        pieces = _pieces(word, font, width)
        lines = [*lines, *pieces] if lines[-1] else [*lines[:-1], *pieces]
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    # Ascender to descender of a line that has both; the same for every text.
    _, top, _, bottom = font.getbbox("Agjy")
    return round(bottom - min(top, 0)) + 2


def _write(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: Text,
    corner: tuple[int, int],
) -> None:
    for index, line in enumerate(text.lines):
        pen.text((corner[0], corner[1] + index * _line_height(font)), line, fill=INK, font=font)
