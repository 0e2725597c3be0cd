"""Who runs where: process group, device, rank-0 logging, stop signals, shares of the work."""

import ctypes
import faulthandler
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pyarrow as pa
import torch
import torch.distributed as dist
from accelerate import PartialState

from dist_train.distributed.barrier import Barrier, timeout
from dist_train.distributed.stage import new_attempt, newer_attempt
from shards.storage import stage_files
from shards.storage.errors import BadInput, Failed, NoGPU, Stopped
from shards.storage.workers import STOPS

LOST = re.compile(r"gloo|nccl|by peer|broken pipe", re.IGNORECASE)
"""What torch says when another rank is gone."""
Work = TypeVar("Work")
log = logging.getLogger("dist_train")


class Runtime:
    """This process among the others: `rank` of `world`, on `device`."""

    def __init__(self, device: str = "auto") -> None:
        """Join the process group that the launcher meant; W = 1 without a launcher.

        Raises NoGPU when `device` is cuda and there is none, and BadInput when the group has
        another size than the launcher's WORLD_SIZE (separate copies would train in silence).
        """
        cpu = _on_cpu(device)
        _leave_traces()
        state = _join(cpu)
        if not cpu and _device_of(state).type == "cpu":
            raise BadInput(f"device {device}: this process has begun on the CPU; start another")
        self.rank, self.world = state.process_index, state.num_processes
        self.device: torch.device = torch.device("cpu") if cpu else _device_of(state)
        _check_world(self.world)
        _log_on_rank_0(self.rank)
        self._barrier = Barrier(self.rank, self.world) if self.world > 1 else None
        self._stop = stop_flag()
        self.attempt: dict[str, Any] = {}

    @property
    def is_main(self) -> bool:
        """Rank 0: it alone writes shared files."""
        return self.rank == 0

    def share(self, work: Sequence[Work]) -> Sequence[Work]:
        """This rank's part of a list of independent pieces that no rank may skip or repeat."""
        return work[self.rank :: self.world]

    def barrier(self) -> None:
        """Wait for all ranks, for as long as they live: one may work for hours before it comes."""
        if self._barrier is not None:
            self._barrier.wait()

    def total(self, value: float) -> float:
        """Sum of `value` over ranks, which come within minutes of each other."""
        if self.world == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box)
        return box.item()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank (JSON-like values); waits for it as `barrier` does."""
        if self.world == 1:
            return value
        self.barrier()
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, on every rank; waits for all as `barrier` does."""
        if self.world == 1:
            return [value]
        self.barrier()
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def stop_requested(self) -> bool:
        """A signal has reached some rank; to be looked at between pieces of work."""
        if self._barrier is None:
            return self._stop.asked
        if self._stop.asked:
            self._barrier.request_stop()
        return self._stop.asked or self._barrier.stop_requested()

    def any_stop_requested(self) -> bool:
        """A signal has reached some rank; every rank must call it at the same point."""
        return self.total(float(self._stop.asked)) > 0

    def stop_together(self, out: Path) -> None:
        """Wait for every rank; then raise Stopped on all of them when a signal has reached one.

        Every rank must call it at the same point, with all its work committed.
        """
        self.barrier()
        if self.any_stop_requested():
            raise Stopped(f"{out}: stopped by a signal; the same command goes on")

    @contextmanager
    def stage(
        self, out: Path, kind: str, config: dict[str, Any], parents: dict[str, Any]
    ) -> Iterator[bool]:
        """Claim `out` on rank 0 and keep its status true; yields whether it is already done.

        Every rank leaves it with the same outcome: a refusal is raised on all of them.
        """
        done = self._begin(out, kind, config, parents)
        try:
            yield done
        except Stopped as stopped:
            self._write_status(out, "preempted", str(stopped))
            raise
        except BaseException as error:
            cause = _cause(error, self.rank)
            # Any rank may be the one that fails, and the others may be stuck: it writes itself.
            # The first to fail is the cause; the others lose their connection to it, or fail alike
            # and leave the word to the lowest of them.
            time.sleep(min(0.05 * self.rank, 5.0))
            if newer_attempt(out, self.attempt):
                raise
            if self.world > 1 and stage_files.status_of(out) == "failed":
                raise SystemExit(getattr(error, "exit_code", 1)) from None
            with suppress(OSError):  # where the disk is full
                reason = f"rank {self.rank}: {type(cause).__name__}: {cause}"
                stage_files.write_status(out, "failed", reason, self.attempt)
            if cause is error:
                raise
            raise cause from None

    def check_newest(self, out: Path) -> None:
        """Before a commit: Failed when another attempt of this stage has begun since.

        Slurm starts a job again whose node is cut off, where the one before may go on.
        """
        if self.is_main and (newer := newer_attempt(out, self.attempt)):
            raise Failed(newer)

    def _begin(self, out: Path, kind: str, config: dict[str, Any], parents: dict[str, Any]) -> bool:
        done, refusal, attempt = False, "", new_attempt()
        if self.is_main:
            try:
                if newer := newer_attempt(out, attempt, begun=False):
                    raise BadInput(newer)
                done = stage_files.begin(out, kind, config, parents)
                if not done:
                    stage_files.write_status(out, "running", by=attempt)
            except BadInput as refused:
                refusal = str(refused)
        done, refusal, self.attempt = self.broadcast((done, refusal, attempt))
        if refusal:
            raise BadInput(refusal)
        return done

    def _write_status(self, out: Path, state: str, reason: str) -> None:
        if self.is_main and not newer_attempt(out, self.attempt):
            stage_files.write_status(out, state, reason, self.attempt)


