#!/usr/bin/env python3
"""Builds assets/photos, assets/objects, assets/digits.* and SOURCES.md from published packages.

    python3 assets/build.py DIR        (needs Pillow, numpy, scikit-learn, rsvg-convert, dpkg-deb)

DIR holds the packages as their registries serve them:
    Debian  lomiri-wallpapers-16.04_20.04.0-2_all.deb
    npm     @lobehub/fluent-emoji-3d 1.1.0, @lobehub/fluent-emoji-flat 1.1.0, @twemoji/svg 15.0.0,
            @iconify-json/noto 1.2.9, @iconify-json/noto-v1 1.2.5, @iconify-json/emojione 1.2.3   (npm pack NAME@VERSION)
    PyPI    scikit_image-0.26.0 wheel (pictures); scikit-learn installed (digits)

Nobody needs to run this to use the program: its output is in the repository. It is kept so that the origin of
every file can be checked. Photographs, object pictures and digits are split into train and test here, by file.
"""
import glob, io, json, os, shutil, subprocess, sys, tempfile, zipfile
import numpy as np
from PIL import Image, ImageOps

HERE = os.path.dirname(os.path.abspath(__file__))
LONGEST, OBJECT = 2688, 192

BY = "CC-BY-4.0 (https://creativecommons.org/licenses/by/4.0/)"
CC0 = "CC0-1.0"
PD = "public domain"
# split, name here, file in the package, author, licence
LOMIRI = [
    ("train", "ridge", "aitzgorri_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", BY),
    ("train", "brook", "life_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", BY),
    ("train", "fig", "Picture_0B_by_freespace.jpg", 'Trevor "Freespace"', BY),
    ("train", "brushes", "Picture_1A_by_freespace.jpg", 'Trevor "Freespace"', BY),
    ("train", "room", "Wine_by_Jakkub_Mede.jpg", "Jakub Mede", BY),
    ("train", "dandelions", "seeding_by_Clements_Engelhardt.jpg", "Clemens Engelhardt", CC0),
    ("test", "peaks", "picosdeeuropa_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", BY),
    ("test", "dogs", "friends_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", BY),
    ("test", "sunset", "sunset_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", BY),
]
SKIMAGE = [
    ("train", "cat", "chelsea.png", "Stefan van der Walt", CC0),
    ("train", "coffee", "coffee.png", "Rachel Michetti", CC0),
    ("train", "launch", "rocket.jpg", "SpaceX", PD),
    ("train", "galaxies", "hubble_deep_field.jpg", "NASA, ESA", PD),
]
# name, code point, name in the iconify sets
CLASSES = [
    ("apple", "1f34e", "red-apple"), ("banana", "1f34c", "banana"), ("boat", "26f5", "sailboat"),
    ("cactus", "1f335", "cactus"), ("camera", "1f4f7", "camera"), ("carrot", "1f955", "carrot"),
    ("clock", "23f0", "alarm-clock"), ("crab", "1f980", "crab"), ("crown", "1f451", "crown"),
    ("donut", "1f369", "doughnut"), ("fox", "1f98a", "fox"), ("frog", "1f438", "frog"),
    ("ghost", "1f47b", "ghost"), ("gift", "1f381", "wrapped-gift"), ("grapes", "1f347", "grapes"),
    ("guitar", "1f3b8", "guitar"), ("mushroom", "1f344", "mushroom"), ("panda", "1f43c", "panda"),
    ("penguin", "1f427", "penguin"), ("pig", "1f437", "pig-face"), ("pizza", "1f355", "pizza"),
    ("sunflower", "1f33b", "sunflower"), ("tree", "1f332", "evergreen-tree"), ("whale", "1f433", "spouting-whale"),
]
# suffix -> (split, package, author, licence)
RENDERINGS = {
    "a": ("test", "npm @lobehub/fluent-emoji-3d 1.1.0", "Microsoft (Fluent Emoji), packed by LobeHub", "MIT"),
    "b": ("train", "npm @lobehub/fluent-emoji-flat 1.1.0", "Microsoft (Fluent Emoji), packed by LobeHub", "MIT"),
    "c": ("train", "npm @twemoji/svg 15.0.0", "Twitter, Inc and other contributors (Twemoji graphics)", BY),
    "d": ("train", "npm @iconify-json/noto 1.2.9", "Google Inc (Noto Emoji)", "Apache-2.0"),
    "e": ("train", "npm @iconify-json/noto-v1 1.2.5", "Google Inc (Noto Emoji, first version)", "Apache-2.0"),
    "f": ("train", "npm @iconify-json/emojione 1.2.3", "Emoji One, EmojiTwo contributors", BY),
}

