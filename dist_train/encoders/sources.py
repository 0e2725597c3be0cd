"""What to say when a model or its weights cannot be had."""

from shards.errors import BadInput


def no_model(model: str, reason: str) -> BadInput:
    """The one line for a model that cannot be built, with the remedy."""
    return BadInput(
        f"encoder.model {model}: {reason}; name a local folder that holds config.json and "
        "model.safetensors: --encoder.model FOLDER"
    )


def no_weights(model: str, error: Exception) -> BadInput:
    """The one line for a model that is neither a local folder nor to be had from the hub."""
    kind = type(error).__name__
    return no_model(model, f"not on this machine, and the hub does not give it ({kind})")
