"""Reads a title: quantities, sizes, model numbers and colours."""

import math
import re
from collections.abc import Callable

from dist_train.decisions import quantity_patterns as patterns
from dist_train.decisions.quantity_patterns import STORAGES, normal, number_in, unit_in
from dist_train.decisions.quantity_units import (
    CLOTHING_SIZES,
    COLOURS,
    CONTEXTS,
    SIZE_WORDS,
    SPECIFICATIONS,
    UNITS,
    Quantity,
    Role,
    Unit,
)

_PACKABLE = {"mass", "volume", "count", "container"}
_RANGED = {"age", "length", "screen", "mass", "voltage", "power"}
_RAMS = {1, 2, 3, 4, 6, 8, 12, 16, 18, 24, 32, 64}


def _spread(value: float, unit: Unit) -> tuple[float, float]:
    """A value with its unit's tolerance, in nine digits so that 0.55 m is 55 cm."""
    ends = value * (1 - unit.tolerance), value * (1 + unit.tolerance)
    return float(f"{ends[0]:.9g}"), float(f"{ends[1]:.9g}")


class Reader:
    """Reads a title in passes, each of which takes what it has understood out of the text."""

    def __init__(self, title: str) -> None:
        self.title = self.text = normal(title)
        self.found: list[Quantity] = []
        self.contents: list[float] = []
        self.containers: list[float] = []

    def read(self) -> list[Quantity]:
        if patterns.DIGIT.search(self.text):
            self.read_measures()
        self.read_clothing()
        if patterns.DIGIT.search(self.text):
            self.read_numbers()
        self.read_colours()
        stated = {q.name for q in self.found if q.role != Role.WEAK}
        return [q for q in self.found if q.role != Role.WEAK or not q.name or q.name not in stated]

    def about(self, context: str) -> bool:
        return CONTEXTS[context].search(self.title) is not None

    def add(
        self, unit: Unit | str, low: float, high: float | None = None, role: Role = Role.PLAIN
    ) -> None:
        """A value, or one from low to high, in the base unit of its kind."""
        high = low if high is None else high
        if isinstance(unit, Unit):
            low, high = _spread(low, unit)[0], _spread(high, unit)[1]
            unit = unit.kind
        self.found.append(Quantity(unit, (low,), (high,), "", role))

    def add_name(self, kind: str, name: str, role: Role = Role.PLAIN) -> None:
        self.found.append(Quantity(kind, (), (), name, role))

    def take(self, pattern: re.Pattern[str], read: Callable[[re.Match[str]], bool]) -> None:
        """Let `read` look at every match; those that it understands leave the text."""
        self.text = pattern.sub(lambda match: " | " if read(match) else match[0], self.text)

    def read_measures(self) -> None:
        self.text = patterns.GLUED.sub(" ", self.text)
        self.text = patterns.KILO.sub(self.thousands_of_mah, self.text)
        self.text = patterns.NOISE.sub(" | ", self.text)
        self.take(patterns.BOTH_MEMORIES, self.both_memories)
        self.take(patterns.ONE_MEMORY, self.one_memory)
        if "x" in self.text or "*" in self.text:
            self.take(patterns.DIMENSIONS, self.dimensions)
        if "x" in self.text or "@" in self.text or "isi" in self.text:
            self.take(patterns.PACK, self.pack)
        if self.about("diaper"):
            self.take(patterns.DIAPER, self.diapers)
        self.take(patterns.MEASURE, self.measure)
        self.count()
        self.take(patterns.NUMBERED, self.numbered_sizes)

    def thousands_of_mah(self, match: re.Match[str]) -> str:
        """The mAh of a power bank's "20k"; any other is a price or a resolution."""
        return f"{match[1]}000 mah" if match[2] or self.about("power bank") else " | "

    def both_memories(self, match: re.Match[str]) -> bool:
        """RAM and storage of "8/256GB"."""
        ram, storage, unit = int(match[1]), int(match[2]), match[3]
        storage *= 1024 if unit == "tb" else 1
        likely = ram in _RAMS and storage in STORAGES and ram < storage
        if not likely or (not unit and storage < 16):
            return False
        self.add("ram", ram)
        self.add("storage", storage)
        return True

    def one_memory(self, match: re.Match[str]) -> bool:
        unit = match["ram_unit"] or match["before_unit"] or match["rom_unit"] or "gb"
        amount = int(match["ram"] or match["before"] or match["rom"])
        factor = {"g": 1, "t": 1024, "m": 1 / 1024}[unit[0]]
        self.add("storage" if match["rom"] else "ram", amount * factor)
        return True

    def dimensions(self, match: re.Match[str]) -> bool:
        """The sides of "30 x 40 x 2 cm": a unit holds for those before it, and is cm if missing."""
        written = [
            side for side in zip(match.groups()[::2], match.groups()[1::2], strict=True) if side[0]
        ]
        named = [unit for _, unit in written if unit]
        unit = UNITS[named[-1] if named else "cm"]
        sides: list[tuple[float, float]] = []
        for number, name in reversed(written):
            unit = UNITS[name] if name else unit
            sides.append(_spread(number_in(number, unit.thousands) * unit.factor, unit))
        smallest = min(sides)[0]
        if not named and smallest >= 480:  # a screen's pixels
            return True
        sure = named or len(sides) == 3 or smallest >= 5
        self.add_sides(sides, 1.0, Role.PLAIN if sure else Role.WEAK)
        if not named:  # may be inches or metres just as well
            self.add_sides(sides, UNITS["inch"].factor, Role.WEAK)
            self.add_sides(sides, UNITS["m"].factor, Role.WEAK)
        return True

    def add_sides(self, sides: list[tuple[float, float]], factor: float, role: Role) -> None:
        sides = sorted(((low * factor, high * factor) for low, high in sides), reverse=True)
        low, high = zip(*sides + [(0.0, math.inf)] * (3 - len(sides)), strict=True)
        self.found.append(Quantity("dimensions", low, high, "", role))

    def pack(self, match: re.Match[str]) -> bool:
        """Multipacks: "3x200ml", "200ml x 3", "2 pcs @500gr", "2 box isi 50"."""
        outer, name = match["outer"], match["unit"] or match["unit_"]
        unit = UNITS[name or "pcs"]
        if unit.kind not in _PACKABLE or not (name or outer):
            return False
        n = int(match["n"] or match["n_"])
        one = number_in(match["one"] or match["one_"], unit.thousands) * unit.factor
        if outer:
            n *= int(UNITS[outer].factor)
        if unit.kind in ("count", "container"):
            self.contents.append(n * one)
            return True
        self.contents.append(n)
        self.add(unit, one, role=Role.SINGLE if n > 1 else Role.PLAIN)
        if n > 1:
            self.add(unit, n * one, role=Role.TOTAL)
        return True

    def diapers(self, match: re.Match[str]) -> bool:
        """Size and count of "M34"."""
        self.add("clothing_size", SIZE_WORDS[match[1]])
        self.contents.append(int(match[2]))
        return True

    def measure(self, match: re.Match[str]) -> bool:
        """A number with its unit, "isi 12", "@24", "SPF 50"; false for a bare number."""
        lead = match["lead"]
        unit = unit_in(match, self.about)
        if unit is None:
            return False
        low = number_in(match["n"], unit.thousands) * unit.factor
        if lead == "spf":
            self.add("spf", low)
        elif match["m"]:
            high = number_in(match["m"], unit.thousands) * unit.factor
            tight = unit.kind == "age" or match["to"] == "-"
            if tight and unit.kind in _RANGED and low < high < math.inf:
                self.add(unit, low, high, Role.RANGE)
            else:
                self.add("number", number_in(match["n"], False))
                self.add_amount(unit, high)
        else:
            self.add_amount(unit, low)
        return True

    def add_amount(self, unit: Unit, amount: float) -> None:
        if unit.kind == "count":
            self.contents.append(amount)
        elif unit.kind == "container":
            self.containers.append(amount)
        elif unit.kind:
            self.add(unit, amount)

    def count(self) -> None:
        """2 box of 50 pcs make 100; "1 box" states nothing, nor does "1 pcs" beside "isi 50"."""
        if len(self.contents) == len(self.containers) == 1:
            counts = [self.contents[0] * self.containers[0]]
        else:
            counts = self.contents + self.containers
        for count in [c for c in counts if c != 1] or self.contents[:1]:
            self.add("count", count)

    def numbered_sizes(self, match: re.Match[str]) -> bool:
        """Sizes in figures: "size 42", "no.38", "ukuran 37-40", "uk 38/39"."""
        self.add_numbered(
            [float(n.replace(",", ".")) for n in re.findall(r"\d+(?:[.,]5(?!\d))?", match[1])],
            "-" in match[1],
        )
        return True

    def add_numbered(self, sizes: list[float], dash: bool) -> None:
        if dash and len(sizes) == 2 and sizes[0] < sizes[1]:
            self.add("number_size", *sizes, role=Role.RANGE)
        else:
            for size in sizes:
                self.add("number_size", size)

    def read_clothing(self) -> None:
        first = patterns.CLOTHING.search(self.text)
        if first:
            certain = re.search(patterns.SIZE_LEAD, self.text) is not None or self.about("clothing")
            self.take(patterns.CLOTHING, lambda match: self.clothing(match, certain))

    def clothing(self, match: re.Match[str], certain: bool) -> bool:
        """Sizes in letters: "XXL", "S-XL", "all size"; a lone S, M or L where clothes are meant."""
        if match["all"]:
            self.add("clothing_size", 0, len(CLOTHING_SIZES) - 1)
            return True
        if not (certain or match["first"].endswith("xl")):
            return False
        low, high = SIZE_WORDS[match["first"]], SIZE_WORDS[match["last"] or match["first"]]
        self.add("clothing_size", low, high, Role.RANGE if low < high else Role.PLAIN)
        return True

    def read_numbers(self) -> None:
        """Model numbers and what numbers are left, such as versions and "iPhone 12"."""
        for model in patterns.SUFFIXED.finditer(self.text):  # dscw150/b
            self.add_name("model", re.sub("-", "", model[1] + model[2]), Role.WEAK)
        before = ""
        for written in patterns.TOKEN.findall(self.text):
            parts = written.split("-")
            named = any(len(part) >= 5 and part.isalpha() for part in parts)
            named |= patterns.COUNTED.fullmatch(written) is not None
            for token in parts if named else [written]:
                if patterns.DIGIT.search(token) and token not in SPECIFICATIONS:
                    self.number_or_model(token, before)
                before = token

    def number_or_model(self, token: str, before: str) -> None:
        joined = re.sub("[-./ ]", "", token)
        version = patterns.VERSION.fullmatch(token)
        ends = token.split("-")
        if version and (len(token) < 6 or "." in token):
            self.add_number([float(version[1])])
            if token.isdigit() and before.isalpha():
                strong = len(before) == 1 and before not in "xv" and len(token) <= 3
                self.add_name("model", before + token, Role.PLAIN if strong else Role.WEAK)
        elif joined.isdigit() and len(joined) < 7 and all(map(patterns.VERSION.fullmatch, ends)):
            self.add_number([float(end) for end in ends])
        else:
            self.add_name("model", joined)
            if len(ends) > 1 and not ends[0].isalpha() and not ends[0].isdigit():  # i5-1135g7
                self.add_name("model", ends[0], Role.WEAK)
            if before.isalpha() and len(before) <= 3:
                self.add_name("model", before + joined, Role.WEAK)
            if ending := patterns.NUMBERED_WORD.fullmatch(token):
                self.add_number([float(ending[1])])

    def add_number(self, numbers: list[float]) -> None:
        """A bare "40" or "36-40" of a shoe is its size."""
        if all(20 <= number <= 50 for number in numbers) and self.about("shoe"):
            self.add_numbered(numbers, len(numbers) == 2)
        else:
            for number in numbers:
                self.add("number", number)

    def read_colours(self) -> None:
        words = re.findall("[a-z]+", self.title)
        at = 0
        while at < len(words):
            two = COLOURS.get(" ".join(words[at : at + 2]))
            colour = two or COLOURS.get(words[at])
            if colour and (
                words[at] != "cream" or self.about("named colour") or self.about("clothing")
            ):
                self.add_name("colour", colour)
            at += 2 if two else 1
