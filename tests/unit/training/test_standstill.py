"""An encoder that does not learn fails the run; passes too small for statistics are refused."""

import logging
import warnings

import pytest

from dist_train.config.training import HeadOptions, ImageEncoderOptions, ImageTraining
from dist_train.encoders.batches import load, own_cores
from dist_train.encoders.encoder import new_encoder
from dist_train.training.data import training_items
from dist_train.training.loop import train
from dist_train.training.standstill import StandstillGuard
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput, Failed
from tests.support.short_training import COMMON, image_config, new_training, stepper_of, text_config


def guarded(stepper, steps: int = 2) -> None:
    """Some steps and the check after them."""
    guard = StandstillGuard(stepper.training)
    for step in range(steps):
        guard.note(stepper.run_step(step)[0])
    guard.check(steps)


def trained(module):
    """The weights that are not frozen."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def test_an_encoder_that_learns_passes(shard_set, tiny_vit):
    guarded(stepper_of(shard_set, image_config(tiny_vit)))


def test_weights_that_keep_their_bits_fail(shard_set, tiny_vit):
    """The neck learns alone, as where a launcher's scheduler holds the backbone's rate at 0."""
    stepper = stepper_of(shard_set, image_config(tiny_vit, weight_decay=0.0))
    for weight in trained(stepper.training.encoder.backbone):
        weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(Failed, match=r"after step 2 the encoder stands still.*no weight changes"):
        guarded(stepper)


def test_gradients_of_zero_fail_though_weights_decay(shard_set, tiny_vit):
    stepper = stepper_of(shard_set, image_config(tiny_vit, weight_decay=0.1))
    for weight in trained(stepper.training.encoder):
        weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(Failed, match="its gradient is 0"):
        guarded(stepper)


@pytest.mark.parametrize("options", [{"freeze": 1.0}, {"freeze": 0.5}])
def test_an_encoder_that_is_to_stand_still_passes(shard_set, tiny_vit, tmp_path, options):
    train("image", shard_set, tmp_path / "run", image_config(tiny_vit, **options))


def test_steps_that_were_left_out_do_not_count(shard_set, tiny_vit):
    stepper = stepper_of(shard_set, image_config(tiny_vit, max_skipped=9), spoilt=(0, 1))
    guarded(stepper)


def test_a_training_whose_rate_is_held_down_fails_early(shard_set, tiny_vit, tmp_path, monkeypatch):
    """Whatever the cause: the loss falls, as the head learns, and the encoder stays as it came."""
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self, closure=None: None)
    with pytest.raises(Failed, match="after step 1 the encoder stands still"):
        train("image", shard_set, tmp_path / "run", image_config(tiny_vit))


# Items of a pass


def test_one_item_a_pass_is_refused(shard_set, tiny_vit, tiny_bert):
    for config in (
        image_config(tiny_vit, accumulation=16),
        image_config(tiny_vit, batch_size=1),
        text_config(tiny_bert, accumulation=16),
    ):
        with pytest.raises(BadInput, match="one item a pass"):
            training_items(ShardSet(shard_set), "text", config, 1)


def test_one_item_a_pass_goes_without_a_neck(shard_set, tiny_vit):
    encoder = ImageEncoderOptions(model=str(tiny_vit), image_size=32, neck=False)
    config = ImageTraining(encoder=encoder, **COMMON | {"accumulation": 16, "epochs": 1})
    guarded(stepper_of(shard_set, config, 32))


@pytest.mark.parametrize(("accumulation", "warned"), [(2, False), (4, True), (8, True)])
def test_few_items_a_pass_are_warned_of(shard_set, tiny_vit, caplog, accumulation, warned):
    with caplog.at_level(logging.WARNING, "dist_train"):
        new_training(shard_set, image_config(tiny_vit, accumulation=accumulation))
    assert (f"are of {16 // accumulation} items" in caplog.text) == warned


def test_batch_statistics_of_a_random_backbone_count_too(shard_set, caplog):
    """Without the neck, on one rank: a batch norm of one item has no spread."""
    name = "mobilenetv2_035"
    encoder = ImageEncoderOptions(model=name, pretrained=False, image_size=32, neck=False)
    for accumulation, outcome in ((16, "refused"), (4, "warned"), (1, "")):
        config = ImageTraining(
            encoder=encoder, **COMMON | {"accumulation": accumulation, "epochs": 1}
        )
        caplog.clear()
        if outcome == "refused":
            with pytest.raises(BadInput, match=r"the backbone normalises .* of one item"):
                new_training(shard_set, config)
            continue
        new_training(shard_set, config)
        assert ("the backbone normalises" in caplog.text) == (outcome == "warned")


# Without training


def test_epochs_that_are_no_step_are_refused(shard_set, tiny_vit, tmp_path):
    with pytest.raises(BadInput, match="are no step"):
        train("image", shard_set, tmp_path / "run", image_config(tiny_vit, epochs=1e-5))


def test_without_epochs_nothing_of_the_training_is_asked_for(shard_set, tiny_vit, tmp_path):
    options = {"epochs": 0, "accumulation": 16, "head": HeadOptions(margin_of_largest=0.1)}
    train("image", shard_set, tmp_path / "run", image_config(tiny_vit, **options))
    assert "as it was, not trained" in (tmp_path / "run/encoder/README.md").read_text()


# Workers


def test_no_more_workers_than_cores_are_started(shard_set, tiny_bert):
    items = training_items(ShardSet(shard_set), "text", text_config(tiny_bert), 1)
    inputs = new_encoder(text_config(tiny_bert).encoder, 0).inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = load(items.reader, inputs, items.plans(0, 2, 0, 1), 64)
        assert sum(len(batch.items) for batch in batches) == 32


def test_the_ranks_of_a_machine_share_its_cores(monkeypatch):
    alone = own_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_cores() == max(1, alone // 2)
