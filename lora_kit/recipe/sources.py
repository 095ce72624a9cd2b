"""One set of captioned pictures, as an item of `data.sources` or `validation.held_out`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from lora_kit.recipe.base import PathText, Positive, Problem, Section, refuse
from lora_kit.recipe.captions import CaptionRules

Alpha = Annotated[str, Field(pattern=r"^(white|black|mask|#[0-9a-fA-F]{6})$")]
"""What becomes of transparency: a colour to put under it, or `mask`."""
Resolution = Annotated[int, Field(ge=8, multiple_of=8)]
"""Side of a square, pixels."""


class SourceSection(Section):
    """One set of captioned pictures."""

    path: PathText
    """A folder (metadata.jsonl / .csv / .parquet, or pictures with `.txt` / `.caption` / `.json` beside them), tar
    shards of WebDataset (one, a folder of them, or a pattern such as `shards/{000..019}.tar` or `shards/*.tar`), a
    data set that HF `datasets` can load, or the data-set TOML of sd-scripts, which becomes one source per subset.
    Relative paths are relative to the recipe's folder."""
    layout: Literal["auto", "plain", "kohya"] = "auto"
    """How a folder is read. `kohya`: its folders are named `N_name`, where N is how often each picture appears in an
    epoch and `name` the caption of pictures that have none. `auto` takes it so, and says so, if all pictures of the
    folder lie in such folders; `plain` never does."""
    nested: bool = True
    """Read the folders within a folder too."""
    metadata_file: PathText | None = None
    """Metadata of a folder that lies elsewhere or has another name: `.jsonl`, `.csv`, `.parquet`, or the `.json` that
    sd-scripts' tools write."""
    config: str | None = None
    """Configuration name of an HF data set."""
    split: str = "train"
    """Split of an HF data set."""
    streaming: bool = False
    """Read an HF data set from its beginning over the network, without fetching it whole. The first `max_records` rows
    are kept in the cache of HF `datasets` and read from there: an epoch needs them in any order."""
    max_records: Positive | None = None
    """Rows that `streaming` reads; `where` then picks among them. Bounds time and disk, about 0.1 to 1 MB a row."""
    image_column: str = "image"
    """Column with the picture, for an HF data set."""
    caption_column: str = "text"
    """Column (of the data set or the metadata) with the caption, or with a list of captions. In a `.json` file beside
    a picture, the key; where there is no `text`, the one of `caption`, `captions` and `tags` that is there."""
    caption_suffix: Annotated[str, Field(pattern=r"^[^/\\]+$")] | None = None
    """What follows a picture's name, less its ending, in the name of its caption file. Default: `.txt` or `.caption`,
    else `.json`."""
    caption_fallback: str | None = None
    """Caption of pictures that have none. Default: the folder's name in the `kohya` layout; otherwise a picture
    without a caption is broken (`data.on_error`)."""
    repeats: Positive = 1
    """How often each picture appears in an epoch. In the `kohya` layout, multiplies the folders' own."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the samples that come from this source, in proportion to the other sources' weights; all sources have
    one or none. Becomes whole repeats, the fewest that meet each share within 1 % of itself, so that pictures of one
    source keep appearing equally often."""
    resolution: Resolution | None = None
    """As `data.resolution`, for this source. Sources of several resolutions are trained in batches of their own, as
    `data.buckets` says."""
    loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of these pictures' loss."""
    regularisation: bool = False
    """These pictures keep what the base knows of a class (prior preservation; Ruiz et al. 2023, section 3.2) and are
    no examples of the subject: the trigger word is not put before their captions. Where they are fewer samples than the
    others, they are repeated until they are as many, unless sources have weights. `loss_weight` is the prior's."""
    target: Literal["picture", "base"] = "picture"
    """What is learnt from these pictures. `base`: to predict what the base model predicts for them under their
    captions, so that it stays as it is there; the training pictures themselves under the class's captions will do, and
    no others are needed. Costs a second forward pass of these pictures."""
    mask_folder: PathText | None = None
    """Folder of masks: each has its picture's path within the source, with any picture's ending. White counts in the
    loss, black does not; a mask may have another resolution than its picture, not another shape. Pictures without a
    mask count everywhere."""
    mask_suffix: Annotated[str, Field(pattern=r"^[^/\\]+$")] | None = None
    """Masks lie beside their pictures, and are named like them with this before the ending: with `-mask`,
    `0001-mask.png` is that of `0001.jpg`."""
    mask_column: str | None = None
    """Column with the mask: a picture of an HF data set, or in metadata the mask's path within the source."""
    where: dict[str, list[str]] = Field(default={})
    """Only records whose column holds one of these values, such as `{kind: [thing]}`."""
    alpha: Alpha | None = None
    """As `data.alpha`, for this source."""
    captions: CaptionRules | None = None
    """As `data.captions`, for this source; replaces it whole. Default: `data.captions`."""

    _reads_captions: bool = PrivateAttr(default=True)

    @property
    def reads_captions(self) -> bool:
        """Whether a picture needs a caption; the base decides, not the recipe."""
        return self._reads_captions

    def without_captions(self) -> SourceSection:
        """The same source for a base that reads no text."""
        found = self.model_copy()
        found._reads_captions = False
        return found

    @model_validator(mode="after")
    def _fits(self) -> SourceSection:
        refuse("SourceSection", _problems(self))
        return self


def weight_problems(sources: Sequence[SourceSection]) -> Iterator[Problem]:
    """What is wrong between the weights of a recipe's sources."""
    without = [index for index, source in enumerate(sources) if source.weight is None]
    if without and len(without) < len(sources):
        said = "has no weight, but another source has: shares need one for each. Give it one, or use repeats for all."
        yield Problem(("sources", without[0]), said)


def _problems(source: SourceSection) -> Iterator[Problem]:
    if source.weight is not None and source.repeats != 1:
        said = f"does nothing beside `weight: {source.weight:g}`, which decides how often pictures appear; keep one."
        yield Problem(("repeats",), said)
    if source.layout == "kohya" and not source.nested:
        yield Problem(("nested",), "`layout: kohya` is about the folders within; set `nested: true`.")
    if source.metadata_file is not None and source.layout == "kohya":
        said = "metadata says of each picture what it is, `layout: kohya` takes it from folders' names; keep one."
        yield Problem(("metadata_file",), said)
    masks = [name for name in ("mask_folder", "mask_suffix", "mask_column") if getattr(source, name) is not None]
    if len(masks) > 1:
        yield Problem((masks[1],), f"beside `{masks[0]}`: a picture has one mask; keep one of them.")
    if source.streaming and source.max_records is None:
        said = "needs `max_records`: how many rows to read, such as 10000. They are kept on disk."
        yield Problem(("streaming",), said)
    if source.max_records is not None and not source.streaming:
        said = "does nothing without `streaming: true`; remove it, or pick records with `where`."
        yield Problem(("max_records",), said)