NOTICES = """
## Notices that must travel with the files

- Fluent Emoji: Copyright (c) Microsoft Corporation. MIT licence: permission is hereby granted, free of charge, to any person obtaining a copy of
  this software and associated documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
  rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software
  is furnished to do so, subject to the following conditions: the above copyright notice and this permission notice shall be included in all copies or
  substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED
  TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE
  LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH
  THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
- Noto Emoji: Copyright Google Inc. Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0; the pictures were trimmed and rasterised.
- Twemoji graphics: Copyright Twitter, Inc and other contributors, CC-BY 4.0. EmojiOne/EmojiTwo: CC-BY 4.0. Both were trimmed and rasterised.
- scikit-learn digits: Copyright (c) 2007-2026 The scikit-learn developers. BSD 3-clause licence, https://opensource.org/license/bsd-3-clause; the
  pictures come from E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998), CC-BY 4.0.

## The nano model (`nano/`)

- `model.safetensors`, `config.json`: trained by this project from random weights on the pictures above, MIT OR Apache-2.0 (LOG.md, 2026-11-21).
- Tokenizer and settings: made by `nano_tokenizer.py` from this project's own prompts. Special-token names and the chat template's form are Qwen2.5-VL's.
"""


def unpack(packages, work):
    def one(pattern):
        found = sorted(glob.glob(os.path.join(packages, pattern)))
        if not found:
            sys.exit(f"build.py: no {pattern} in {packages}: fetch the packages listed at the top of this file")
        return found[-1]

    subprocess.run(["dpkg-deb", "-x", one("lomiri-wallpapers-16.04*.deb"), f"{work}/lomiri"], check=True)
    with zipfile.ZipFile(one("scikit_image-*.whl")) as wheel:
        wheel.extractall(f"{work}/skimage", [n for n in wheel.namelist() if n.startswith("skimage/data/")])
    for name, pattern in {
        "a": "lobehub-fluent-emoji-3d-*.tgz", "b": "lobehub-fluent-emoji-flat-*.tgz", "c": "twemoji-svg-*.tgz",
        "d": "iconify-json-noto-1.*.tgz", "e": "iconify-json-noto-v1-*.tgz", "f": "iconify-json-emojione-1*.tgz",
    }.items():
        os.makedirs(f"{work}/{name}")
        subprocess.run(["tar", "xzf", one(pattern), "-C", f"{work}/{name}"], check=True)


def photos(work, sources):
    tables = [("lomiri/usr/share/backgrounds", LOMIRI, "Debian lomiri-wallpapers-16.04 20.04.0-2"),
              ("skimage/skimage/data", SKIMAGE, "PyPI scikit-image 0.26.0, skimage/data")]
    for folder, table, package in tables:
        for split, name, file, author, licence in table:
            picture = ImageOps.exif_transpose(Image.open(f"{work}/{folder}/{file}")).convert("RGB")
            scale = LONGEST / max(picture.size)
            if scale < 1:
                picture = picture.resize([round(s * scale) for s in picture.size], Image.LANCZOS)
            for quality in (82, 76, 70, 64, 58):
                data = io.BytesIO()
                picture.save(data, "JPEG", quality=quality, optimize=True, progressive=False)
                if len(data.getvalue()) <= 1_100_000:
                    break
            path = f"photos/{split}/{name}.jpg"
            os.makedirs(f"{HERE}/photos/{split}", exist_ok=True)
            open(f"{HERE}/{path}", "wb").write(data.getvalue())
            sources.append((path, f"{package}: {file}; here {picture.size[0]}x{picture.size[1]}", author, licence))


