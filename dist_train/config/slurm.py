"""What the jobs of `dist-train submit` ask Slurm for: one section for all, one for each stage."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from shards.storage.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """One job; what a stage does not say is taken from the section `slurm` above it."""

    partition: str | None = None
    """Not given: the cluster's default."""
    account: str | None = None
    """Not given: the user's default."""
    qos: str | None = None
    """Quality of service; not given: the account's default."""
    nodes: int | None = None
    """Not given: 1."""
    gpus: int | None = None
    """GPUs a node; not given: 0."""
    processes: int | None = None
    """Processes a node; not given: one a GPU, or one."""
    tasks: int | None = None
    """Of pack and join: tasks of an array that share the work and each start by themselves."""
    cpus: int | None = None
    """CPU cores a node."""
    mem: str | None = None
    """Memory a node: 64G."""
    time: str | None = None
    """Limit: 12:00:00 or 2-00:00:00."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch: --exclude=node7."""

    def __post_init__(self) -> None:
        for name, least in {"nodes": 1, "gpus": 0, "processes": 1, "tasks": 1, "cpus": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"slurm {name}: {value}, must be at least {least}")
        for line in self.sbatch:
            if not line.startswith("-") or "\n" in line:
                raise BadInput(f"slurm sbatch: {line!r} is no option of sbatch (--exclude=node7)")


Stage = Annotated[SlurmJob, Parameter(show=False)]  # the help would name eleven options nine times
USUAL = {
    "pack": SlurmJob(nodes=1, gpus=0, processes=1, tasks=4),
    "index": SlurmJob(nodes=1),
    "match": SlurmJob(nodes=1, gpus=0, processes=1),
    "evaluate": SlurmJob(nodes=1, gpus=0, processes=1),
    "report": SlurmJob(nodes=1, gpus=0, processes=1),
}
"""What these stages take, where their own section does not say else."""
ARRAYS = ("pack", "join")
"""Stages whose workers need no process group."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(SlurmJob):
    """How the stages run under Slurm. Also by stage: slurm.image.nodes, slurm.pack.tasks, …"""

    setup: tuple[str, ...] = ()
    """Lines of bash before each stage: module load cuda/12.4."""
    container: str = ""
    """Words before the command on every node, split at blanks: apptainer exec --nv image.sif."""
    srun: tuple[str, ...] = ()
    """More options of srun: --container-image=dist_train.sqsh (pyxis)."""
    accelerate: Path | None = None
    """The launcher's configuration; not given: accelerate_config.yaml."""
    stop_before: int = 180
    """Seconds before the time limit at which a stage saves and goes back into the queue."""
    max_requeues: int = 20
    """Times that a job may put itself back into the queue."""
    pack: Stage = field(default_factory=SlurmJob)
    image: Stage = field(default_factory=SlurmJob)
    text: Stage = field(default_factory=SlurmJob)
    embed: Stage = field(default_factory=SlurmJob)
    index: Stage = field(default_factory=SlurmJob)
    join: Stage = field(default_factory=SlurmJob)
    match: Stage = field(default_factory=SlurmJob)
    evaluate: Stage = field(default_factory=SlurmJob)
    report: Stage = field(default_factory=SlurmJob)

    def __post_init__(self) -> None:
        super().__post_init__()
        for word in (self.container, *self.srun):
            if set(word) & set("'\"\\$`"):
                raise BadInput(f"slurm: {word!r} is split at blanks as it is; no quotes, no $")
        asked = [name for name in STAGES if name not in ARRAYS and getattr(self, name).tasks]
        if asked or self.tasks is not None:
            where = f"slurm.{asked[0]}" if asked else "slurm"
            raise BadInput(f"{where}.tasks: only of {' and '.join(ARRAYS)}")

    def job(self, stage: str, alone: bool = False) -> SlurmJob:
        """What `stage` asks for: its own section, then what is usual for it, then this one.

        `alone` leaves it one process; so each task of an array of joins is, where not said else.
        """
        found: dict[str, Any] = {}
        own, usual = getattr(self, stage), USUAL.get(stage, SlurmJob())
        one = SlurmJob(nodes=1, processes=1, gpus=min(1, own.gpus or self.gpus or 0))
        if stage == "join" and own.tasks:
            usual = one
        for level in (self, usual, own, *([one] if alone else [])):
            given = {f.name: getattr(level, f.name) for f in fields(SlurmJob)}
            found |= {name: value for name, value in given.items() if value not in (None, ())}
        return replace(SlurmJob(), **found)


STAGES = tuple(f.name for f in fields(SlurmConfig) if f.type is Stage)
