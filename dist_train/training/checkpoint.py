"""Checkpoints: complete or absent, hashed, without pickle, loadable by any number of ranks.

step-00001000/encoder.safetensors          weights and buffers
              optimizer.safetensors        AdamW's moments by parameter name
              head-<first>-<last>.safetensors   centres and moments of these classes
              average.safetensors          the moving average of the encoder, if there is one
              best.safetensors             the best encoder so far, if it is to be kept
              state.json                   step, classes, position in the order, counts, scores
              manifest.json                sizes and sha256 of all of them, written last
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dist_train.distributed.runtime import Runtime
from dist_train.encoders.folder import save_tensors
from dist_train.heads.class_parallel import load_head, save_head
from dist_train.monitor.metrics import Metrics
from dist_train.training.setup import Training
from dist_train.training.sharded_state import (
    complete_state,
    load_complete_state,
    load_moments,
    moments,
)
from shards.order.global_order import check_equal
from shards.storage.errors import BadInput, Failed
from shards.storage.files import read_json, sha256_file, sync, write_json

FORMAT = 3
ALWAYS = {"encoder.safetensors", "optimizer.safetensors", "state.json"}
log = logging.getLogger(__name__)


class State(TypedDict):
    """state.json."""

    format: int
    step: int
    order: dict[str, Any]
    classes: int
    class_names: str
    """Digest of the label groups by class."""
    progress: dict[str, Any]
    """All of Progress but its weights."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, keep: int, runtime: Runtime, grace: float = math.inf) -> None:
        """`keep`: how many stay. `grace`: seconds that a save may take before a warning."""
        self.run, self.folder = run, run / "checkpoints"
        self.keep, self.runtime, self.grace = keep, runtime, grace

    def save(self, training: Training, step: int, metrics: Metrics | None = None) -> float:
        """Write the checkpoint of `step`; all ranks call it at the same step. The seconds it took.

        Does nothing, in 0 seconds, where it exists. Raises Failed on all ranks when one cannot
        write; the checkpoints before it stay complete.
        """
        final, began = self.folder / f"step-{step:08d}", time.monotonic()
        if self.runtime.broadcast(final.exists()):
            return 0.0
        self.runtime.check_newest(self.run)
        # Each attempt has its own: one that was cut off may still write into its.
        temporary = self.folder / f".{final.name}.tmp-{self.runtime.attempt.get('attempt', '')}"
        # Gathered by all ranks together, written by rank 0.
        tensors = {
            "encoder": complete_state(training.encoder),
            "optimizer": moments(training.prepared, training.optimizer),
        }
        if training.average is not None:
            tensors["average"] = training.average.module.state_dict()
        progress = {f.name: getattr(training.progress, f.name) for f in fields(training.progress)}
        if best_weights := progress.pop("best_weights"):
            tensors["best"] = best_weights
        state: State = {
            "format": FORMAT,
            "step": step,
            "order": training.order.at(step * training.order.batch).to_json(),
            "classes": training.head.classes,
            "class_names": training.class_names,
            "progress": progress,
        }
        self._on_main(lambda: self._write(temporary, tensors, state), temporary)
        self._on_all(
            lambda: save_head(temporary, training.head, training.head_optimizer), temporary
        )
        self._on_main(lambda: self._finish(temporary, final), temporary)
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
        return seconds

    def _on_main(self, action: Callable[[], None], temporary: Path) -> None:
        self._on_all(action if self.runtime.is_main else lambda: None, temporary)

    def _on_all(self, action: Callable[[], None], temporary: Path) -> None:
        """Have every rank do its `action`; where one cannot write, all of them raise Failed."""
        fault = ""
        try:
            action()
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

    def _write(
        self, temporary: Path, tensors: dict[str, dict[str, torch.Tensor]], state: State
    ) -> None:
        # Unfinished ones go first: on a disk without room for two, none would ever fit.
        for folder in self.folder.glob(".step-*.tmp*"):
            shutil.rmtree(folder, ignore_errors=True)  # its attempt may still be writing
        temporary.mkdir(parents=True)
        for name, values in tensors.items():
            save_tensors(temporary / f"{name}.safetensors", values)
        write_json(temporary / "state.json", state)

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
        for folder in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(folder)

    def load_newest(self, training: Training) -> int:
        """Load the newest complete checkpoint into `training`; its step, 0 when there is none.

        A damaged one is removed with a warning. Raises BadInput when the ranks, or the checkpoint
        and this training, differ in their order.
        """
        check_equal(self.runtime.all_gather(training.order.to_json()))
        step = 0
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            fault = self.runtime.broadcast(_fault(folder) if self.runtime.is_main else "")
            if not fault:
                step = self._load(folder, training)
                break
            log.warning("%s: %s; it is removed, going back to the one before", folder, fault)
            self.runtime.barrier()
            if self.runtime.is_main:
                shutil.rmtree(folder)
        position = step * training.order.batch
        check_equal(self.runtime.all_gather(training.order.at(position).to_json()))
        return step

    def _load(self, folder: Path, training: Training) -> int:
        """Load one checkpoint; BadInput when it is of another training. Its step."""
        state: State = read_json(folder / "state.json")
        if state["format"] != FORMAT or state["classes"] != training.head.classes:
            raise BadInput(f"{folder}: of another format or number of classes; start a new run")
        step, batch = int(state["step"]), training.order.batch
        position = training.order.check_goes_on(state["order"], str(folder))
        if position != step * batch:
            raise BadInput(
                f"{folder}: {step} steps took {position} items, with another batch_size than now; "
                "continue with that one, or start a new run"
            )
        load_complete_state(training.encoder, load_file(folder / "encoder.safetensors"))
        progress, best = training.progress, folder / "best.safetensors"
        for name, value in state["progress"].items():
            setattr(progress, name, value)
        keeps_best = best.exists() and self.runtime.is_main
        progress.best_weights = load_file(best) if keeps_best else {}
        saved = load_file(folder / "optimizer.safetensors")
        load_moments(training.prepared, training.optimizer, saved, progress.updates)
        if training.average is not None:
            training.average.module.load_state_dict(load_file(folder / "average.safetensors"))
        load_head(folder, training.head, training.head_optimizer)
        log.info("%s: going on from step %d", folder, step)
        return step


def _fault(folder: Path) -> str:
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
