"""The title that one seller writes for one posting of a product."""

from dist_train.synthetic.products import Product
from dist_train.synthetic.randomness import Dice
from dist_train.synthetic.sellers import (
    EMOJI,
    ESCAPES,
    HABITS,
    PROMOTIONS,
    SHAPE_WORDS,
    SHARES,
    SHORT_PRAISE,
    SHORTHAND,
    Habit,
)
from dist_train.synthetic.sizes import spellings
from dist_train.synthetic.tints import Tint

COPIED = 0.45
"""Share of titles that begin as the text of the brand's own shop, as resellers paste it."""
BARE = 0.035
"""Share of titles that say no more than the kind and a word of praise."""

_LETTERS = "aeioutnsrl"


def title_of(product: Product, posting: int) -> str:
    """The title of one posting of a product (0 to product.postings - 1); never empty."""
    seed = product.line.seed
    dice = Dice(seed, "title", product.number, posting)
    if dice.chance(BARE):
        return f"{_kind_name(product, dice, 0.2)} {dice.pick(SHORT_PRAISE)}"
    habit = HABITS[dice.weighted(SHARES)]
    if dice.chance(COPIED):
        parts = _parts(product, HABITS[0], Dice(seed, "shop title", product.number))
    else:
        parts = _parts(product, habit, dice)
        _reorder(parts, habit, dice)
    words = _mistyped(" ".join(parts).split(" "), habit, dice)
    return _dressed(_cased(" ".join(words), dice), habit, dice)


def _parts(product: Product, habit: Habit, dice: Dice) -> list[str]:
    """What this seller finds worth saying, in the order in which brands themselves say it."""
    line, english, unit = product.line, habit.english, dice.unit
    parts = [line.brand.name] if unit() < habit.brand else []
    parts.append(_kind_name(product, dice, english))
    if unit() < habit.name and line.name:
        parts.append(_line_name(line.name, dice))
    for feature, share in zip(line.features, (habit.feature, habit.second_feature), strict=True):
        if unit() < share:
            parts.append(feature[unit() < english])
    if unit() < habit.tint:
        parts.append(_tint_name(product.tint, english, dice))
    if unit() < habit.shape and line.shape in SHAPE_WORDS:
        parts.append(SHAPE_WORDS[line.shape])
    if unit() < habit.size:
        parts.append(dice.pick(spellings(product.size)))
    if unit() < habit.synonym:
        parts.append(_kind_name(product, dice, 0.5))
    return parts


def _kind_name(product: Product, dice: Dice, english: float) -> str:
    """The usual name of the kind, more often than not, or one of its synonyms."""
    kind = product.line.kind
    names = kind.english if dice.chance(english) else kind.indonesian
    return names[0] if dice.chance(0.5) else dice.pick(names)


def _line_name(name: str, dice: Dice) -> str:
    """The line's name; model codes lose their hyphen with one seller and the case with another."""
    if "-" not in name or dice.chance(0.5):
        return name
    return name.replace("-", dice.pick(("", " ", ".")))


def _tint_name(tint: Tint, english: float, dice: Dice) -> str:
    draw = dice.unit()
    if draw < 0.12:
        return tint.short
    if draw < 0.24:
        return f"warna {tint.indonesian}"
    return tint.english if dice.chance(english) else tint.indonesian


def _reorder(parts: list[str], habit: Habit, dice: Dice) -> None:
    """Swap a few neighbours, or everything."""
    if not dice.chance(habit.reordered):
        return
    if dice.chance(0.35):
        dice.shuffle(parts)
        return
    for place in range(len(parts) - 1):
        if dice.chance(0.35):
            parts[place], parts[place + 1] = parts[place + 1], parts[place]


def _mistyped(words: list[str], habit: Habit, dice: Dice) -> list[str]:
    """Shorthand, slipped fingers, and two words run into one."""
    written: list[str] = []
    for word in words:
        draw = dice.unit()
        if draw < habit.typo and len(word) > 3 and word.isalpha():
            word = _slip(word, dice)
        elif draw > 0.85:
            word = SHORTHAND.get(word, word)
        if written and draw < habit.typo * 0.3:
            written[-1] += word
        else:
            written.append(word)
    return written


def _slip(word: str, dice: Dice) -> str:
    """One letter dropped, doubled, swapped with the next, or another in its place."""
    at, way = 1 + dice.below(len(word) - 2), dice.below(4)
    head, letter, tail = word[:at], word[at], word[at + 1 :]
    if way == 0:
        return head + tail
    if way == 1:
        return head + letter + letter + tail
    if way == 2:
        return head + tail[0] + letter + tail[1:]
    return head + dice.pick(_LETTERS) + tail


def _cased(text: str, dice: Dice) -> str:
    draw = dice.unit()
    if draw < 0.22:
        return text.upper()
    if draw < 0.58:
        return text.title()
    return text.lower() if draw < 0.72 else text


def _dressed(text: str, habit: Habit, dice: Dice) -> str:
    """Promotion words, emoji, brackets and shop codes around the title."""
    if dice.chance(habit.promotion):
        for _ in range(1 + dice.weighted((6, 3, 1))):
            text = _promoted(text, dice.pick(PROMOTIONS), dice)
    if dice.chance(0.10):
        sign = dice.pick(ESCAPES if dice.chance(0.4) else EMOJI)
        text = f"{sign} {text}" if dice.chance(0.4) else f"{text} {sign}{sign * dice.below(3)}"
    if dice.chance(0.05):
        text = f"{text} {dice.pick('ABKMRST')}{dice.below(1000):03d}"
    if dice.chance(0.03):
        text = f"{text} ({dice.pick(PROMOTIONS)} {dice.pick(ESCAPES)})"
    return text


def _promoted(text: str, word: str, dice: Dice) -> str:
    draw = dice.unit()
    if draw < 0.35:
        return f"{text} {word}"
    if draw < 0.60:
        return f"{word} {text}"
    if draw < 0.75:
        return f"[{word}] {text}"
    return f"{text} - {word}" if draw < 0.87 else f"{text} / {word}"
