"""Checkpoints: complete or absent, hashed, without pickle, loadable by any number of ranks.

step-00001000/encoder.safetensors          weights and buffers
              optimizer.safetensors        AdamW's moments by parameter name
              head-<first>-<last>.safetensors   centres and moments of these classes
              average.safetensors          the moving average of the encoder, if there is one
              best.safetensors             the best encoder so far, if it is to be kept
              state.json                   step, classes, position in the order, Progress
              manifest.json                sizes and sha256 of all of them, written last
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dist_train.distributed.runtime import Runtime
from dist_train.encoders.encoder import save_tensors
from dist_train.heads.class_parallel import load_head, save_head
from dist_train.monitor.metrics import Metrics
from dist_train.training.setup import Training, class_names_digest, run_to_grow_from
from shards.order.global_order import check_equal
from shards.storage.errors import BadInput, Corrupt, Failed
from shards.storage.files import read_json, sha256_file, sync, write_json

FORMAT = 3
ALWAYS = {"encoder.safetensors", "optimizer.safetensors", "state.json"}
MOMENTS = ("exp_avg", "exp_avg_sq")
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, keep: int, runtime: Runtime, grace: float = math.inf) -> None:
        """`keep`: how many stay. `grace`: seconds that a save may take before a warning."""
        self.run, self.folder = run, run / "checkpoints"
        self.keep, self.runtime, self.grace = keep, runtime, grace

    def save(self, training: Training, step: int, metrics: Metrics | None = None) -> None:
        """Write the checkpoint of `step`; all ranks call it at the same step.

        Does nothing where it exists. Raises Failed on all ranks when one cannot write; the
        checkpoints before it stay complete.
        """
        final, began = self.folder / f"step-{step:08d}", time.monotonic()
        if self.runtime.broadcast(final.exists()):
            return
        self.runtime.check_newest(self.run)
        # Each attempt has its own: one that was cut off may still write into its.
        temporary = self.folder / f".{final.name}.tmp-{self.runtime.attempt.get('attempt', '')}"
        # Gathered by all ranks together, written by rank 0.
        tensors = {"encoder": training.complete_state(), "optimizer": moments(training)}
        if training.average is not None:
            tensors["average"] = training.average.module.state_dict()
        progress = {**vars(training.progress)}
        if best_weights := progress.pop("best_weights"):
            tensors["best"] = best_weights
        order = training.items.state
        state = {
            "format": FORMAT,
            "step": step,
            "order": order.at(step * order.batch).to_json(),
            "classes": training.head.classes,
            "class_names": class_names_digest(training.items.class_names),
            "progress": progress,
        }
        with self._writing(temporary):
            if self.runtime.is_main:
                # What is not needed goes first: on a disk without room for two, none would fit.
                self._remove_old()
                temporary.mkdir(parents=True)
                for name, values in tensors.items():
                    save_tensors(temporary / f"{name}.safetensors", values)
                write_json(temporary / "state.json", state)
        with self._writing(temporary):
            save_head(temporary, training.head, training.head_optimizer)
        with self._writing(temporary):
            if self.runtime.is_main:
                self._finish(temporary, final)
        seconds = self.runtime.broadcast(time.monotonic() - began)
        log.info("%s: written in %.1f s", final, seconds)
        if seconds > self.grace and self.runtime.is_main:
            log.warning(
                "%s: took %.0f s, a stop signal leaves %.0f (--grace): give more (Slurm: "
                "--signal) or use a faster disk",
                *(final, seconds, self.grace),
            )
        if metrics is not None:
            metrics.write(step, "save", {"seconds": seconds})

    @contextmanager
    def _writing(self, temporary: Path) -> Iterator[None]:
        """Where one rank cannot write in the block, all of them raise Failed at its end."""
        fault = ""
        try:
            yield
        except (OSError, SafetensorError) as error:
            fault = f"rank {self.runtime.rank}: {error}"
        faults = [one for one in self.runtime.all_gather(fault) if one]
        if not faults:
            return
        if self.runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(self.run).free / 1e6
        newest = max((path.name for path in self.folder.glob("step-*")), default="none")
        raise Failed(
            f"{temporary}: cannot be written ({faults[0]}; {free:.0f} MB free there); the newest "
            f"complete checkpoint is {newest}; make room (--keep 1 needs that of two), and the "
            "same command goes on from it"
        )

    def _finish(self, temporary: Path, final: Path) -> None:
        """Write the manifest, rename the folder to `final`, and keep the newest `keep` only."""
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(temporary.iterdir())
        }
        write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
        self.runtime.check_newest(self.run)
        os.replace(temporary, final)
        sync(self.folder)
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove all but the newest `keep`, and what attempts that were cut off left unfinished."""
        old = sorted(self.folder.glob("step-*"))[: -self.keep]
        for folder in [*old, *self.folder.glob(".step-*.tmp*")]:
            shutil.rmtree(folder, ignore_errors=True)  # such an attempt may still be writing

    def load_newest(self, training: Training) -> int:
        """Load the newest complete checkpoint into `training`; its step, 0 when there is none.

        A damaged one is removed with a warning. Raises BadInput when the ranks, or the checkpoint
        and this training, differ in their order.
        """
        order, step = training.items.state, 0
        check_equal(self.runtime.all_gather(order.to_json()))
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            fault = self.runtime.broadcast(checkpoint_fault(folder) if self.runtime.is_main else "")
            if not fault:
                step = self._load(folder, training)
                break
            log.warning("%s: %s; it is removed, going back to the one before", folder, fault)
            self.runtime.barrier()
            if self.runtime.is_main:
                shutil.rmtree(folder)
        check_equal(self.runtime.all_gather(order.at(step * order.batch).to_json()))
        if self.runtime.is_main:
            self._remove_old()
        return step

    def _load(self, folder: Path, training: Training) -> int:
        """Load one checkpoint; BadInput when it is of another training. Its step."""
        state = read_json(folder / "state.json")
        if state["format"] != FORMAT or state["classes"] != training.head.classes:
            raise BadInput(f"{folder}: of another format or number of classes; start a new run")
        step, order = int(state["step"]), training.items.state
        position = order.check_goes_on(state["order"], str(folder))
        if position != step * order.batch:
            raise BadInput(
                f"{folder}: {step} steps took {position} items, with another batch_size than now; "
                "continue with that one, or start a new run"
            )
        with training.with_complete_weights(writer=0):
            training.encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
        progress, best = training.progress, folder / "best.safetensors"
        vars(progress).update(state["progress"])
        keeps_best = best.exists() and self.runtime.is_main
        progress.best_weights = load_file(best) if keeps_best else {}
        load_moments(training, load_file(folder / "optimizer.safetensors"))
        if training.average is not None:
            training.average.module.load_state_dict(load_file(folder / "average.safetensors"))
        load_head(folder, training.head, training.head_optimizer)
        log.info("%s: going on from step %d", folder, step)
        return step


