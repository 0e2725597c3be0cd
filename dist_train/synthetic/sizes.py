"""Sizes and quantities, and the many ways in which sellers write one and the same."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple


class Size(NamedTuple):
    """An amount of a unit: (250, "g"), ("XL", "wear"), ("Zenfo A12", "phone")."""

    amount: int | str
    unit: str


def _decimal(amount: int, per: int) -> str:
    return f"{amount / per:.3f}".rstrip("0").rstrip(".")


def _metric(amount: int, small: tuple[str, ...], large: tuple[str, ...]) -> list[str]:
    """250 as "250gr", "250 gram", "0,25kg", …; a thousand small ones make a large one."""
    forms = [f"{amount}{gap}{unit}" for unit in small for gap in ("", " ")]
    part = _decimal(amount, 1000)
    if len(part) > 4:
        return forms
    for unit in large:
        forms += [f"{part}{unit}", f"{part.replace('.', ',')} {unit}"]
    return forms


def _mass(amount: int) -> list[str]:
    return _metric(amount, ("gr", "gr", "g", "gram"), ("kg", "Kg"))


def _volume(amount: int) -> list[str]:
    return _metric(amount, ("ml", "ml", "mL", "mili"), ("L", "liter"))


def _count(amount: int) -> list[str]:
    forms = [f"{amount}pcs", f"{amount} pcs", f"isi {amount}", f"isi {amount} pcs", f"{amount}'s"]
    forms += [f"{amount} lembar", f"@{amount}", f"{amount}pc"]
    return forms + ([f"{amount // 12} lusin"] if amount % 12 == 0 else [])


def _wear(amount: str) -> list[str]:
    return [f"size {amount}", f"ukuran {amount}", f"uk {amount}", f"uk.{amount}", amount, amount]


def _shoe(amount: int) -> list[str]:
    return [f"size {amount}", f"ukuran {amount}", f"no {amount}", f"no.{amount}", f"{amount}"]


def _watt(amount: int) -> list[str]:
    return [f"{amount}W", f"{amount}w", f"{amount} watt", f"{amount}watt", f"{amount} W"]


def _length(amount: int) -> list[str]:
    metres = _decimal(amount, 100)
    return [
        *(f"{amount}cm", f"{amount} cm", f"{amount} centi", f"{metres}m"),
        *(f"{metres.replace('.', ',')} meter", f"{metres} m"),
    ]


def _dial(amount: int) -> list[str]:
    return [f"{amount}mm", f"{amount} mm", f"{_decimal(amount, 10)}cm", f"diameter {amount}mm"]


def _charge(amount: int) -> list[str]:
    dotted = f"{amount:,}".replace(",", ".")
    return [f"{amount}mAh", f"{amount} mah", f"{dotted}mAh", f"{dotted} mAh", f"{amount // 1000}K"]


def _memory(amount: int) -> list[str]:
    return [f"{amount}GB", f"{amount} GB", f"{amount}gb", f"{amount} giga", f"{amount}G"]


def _phone(amount: str) -> list[str]:
    joined = amount.replace(" ", "", 1)
    return [f"untuk {amount}", f"for {amount}", amount, f"tipe {amount}", joined, amount]


_WAYS: dict[str, Callable] = {
    **{"g": _mass, "ml": _volume, "pcs": _count, "wear": _wear, "shoe": _shoe, "W": _watt},
    **{"cm": _length, "mm": _dial, "mAh": _charge, "GB": _memory, "phone": _phone},
}


@lru_cache(maxsize=4096)
def spellings(size: Size) -> tuple[str, ...]:
    """The ways in which a title may give this size; likelier ones stand there twice."""
    return tuple(_WAYS[size.unit](size.amount))


def stamp(size: Size) -> str:
    """The size as it is printed on the pack."""
    if size.unit in ("wear", "shoe", "phone"):
        return str(size.amount)
    if size.unit in ("g", "ml") and isinstance(size.amount, int) and size.amount >= 1000:
        return f"{_decimal(size.amount, 1000)} {'kg' if size.unit == 'g' else 'L'}"
    return f"{size.amount} {size.unit}"
