"""The habits of the sellers who write titles, and the words they decorate them with."""

from typing import NamedTuple


class Habit(NamedTuple):
    """How one sort of seller writes: the share of titles that name each part."""

    share: float
    brand: float
    name: float
    feature: float
    second_feature: float
    synonym: float
    size: float
    tint: float
    shape: float
    promotion: float
    reordered: float
    typo: float
    english: float


HABITS = (
    # An official shop: everything is there, in order.
    Habit(0.38, 0.99, 0.98, 0.92, 0.50, 0.05, 0.97, 0.95, 0.08, 0.10, 0.08, 0.01, 0.08),
    # A reseller who stuffs keywords so that any search finds him.
    Habit(0.24, 0.96, 0.92, 0.92, 0.60, 0.30, 0.86, 0.84, 0.12, 0.55, 0.40, 0.02, 0.15),
    # One who types on a phone in a hurry.
    Habit(0.22, 0.86, 0.82, 0.45, 0.05, 0.04, 0.66, 0.64, 0.04, 0.30, 0.20, 0.04, 0.08),
    # A dropshipper with a machine translation from English.
    Habit(0.16, 0.76, 0.85, 0.90, 0.55, 0.20, 0.80, 0.80, 0.16, 0.20, 0.40, 0.02, 0.85),
)
SHARES = tuple(habit.share for habit in HABITS)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


PROMOTIONS = _listed(
    "promo|PROMO|termurah|murah|MURAH|best seller|ready stock|READY STOCK|READY|cod|COD|bisa cod|"
    "bayar ditempat|original|ORIGINAL|ori|ORI 100%|100% original|asli|grosir|ecer|terlaris|"
    "terbaru|new|diskon|DISKON 50%|flash sale|gratis ongkir|free ongkir|bpom|BPOM|halal|garansi|"
    "import|premium|kualitas terbaik|bagus|viral|hits|kekinian|jakarta|limited|sale|SALE|"
    "cuci gudang|harga pabrik|free bubble wrap|high quality|good quality|hot|big sale|"
    "beli 2 gratis 1|per pcs|satuan|1 pcs|paket hemat|siap kirim|stok terbatas"
)
SHORT_PRAISE = _listed(
    "ORI murah bagus|murah meriah|ready gan|original murah|bagus banget|best seller nih|"
    "promo hari ini|terlaris|kualitas premium|barang bagus|harga grosir|stok baru"
)
EMOJI = _listed("✨|🔥|❤|⭐|💯|🎁|👍|💥|🌸|✅|🚚|💖|⚡|👶|🛒|🌿")
ESCAPES = tuple("".join(f"\\x{byte:02x}" for byte in e.encode()) for e in EMOJI)
"""Emoji as the literal text `\\xe2\\x9c\\xa8`: what a careless export makes of them."""

SHAPE_WORDS = {
    **{"bottle": "botol", "pump": "pump", "pouch": "refill", "sachet": "sachet", "box": "box"},
    **{"jar": "jar", "tube": "tube", "can": "kaleng", "sack": "karung", "cup": "cup"},
    **{"dropper": "pipet", "spray": "spray", "gable": "kotak"},
}
SHORTHAND = {
    **{"untuk": "utk", "anak": "ank", "wanita": "wnt", "pria": "cowok", "dengan": "dgn"},
    **{"original": "ori", "bayi": "baby", "murah": "mrh", "putih": "pth", "hitam": "htm"},
    **{"sabun": "sbn", "minyak": "mnyk", "susu": "sussu", "sepatu": "spatu", "tas": "tass"},
    **{"celana": "clna", "panjang": "pjg", "pendek": "pdk", "tebal": "tbl", "warna": "wrn"},
    **{"gratis": "free", "botol": "btl", "lampu": "lmp", "kaos": "kaus", "jaket": "jacket"},
}