def grow_centres(training: Training) -> None:
    """Before the first step: take centres, moments and steps of the classes of an earlier run.

    All ranks call it together; nothing is done unless `head.grow_from` names a run. Raises BadInput
    for a run over other classes, Corrupt for a checkpoint that is not as it was written.
    """
    items, head, runtime = training.items, training.head, training.runtime
    if items.config.head.grow_from is None:
        return
    folder = run_to_grow_from(items.config.head.grow_from)
    if fault := runtime.broadcast(checkpoint_fault(folder) if runtime.is_main else ""):
        raise Corrupt(f"{fault}; restore it or grow from another run")
    state = read_json(folder / "state.json")
    known = int(state["classes"])
    if class_names_digest(items.class_names[:known]) != state["class_names"]:
        raise BadInput(
            f"{folder}: its {known} classes are not the first of these {head.classes}; grow from a "
            "run over the same catalogue, whose class ids were only added to"
        )
    load_head(folder, head, training.head_optimizer, known)
    log.info("centres of %d of %d classes taken from %s", known, head.classes, folder)


def checkpoint_fault(folder: Path) -> str:
    """How a checkpoint's files differ from its manifest; empty when it is complete."""
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
        if missing := sorted(ALWAYS - manifest["files"].keys()):
            return f"{path}: does not list {missing[0]}"
        for name, facts in manifest["files"].items():
            file = folder / name
            if not file.exists() or file.stat().st_size != facts["bytes"]:
                return f"{file}: missing or cut short"
            if sha256_file(file) != facts["sha256"]:
                return f"{file}: bytes differ from their sha256"
        # If both name the same other format, it is complete and of another version: refused later.
        written, state = manifest["format"], read_json(folder / "state.json")["format"]
        return "" if written == state else f"{path}: format {written}, its state.json {state}"
    except BadInput as error:
        return str(error)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"{path}: not as it was written ({type(error).__name__}: {error})"