def _cause(error: BaseException, rank: int) -> BaseException:
    """`error`, or what it means when it only says that another rank does not answer any more."""
    if not (isinstance(error, RuntimeError) and LOST.search(str(error))):
        return error
    return Failed(
        f"rank {rank} lost its connection to another rank, which was killed or whose machine is "
        "gone (out of memory? the launcher names it); the same command goes on "
        f"({str(error).partition('. ')[0]})"
    )


def stop_flag() -> "_StopFlag":
    """The process's: a stage that begins after the signal hears of it too."""
    installed = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return installed if isinstance(installed, _StopFlag) and installed.is_ours() else _StopFlag()


class _StopFlag:
    """A signal of STOPS asks for a stop; SIGTERM or SIGINT again after GRACE seconds ends at once.

    Not at once: a launcher that is told to stop passes the signal on to ranks that have it.
    """

    GRACE = 20.0

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._pid = os.getpid()
        for number in STOPS:
            signal.signal(number, self._on_signal)

    def is_ours(self) -> bool:
        """It was not inherited from the process that forked this one."""
        return os.getpid() == self._pid

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.is_ours():
            # A process that a library forked inherits this handler, but it is not asked to stop.
            if number != signal.SIGUSR1:
                os._exit(0)
            return
        if number != signal.SIGUSR1 and self._asked_at and self._age() > self.GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._pid, number)
        if number != signal.SIGUSR1:
            self._asked_at = self._asked_at or time.monotonic()
        self.asked = True

    def _age(self) -> float:
        return time.monotonic() - self._asked_at


def row_blocks(rows: int, smallest: int = 256, largest: int = 65_536) -> list[range]:
    """Cut `rows` into the blocks that are the unit of work, of commit and of resume.

    A function of the number of rows alone, about 64 blocks where that fits the bounds.
    """
    size = min(largest, max(smallest, -(-rows // 64)))
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def peak_bytes() -> int:
    """The most memory that this process has held (ru_maxrss may be that of who started it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def trim_allocators() -> None:
    """Return what is free in the allocators to the system.

    glibc keeps the gaps that pieces of changing sizes leave: twice what is held after some minutes.
    """
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def under_launcher() -> bool:
    """This process was started by torchrun or accelerate launch."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def supports_bf16(device: torch.device) -> bool:
    """The device multiplies bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a precision option."""
    enabled = precision == "bf16" or (precision == "auto" and supports_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over ranks; its gradient is summed over ranks too."""
    return _SumOverRanks.apply(values) if dist.is_initialized() else values


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def _on_cpu(device: str) -> bool:
    if device == "cuda" and not torch.cuda.is_available():
        raise NoGPU("--device cuda: no GPU answers (driver missing, or a CPU build of torch)")
    return device == "cpu" or not torch.cuda.is_available()


def _leave_traces() -> None:
    """A crash prints where it was, SIGUSR2 prints where every thread is, and NCCL's flight recorder
    writes down what each rank was at when a collective times out.
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


def _check_nodes() -> None:
    """No node of a Slurm step works alone beside the others, for want of a launcher over all."""
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{of}", "1")) for of in ("TASKS", "NODES"))
    if under_launcher():
        world, here = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        alone, knows = world < nodes * here, f"{world} processes, {here} of them here"
    else:
        alone, knows = tasks > 1, "itself alone"
    if alone:
        raise BadInput(
            f"Slurm runs this step as {tasks} tasks on {nodes} nodes, and task "
            f"{os.environ.get('SLURM_PROCID')} knows of {knows}: each would do all the work; start "
            "it by launch/slurm/stage.sh, or with --num_machines and --machine_rank"
        )


def _join(cpu: bool) -> PartialState:
    _check_nodes()
    if not under_launcher():
        _check_world(1)  # before accelerate fails on the half of a launcher's variables
        _check_alone()
    if not cpu:
        return PartialState(timeout=timeout())
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # use_cpu would drop DeepSpeed without a word.
        os.environ["DS_ACCELERATOR"] = "cpu"
        return PartialState(backend="gloo", timeout=timeout())
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=True, backend="gloo" if under_launcher() else None, timeout=timeout())


def _device_of(state: PartialState) -> torch.device:
    assert state.device is not None
    return state.device


def _check_world(world: int) -> None:
    meant = int(os.environ.get("WORLD_SIZE", "1"))
    grouped = dist.get_world_size() if dist.is_initialized() else 1
    if not meant == world == grouped:
        raise BadInput(
            f"the launcher meant {meant} processes, accelerate sees {world} and the process group "
            f"has {grouped}; start with: accelerate launch --num_processes {meant} -m dist_train"
        )


def _check_alone() -> None:
    """`accelerate launch` says so little where it was to start several and started this one."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise BadInput(
            "accelerate launch was told of several processes and has started this one alone; use a "
            "config whose distributed_type is MULTI_GPU (on CPUs too: launch/accelerate/cpu.yaml), "
            "without --cpu"
        )


def _log_on_rank_0(rank: int) -> None:
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    for name in ("dist_train", "shards"):
        logging.getLogger(name).setLevel(level)


class Clock:
    """Seconds since it was made, for rates and reports."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start
