"""This process in its group: rank, device, collectives, and the status of the stage it works on."""

import faulthandler
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from dist_train.distributed.barrier import Barrier, timeout
from dist_train.distributed.launcher import check_before_joining, check_world, under_launcher
from dist_train.distributed.stage import Attempt, Parents, new_attempt, newer_attempt
from shards.read.location import Folder
from shards.storage import stage_files
from shards.storage.errors import BadInput, Corrupt, Failed, NoGPU, Stopped
from shards.storage.stops import StopFlag, stops_interrupt

LOST = re.compile(r"gloo|nccl|by peer|broken pipe", re.IGNORECASE)
"""What torch's errors contain when another rank no longer answers."""
REDUCTIONS = "torch/multiprocessing/reductions.py"
"""The module of torch that fetches the tensors of a batch from the worker that prepared it."""
STOPPED = "stopped by a signal; the same command goes on"
Work = TypeVar("Work")
Value = TypeVar("Value")


class Runtime:
    """This process as `rank` of `world` processes, on `device`."""

    def __init__(self, device: str = "auto") -> None:
        """Join the process group of the launcher; without a launcher W = 1.

        Raises NoGPU if `device` is cuda and there is none, and BadInput if the group has another
        size than the launcher meant (each process would then do all the work).
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise NoGPU("--device cuda: no GPU answers (driver missing, or a CPU build of torch)")
        cpu = device == "cpu" or not torch.cuda.is_available()
        _enable_traces()
        self._stop = StopFlag.installed()
        check_before_joining()
        if not cpu:
            state = PartialState(timeout=timeout())
        elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            # use_cpu would silently drop DeepSpeed.
            os.environ["DS_ACCELERATOR"] = "cpu"
            state = PartialState(backend="gloo", timeout=timeout())
        else:
            os.environ["ACCELERATE_USE_CPU"] = "true"
            backend = "gloo" if under_launcher() else None
            state = PartialState(cpu=True, backend=backend, timeout=timeout())
        assert state.device is not None
        if not cpu and state.device.type == "cpu":
            raise BadInput(f"device {device}: this process already runs on the CPU; start another")
        self.rank, self.world = state.process_index, state.num_processes
        self.device: torch.device = torch.device("cpu") if cpu else state.device
        check_world(self.world, dist.get_world_size() if dist.is_initialized() else 1)
        # Rank 0 logs the progress, the others only warnings.
        form = {"format": "%(asctime)s %(message)s", "datefmt": "%H:%M:%S"}
        logging.basicConfig(**form, level=logging.WARNING)
        for name in ("dist_train", "shards"):
            logging.getLogger(name).setLevel(logging.INFO if self.is_main else logging.WARNING)
        self._barrier = Barrier(self.rank, self.world) if self.world > 1 else None
        self.attempt: Attempt = {}

    @property
    def is_main(self) -> bool:
        """Rank 0: it alone writes shared files."""
        return self.rank == 0

    def share(self, work: Sequence[Work]) -> Sequence[Work]:
        """Every W-th piece of `work`, from this rank's number on: each piece has one rank."""
        return work[self.rank :: self.world]

    def barrier(self) -> None:
        """Wait for all ranks as long as they are alive: one may work for hours before it comes."""
        if self._barrier is not None:
            self._barrier.wait()

    def all_reduce_sum(self, value: float) -> float:
        """Sum of `value` over ranks, which must call it within minutes of each other."""
        if self.world == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box)
        return box.item()

    def broadcast(self, value: Value) -> Value:
        """Rank 0's `value` on every rank (JSON-like values); waits for it as `barrier` does."""
        if self.world == 1:
            return value
        self.barrier()
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Every rank's `value` in rank order, on every rank; waits for all as `barrier` does."""
        if self.world == 1:
            return [value]
        self.barrier()
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def compare(self, folder: Folder, names: Sequence[str]) -> None:
        """Compare files of a finished stage with its manifest, each on one rank.

        Every rank must call it at the same point. Raises Corrupt, which names a file, on all of
        them.
        """
        fault = ""
        try:
            folder.compare(self.share(names))
        except Corrupt as error:
            fault = str(error)
        if fault := next(filter(None, self.all_gather(fault)), ""):
            raise Corrupt(fault)
        folder.trust(names)

    def stop_requested(self) -> bool:
        """Some rank has received a stop signal; to be checked between pieces of work."""
        mine = self._stop.requested
        return mine if self._barrier is None else self._barrier.stop_requested(mine)

    def any_stop_requested(self) -> bool:
        """Some rank has received a stop signal; every rank must call it at the same point."""
        return self.all_reduce_sum(float(self._stop.requested)) > 0

    def stop_together(self, out: Path) -> None:
        """Wait for every rank; raise Stopped on all of them if one has received a stop signal.

        Every rank must call it at the same point, with all its work committed.
        """
        self.barrier()
        if self.any_stop_requested():
            raise Stopped(f"{out}: {STOPPED}")

    def alone(self, out: Path, work: Callable[..., object], *arguments: Any) -> None:
        """Rank 0 calls `work`, which a stop signal interrupts, while the other ranks wait for it.

        Every rank must call it at the same point; raises Stopped on all of them if interrupted.
        """
        interrupted = False
        if self.is_main:
            try:
                with stops_interrupt():
                    work(*arguments)
            except KeyboardInterrupt:
                interrupted = True
        if self.broadcast(interrupted):
            raise Stopped(f"{out}: {STOPPED}")

    @contextmanager
    def stage(
        self, out: Path, kind: str, config: dict[str, Any], parents: Parents
    ) -> Iterator[bool]:
        """Begin the stage `out` on rank 0 and keep its status; yields whether it is already done.

        Every rank leaves it with the same outcome: BadInput of a refusal is raised on all of them.
        A stop signal interrupts the block of one process alone; of several, which would wait for
        it in a collective, each has to look for it, as must a block of `stops_interrupt(False)`.
        """
        with stops_interrupt(False):  # the status is always written
            done, refusal, attempt = False, "", new_attempt()
            if self.is_main:
                try:
                    if newer := newer_attempt(out, attempt, begun=False):
                        raise BadInput(newer)
                    done = stage_files.begin(out, kind, config, parents)
                    if not done:
                        stage_files.write_status(out, "running", by={**attempt})
                except BadInput as refused:
                    refusal = str(refused)
            done, refusal, self.attempt = self.broadcast((done, refusal, attempt))
            if refusal:
                raise BadInput(refusal)
            try:
                with stops_interrupt(self.world == 1):
                    yield done
            except (Stopped, KeyboardInterrupt) as error:
                stopped = error if isinstance(error, Stopped) else Stopped(f"{out}: {STOPPED}")
                if not done and self.is_main and not newer_attempt(out, self.attempt):
                    stage_files.write_status(out, "preempted", str(stopped), {**self.attempt})
                raise stopped from None
            except BaseException as error:
                self._write_failure(out, error)
                raise

    def _write_failure(self, out: Path, error: BaseException) -> None:
        """Record why the stage failed; raises what says it better than `error`, if anything does.

        Any rank may be the one that fails, and the others may be stuck, so each writes the status.
        The first failure is the cause: others then lose their connection to it. If all fail alike,
        the lowest rank writes, as the others wait longer here.
        """
        cause = _cause(error, self.rank)
        time.sleep(min(0.05 * self.rank, 5.0))
        if newer_attempt(out, self.attempt):
            return
        if self.world > 1 and stage_files.status_of(out) == "failed":
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        with suppress(OSError):  # the disk may be full
            reason = f"rank {self.rank}: {type(cause).__name__}: {cause}"
            stage_files.write_status(out, "failed", reason, {**self.attempt})
        if cause is not error:
            raise cause from None

    def check_newest(self, out: Path) -> None:
        """Before a commit: raise Failed if a newer attempt of this stage has begun.

        Slurm restarts a job whose node is cut off, while the first attempt may still run there.
        """
        if self.is_main and (newer := newer_attempt(out, self.attempt)):
            raise Failed(newer)


