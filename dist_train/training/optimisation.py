"""Optimizers of encoder and head: which weights, at which learning rates, clipped how."""

from typing import Any

import torch
import torch.distributed as dist
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.optim import AdamW

from dist_train.config import TrainingOptions
from dist_train.encoders.folder import Encoder
from dist_train.heads.class_parallel import MarginHead
from dist_train.heads.row_optimizer import RowAdamW, coalesced
from shards.errors import BadInput

EPS = 1e-6
"""AdamW's, as BERT was trained with. At 1e-8 rounding in gradients that are zero (a bias before
batch normalisation, the bias of attention keys) becomes steps of full size, which differ with W."""


def encoder_optimizer(encoder: Encoder, config: TrainingOptions) -> AdamW:
    """AdamW over the encoder's trainable weights; biases and norms do not decay.

    With `layer_decay` d a layer n below the top has the learning rate lr * d^n (Clark et al.,
    ELECTRA, 2020; Bao et al., BEiT, 2021); the neck has lr. Raises BadInput for an encoder whose
    layers cannot be told apart.
    """
    if config.layer_decay == 1:
        groups = param_groups_weight_decay(encoder, config.weight_decay)
    else:
        neck = param_groups_weight_decay(encoder.neck, config.weight_decay)
        groups = _by_layer(encoder, config) + neck
    return AdamW([group for group in groups if group["params"]], lr=config.lr, eps=EPS)


def _by_layer(encoder: Encoder, config: TrainingOptions) -> list[dict[str, Any]]:
    groups = param_groups_layer_decay(
        encoder.backbone, config.weight_decay, layer_decay=config.layer_decay
    )
    if len({group["lr_scale"] for group in groups if group["params"]}) < 2:
        raise BadInput(
            f"layer_decay: the layers of {config.encoder.model} cannot be told apart (as where all "
            "share their weights), each would have the same rate; leave it at 1"
        )
    return groups


def head_optimizer(head: MarginHead, config: TrainingOptions) -> RowAdamW:
    """AdamW over this rank's class centres; of those that a step sees, when it samples."""
    return RowAdamW(head.weight, lr=config.head.lr, weight_decay=config.weight_decay, eps=EPS)


def clip_head(head: MarginHead, limit: float, told: torch.Tensor | None = None) -> torch.Tensor:
    """Scale the head's gradient to norm `limit` over all ranks; its norm before, () float64.

    `told` (n,) is summed over ranks in place, in the same collective. The host waits for nothing.
    """
    assert head.weight.grad is not None
    grad = head.weight.grad = coalesced(head.weight.grad)
    values = grad.values() if grad.is_sparse else grad
    sums = torch.linalg.vector_norm(values).double().square()[None]
    if told is not None:
        sums = torch.cat([sums, told.double()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    norm = sums[0].sqrt()
    values.mul_((limit / norm).clamp(max=1).to(values.dtype))
    if told is not None:
        told.copy_(sums[1:])
    return norm
