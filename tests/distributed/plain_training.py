"""Five steps of a training without anything of ours that is distributed: the reference.

One process, one B x C matrix, torch's AdamW and clipping, gradients added up over the passes.
"""

import torch
from torch.nn.utils import clip_grad_norm_

from dist_train.config import TrainingOptions
from dist_train.encoders.batches import load
from dist_train.encoders.folder import Encoder, new_encoder
from dist_train.heads.centres import initial_centres
from dist_train.heads.margins import ramped
from dist_train.training.data import training_items
from dist_train.training.optimisation import EPS, encoder_optimizer
from shards.reader import ShardSet
from tests.margin_reference import reference_loss


def plain_training(
    view: str, shards: ShardSet, config: TrainingOptions, rates: list[tuple[float, float]]
) -> tuple[Encoder, torch.Tensor]:
    """Encoder and centres (C, D) after as many steps as `rates` (of encoder and head)."""
    items = training_items(shards, view, config, 1)
    encoder = new_encoder(view, config.encoder, config.seed).train()
    encoder.precision = config.precision
    centres = initial_centres(0, items.classes, encoder.width, config.seed).requires_grad_()
    of_encoder = encoder_optimizer(encoder, config)
    of_head = torch.optim.AdamW([centres], weight_decay=config.weight_decay, eps=EPS)
    inputs = encoder.inputs(getattr(config, "min_crop", None))
    plans = items.plans(0, len(rates), 0, 1)
    batches = load(items.reader, inputs, plans, 0, stand_ins=items.numbers)
    for step, lrs in enumerate(rates):
        for optimizer, lr in zip((of_encoder, of_head), lrs, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr
        margin = ramped(config.head.margin, step, items.steps, config.head.ramp)
        for _ in range(config.accumulation):
            batch = next(batches)
            value = reference_loss(
                encoder(*batch.inputs), centres, batch.class_ids, loss=config.head.loss,
                scale=config.head.scale, margin=margin,
            )  # fmt: skip
            (value / config.accumulation).backward()
        clip_grad_norm_([p for p in encoder.parameters() if p.requires_grad], config.clip)
        clip_grad_norm_([centres], config.clip)
        of_encoder.step()
        of_head.step()
    return encoder, centres.detach()
