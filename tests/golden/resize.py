"""Writes the small files that src/image's tests hold the decoder and the resizer against. Made with Pillow 13.0.0.

    python tests/golden/resize.py

resize/NAME.png                  a source
resize/NAME.to-WxH.png           what Pillow makes of it
resize/NAME.rows-first-WxH.png   the same along rows first, always, as Pillow up to 12 does (on any version: two resizes)
decode/NAME.EXT                  a file in some mode
decode/NAME.rgb.png              it upright, in RGB, what is transparent on white as transformers' convert_to_rgb has it
"""
import pathlib

import numpy as np
from PIL import Image, ImageOps

here = pathlib.Path(__file__).parent
rng = np.random.default_rng(7)


def picture(width, height):
    """A smooth ground with hard edges: what photographs have, in few bytes."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    rgb = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 3) * np.cos(y / 5)], -1)
    rgb[height // 4 : height // 2, width // 5 : width // 2] = (250, 10, 30)
    rgb[(x + y) % 11 < 1] = (0, 255, 0)
    return Image.fromarray(rgb.astype(np.uint8))


def noise(width, height):
    """Black and white: the most that the cubic can overshoot, so that clipping between the passes shows."""
    return Image.fromarray((rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8))


resize = here / "resize"
resize.mkdir(exist_ok=True)
cases = {
    "picture": (picture(41, 29), [(56, 28), (28, 28), (41, 20), (20, 29), (41, 29), (1, 1), (100, 3)]),
    "tall": (picture(20, 50), [(28, 28), (19, 40), (5, 49), (10, 30)]),
    "noise": (noise(17, 13), [(28, 14), (7, 5), (40, 4), (16, 12)]),
    "column": (noise(1, 30), [(28, 56), (1, 3), (3, 1)]),
    "row": (noise(30, 1), [(56, 28), (3, 1), (1, 3)]),
    "dot": (Image.new("RGB", (1, 1), (12, 34, 250)), [(5, 3)]),
}
for name, (image, sizes) in cases.items():
    image.save(resize / f"{name}.png", optimize=True)
    for size in sizes:
        image.resize(size, Image.BICUBIC).save(resize / f"{name}.to-{size[0]}x{size[1]}.png", optimize=True)
for name, size in (("tall", (10, 30)), ("noise", (40, 4))):
    image = cases[name][0]
    rows = image.resize((size[0], image.height), Image.BICUBIC).resize(size, Image.BICUBIC)
    rows.save(resize / f"{name}.rows-first-{size[0]}x{size[1]}.png", optimize=True)

decode = here / "decode"
decode.mkdir(exist_ok=True)
small = picture(19, 14)
alpha = small.convert("RGBA")
alpha.putalpha(small.convert("L"))
turned = Image.Exif()
turned[0x0112] = 6
files = {
    "palette.png": (small.quantize(9), {}),
    "palette-transparent.png": (small.quantize(9), {"transparency": 2}),
    "bilevel.png": (small.convert("1"), {}),
    "grey.png": (small.convert("L"), {}),
    "grey-alpha.png": (alpha.convert("LA"), {}),
    "alpha.png": (alpha, {}),
    "turned.png": (small, {"exif": turned}),
    "alpha.webp": (alpha, {"lossless": True, "exact": True}),
    "lossy.webp": (small, {"quality": 60}),
    "turned.jpg": (small, {"exif": turned, "quality": 95, "subsampling": 0}),
    "grey.jpg": (small.convert("L"), {"quality": 90}),
    "cmyk.jpg": (small.convert("CMYK"), {"quality": 95}),
    "chroma-halved.jpg": (picture(61, 45), {"quality": 75, "subsampling": "4:2:0"}),
    "chroma-narrow.jpg": (picture(61, 45), {"quality": 30, "subsampling": "4:2:2", "restart_marker_blocks": 3}),
    "progressive.jpg": (picture(61, 45), {"quality": 85, "progressive": True}),
    "kept-as-rgb.jpg": (picture(37, 29), {"quality": 85, "keep_rgb": True}),
}
for name, (image, options) in files.items():
    image.save(decode / name, **options)
    opened = ImageOps.exif_transpose(Image.open(decode / name))
    if "A" in opened.getbands() or opened.info.get("transparency") is not None:
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, (255, 255, 255, 255)), opened)
    opened.convert("RGB").save(decode / f"{name}.rgb.png", optimize=True)
