"""The `tokens:` section: new words for the text encoder, learned alone or together with adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lora_kit.recipe.base import EMBEDDING_FILES, Above0, Fraction, Positive, Problem, Section
from lora_kit.recipe.optimizer import OptimizerSection
from lora_kit.recipe.rules import listed

if TYPE_CHECKING:
    from lora_kit.recipe.sections import Recipe

TOKEN_LR = 5e-4  # the habit of diffusers' textual_inversion.py and of cloneofsimo/lora's pivotal tuning
_UNFIT = re.compile(r"[\s.]")


class TokenSection(Section):
    """One new word (textual inversion, Gal et al. 2022). With `targets` it is learned together with the adapters
    (pivotal tuning); with `targets: none`, alone."""

    token: Annotated[str, Field(min_length=1)]
    """The new word, such as `<cat-toy>`: no blanks, no dots, and no word that the tokenizer knows as one token. Write
    it in the captions, or as `data.trigger`."""
    initializer: Annotated[str, Field(min_length=1)] = "random"
    """What its vectors begin as: word(s) of the tokenizer's vocabulary, such as `toy`; `random`: normally distributed
    with the vocabulary's own mean and standard deviation in each dimension; or an embedding file (.safetensors, or an
    A1111 .pt) to go on from."""
    vectors: Positive | None = None
    """How many vectors, each of which takes a place in the caption as a token does. With more of them than initializer
    words, the words repeat. Default: as many as the initializer has, 1 for `random`."""
    lr: Above0 | None = None
    """Learning rate of its vectors. Default: `optimizer.token_lr`."""
    norm_decay: Fraction = 0.0
    """After each step every vector's length goes this share of the way to the vocabulary's mean length: 0.01 keeps it
    near, 1 holds it there. Long vectors drown the other words of a prompt. Default: lengths are free, as in the
    paper."""
    until: Positive | None = None
    """Learn it in the first steps only, up to this one; after that it stays as it is, and the adapters go on (pivotal
    tuning's two phases). Default, and where the run is shorter: to the end."""

    @property
    def is_file(self) -> bool:
        """Whether it begins as an embedding file's vectors."""
        return self.initializer.lower().endswith(EMBEDDING_FILES)


def file_stem(token: str) -> str:
    """`<cat-toy>` → `cat-toy`: what every file system takes, and A1111 knows the word by."""
    return re.sub(r"[^\w+-]+", "_", token).strip("_") or token.encode().hex()


def rate_of_token(token: TokenSection, section: OptimizerSection) -> float:
    """The token's own rate, or `token_lr`, or its default."""
    return token.lr or section.token_lr or (section.lr if section.is_prodigy else TOKEN_LR)


def token_problems(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with the tokens among themselves and beside the other sections."""
    if not recipe.tokens:
        if recipe.targets == "none":
            yield Problem(("targets",), "`none` trains nothing; name what to train, or give `tokens` to learn.")
        if recipe.optimizer.token_lr is not None:
            yield Problem(("optimizer", "token_lr"), "does nothing without `tokens`; remove it.")
        if recipe.save.bundle_tokens:
            yield Problem(("save", "bundle_tokens"), "does nothing without `tokens`; remove it.")
        return
    yield from _names(recipe.tokens)
    yield from _until(recipe)
    yield from _bundled(recipe)
    yield from _lengths(recipe)
    if any(rule.method == "full" for rule in listed(recipe.targets)):
        said = "`method: full` writes a whole model, which cannot hold new tokens; train adapters (`method: diff` for "
        yield Problem(("tokens",), f"{said}whole weights), or remove `tokens`.")


def _names(tokens: Sequence[TokenSection]) -> Iterator[Problem]:
    for index, one in enumerate(tokens):
        if _UNFIT.search(one.token):
            said = f"got {one.token!r}; a token has no blanks and no dots: write `<cat-toy>`, for one."
            yield Problem(("tokens", index, "token"), said)
        for other in tokens[:index]:
            first, second = one.token.lower(), other.token.lower()
            if first in second or second in first:
                said = f"{one.token!r} and {other.token!r}: one contains the other (upper case counts as lower case), "
                yield Problem(("tokens", index, "token"), f"{said}so that captions would be ambiguous; rename one.")
            elif file_stem(first) == file_stem(second):
                said = f"{one.token!r} and {other.token!r} would have one file, {file_stem(first)}.safetensors"
                yield Problem(("tokens", index, "token"), f"{said}; rename one.")


def _until(recipe: Recipe) -> Iterator[Problem]:
    last = recipe.train.max_steps
    ends = [one.until or last for one in recipe.tokens]
    if recipe.targets == "none" and max(ends) < last:
        said = f"no token is learned after step {max(ends)}, and `targets: none` trains nothing else; set "
        yield Problem(("tokens",), f"{said}train.max_steps to {max(ends)}, or leave `until` out of one.")


def _bundled(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.save.bundle_tokens:
        return
    if recipe.targets == "none":
        said = "there is no adapter file to put the tokens into; each has a file of its own. Remove it."
        yield Problem(("save", "bundle_tokens"), said)
    elif recipe.save.format not in ("kohya", None):
        said = f"the {recipe.save.format} layout holds no tokens; use `format: kohya`, or remove it."
        yield Problem(("save", "bundle_tokens"), said)


def _lengths(recipe: Recipe) -> Iterator[Problem]:
    """The schedule-free optimizers set the weights anew from their own copies, which would undo it."""
    for index, one in enumerate(recipe.tokens):
        if one.norm_decay and recipe.optimizer.is_schedule_free:
            said = f"`{recipe.optimizer.name}` keeps copies of its own of the vectors, whose length this would not "
            yield Problem(("tokens", index, "norm_decay"), f"{said}change; remove it, or use another optimizer.")