def rasterise(svg):
    png = subprocess.run(["rsvg-convert", "-w", "384", "-h", "384", "-a"], input=svg, stdout=subprocess.PIPE, check=True)
    return Image.open(io.BytesIO(png.stdout)).convert("RGBA")


def icon(folder, name):
    icons = json.load(open(f"{folder}/package/icons.json"))
    entry = icons["icons"].get(name) or icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent"))
    if entry is None:
        return None
    w, h = (entry.get(k, icons.get(k, 16)) for k in ("width", "height"))
    return rasterise(f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                     f'viewBox="0 0 {w} {h}">{entry["body"]}</svg>'.encode())


def objects(work, sources):
    os.makedirs(f"{HERE}/objects", exist_ok=True)
    table = []
    for name, code, icon_name in CLASSES:
        files = []
        for key, (split, package, author, licence) in RENDERINGS.items():
            if key == "a":
                picture = Image.open(f"{work}/a/package/assets/{code}.webp").convert("RGBA")
            elif key in "bc":
                folder = "assets/" if key == "b" else ""
                picture = rasterise(open(f"{work}/{key}/package/{folder}{code}.svg", "rb").read())
            else:
                picture = icon(f"{work}/{key}", icon_name)
            if picture is None:
                continue
            # The box of an object is the box of its picture, so transparent margins go.
            picture = picture.crop(picture.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox())
            scale = OBJECT / max(picture.size)
            picture = picture.resize([max(1, round(s * scale)) for s in picture.size], Image.LANCZOS)
            path = f"objects/{name}_{key}.webp"
            picture.save(f"{HERE}/{path}", "WEBP", quality=90, alpha_quality=90, method=6)
            files.append({"file": f"{name}_{key}.webp", "split": split, "source": package})
        table.append({"name": name, "pictures": files})
    rows = ",\n".join("  " + json.dumps(row) for row in table)
    open(f"{HERE}/objects/objects.json", "w").write(f"[\n{rows}\n]\n")
    for key, (split, package, author, licence) in RENDERINGS.items():
        sources.append((f"objects/*_{key}.webp ({split})", f"{package}; trimmed, scaled to {OBJECT} px", author, licence))


def digits(sources):
    from sklearn.datasets import load_digits
    data = load_digits()
    across, train = 64, 1400
    count = len(data.images)
    sheet = np.zeros(((count + across - 1) // across * 8, across * 8), np.uint8)
    for i, digit in enumerate(data.images):
        y, x = i // across * 8, i % across * 8
        sheet[y:y + 8, x:x + 8] = np.clip(digit * 255 / 16, 0, 255).round()
    Image.fromarray(sheet).save(f"{HERE}/digits.png", optimize=True)
    json.dump({"side": 8, "across": across, "train": train, "labels": "".join(map(str, data.target))},
              open(f"{HERE}/digits.json", "w"), indent=1)
    sources.append(("digits.png, digits.json", f"PyPI scikit-learn, load_digits(): {count} handwritten digits, the first {train} train, "
                    "the rest test; from the UCI Optical Recognition of Handwritten Digits set", "E. Alpaydin, C. Kaynak", "BSD-3-Clause (scikit-learn); UCI set CC-BY-4.0"))


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for old in ("photos", "objects"):
        shutil.rmtree(f"{HERE}/{old}", ignore_errors=True)
    sources = []
    with tempfile.TemporaryDirectory() as work:
        unpack(sys.argv[1], work)
        photos(work, sources)
        objects(work, sources)
    digits(sources)
    with open(f"{HERE}/SOURCES.md", "w") as out:
        out.write("# Where the bundled files come from\n\n"
                  "Written by `build.py`, which makes every file below from published packages. All pictures were re-encoded; photographs\n"
                  "longer than 2688 pixels and all object pictures were scaled. CC-BY material is used with the credit given here;\n"
                  "nothing implies that its authors endorse this program.\n\n"
                  "| file | origin | author | licence |\n| --- | --- | --- | --- |\n")
        for row in sources:
            out.write("| " + " | ".join(row) + " |\n")
        out.write(NOTICES)


main()
