"""What two or more of the five scripts share. Read the U-Net, euler and Trainer; the rest is plumbing.

Notation, the same in every script and in the equations:

    z      noise N(0, I), shape (B, 3, H, W)
    x      image in [-1, 1], real or made by a network, shape (B, 3, H, W)
    t      time, shape (B,): t = 0 is noise, t = 1 is data
    x_t    t x + (1 - t) z, a point on the straight line from z to x
    v      velocity: what every network predicts, as v(x_t, t). Along the straight line it is x - z

Images are uint8 on disk, float in [-1, 1] everywhere else. Labels are int64 (B,), or None.

Constants carry their origin: "paper:" (Zhu, Liu, Liu: SlimFlow, arXiv 2407.12718), "official code:" (only in
the code that its authors published) or "ours:". The settings of cifar10 and ffhq64 are the paper's unless the
text says otherwise; those of the other presets are ours.
"""
import argparse
import contextlib
import copy
import datetime
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

PRESETS = ("shapes", "cifar10_quick", "cifar10", "ffhq64", "imagenet64")  # the columns of the settings
PRESET = "shapes"  # the column in use; --preset NAME chooses another for one run

# Training draws t from [EPS, 1] and sampling begins at EPS: a network is asked only what it was taught.
EPS = 1e-3  # official code: 0.001, inherited from diffusion models, which divide by t
# Noise is numbered. Each use has numbers of its own: no image that is judged comes from a noise trained on.
PAIRS, OWN_PAIRS, EVALUATION = 0, 10**9, 2 * 10**9
# `torchrun --nproc_per_node=8 01_train_teacher.py` starts 8 processes, one for each GPU; else there is one.
# They divide the batch among them: its size stays, and only the random draws of training differ.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class UserError(ValueError):
    """Something that the user can mend. run() prints it as one line, without a traceback."""


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def read_settings(table, doc, argv=None):
    """A script's settings as attributes: the preset's column of its table, then the command line's."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, add_help=False)
    parser.add_argument("--preset", default=PRESET, choices=PRESETS, help=f"column of settings [{PRESET}]")
    preset = parser.parse_known_args(argv)[0].preset
    parser.add_argument("--help", "-h", action="help", help="show this, with the values of the preset")
    parser.add_argument("--out", default="out", help="results go into <out>/<preset>/ [out]")
    parser.add_argument("--seed", type=int, default=0, help="training and sampling draw from it [0]")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is any), cpu, cuda:1, mps")
    parser.add_argument("--restart", action="store_true", help="start over instead of continuing")
    parser.add_argument("--allow_mixed", action="store_true", help="accept files whose sources were replaced")
    for name, *row in table:  # five values, what they are, and perhaps a tuple of all that they may be
        value, text = row[PRESETS.index(preset)], row[len(PRESETS)]
        how = {"type": type(value), "choices": row[-1] if len(row) > 6 else None}
        if isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        if isinstance(value, tuple):
            how = {"type": lambda given: tuple(int(part) for part in given.split(","))}  # "1,2" -> (1, 2)
        parser.add_argument(f"--{name}", default=value, help=f"{text} [{value}]".strip(), **how)
    cfg = parser.parse_args(argv)
    for name, value in vars(cfg).items():
        require(not isinstance(value, int | float) or 0 <= value < math.inf,
                f"--{name} {value} must be finite, and not negative")
    cfg.folder = Path(cfg.out, cfg.preset)
    return cfg


def settings_of(cfg):
    """The settings that a result depends on, as a dict."""
    others = ("out", "folder", "device", "restart", "allow_mixed")
    return {name: value for name, value in vars(cfg).items() if name not in others}


def require_same_run(path, then, now):
    """Raises UserError unless the run that left `path` had the same settings. then, now: dicts."""
    differ = [f"{key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]]
    require(not differ, f"{path} is of another run: {'; '.join(differ)}. --restart, or another --out?")


def run(main, table, doc, argv=None):
    """Calls main(settings). What the user can mend ends in one line and exit code 1, without a traceback."""
    try:
        if WORLD == 1:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
        main(read_settings(table, doc, argv))
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(str(stop) or "stopped: what was saved is kept, and the same command continues")
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: a smaller --batch (02, 05: BATCH), or more processes, need less")


def start(cfg, name):
    """Joins the other processes if there are any, prints the settings, and returns the torch.device."""
    if WORLD > 1 and not dist.is_initialized():  # a process that waits for another one for an hour gives up
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    device = cfg.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(int(device[5:] or os.environ.get("LOCAL_RANK", 0)))
            torch.backends.cudnn.allow_tf32 = False  # fp32 means float32
            torch.backends.cudnn.benchmark = True  # look for the fastest convolution
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {cfg.device} cannot be used: {str(error).splitlines()[0]}") from error
    if getattr(cfg, "precision", "") == "auto":
        cfg.precision = "bf16" if has_bf16 else "fp32"
    torch.manual_seed(cfg.seed)  # the networks' first weights
    say(f"{name} | {device} x {WORLD}, {torch.get_num_threads()} threads | torch {torch.__version__}")
    say("settings | " + " ".join(f"{key}={value}" for key, value in settings_of(cfg).items()))
    return device


def say(text):  # in process 0
    if RANK == 0:
        print(text, flush=True)


def wait_for_all():  # until every process has come here
    if WORLD > 1:
        dist.barrier()


# ----------------------------------------------------------------------------------------- files and pictures
# An artifact (.pt) is a dict. `id` is a fingerprint of its content, `made_from` {file name: id} of all that
# it was made from, so that nothing is mixed unnoticed.

def fingerprint(*tensors):
    """16 hexadecimal digits that change with any bit of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as file:` gives a binary file that gets its name only when it is complete."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before it replaces what was there
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        raise UserError(f"could not write {path}, kept the old one: {error.__context__ or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path):
    """The dict in a .pt file, its tensors memory-mapped. No code is unpickled. UserError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch's files are zips, with checksums
            require(archive.testzip() is None, "a checksum is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged zip can fail in a dozen ways
        raise UserError(f"{path} is damaged or not one of ours ({str(error)[:50]!r}): redo it") from error


def save(path, **content):
    """Writes a dict as a .pt file, whole or not at all."""
    with writing(path) as file:
        torch.save(content, file)


def load(cfg, name):
    """The artifact <out>/<preset>/<name>. It gets a "lineage": the made_from of what is made from it."""
    path, stage = cfg.folder / name, f"Run stage {name[:2]} for --preset {cfg.preset} --out {cfg.out}"
    require(path.exists(), f"{path} is missing. {stage} first")
    artifact = read(path)
    require(artifact.get("preset") == cfg.preset, f"{path} is of another --preset. {stage} again")
    for parent, identity in artifact["made_from"].items():
        if (cfg.folder / parent).exists() and not cfg.allow_mixed:
            require(read(cfg.folder / parent)["id"] == identity, f"{path} is out of date: it was made from "
                    f"another {parent} than the one beside it. {stage} again, with --restart")
    return {**artifact, "lineage": {**artifact["made_from"], name: artifact["id"]}}


def save_network(cfg, name, net, made_from):
    """Process 0 writes the weights, and the arguments that build the network, as <out>/<preset>/<name>."""
    if RANK == 0:
        weights = {key: value.cpu() for key, value in net.state_dict().items()}
        save(cfg.folder / name, id=fingerprint(*weights.values()), made_from=made_from, preset=cfg.preset,
             settings=settings_of(cfg), network=net.args, class_names=net.class_names, weights=weights)


def load_network(cfg, name, device):
    """(UNet in eval mode, its artifact) from what save_network wrote. Raises UserError as load() does."""
    artifact = load(cfg, name)
    net = UNet(**artifact["network"], precision=cfg.precision).to(device).eval()
    net.load_state_dict(artifact["weights"])
    net.class_names = artifact.get("class_names", [])
    return net, artifact


def download(url, sha256, instead):
    """The path data/<file name> of a published file, downloaded once. UserError says what to do `instead`."""
    path = Path("data", url.split("/")[-1])
    try:
        if RANK == 0 and not path.exists():
            path.parent.mkdir(exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256)
        wait_for_all()
        require(hashlib.sha256(path.read_bytes()).hexdigest().startswith(sha256), f"{path} is another file")
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(f"no {url} ({error}). Put it at {path}, or {instead}") from error
    return path


def save_grid(path, rows, titles=(), columns=()):
    """Process 0 writes a PNG: a row of images for each float tensor (N, 3, H, W), with titles above them."""
    size = rows[0].shape[-1]
    cell, bar, top = size * max(1, 64 // size) + 2, 18 if titles else 0, 32 if columns else 0
    canvas = Image.new("RGB", (len(rows[0]) * cell + 2, top + len(rows) * (cell + bar) + 2), "white")
    draw = ImageDraw.Draw(canvas)
    for i, column in enumerate(columns):  # "red circle" in two lines
        words = [word[:cell // 6] for word in column.split()[:2]]  # as much as there is room for
        draw.text((i * cell + 4, 2), "\n".join(words), "black", font_size=12)
    for r, row in enumerate(rows):
        y = top + r * (cell + bar)
        draw.text((4, y + 2), titles[r] if titles else "", "black", font_size=12)
        for i, image in enumerate(to_uint8(row.cpu())):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((cell - 2, cell - 2), Image.NEAREST)
            canvas.paste(tile, (i * cell + 2, y + bar + 2))
    if RANK == 0:
        with writing(path) as file:
            canvas.save(file, "PNG")


# ------------------------------------------------------------------------------------------------------ data
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170 MB: the version without pickles
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp")
FOOTER = 1000  # bytes of JSON, at the end of a file of decoded images
# Hidden files and folders (".." too), what macOS adds to a zip, and the entries of a zip that are folders.
HIDDEN = re.compile(r"(^|/)(\.[^/]|__MACOSX/)|/$")
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (230, 60, 50), "yellow": (235, 205, 60), "green": (70, 190, 80),
           "cyan": (70, 195, 215), "blue": (70, 100, 235), "magenta": (215, 80, 205)}
CLASSES = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]  # of `shapes`; a label is an index


def from_uint8(images):
    return images.float() / 127.5 - 1  # 0..255 -> float32 -1..1


def to_uint8(images):
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)  # -1..1, clipped -> 0..255


def noise_for(seed, indices, shape):
    """Noise z ~ N(0, I) for each index, float32 (len(indices), *shape): a function of (seed, index) alone."""
    noise = torch.empty(len(indices), *shape)
    for row, index in zip(noise.numpy(), indices):
        philox = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))  # a generator with a key
        np.random.Generator(philox).standard_normal(out=row, dtype=np.float32)
    return noise


def labels_for(seed, n, classes):
    """n labels, int64, uniform over the classes; None if there are none."""
    return torch.from_numpy(np.random.default_rng(seed).integers(classes, size=n)) if classes else None


def draw_shapes(n, image_size, seed=0):
    """n drawings, the same for a seed: images uint8 (n, 3, H, W), labels int64 (n,), numbers of CLASSES."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(CLASSES), size=n)
    radius = rng.uniform(0.18, 0.34, size=n)  # in units of the image's side
    centre_x, centre_y = rng.uniform(radius + 0.03, 0.97 - radius, size=(2, n))
    ground = rng.uniform(10, 60, size=(n, 1)) + rng.uniform(-8, 8, size=(n, 3))  # nearly grey
    ink = np.array(list(COLOURS.values()))[labels % len(COLOURS)] + rng.uniform(-20, 20, size=(n, 3))
    images = np.empty((n, 3, image_size, image_size), dtype=np.uint8)
    pixel = (np.arange(image_size) + 0.5) / image_size
    for i in range(n):
        x = np.abs(pixel[None, :] - centre_x[i]) / radius[i]  # (1, W), in radii; all shapes are symmetric
        y = (pixel[:, None] - centre_y[i]) / radius[i]  # (H, 1), downwards
        # The distance from the outline, in radii, negative inside: of each shape.
        distance = (np.hypot(x, y) - 1, np.maximum(x, np.abs(y)) - 0.85,
                    np.maximum(0.884 * x - 0.467 * (y + 1), y - 0.8))[labels[i] // len(COLOURS)]
        # Antialiasing: a pixel within half a pixel of the outline is covered in part.
        cover = np.clip(0.5 - distance * radius[i] * image_size, 0, 1)
        pixels = cover * ink[i, :, None, None] + (1 - cover) * ground[i, :, None, None]
        images[i] = pixels.round().clip(0, 255)
    return torch.from_numpy(images), torch.from_numpy(labels)


def load_images(source, image_size):
    """The images and labels of load_data()."""
    return load_data(source, image_size)[:2]


def load_data(source, image_size):
    """A data set: images uint8 (N, 3, H, W), labels int64 (N,) or None, the names of the classes (or []).

    source: "shapes" (drawn), "cifar10" (downloaded), or a path: of CIFAR-10's binary version (.tar.gz), or
    of images, a folder or zip (docs/images.md). Images are cropped and resized to image_size; with None all
    must have one size. Prints a line that says what was read. UserError names the files that are wrong.
    """
    notes = ""
    if source == "shapes":
        images, labels = draw_shapes(16_384, image_size or 16)
        names = CLASSES
    elif source == "cifar10" or str(source).endswith(".tar.gz"):
        images, labels = read_cifar10(source, image_size)
        names = CIFAR10_CLASSES
    else:
        images, labels, names, notes = read_files(Path(source).expanduser(), image_size)
    line = f"data | {len(images):,} images of {images.shape[3]}x{images.shape[2]} from {source}{notes}"
    if labels is not None:
        counts = Counter(sorted(labels.tolist()))
        known = dict(enumerate(names))
        sizes = ", ".join(f"{known.get(label, label)} {n:,}" for label, n in counts.items())
        if len(counts) > 20:
            sizes = f"{min(counts.values()):,} to {max(counts.values()):,} images each"
        line += f" | {len(counts):,} classes: {sizes}"
    say(line)
    return images, labels, names


def read_cifar10(path, image_size):
    """(images, labels) of CIFAR-10's binary version: 5 x 10,000 records of a label byte and 3,072 pixels."""
    if path == "cifar10":
        path = download(CIFAR10_URL, CIFAR10_SHA256, "give a path")
    require(image_size in (None, 32), f"{path} holds 32x32 images: set --image_size 32, not {image_size}")
    try:
        with tarfile.open(path) as archive:  # nothing is unpacked to the disk
            files = [archive.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read(30_730_000)
                     for i in range(1, 6)]
        table = torch.frombuffer(bytearray().join(files), dtype=torch.uint8).view(50_000, 3073)
    except Exception as error:  # a damaged archive can fail in many ways
        raise UserError(f"{path} is not CIFAR-10 in its binary version, or is damaged: {error}") from error
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long()


def read_files(path, image_size):
    """load_data() for a folder or zip, and notes for its line. What is rare is left to prepare_images.py."""
    # 1. The files, under names like cat/1.png.
    files, read_bytes = list_files(path)
    names = sorted(name for name in files if name.lower().endswith(IMAGE_FILES))
    others = files.keys() - {"dataset.json", *names}
    left_out = listed(Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in others))
    prepare = f"python extras/prepare_images.py {path} new.zip"
    require(names, f"{path} holds no {', '.join(IMAGE_FILES)} (left out: {left_out}). {prepare} reads more")

    # 2. The labels: those of dataset.json, or the folders.
    labels, classes = class_folders(names)
    below = [name for name in files if name.endswith("/dataset.json")]
    require(not below, f"{path}: {below[:1]} is not at the top. {prepare} reads it there")
    if "dataset.json" in files:
        try:
            dataset = json.loads(read_bytes(files["dataset.json"]))
            given = dict(dataset["labels"] or [])
            labels, classes = None, []
            if given:
                classes = list(map(str, dataset.get("classes") or []))
                numbers = torch.tensor([given[name] for name in names])
                labels = numbers.long()
                require(labels.ndim == 1 and (labels == numbers).all(), "a label is not a whole number")
                require(len(given) == len(dataset["labels"]), "an image is named twice")
        except Exception as error:  # it can be wrong in many ways
            raise UserError(f"{path}: dataset.json must give a whole number to all images, as in "
                            f'{{"labels": [["a/0.png", 3], ...]}} ({error!r}). {prepare} reads more '
                            "forms") from error

    # 3. The pixels: decoded once, into a file whose name changes with the images, and mapped from there.
    sources = [files[name] for name in names] if path.is_dir() else [path]
    stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, sources)]
    version = repr((str(path.resolve()), image_size, names, stamps)).encode()
    cache = Path("data/cache", hashlib.sha256(version).hexdigest()[:16])
    if RANK == 0 and not read_footer(cache):
        say(f"reading {len(names):,} images from {path} into {cache}")
        own, shape, bad = f"{cache}.{os.urandom(4).hex()}", None, []  # another run may be writing the same
        with writing(own) as file:
            changed = Counter()
            for name in names:  # one at a time. Threads were not faster: most of the time is Python's
                try:
                    image, changes = read_image(read_bytes(files[name]), image_size)
                    shape = shape or image.shape
                    require(image.shape == shape, f"is {image.shape}, and {names[0]} is {shape}")
                except Exception as error:  # an image can be damaged in many ways
                    bad.append(f"{name} ({str(error).partition(' <_io')[0]})")
                else:
                    file.write(image.tobytes())
                    changed.update(changes)
            more = f" and {len(bad) - 10:,} more" if len(bad) > 10 else ""
            require(not bad, f"{path}: {len(bad):,} of {len(names):,} images cannot be read: "
                    f"{', '.join(bad[:10])}{more}. Remove them, or {prepare} leaves them out")
            file.write(json.dumps([[len(names), *shape], listed(changed)]).encode().ljust(FOOTER))
        os.replace(own, cache)
    wait_for_all()
    shape, changed = read_footer(cache)
    images = torch.from_file(str(cache), size=math.prod(shape), dtype=torch.uint8).view(shape)
    return images, labels, classes, f" | changed: {changed} | left out: {left_out}"


def list_files(path):
    """{name: file} of a folder or zip, and the function that reads such a file."""
    require(path.exists(), f"{path} does not exist: --data is shapes, cifar10, or a folder or zip of images")
    if path.is_dir():
        found = [(file.relative_to(path).as_posix(), file) for file in files_below(path)]
        read_bytes = Path.read_bytes
    else:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is neither a folder nor a zip of images: {error}") from error
        found = [(entry.filename.replace("\\", "/"), entry) for entry in archive.infolist()]
        read_bytes = archive.read
    files = {}
    for name, file in found:
        require(name not in files, f"{path} holds two files named {name}. Remove one")
        if not HIDDEN.search(name):
            files[name] = file
    return files, read_bytes


def files_below(folder):
    """Yields the files in a folder and in those below. Links are followed, but not back to a folder above."""
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif not any(path.samefile(above) for above in path.parents):
            yield from files_below(path)


def class_folders(names):
    """(labels int64 (N,), names of the classes) of files: each folder is a class. One folder: (None, [])."""
    folders = [os.path.dirname(name) or "." for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2:
        return None, []
    if all(map(str.isdecimal, classes)):
        classes.sort(key=int)  # 2 before 10
    number = {folder: i for i, folder in enumerate(classes)}
    return torch.tensor([number[folder] for folder in folders]), classes


def read_image(content, image_size):
    """(uint8 (3, H, W), what was changed: a list) from the bytes of a file. Raises errors of many kinds."""
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
        image = ImageOps.exif_transpose(image)  # a phone's photo may lie on its side, and says so
    require(not image.mode.startswith("I"), "16-bit grey")
    changes = []
    if Image.getmodebase(image.mode) == "L":
        changes.append("grey")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            changes.append("transparent (composited on white)")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image_size:
        if image.width != image.height:
            changes.append("cropped to the centre square")
        if min(image.size) < image_size:
            changes.append("enlarged")
        image = ImageOps.fit(image, (image_size, image_size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1), changes


def read_footer(cache):
    """[shape of the images, what was changed], the end of a cache file; None if the file is not whole."""
    try:
        with open(cache, "rb") as file:
            file.seek(-FOOTER, os.SEEK_END)
            return json.loads(file.read())
    except (OSError, ValueError):
        return None


def listed(counts):
    """The most frequent of a Counter, as text: 30 .bmp, 5 .gif."""
    return ", ".join(f"{n:,} {name}" for name, n in counts.most_common(9)) or "nothing"


# ----------------------------------------------------------------------------------------------------- U-Net
# The paper's network (NCSN++, as "DDPM++"; EDM calls it SongUNet). An encoder halves the image step by step,
# a decoder doubles it again, and gets at each size what the encoder left there: the skips.
# The student of `shapes` (image_size 16, base 12, mult (1, 2), blocks 1, attn (8,)), channels and size:
#     conv_in                              3 -> 12   16x16   leaves 12
#     encoder  block                      12 -> 12   16x16   leaves 12
#              block, halving             12 -> 12    8x8    leaves 12
#              block, attention           12 -> 24    8x8    leaves 24
#     middle   block, attention; block    24 -> 24    8x8
#     decoder  2 blocks, attention        24 -> 24    8x8    take 24, 12 (appended: the first sees 48)
#              doubling; 2 blocks         24 -> 12   16x16   take 12, 12
#     conv_out                            12 -> 3    16x16

# Official code: the scale of each branch's last layer. So blocks begin by passing on their input (scaled),
# and the network by answering 0; training adds to that little by little, which deep networks learn best.
NEARLY_ZERO = 1e-10


def init_(layer, scale=1.0):
    """Official code: Xavier-uniform weights with their variance multiplied by `scale`, biases 0."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    """Normalisation in groups of 4 channels or more, at most 32 groups."""
    groups = min(channels // 4, 32)
    require(groups and channels % groups == 0, f"{channels} channels: --base must be a multiple of 4 or 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Attention(nn.Module):
    """Every pixel looks at every pixel: one head over all channels, added to its input."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = init_(nn.Conv2d(channels, 3 * channels, 1), 0.2)
        self.proj = init_(nn.Conv2d(channels, channels, 1), NEARLY_ZERO)

    def forward(self, x):
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, 1, c, height * width).transpose(3, 4)
        # q, k, v (B, 1, HW, C) -> (B, 1, HW, C). A GPU's fused attention wants C last in memory, too.
        h = F.scaled_dot_product_attention(*qkv.contiguous().unbind(1))
        h = h.transpose(2, 3).reshape(b, c, height, width)
        return (x + self.proj(h)) * math.sqrt(0.5)


class ResBlock(nn.Module):
    """Two 3x3 convolutions that are told the time, added to their input. May halve or double the size."""

    def __init__(self, c_in, c_out, c_emb, dropout, attention=False, up=False, down=False):
        super().__init__()
        self.up = up
        self.resample = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2) if down else nn.Identity()
        self.norm0 = group_norm(c_in)
        self.conv0 = init_(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb = init_(nn.Linear(c_emb, c_out))
        self.norm1 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = init_(nn.Conv2d(c_out, c_out, 3, padding=1), NEARLY_ZERO)
        self.skip = init_(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out or up or down else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        h = h + self.emb(emb)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = self.skip(self.resample(x))
        return self.attention((x + h) * math.sqrt(0.5))  # a sum of two has twice the variance: undone


class UNet(nn.Module):
    """The velocity network v(x_t, t): base * mult[i] channels and `blocks` residual blocks on level i.

    The decoder has one block more. At the sizes `attn` attention follows each block of the encoder, the last
    of the decoder, and the first in the middle. precision "bf16": all but the weights and the last layer.
    """

    def __init__(self, image_size, channels=3, base=64, mult=(1, 2, 2), blocks=2, attn=(16,), classes=0,
                 dropout=0.0, precision="fp32"):
        super().__init__()
        self.args = dict(image_size=image_size, channels=channels, base=base, mult=tuple(mult), blocks=blocks,
                         attn=tuple(attn), classes=classes, dropout=dropout)
        self.precision, smallest = precision, image_size / 2 ** (len(mult) - 1)
        self.class_names = []  # filled by whoever knows them
        require(base >= 4 and blocks and min(mult) >= 1 and dropout < 1,
                "a network needs base >= 4, blocks >= 1, mult >= 1, dropout < 1")
        require(smallest and smallest.is_integer(), f"image_size {image_size} cannot be halved for {mult=}")
        c_emb = 4 * base
        self.time0, self.time1 = init_(nn.Linear(base, c_emb)), init_(nn.Linear(c_emb, c_emb))
        self.label = init_(nn.Linear(classes, base)) if classes else None
        frequencies = torch.exp(torch.arange(base // 2) * -(math.log(10_000) / (base // 2 - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)  # from 1 to 1/10000
        self.conv_in = init_(nn.Conv2d(channels, base, 3, padding=1))

        c, size, skips = base, image_size, [base]  # skips: the channels that the encoder leaves
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.encoder.append(ResBlock(c, base * m, c_emb, dropout, size in attn))
                c = base * m
                skips.append(c)
            if size > smallest:
                self.encoder.append(ResBlock(c, c, c_emb, dropout, down=True))
                size //= 2
                skips.append(c)
        self.middle = nn.ModuleList([ResBlock(c, c, c_emb, dropout, True), ResBlock(c, c, c_emb, dropout)])
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                attention = i == blocks and size in attn
                self.decoder.append(ResBlock(c + skips.pop(), base * m, c_emb, dropout, attention))
                c = base * m
            if level > 0:
                self.decoder.append(ResBlock(c, c, c_emb, dropout, up=True))
                size *= 2
        self.norm_out = group_norm(c)
        self.conv_out = init_(nn.Conv2d(c, channels, 3, padding=1), NEARLY_ZERO)
        if precision == "fp32":
            self.to(memory_format=torch.channels_last)  # in memory: 10 % faster on CPUs

    def forward(self, x, t, labels=None):
        """x (B, C, H, W), t (B,) in [0, 1], labels int64 (B,) or None -> velocity (B, C, H, W)."""
        assert (labels is None) == (self.label is None), "labels are for networks with classes"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            # Official code: 999 t, since this embedding was made for step numbers from 0 to 999.
            angles = 999 * t[:, None] * self.frequencies  # (B, base / 2)
            emb = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, base)
            if labels is not None:
                classes = self.label.in_features
                emb = emb + self.label(F.one_hot(labels, classes).to(emb.dtype) * math.sqrt(classes))
            emb = F.silu(self.time1(F.silu(self.time0(emb))))  # (B, 4 base)
            h = self.conv_in(x)
            skips = [h]
            for block in self.encoder:
                h = block(h, emb)
                skips.append(h)
            for block in self.middle:
                h = block(h, emb)
            for block in self.decoder:
                if not block.up:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = block(h, emb)
        # The last layer is float32 always: its rounding would be seen in the image.
        return self.conv_out(F.silu(self.norm_out(h.to(self.conv_out.weight.dtype))))


# ------------------------------------------------------------------------------------- sampling and training
@torch.no_grad()
def euler(net, z, steps, labels=None):
    """Follows dx/dt = v(x, t) from noise z (B, C, H, W) to images (B, C, H, W), in `steps` network calls."""
    x = z
    for i in range(steps):
        # x <- x + v(x, t_i) / N,  t_i = EPS + (1 - EPS) i / N.  One step: x = z + v(z, EPS)
        t = torch.full(x.shape[:1], EPS + (1 - EPS) * i / steps, device=x.device)
        x = x + net(x, t, labels) / steps
    return x


def samples(net, seed, numbers, steps, labels=None):
    """Images (N, 3, H, W) from the noises of these numbers (a range) that stage 05 judges. Number i has the
    label labels[i], by default that of the seed."""
    device, size = net.conv_in.weight.device, net.args["image_size"]
    z = noise_for(seed, [EVALUATION + i for i in numbers], (net.args["channels"], size, size))
    y = labels_for(seed, numbers[-1] + 1, net.args["classes"]) if labels is None else labels
    y = None if y is None else y[list(numbers)].to(device)
    return euler(net, z.to(device), steps, y).cpu()


LOG_SECONDS, SAVE_SECONDS = 10, 300  # ours: between two log lines, and between two saved states


class Trainer:
    """What surrounds a training step: optimiser, clipping, learning rate, EMA, log lines, resume, processes.

    The loop is `for step in trainer.steps()`. It calls trainer.net on what trainer.draw() gives, and ends in
    trainer.update(loss). trainer.ema is the averaged network: only this one makes images and is saved.
    """

    def __init__(self, cfg, name, net, made_from):
        require(cfg.steps and cfg.batch and cfg.batch % WORLD == 0, f"--steps {cfg.steps} and --batch "
                f"{cfg.batch} must be at least 1, and the batch a multiple of the {WORLD} processes")
        self.cfg, self.name, self.path = cfg, name, cfg.folder / f"{name[:2]}_state.pt"
        self.trained = net.train()  # with dropout
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)  # without
        self.weights, self.averages = list(net.parameters()), list(self.ema.parameters())
        self.device = self.weights[0].device
        self.hidden, rest = {}, []  # Muon trains 3x3 convolutions except the first and last, Adam the rest
        for p in self.weights:
            if cfg.optimizer == "muon" and p.shape[2:] == (3, 3) and min(p.shape[:2]) > 3:
                self.hidden.setdefault(p.shape, []).append(p)  # those of one shape step together
            else:
                rest.append(p)
        self.adam = torch.optim.Adam(rest, betas=(0.9, 0.999), eps=1e-8, fused=True)  # paper
        self.momenta = [torch.zeros_like(torch.stack(same).flatten(2)) for same in self.hidden.values()]
        self.done, self.strips = 0, {}  # steps; samples along the way
        self.recent, self.note = [], ""  # for the log line: (loss, gradient norm) of the last steps
        self.run = {**settings_of(cfg), "data": "", "made from": made_from}  # data: by fingerprint, not path
        if cfg.restart and RANK == 0:
            self.path.unlink(missing_ok=True)
        if self.path.exists() and not cfg.restart:
            state = read(self.path)
            require_same_run(self.path, state["run"], self.run)
            self.trained.load_state_dict(state["weights"])
            self.ema.load_state_dict(state["ema"])
            self.adam.load_state_dict(state["adam"])
            self.momenta = [momentum.to(self.device) for momentum in state["momenta"]]
            self.done, self.strips = state["done"], state["strips"]
            say(f"{name} | continues after step {self.done} of {cfg.steps}, from {self.path}")
        if self.device.type == "cuda" and cfg.steps >= 5000:  # ours: then a minute of compiling pays
            net.compile(dynamic=False)  # fuses all that lies between the convolutions
        self.net = net
        if WORLD > 1:  # averages the gradients of all processes
            self.net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)

    def steps(self):
        """Yields the number of each step. In between it logs, saves, and ends the run when asked to."""
        cfg, first, asked_to_stop = self.cfg, self.done, []
        # One process finishes its step; several end at once, and continue from the last state.
        signals = (signal.SIGINT, signal.SIGTERM) if WORLD == 1 else ()
        for number in signals:
            signal.signal(number, lambda *_: asked_to_stop.append(True))
        began = logged = saved = time.time()
        for step in range(first, cfg.steps):
            # A run that continues draws what the unbroken one would have drawn; no random state is saved.
            seed = np.random.SeedSequence(cfg.seed, spawn_key=(step, RANK)).generate_state(1)
            torch.manual_seed(int(seed[0]))
            yield step
            now, end = time.time(), self.done == cfg.steps or bool(asked_to_stop)
            save_now = end or now - saved > SAVE_SECONDS
            if save_now or now - logged > LOG_SECONDS:
                recent, speed = torch.stack(self.recent), (self.done - first) / (now - began)
                require(recent.isfinite().all(), f"a loss or gradient of steps {self.done - len(recent)} to "
                        f"{step} was not finite. Look at the data, or --restart with a lower --lr")
                logged, self.recent = now, []
                say(f"{self.name} | step {self.done:>6}/{cfg.steps} | loss {recent[:, 0].mean():.4f} | "
                    f"{self.note}lr {self.lr:.1e} | {cfg.batch * speed:.0f} img/s | left "
                    f"{datetime.timedelta(seconds=round((cfg.steps - self.done) / speed))}")
            if save_now and RANK == 0:
                save(self.path, run=self.run, done=self.done, strips=self.strips, ema=self.ema.state_dict(),
                     weights=self.trained.state_dict(), adam=self.adam.state_dict(), momenta=self.momenta)
            saved = now if save_now else saved
            if end and self.done < cfg.steps:
                raise KeyboardInterrupt(f"stopped after step {self.done}: repeat without --restart to go on")
        for number in signals:
            signal.signal(number, signal.default_int_handler)

    def draw(self, *tensors):
        """The same random rows of each tensor (None stays None), on the device."""
        i = torch.randint(len(tensors[0]), (self.cfg.batch // WORLD,))
        rows = [tensor if tensor is None else tensor[i] for tensor in tensors]
        cuda = self.device.type == "cuda"  # a copy from pinned memory does not wait for the GPU
        rows = [row.pin_memory() if cuda and row is not None else row for row in rows]
        return [row if row is None else row.to(self.device, non_blocking=cuda) for row in rows]

    @torch.no_grad()
    def update(self, loss, note=""):
        """One step down the gradient of `loss`, and one of the EMA. `note` is for the log line."""
        cfg, n = self.cfg, self.done
        self.trained.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)  # paper: 1

        # lr rises over the first cfg.warmup steps and falls to 0 over the last cfg.cooldown (a share of all)
        rise = min(1.0, (n + 1) / max(1, cfg.warmup))
        fall = min(1.0, (cfg.steps - n) / max(1.0, cfg.cooldown * cfg.steps))
        self.adam.param_groups[0]["lr"] = self.lr = cfg.lr * rise * fall
        self.adam.step()
        # Muon (Jordan et al. 2024): along the momentum made orthogonal, so that all directions of a weight
        # matrix, here (C_out, C_in k k), learn equally fast.
        for weights, momentum in zip(self.hidden.values(), self.momenta):
            gradient = torch.stack([p.grad for p in weights]).flatten(2)
            momentum.lerp_(gradient, 0.05)
            x = gradient.lerp(momentum, 0.95)  # Nesterov's: a look ahead
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
            for _ in range(5):  # Newton-Schulz: takes all singular values to between 0.7 and 1.2
                a = x @ x.mT
                b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # b = -4.7750 a + 2.0315 a a
                x = torch.baddbmm(x, b, x, beta=3.4445)  # x <- 3.4445 x + b x
            size = 0.2 * math.sqrt(max(x.shape[1:])) * self.lr  # weights move by 0.2 lr, about as with Adam
            torch._foreach_sub_(weights, [row.view_as(p) for row, p in zip(x, weights)], alpha=size)

        # EMA: theta' <- d theta' + (1 - d) theta, d = min(cfg.ema, (1 + n) / (10 + n)); see stage 01
        n = self.done = n + 1
        d = min(cfg.ema, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.averages, self.weights, 1 - d)
        self.recent.append(torch.stack([loss, norm]))  # to read it here would be to wait for the GPU
        self.note = f"{note} | " if note else ""
