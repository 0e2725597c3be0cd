"""Where a model's weights come from, and what to say when they cannot be had."""

from shards.errors import BadInput


def no_weights(model: str, error: Exception) -> BadInput:
    """The one line for a model that is neither a local folder nor to be had from the hub."""
    return BadInput(
        f"encoder.model {model}: not on this machine and the hub does not answer "
        f"({type(error).__name__}); name a local folder that holds config.json and "
        "model.safetensors: --encoder.model FOLDER"
    )
