"""Some steps of a training without anything of ours that is distributed: the reference.

One process, one B x C matrix in float64, torch's AdamW and clipping, gradients added up over the
passes. Options that it does not know must be at their defaults.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from dist_train.config.training import TrainingOptions
from dist_train.encoders.batches import load
from dist_train.encoders.encoder import Encoder, new_encoder
from dist_train.heads.centres import initial_centres
from dist_train.training.data import TrainingItems, training_items
from shards.read.shard_set import ShardSet
from tests.support.margin_reference import reference_loss

EPS = 1e-6
"""As BERT was trained (Devlin et al.; transformers' AdamW); torch's own default is 1e-8."""
START_LENGTH = 0.05
"""Of a centre that begins as a mean, in units of the square root of its width."""


@dataclass
class Plain:
    """What a training ends with."""

    encoder: Encoder
    centres: torch.Tensor
    """(C, D)."""
    losses: list[float] = field(default_factory=list)
    """Of each step over its whole batch, before its update, float64."""
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    """Moving average of the encoder's weights and statistics, float64."""


def plain_training(
    modality: str, shards: ShardSet, config: TrainingOptions, rates: list[tuple[float, float]]
) -> Plain:
    """The training after as many steps as `rates` (of encoder and head)."""
    items = training_items(shards, modality, config, 1)
    encoder = new_encoder(config.encoder, config.seed).train()
    encoder.precision = config.precision
    centres = _start(encoder, items, config).requires_grad_()
    plain = Plain(encoder, centres)
    optimizers = _optimizers(encoder, centres, config)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    inputs = encoder.inputs(config)
    plans = items.plans(0, len(rates), 0, 1)
    batches = load(items.reader, inputs, plans, 0, stand_ins=items.numbers)
    margins = _margins(items, config)
    for step, lrs in enumerate(rates):
        for optimizer, lr in zip(optimizers, lrs, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr
        steps = -(-round(config.epochs * len(items.numbers)) // config.batch_size)
        ramp = min(1.0, (step + 1) / (config.head.ramp * steps)) if config.head.ramp else 1.0
        losses = []
        for _ in range(config.accumulation):
            batch = next(batches)
            losses.append(reference_loss(
                encoder(*batch.inputs).double(), centres.double(), batch.class_ids,
                loss=config.head.loss, scale=config.head.scale,
                margin=ramp * margins[batch.class_ids],
            ))  # fmt: skip
            (losses[-1] / config.accumulation).backward()
        plain.losses.append(float(np.mean([loss.item() for loss in losses])))
        clip_grad_norm_(trained, config.clip)
        clip_grad_norm_([centres], config.clip)
        for optimizer in optimizers:
            optimizer.step()
        _follow(plain, config.ema, step)
    plain.centres = centres.detach()
    return plain


def _optimizers(
    encoder: Encoder, centres: torch.Tensor, config: TrainingOptions
) -> tuple[torch.optim.Optimizer, ...]:
    """Of the encoder, whose biases, norms and neck do not decay, and of the centres, which do."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    of_head = {"params": [centres], "weight_decay": config.weight_decay}
    return tuple(torch.optim.AdamW(g, betas=(0.9, 0.999), eps=EPS) for g in (groups, [of_head]))


def _margins(items: TrainingItems, config: TrainingOptions) -> torch.Tensor:
    """Of each class (C,), when the ramp is over: those of the largest smallest, by n^(-1/4)."""
    head = config.head
    if head.margin_of_largest is None:
        return torch.full((items.classes,), head.margin, dtype=torch.float64)
    ids = items.reader.records["class_id"][items.numbers]
    rarity = np.array([(ids == c).sum() for c in range(items.classes)], float) ** -0.25
    margins = np.interp(rarity, [rarity.min(), rarity.max()], [head.margin_of_largest, head.margin])
    return torch.from_numpy(margins)


def _start(encoder: Encoder, items: TrainingItems, config: TrainingOptions) -> torch.Tensor:
    """Centres (C, D) before the first step."""
    centres = initial_centres(0, items.classes, encoder.width, config.seed)
    if config.head.start == "means":
        for number, mean in enumerate(class_means(encoder, items)):
            centres[number] = mean * START_LENGTH * encoder.width**0.5
    return centres


def class_means(encoder: Encoder, items: TrainingItems) -> list[torch.Tensor]:
    """Of each class the direction (D,) of the sum of its items' directions, seen in eval mode."""
    training, means = encoder.training, []
    encoder.eval()
    for number in range(items.classes):
        here = items.numbers[items.reader.records["class_id"][items.numbers] == number]
        own = [items.reader[int(n)] for n in here]
        with torch.no_grad():
            vectors = encoder(*encoder.inputs()(own, [0] * len(own))).double()
        means.append(F.normalize(F.normalize(vectors, dim=1).sum(0), dim=0))
    encoder.train(training)
    return means


def _follow(plain: Plain, decay: float, updates: int) -> None:
    """Take the present weights into the average, which before them had taken in `updates`."""
    keep = min(decay, 1 - (1 + updates) ** (-2 / 3)) if updates else 0.0
    for name, value in plain.encoder.state_dict().items():
        old = plain.average.get(name, value.double())
        plain.average[name] = keep * old + (1 - keep) * value.double()
