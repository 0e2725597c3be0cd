"""What the launcher asks of a training: accelerate's object, and the settings that are refused.

A setting that dist_train owns, or that nobody here carries out, would otherwise be dropped without
a word, or train other weights than the options say.
"""

import os
import warnings
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from transformers.integrations import unset_hf_deepspeed_config

from dist_train.config.training import TrainingOptions
from dist_train.distributed.barrier import timeout
from dist_train.distributed.runtime import Runtime
from shards.storage.errors import BadInput
from shards.storage.files import read_json

STRATEGIES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Variables by which accelerate launch asks for a strategy that no training here follows."""
OPTIONS = {
    "optimizer": "--lr and --weight-decay",
    "scheduler": "--schedule and --warmup",
    "train_batch_size": "--batch-size",
    "train_micro_batch_size_per_gpu": "--batch-size and --accumulation",
    "gradient_accumulation_steps": "--accumulation",
    "gradient_clipping": "--clip",
    "activation_checkpointing": "--gradient-checkpointing",
    "compile": "--compile",
    "fp16": "--precision",
    "bf16": "--precision bf16, which multiplies in bfloat16 and keeps the weights in float32",
    "bfloat16": "--precision bf16, which multiplies in bfloat16 and keeps the weights in float32",
    "amp": "--precision",
    "torch_autocast": "--precision",
}
"""Keys of DeepSpeed's JSON that belong to an option of the training."""
ALLOWED = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "disable_python_gc",
}  # fmt: skip
"""Keys of DeepSpeed's JSON that say where things lie and what is logged."""
GATHER = "stage3_gather_16bit_weights_on_model_save"
FIELDS = ("gradient_accumulation_steps", "gradient_clipping")
"""Keys that accelerate's own configuration may give instead of a JSON."""


def new_accelerator(config: TrainingOptions, runtime: Runtime) -> Accelerator:
    """The accelerator that the launcher asks for, with our batch size, precision and clipping.

    Raises BadInput for a launcher that asks for anything that dist_train decides or does not do.
    """
    check_launcher()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if deepspeed:
        check_deepspeed(config)
    accelerator = Accelerator(
        # Given as a plugin, or a variable of the launcher would win and silently drop updates.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulation),
        mixed_precision="no",  # ours is the autocast inside the encoder, the same everywhere
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout())],
    )
    plugin = accelerator.state.deepspeed_plugin
    if (plugin is not None) != deepspeed:
        raise BadInput(
            "the launcher asks for DeepSpeed and for the CPU, where accelerate drops DeepSpeed "
            "without a word; set ACCELERATE_USE_CPU=false and DS_ACCELERATOR=cpu"
        )
    if plugin is None:
        return accelerator
    if config.compile and plugin.zero_stage == 3:
        raise BadInput("compile: ZeRO-3 moves weights while the encoder runs; use ZeRO-2 or DDP")
    settings: dict[str, Any] = plugin.deepspeed_config
    # Without an epoch the batch need not divide.
    share = max(1, config.batch_size // (config.accumulation * runtime.world))
    settings["train_micro_batch_size_per_gpu"] = share
    settings["gradient_accumulation_steps"] = config.accumulation
    settings["gradient_clipping"] = config.clip
    # DeepSpeed calls torch by older names, of which each rank would warn.
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    # Otherwise transformers shards a new model's weights, whatever zero3_init_flag says.
    unset_hf_deepspeed_config()
    return accelerator


def check_launcher() -> None:
    """Raise BadInput for a strategy, precision or compiler that no training here would use."""
    variables = os.environ
    for name, strategy in STRATEGIES.items():
        if variables.get(name, "").lower() == "true":
            raise BadInput(
                f"the launcher asks for {strategy}, which dist_train does not do: each process "
                "would hold the complete encoder; to split it use DeepSpeed "
                "(launch/accelerate/deepspeed_zero3.yaml)"
            )
    precision = variables.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if precision == "fp16":
        raise BadInput(
            "the launcher asks for fp16: one rank's overflow would skip its step alone, and "
            "DeepSpeed's loss scale would reach the head; launch with --mixed_precision bf16 or no "
            "(--precision sets what is used)"
        )
    if precision == "fp8":
        raise BadInput(
            "the launcher asks for fp8, which dist_train does not do; launch with "
            "--mixed_precision bf16 or no (--precision sets what is used)"
        )
    backend = variables.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", ""):
        raise BadInput(
            f"the launcher asks for dynamo_backend {backend}: leave it at no; --compile compiles "
            "the encoder"
        )


def check_deepspeed(config: TrainingOptions) -> None:
    """Raise BadInput for settings of DeepSpeed that belong to an option, or that are not known."""
    variables = os.environ
    where = variables.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if where == "none":
        for name, ours in zip(FIELDS, (config.accumulation, config.clip), strict=True):
            given = variables.get(f"ACCELERATE_{name.upper()}", "none")
            if given not in ("none", "auto") and float(given) != ours:
                raise BadInput(
                    f"the launcher asks for {name} {given}, {OPTIONS[name]} for {ours}: give the "
                    "option, or take the setting out of the launcher's configuration"
                )
        stage = int(variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    else:
        if not Path(where).is_file():
            raise BadInput(f"{where}: DeepSpeed's JSON is not there ({Path.cwd()} is the folder)")
        stage = _zero_stage(where)
    if stage not in (1, 2, 3):
        raise BadInput(
            f"DeepSpeed's zero stage is {stage}; take 1, 2 or 3, or launch without DeepSpeed "
            "(accelerate_config.yaml)"
        )


def _zero_stage(where: str) -> object:
    """The stage in DeepSpeed's JSON; BadInput for keys that are an option's or not known."""
    settings = read_json(Path(where))
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise BadInput(f"{where}: names no zero_optimization, as launch/accelerate/*.json do")
    refused = []
    for name, value in settings.items():
        off = isinstance(value, dict) and value.get("enabled") in (False, "auto")
        if name not in ALLOWED and value != "auto" and not off:
            refused.append(f"{name} (give {OPTIONS[name]})" if name in OPTIONS else name)
    # accelerate would compute these from a hidden_size that the encoders do not have.
    unknown = [name for name, value in zero.items() if value == "auto" and name != GATHER]
    refused += [f"zero_optimization.{name} auto" for name in unknown]
    if refused:
        raise BadInput(f"{where}: take out what DeepSpeed is not to decide: {', '.join(refused)}")
    return zero.get("stage", 0)
