"""What a launcher has put into the environment, and the starts that would work on in silence.

Each of these mistakes gives several processes that all do the complete work, without any error.
"""

import os

from shards.storage.errors import BadInput


def under_launcher() -> bool:
    """This process was started by torchrun or accelerate launch."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def check_before_joining() -> None:
    """Raise BadInput if a launcher or Slurm meant several processes and this one would be alone."""
    variables = os.environ
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS", "1"))
    nodes = int(variables.get("SLURM_STEP_NUM_NODES", "1"))
    if under_launcher():
        world, local = int(variables["WORLD_SIZE"]), int(variables.get("LOCAL_WORLD_SIZE", "1"))
        alone, group = world < nodes * local, f"{world} processes, {local} of them on its node"
    else:
        alone, group = tasks > 1, "only itself"
    if alone:
        raise BadInput(
            f"Slurm runs this step as {tasks} tasks on {nodes} nodes, but the group of task "
            f"{variables.get('SLURM_PROCID')} is {group}: every node would do all the work; start "
            "it by launch/slurm/stage.sh, or with --num_machines and --machine_rank"
        )
    if under_launcher():
        return
    check_world(1, 1)  # accelerate fails without a hint if only WORLD_SIZE is set
    if "ACCELERATE_MIXED_PRECISION" in variables and "MASTER_ADDR" in variables:
        raise BadInput(
            "accelerate launch was to start several processes and has started only this one; use a "
            "config whose distributed_type is MULTI_GPU (on CPUs too: launch/accelerate/cpu.yaml), "
            "without --cpu"
        )


def check_world(world: int, grouped: int) -> None:
    """Raise BadInput unless `world` (accelerate's) and `grouped` (torch's) are the launcher's."""
    meant = int(os.environ.get("WORLD_SIZE", "1"))
    if not meant == world == grouped:
        raise BadInput(
            f"the launcher meant {meant} processes, accelerate sees {world} and the process group "
            f"has {grouped}; start with: accelerate launch --num_processes {meant} -m dist_train"
        )
