"""New tokens whose vectors are trained: rows beside the frozen embedding (textual inversion, Gal et al. 2022)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.adapters.token_files import Embedding, read_embedding
from lora_kit.adapters.tokens import TEXT_ENCODER, token_names
from lora_kit.data import TrainingSet
from lora_kit.diffusion.randomness import generator_for
from lora_kit.errors import AdapterFileError, RecipeError
from lora_kit.models import ModelBundle
from lora_kit.recipe import OptimizerSection, Recipe, TokenSection
from lora_kit.recipe.tokens import rate_of_token


class TokenRows(nn.Module):
    """An embedding whose ids from `first` on are trainable rows; the base's own are frozen and stay as they are."""

    def __init__(self, base: nn.Embedding, first: int, parts: Sequence[Tensor]) -> None:
        """parts: each token's vectors [n, width], kept in fp32; read out in the base's precision."""
        super().__init__()
        self.base_layer, self.first = base, first  # the name that adapters' layers have, and sharding knows
        self.rows = nn.ParameterList([nn.Parameter(part.detach().float().clone()) for part in parts])

    @property
    def weight(self) -> Tensor:
        """The base's own weight, for code that asks an embedding for its precision or device."""
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → vectors [..., width]."""
        new = ids >= self.first
        known = self.base_layer(ids.masked_fill(new, 0))
        learned = functional.embedding((ids - self.first).clamp(min=0), torch.cat(list(self.rows)))
        return torch.where(new[..., None], learned.to(known.dtype), known)


class LearnedToken(NamedTuple):
    """One token of a run."""

    section: TokenSection
    rows: nn.Parameter
    """fp32 [n, width]."""


class LearnedTokens(NamedTuple):
    """The tokens of a run."""

    tokens: tuple[LearnedToken, ...]
    mean_norm: float
    """Mean 2-norm of the base's vocabulary."""

    @property
    def sizes(self) -> dict[str, int]:
        """Token → its number of vectors."""
        return {one.section.token: len(one.rows) for one in self.tokens}

    def embeddings(self) -> list[Embedding]:
        """Each token with its vectors as they are now."""
        return [Embedding(one.section.token, one.rows.detach().cpu().clone()) for one in self.tokens]

    def unfreeze(self, step: int) -> None:
        """Let those learn that do in optimizer step `step` (0-based), and no others."""
        for section, rows in self.tokens:
            learns = section.until is None or step < section.until
            rows.requires_grad_(learns)
            if not learns:
                rows.grad = None

    def ends_at(self, step: int) -> bool:
        """Whether a token learns no more from optimizer step `step` on, but did before."""
        return any(section.until == step > 0 for section, _ in self.tokens)

    @torch.no_grad()
    def decay_norms(self, step: int, held: Tensor | None = None) -> None:
        """After optimizer step `step`: lengths go toward the vocabulary's, as each token's `norm_decay` says.

        held: as `limit_norms`'.
        """
        for section, rows in self.tokens:
            if section.norm_decay and (section.until is None or step < section.until):
                norms = rows.norm(dim=1, keepdim=True).clamp(min=1e-12)  # of a zero vector nothing can be made
                factors = 1 + section.norm_decay * (self.mean_norm - norms) / norms
                rows.mul_(factors if held is None else factors.masked_fill(held, 1.0))

    def groups(self, section: OptimizerSection) -> list[dict[str, Any]]:
        """Optimizer groups, one for each rate."""
        found: dict[float, dict[str, Any]] = {}
        for own, rows in self.tokens:
            rate = rate_of_token(own, section)
            found.setdefault(rate, {"params": [], "lr": rate, "peak_lr": rate})["params"].append(rows)
        return list(found.values())


