"""The picture of a product by itself, before anyone photographs it."""

from functools import lru_cache

from PIL import Image

from dist_train.synthetic import containers, gadgets, packets, wearables
from dist_train.synthetic.canvas import Canvas
from dist_train.synthetic.looks import look_of
from dist_train.synthetic.products import Product

_ROOMS = (containers, packets, wearables, gadgets)


# A block is photographed product by product, so a few pictures are enough to keep.
@lru_cache(maxsize=12)
def pack(product: Product) -> Image.Image:
    """The product cut out: RGBa (premultiplied), SIDE by SIDE pixels, clear around it."""
    canvas = Canvas()
    shape = product.line.shape
    room = next(room for room in _ROOMS if hasattr(room, shape))
    getattr(room, shape)(canvas, look_of(product))
    return canvas.finished()