def row_blocks(rows: int, smallest: int = 256, largest: int = 65_536) -> list[range]:
    """Cut `rows` into the blocks that are the unit of work, of commit and of resume.

    A function of the number of rows alone: about 64 blocks within the bounds of their size.
    """
    size = min(largest, max(smallest, -(-rows // 64)))
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over ranks; its gradient is summed over ranks too."""
    return _SumOverRanks.apply(values) if dist.is_initialized() else values


class _SumOverRanks(torch.autograd.Function):
    """torch.distributed.nn.functional.all_reduce, which torch deprecates and does not compile."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return _SumOverRanks.forward(ctx, grads[0])


def _cause(error: BaseException, rank: int) -> BaseException:
    """`error`, or Failed if it only shows that another rank or a loader worker was killed."""
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
        return Failed(
            f"rank {rank} lost its connection to another rank, which was killed or whose machine "
            "is down (out of memory? the launcher's log names it); the same command goes on "
            f"({str(error).partition('. ')[0]})"
        )
    # The worker's death is noticed by itself, or by a batch that can no longer be fetched from it.
    frames = traceback.extract_tb(error.__traceback__)
    fetching = any(frame.filename.endswith(REDUCTIONS) for frame in frames)
    if "DataLoader worker (pid" in str(error) or (fetching and isinstance(error, OSError)):
        return Failed(
            f"rank {rank}: a loader worker was killed, perhaps for lack of memory (see dmesg); the "
            "same command goes on, with fewer --workers in less memory"
        )
    return error


def _enable_traces() -> None:
    """Print a traceback at a crash and, for every thread, at SIGUSR2; record NCCL's timeouts.

    NCCL's flight recorder writes what each rank was doing when a collective timed out.
    """
    errors = sys.__stderr__
    if errors is not None:
        faulthandler.enable(errors)
        faulthandler.register(signal.SIGUSR2, errors)
    folder = Path(tempfile.gettempdir())
    job = os.environ.get("SLURM_JOB_ID", os.environ.get("MASTER_PORT", "0"))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / f"dist_train-{job}-rank-"))
