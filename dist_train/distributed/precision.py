"""Which arithmetic a device supports, and the autocast context of the option `precision`."""

import torch


def supports_bf16(device: torch.device) -> bool:
    """The device multiplies bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of `precision`: auto, bf16 or fp32."""
    enabled = precision == "bf16" or (precision == "auto" and supports_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