def start_tokens(bundle: ModelBundle, sections: Sequence[TokenSection], seed: int) -> LearnedTokens:
    """Put the tokens into tokenizer and text encoder, their rows trainable.

    Raises RecipeError listing every token that the tokenizer has and every initializer that does not fit.
    """
    network: Any = bundle.components[TEXT_ENCODER]
    base = cast(nn.Embedding, network.get_input_embeddings())
    vocabulary = base.weight.detach()
    tokenizer: Any = copy.deepcopy(bundle.tokenizer)
    problems = [problem for index, one in enumerate(sections) for problem in _problems(tokenizer, one, index)]
    starts: list[Tensor] = []
    for index, one in enumerate(sections if not problems else ()):
        try:
            starts.append(_start(tokenizer, vocabulary, one, seed))
        except AdapterFileError as error:
            problems.append(f"tokens.{index}.initializer: {error}")
    if problems:
        raise RecipeError("\n  ".join(["these tokens cannot be learned:", *problems]))
    names = [name for one, rows in zip(sections, starts, strict=True) for name in token_names(one.token, len(rows))]
    first = len(tokenizer)
    tokenizer.add_tokens(names)
    if tokenizer.convert_tokens_to_ids(names) != list(range(first, first + len(names))):
        raise RecipeError(f"tokens: the tokenizer has some of {', '.join(names)} already; choose other names.")
    made = TokenRows(base, first, starts)
    network.set_input_embeddings(made)
    bundle.tokenizer = tokenizer
    learned = tuple(LearnedToken(one, rows) for one, rows in zip(sections, made.rows, strict=True))
    return LearnedTokens(learned, float(vocabulary.double().norm(dim=1).mean()))


def token_notices(tokens: LearnedTokens, recipe: Recipe, data: TrainingSet) -> list[str]:
    """What is learned, and which tokens no caption says, so that nothing would be learned of them."""
    rates = {one.section.token: rate_of_token(one.section, recipe.optimizer) for one in tokens.tokens}
    listed = ", ".join(f"{token} ({count} vectors, rate {rates[token]:g})" for token, count in tokens.sizes.items())
    said = " ".join(data.captions()).lower()
    missing = [token for token in tokens.sizes if token.lower() not in said]
    notices = [f"tokens: {listed}. Figures compare with the base that has them as they begin."]
    if missing:
        names = ", ".join(missing)
        notices.append(f"No caption says {names}: nothing is learned of it. Write it in captions or data.trigger.")
    return notices


def _problems(tokenizer: Any, section: TokenSection, index: int) -> Iterator[str]:
    ids, place = _ids(tokenizer, section.token), f"tokens.{index}"
    if len(ids) == 1 or section.token in tokenizer.get_vocab():
        yield f"{place}.token: the tokenizer has {section.token!r} already; choose another, such as <my-toy>"
    if section.initializer == "random" or section.is_file:
        return
    count = len(_ids(tokenizer, section.initializer))
    if not count:
        yield f"{place}.initializer: {section.initializer!r} has no token; name a word, a file, or `random`"
    if section.vectors is not None and count > section.vectors:
        said = f"{section.initializer!r} is {count} tokens, but `vectors` is {section.vectors}; set vectors: {count}"
        yield f"{place}.initializer: {said}, or use a word that is one token"


def _start(tokenizer: Any, vocabulary: Tensor, section: TokenSection, seed: int) -> Tensor:
    """The token's first vectors, fp32 [n, width]. Raises AdapterFileError for a file that does not fit."""
    if section.is_file:
        return _from_file(section, vocabulary.shape[1])
    if section.initializer == "random":
        shape = (section.vectors or 1, vocabulary.shape[1])
        noise = torch.randn(shape, generator=generator_for(seed, "token", section.token)).to(vocabulary.device)
        return noise * vocabulary.float().std(0) + vocabulary.float().mean(0)
    ids = _ids(tokenizer, section.initializer)
    return vocabulary[[ids[row % len(ids)] for row in range(section.vectors or len(ids))]].float()


def _from_file(section: TokenSection, width: int) -> Tensor:
    vectors = read_embedding(Path(section.initializer)).vectors
    if vectors.shape[1] != width:
        known = {768: " (Stable Diffusion 1)", 1024: " (Stable Diffusion 2)"}
        got, wanted = (f"{size}{known.get(size, '')}" for size in (vectors.shape[1], width))
        raise AdapterFileError(f"{section.initializer}: its vectors are {got} wide, the text encoder's {wanted}")
    if section.vectors not in (None, len(vectors)):
        raise AdapterFileError(
            f"{section.initializer} holds {len(vectors)} vectors, but `vectors` is {section.vectors}; leave it out"
        )
    return vectors


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
