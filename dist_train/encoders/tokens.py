"""Tokenizers and what a model makes of their tokens: whether they fit, how states are pooled."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from dist_train.encoders.source import WANTED, Source
from shards.catalogue.titles import readable_title
from shards.storage.errors import BadInput

ALIKE = 1e-3
"""Difference of two unit vectors of one title that is rounding."""
States = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector (b, D) of the states (b, T, D) of each title, whose tokens come first in it."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def check_tokenizer_files(source: Source) -> None:
    """BadInput for a SentencePiece file that no installed package can read."""
    if source.folder is None or importlib.util.find_spec("sentencepiece"):
        return
    files = sorted(source.folder.glob("*.model"))
    if files and not (source.folder / "tokenizer.json").is_file():
        raise BadInput(
            f"{files[0]}: reading it needs a package: pip install sentencepiece (or put the "
            "model's tokenizer.json beside it)"
        )


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, backbone: Any, source: Source) -> None:
    """Make `tokenizer` pad with a token it has; BadInput when it is not that of the model."""
    tokenizer.padding_side = "right"  # as we pad, and so also for who opens the folder
    if tokenizer.pad_token_id is None:
        others = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next((one for one in others if one), None)
    embedding = None
    try:
        embedding = backbone.get_input_embeddings()
    except NotImplementedError:
        return  # it computes embeddings from characters
    if not isinstance(embedding, nn.Embedding):
        return
    known, rows = len(tokenizer), embedding.num_embeddings
    if known > rows:
        raise BadInput(
            f"{source}: its tokenizer has {known} tokens and the model only {rows}; take the "
            "tokenizer that the model was trained with"
        )
    if known < rows / 2 or tokenizer.pad_token_id is None:
        raise BadInput(
            f"{source}: its tokenizer has {known} tokens and the model {rows}, so titles would "
            f"become unknown tokens; its files are missing: {WANTED['text']}"
        )


def plain_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Up to 16 ids (n,), n > 1, of tokens that are text."""
    special = set(tokenizer.all_special_ids)
    ids = [one for one in range(min(len(tokenizer), 4096)) if one not in special][:16]
    return torch.tensor(ids or [0, 1])


def check_class_token(
    tokenizer: PreTrainedTokenizerBase, states: torch.Tensor, source: Source
) -> None:
    """BadInput when the first state says nothing of a title.

    `states` (2, T, D) are those of two titles that have only their first token in common.
    """
    first, *_ = tokenizer("a b")["input_ids"]
    if torch.allclose(states[0, 0], states[1, 0], rtol=1e-6, atol=1e-7):
        why = "the first token of a causal model sees no other"
    elif first not in tokenizer.all_special_ids:
        why = "its titles begin with no class token"
    else:
        return
    raise BadInput(f"{source}: encoder.pooling cls: {why}; use last or mean")


def check_lengths(states: States, tokens: torch.Tensor, longest: int, source: Source) -> None:
    """BadInput when the model cannot read `longest` tokens, or what pads a title changes it.

    `tokens` (2, t): two titles, the first of half the length.
    """
    half = (tokens.shape[1] + 1) // 2
    full = tokens[1:].repeat(1, -(-longest // tokens.shape[1]))[:, :longest]

    def fails(length: int) -> bool:
        try:
            states(full[:, :length], torch.ones_like(full[:, :length]))
        except (IndexError, RuntimeError, ValueError):
            return True
        return False

    with torch.no_grad():
        if fails(longest):
            low, high = tokens.shape[1], longest
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if fails(middle) else (middle, high)
            raise BadInput(
                f"{source}: encoder.max_length {longest}: the model reads at most {low} tokens; "
                f"set it to {low} or less"
            )
        padded = F.pad(tokens[:1], (0, longest - tokens.shape[1]), value=int(tokens[0, -1]))
        mask = (torch.arange(longest)[None] < half).long()
        together = states(torch.cat([padded, full]), torch.cat([mask, torch.ones_like(mask)]))
        alone = states(tokens[:1, :half], mask[:, :half])
    a, b = (F.normalize(one[0, :half].float(), dim=1) for one in (together, alone))
    if not torch.allclose(a, b, rtol=0, atol=ALIKE):
        raise BadInput(
            f"{source}: what it makes of a title depends on the longest title of its batch (up to "
            f"{(a - b).abs().max():.1g} of a vector of length one); name another model"
        )


def check_titles(tokenizer: PreTrainedTokenizerBase, titles: list[str], model: str) -> None:
    """BadInput when the tokenizer of `model` does not know most tokens of `titles`."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    special = set(tokenizer.all_special_ids) - {unknown}
    ids = [tokenizer(readable_title(title))["input_ids"] for title in titles]
    of_title = [[one for one in row if one not in special] for row in ids]
    total = sum(map(len, of_title))
    count = sum(row.count(unknown) for row in of_title)
    if count > total / 2:
        worst = max(range(len(titles)), key=lambda n: of_title[n].count(unknown))
        raise BadInput(
            f"encoder.model {model}: its tokenizer does not know {count} of {total} tokens of "
            f"{len(titles)} titles, such as {titles[worst]!r}; name a model of this catalogue's "
            "language and writing, with its tokenizer files"
        )
