"""Mixup and cut-mix: what a mixed photo shows, whose classes it counts for, and how much."""

import numpy as np
import pytest
import torch

from dist_train.config.training import HeadOptions, ImageTraining, TextTraining
from dist_train.training.data import mix_of_step
from dist_train.training.loop import train
from shards.storage.errors import BadInput
from tests.support.margin_reference import reference_loss
from tests.support.short_training import image_config, stepper_of

SIDE = 32


def mixes(steps: int = 200, **options):
    return [mix_of_step(ImageTraining(**options), SIDE, step) for step in range(steps)]


def photos(count: int = 8) -> torch.Tensor:
    """Each of one value, its number."""
    return torch.arange(float(count))[:, None, None, None].expand(count, 3, SIDE, SIDE)


def test_nothing_is_mixed_by_default():
    assert mixes(5) == [None] * 5
    assert mix_of_step(TextTraining(), SIDE, 0) is None


def test_a_step_is_always_mixed_alike_and_another_otherwise():
    both = {"mixup": 0.4, "cutmix": 1.0}
    assert mixes(**both) == mixes(**both)
    assert mixes(**both) != mixes(**both, seed=1)
    found = mixes(**both)
    assert 60 < sum(mix.box is None for mix in found) < 140
    assert len({mix.share for mix in found if mix.box is None}) > 60


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_a_photo_shows_its_own_share_and_its_partners_the_rest(options):
    own = np.arange(8)
    partner = own ^ 1
    for mix in mixes(30, **options):
        mean = mix.photos(photos()).mean((1, 2, 3)).numpy()
        assert mean == pytest.approx(mix.share * own + (1 - mix.share) * partner, abs=1e-4)
        assert mix.partners(torch.arange(8)).tolist() == partner.tolist()
        assert 0 <= mix.share <= 1


def test_a_box_shows_the_partner_alone():
    cut = next(mix for mix in mixes(cutmix=1.0) if 0.2 < mix.share < 0.8)
    mixed = cut.photos(photos())
    assert set(mixed[2].unique().tolist()) == {2.0, 3.0}
    assert (mixed[2][..., *cut.box] == 3).all()


def test_partners_are_of_other_products_in_batches_by_product():
    mix = mix_of_step(ImageTraining(mixup=1.0, photos_per_product=3), SIDE, 0)
    products = torch.arange(4).repeat_interleave(3)
    assert (mix.partners(products) != products).all()
    assert (mix.partners(mix.partners(products)) == products).all()


def test_shares_of_mixup_are_betas():
    shares = np.array([mix.share for mix in mixes(2000, mixup=0.4)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(0.25 / (2 * 0.4 + 1), rel=0.1)


def test_the_head_is_called_twice_a_pass():
    assert ImageTraining(accumulation=2, mixup=0.1).head_passes == 4
    assert ImageTraining(accumulation=2).head_passes == 2


def test_halves_of_pairs_are_refused(shard_set, tiny_vit, tmp_path):
    with pytest.raises(BadInput, match="9 items a pass and process are no multiple of 2"):
        train("image", shard_set, tmp_path, image_config(tiny_vit, mixup=0.2, batch_size=9))


# The loss of mixed photos


def watched_step(shard_set, config):
    """The first step: (its loss, pixels as read and as the encoder saw them, vectors, labels)."""
    stepper = stepper_of(shard_set, config)
    encoder, batches = stepper.training.encoder, list(stepper.batches)
    stepper.batches, seen = iter(batches), []
    encoder.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out.detach())))
    centres = stepper.training.head.weight.detach().clone()
    loss = stepper.run_step(0)[0]["loss"]
    passes = [
        (batch.inputs[0], pixels, vectors, batch.class_ids)
        for batch, (pixels, vectors) in zip(batches, seen, strict=False)
    ]
    return loss, passes, centres


def share_of(own: torch.Tensor, other: torch.Tensor, mixed: torch.Tensor) -> float:
    """Of photos (b, 3, H, W) that are mixed of two, the share of the first: by least squares of
    shades that are laid over one another, else by counting places.
    """
    apart, seen = (own - other).double(), (mixed - other).double()
    laid = float((apart * seen).sum() / apart.square().sum())
    if torch.allclose(other + laid * apart, mixed.double(), atol=1e-4):
        return laid
    places = (apart != 0).any(1)
    return float((seen != 0).any(1)[places].double().mean())


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_the_loss_of_a_mixed_photo_is_each_products_by_what_is_seen_of_it(
    shard_set, tiny_vit, options, passes
):
    """Shares and partners as read off the pixels that the encoder gets."""
    apart = []
    for seed in range(4):
        head = HeadOptions(ramp=0.0)
        config = image_config(tiny_vit, accumulation=passes, seed=seed, head=head, **options)
        loss, seen, centres = watched_step(shard_set, config)
        parts = []
        for photos, mixed, vectors, labels in seen[:passes]:
            partner = torch.arange(len(photos)) ^ 1
            share = share_of(photos, photos[partner], mixed)
            own, other = (
                reference_loss(
                    vectors.double(), centres.double(), of, loss="arcface", scale=32.0, margin=0.5
                ).item()
                for of in (labels, labels[partner])
            )
            parts.append(share * own + (1 - share) * other)
            apart.append(abs((1 - 2 * share) * (own - other)) / own)
        assert loss == pytest.approx(np.mean(parts), rel=1e-3 if "cutmix" in options else 1e-5)
    assert max(apart) > 0.02  # so that the shares swapped would be noticed


def test_boxes_hide_as_much_as_cut_out_anywhere_and_cut_at_the_edge():
    """A square of the share u ~ U(0, 1) of the area, its middle anywhere: of a side r the part
    r - r^2 / 4 is inside in the mean, so E[(r - r^2 / 4)^2] of the photo is hidden, r = sqrt(u).
    """
    found = [mix_of_step(ImageTraining(cutmix=1.0), 256, step) for step in range(3000)]
    hidden = np.array([1 - mix.share for mix in found])
    assert hidden.mean() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.02)
    assert hidden.max() > 0.85
    boxes = [mix.box for mix in found]
    for part in range(2):
        starts, stops = (np.array([getattr(box[part], end) for box in boxes])
                         for end in ("start", "stop"))  # fmt: skip
        assert (starts.min(), stops.max()) == (0, 256)
        assert (starts + stops).mean() / 2 == pytest.approx(128, abs=5)
    middles = np.array([[(part.start + part.stop) / 2 for part in box] for box in boxes])
    assert abs(np.corrcoef(middles.T)[0, 1]) < 0.1
