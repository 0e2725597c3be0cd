"""What the jobs of `dist-train submit` request of Slurm: a section for all, one for each stage."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from shards.storage.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """Resources of one Slurm job; what a stage does not give is taken from the section slurm."""

    partition: str | None = None
    """Partition to submit to. Not given: the cluster's default."""
    account: str | None = None
    """Account that is charged. Not given: the user's default."""
    qos: str | None = None
    """Quality of service. Not given: the account's default."""
    nodes: int | None = None
    """Number of nodes of a stage. Not given: 1."""
    gpus: int | None = None
    """GPUs on each node. Not given: 0, so that the stages run on CPUs."""
    processes: int | None = None
    """Processes on each node. Not given: one for each GPU, or one."""
    tasks: int | None = None
    """Only in the sections pack and join: jobs of a Slurm array that share the work."""
    cpus: int | None = None
    """CPU cores on each node: processes times (workers + 1) or more. Not given: the cluster's
    default."""
    mem: str | None = None
    """Memory on each node, such as 64G. Not given: the cluster's default."""
    time: str | None = None
    """Time limit of each job, such as 12:00:00 or 2-00:00:00. Not given: the partition's
    default."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, such as --exclude=node7."""

    def __post_init__(self) -> None:
        for name, least in {"nodes": 1, "gpus": 0, "processes": 1, "tasks": 1, "cpus": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"slurm {name}: {value}, must be at least {least}")
        for line in self.sbatch:
            if not line.startswith("-") or "\n" in line:
                raise BadInput(f"slurm sbatch: {line!r} is no option of sbatch (--exclude=node7)")


SingleJob = Annotated[SlurmJob, Parameter(show=False)]  # help would list eleven options nine times
ONE_PROCESS = SlurmJob(nodes=1, gpus=0, processes=1)
DEFAULTS = {
    "pack": replace(ONE_PROCESS, tasks=4),
    "index": SlurmJob(nodes=1),
    "match": ONE_PROCESS,
    "evaluate": ONE_PROCESS,
    "report": ONE_PROCESS,
}
"""Defaults of these stages; their own sections go before, the section slurm comes after."""
ARRAYS = ("pack", "join")
"""Stages whose workers need no process group."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(SlurmJob):
    """How the stages run under Slurm. Each may have its own section: slurm.image.nodes."""

    setup: tuple[str, ...] = ()
    """Lines of bash that run before each stage, such as module load cuda/12.4."""
    container: str = ""
    """Prefix of the command that starts each process, such as apptainer exec --nv image.sif. It is
    split at blanks; quotes do not work in it."""
    srun: tuple[str, ...] = ()
    """Further options of srun, such as --container-image=dist_train.sqsh (pyxis)."""
    accelerate: Path | None = None
    """Configuration file for accelerate launch, which starts the processes. Not given: the
    accelerate_config.yaml of this checkout."""
    stop_before: int = 180
    """Seconds before the time limit at which a stage saves its work and is requeued. Raise it when
    a checkpoint takes longer to write."""
    max_requeues: int = 20
    """Number of times that a job may requeue itself; then it fails, and submit goes on with it."""
    pack: SingleJob = field(default_factory=SlurmJob)
    image: SingleJob = field(default_factory=SlurmJob)
    text: SingleJob = field(default_factory=SlurmJob)
    embed: SingleJob = field(default_factory=SlurmJob)
    index: SingleJob = field(default_factory=SlurmJob)
    join: SingleJob = field(default_factory=SlurmJob)
    match: SingleJob = field(default_factory=SlurmJob)
    evaluate: SingleJob = field(default_factory=SlurmJob)
    report: SingleJob = field(default_factory=SlurmJob)

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in (self.container, *self.srun):
            if set(text) & set("'\"\\$`"):
                raise BadInput(
                    f"slurm: {text!r} is split at blanks; quotes, \\, $ and ` do not work in it"
                )
        wrong = [name for name in STAGES if name not in ARRAYS and getattr(self, name).tasks]
        if wrong or self.tasks is not None:
            section = f"slurm.{wrong[0]}" if wrong else "slurm"
            raise BadInput(f"{section}.tasks: only for {' and '.join(ARRAYS)}")

    def job(self, stage: str, one_process: bool = False) -> SlurmJob:
        """The resources of `stage`: its own section, then its defaults, then this section.

        With `one_process`, and in a task of an array of joins by default, one process runs.
        """
        own, defaults = getattr(self, stage), DEFAULTS.get(stage, SlurmJob())
        single = SlurmJob(nodes=1, processes=1, gpus=min(1, own.gpus or self.gpus or 0))
        if stage == "join" and own.tasks:
            defaults = single
        found: dict[str, Any] = {}
        for level in (self, defaults, own, *([single] if one_process else [])):
            given = {f.name: getattr(level, f.name) for f in fields(SlurmJob)}
            found |= {name: value for name, value in given.items() if value not in (None, ())}
        return SlurmJob(**found)


STAGES = tuple(f.name for f in fields(SlurmConfig) if f.type is SingleJob)
