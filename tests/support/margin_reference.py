"""The margin softmax as the papers write it: one B x C matrix in one process, and autograd."""

import torch
import torch.nn.functional as F


def reference_loss(
    embeddings: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, *, loss: str,
    scale: float, margin: torch.Tensor | float, each: int = 1, detached: bool = False,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Mean loss of embeddings (B, D) over centres (C * each, D); `margin` (B,) or one for all.

    `seen` (n,): the classes that take part, None for all.
    """
    cosine = F.normalize(embeddings, dim=1) @ F.normalize(centres, dim=1).T
    cosine = cosine.unflatten(1, (-1, each)).max(2).values
    rows = torch.arange(len(labels))
    own = cosine[rows, labels]
    moved = _moved(own, torch.as_tensor(margin, dtype=own.dtype), loss)
    if detached:
        moved = own + (moved - own).detach()
    logits = scale * cosine.index_put((rows, labels), moved)
    if seen is not None:
        out = torch.ones(cosine.shape[1], dtype=torch.bool)
        out[seen] = False
        logits = logits.masked_fill(out, -torch.inf)
    return F.cross_entropy(logits, labels)


def _moved(own: torch.Tensor, margin: torch.Tensor, loss: str) -> torch.Tensor:
    if loss == "cosface":
        return own - margin
    turned = own * margin.cos() - (1 - own * own).sqrt() * margin.sin()
    return torch.where(own > torch.cos(torch.pi - margin), turned, own - margin * margin.sin())