def moments(training: Training) -> dict[str, torch.Tensor]:
    """AdamW's `exp_avg/NAME` and `exp_avg_sq/NAME` of every trained parameter, complete.

    All ranks call it together; empty before any update.
    """
    if not training.uses_deepspeed:
        return {
            f"{kind}/{name}": training.optimizer.state[parameter][kind]
            for name, parameter in training.encoder.named_parameters()
            for kind in MOMENTS
            if kind in training.optimizer.state.get(parameter, {})
        }
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = cast(Any, training.optimizer).optimizer
    # Before the first update there are none, and DeepSpeed raises if they are requested.
    if not any(zero.optimizer.state.values()):
        return {}
    _link_moments(zero)
    found = {}
    for name, parameter in training.encoder.named_parameters():
        for kind in MOMENTS if parameter.requires_grad else ():
            value = safe_get_full_optimizer_state(parameter, kind)
            assert value is not None  # every trained parameter was linked
            found[f"{kind}/{name}"] = value
    return found


def load_moments(training: Training, saved: dict[str, torch.Tensor]) -> None:
    """Restore what `moments` returned after `progress.updates`; the weights are loaded before."""
    optimizer, step = training.optimizer, float(training.progress.updates)
    # Of a parameter that is not trained, nothing was saved.
    of_parameter = {
        parameter: {kind: saved[f"{kind}/{name}"] for kind in MOMENTS}
        for name, parameter in training.encoder.named_parameters()
        if f"{MOMENTS[0]}/{name}" in saved
    }
    if not training.uses_deepspeed:
        for parameter, values in of_parameter.items():
            placed = {kind: value.to(parameter.device) for kind, value in values.items()}
            optimizer.state[parameter] = {"step": torch.tensor(step), **placed}
        return
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    zero = cast(Any, optimizer).optimizer
    if saved:
        # This rank's float32 copies of the weights, which the optimizer steps on.
        copies = getattr(zero, "fp32_partitioned_groups_flat", None)
        for flat in zero.single_partition_of_fp32_groups if copies is None else copies:
            state = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(step), **state}
        _link_moments(zero)
    for parameter, values in of_parameter.items():
        for kind, saved_value in values.items():
            value, shard = saved_value.to(parameter.device), getattr(parameter, "ds_tensor", None)
            if shard is None:
                safe_set_full_optimizer_state(parameter, value, kind)
                continue
            # ZeRO-3 pads the last rank's shard; DeepSpeed's own function refuses a value that
            # needs padding.
            size, rank, world = shard.numel(), dist.get_rank(), dist.get_world_size()
            flat = nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
            own = flat[rank * size : (rank + 1) * size]
            safe_set_local_optimizer_state(parameter, own, kind)
    # ZeRO steps on its own float32 copy of the weights that have just been loaded.
    zero.refresh_fp32_params()


def _link_moments(zero: Any) -> None:
    # DeepSpeed links a parameter to its moments when the first group has stepped, and so finds
    # none for the others; linked again, all are there. ZeRO-3 looks them up instead.
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
