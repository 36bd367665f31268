"""Turn almost any folder or zip of images into a zip that stage 01 reads. Says what it changed.

    python extras/prepare_images.py my_images my_images.zip --image_size 64
    python 01_train_teacher.py --preset ffhq64 --data my_images.zip

Reads every format that Pillow knows (of an animation, the first picture), and 16-bit grey. Images
that cannot be read are left out and listed. The labels are those of a dataset.json, in whichever
folder it is. A label there may be a number, 3 or 3.0, a text, "3", true or false, or one-hot,
[0, 0, 0, 1]. Without a dataset.json each folder is a class, if there are two or more.

Writes  the zip: 000000.png, 000001.png, ... in RGB; and dataset.json, with the labels and the
        names of the classes
"""
import argparse
import io
import json
import os
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, require, writing
from extras.image_files import class_folders, list_files, listed, read_image


def as_png(content):
    """Turns the bytes of an image in any format into those of an 8-bit PNG.

    Raises many kinds of errors.
    """
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode.startswith("I"):  # 16-bit grey, 0 to 65,535
        values = np.asarray(image)
        require(values.min() >= 0 and values.max() < 2**16, "more than 16 bits")
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def class_number(label):
    """The int that a label stands for: 3, 3.0, "3", true or one-hot [0, 0, 0, 1]; else None."""
    if isinstance(label, list) and label.count(1) == 1:
        if label.count(0) == len(label) - 1:
            return label.index(1)
    try:
        if int(label) == float(label):
            return int(label)
    except (TypeError, ValueError, OverflowError):
        pass
    return None


def read_labels(files, read_bytes):
    """({name: number of its class, or None}, names of the classes), from dataset.json.

    (None, []) if there is none.
    """
    found = [name for name in files if Path(name).name == "dataset.json"]
    require(len(found) < 2, f"more than one dataset.json: {', '.join(found)}")
    if not found:
        return None, []
    numbers = {}
    try:
        dataset = json.loads(read_bytes(files[found[0]]))
        for name, label in dict(dataset["labels"] or {}).items():
            name = name.replace("\\", "/")
            path = os.path.join(os.path.dirname(found[0]), name)  # relative to dataset.json
            numbers[path] = class_number(label)
        return numbers, dataset.get("classes") or []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{found[0]} is not {{"labels": [["a/0.png", 3], ...]}}: '
                        f"{error!r}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder or zip of images")
    parser.add_argument("target", type=Path, help="the zip to write")
    parser.add_argument("--image_size", type=int, default=0,
                        help="crop and resize to it; 0: leave sizes")
    cfg = parser.parse_args()
    files, read_bytes = list_files(cfg.source)
    formats = Image.registered_extensions()
    readable = {end for end in formats if formats[end] in Image.OPEN}
    names = sorted(name for name in files if Path(name).suffix.lower() in readable)
    numbers, classes = read_labels(files, read_bytes)
    kept, bad, changed = [], [], Counter()
    with writing(cfg.target) as file, zipfile.ZipFile(file, "w") as archive:
        for name in names:
            try:
                require(not numbers or numbers.get(name) is not None,
                        "its label is not a whole number")
                pixels, changes = read_image(as_png(read_bytes(files[name])), cfg.image_size)
            except Exception as error:  # an image can be damaged in many ways
                bad.append(f"{name} ({str(error).partition(' <_io')[0]})")
                continue
            with archive.open(f"{len(kept):06}.png", "w") as png:
                Image.fromarray(pixels.transpose(1, 2, 0)).save(png, "PNG")
            kept.append(name)
            changed.update(changes)
        labels = []
        if numbers:
            labels = [numbers[name] for name in kept]
        elif numbers is None:
            found, classes = class_folders(kept)
            if classes:
                labels = found.tolist()
        rows = [[f"{i:06}.png", label] for i, label in enumerate(labels)]
        archive.writestr("dataset.json", json.dumps({"labels": rows, "classes": classes}))
        require(kept, f"{cfg.source}: none of {len(names)} images can be read: "
                f"{', '.join(bad[:10])}")
    others = files.keys() - {*names, "dataset.json"}
    suffixes = Counter(Path(name).suffix for name in others)
    print(f"wrote {cfg.target} | {len(kept):,} images, {len(classes)} classes | "
          f"changed: {listed(changed)} | left out: {listed(suffixes)}, {len(bad):,} images that "
          f"cannot be read: {', '.join(bad)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
