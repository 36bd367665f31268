"""What two or more of the five scripts share. Read the U-Net, euler and Trainer; the rest is plumbing.

Notation, the same in every script and in the equations:

    z      noise N(0, I), shape (B, 3, H, W)
    x      image in [-1, 1], real or made by a network, shape (B, 3, H, W)
    t      time, shape (B,): t = 0 is noise, t = 1 is data
    x_t    t x + (1 - t) z, a point on the straight line from z to x
    v      velocity: what every network predicts, as v(x_t, t). Along the straight line it is x - z

Images are uint8 on disk, float in [-1, 1] everywhere else. Labels are int64 (B,), or None.

Constants carry their origin: "paper:", "official code:" (only the authors' published code has it), "ours:" (our
choice). The columns cifar10 and ffhq64 of the settings are the paper's, unless the text says otherwise.
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
import signal
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

PRESETS = ("shapes", "cifar10_quick", "cifar10", "ffhq64", "imagenet64")  # the columns of the settings
PRESET = "shapes"  # the column in use; --preset NAME chooses another for one run

# Training draws t from [EPS, 1] and sampling begins at EPS: a network is asked only what it was taught.
EPS = 1e-3  # official code: 0.001 (diffusion models divide by t; rectified flow inherited the bound)

# Noise is numbered. Each use has its own numbers, so no image that is judged comes from a noise trained on.
PAIRS, OWN_PAIRS, EVALUATION = 0, 10**9, 2 * 10**9

# `torchrun --nproc_per_node=8 01_train_teacher.py` starts 8 processes, one for each GPU. Otherwise there is one: 0.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# -------------------------------------------------------------------------------------------------- settings

class UserError(ValueError):
    """Something that the user can mend. run() prints it as one line, without a traceback."""


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def int_tuple(text):
    return tuple(int(part) for part in text.split(","))  # "1,2,2" -> (1, 2, 2)


def read_settings(table, doc, argv=None):
    """A script's settings as attributes: the preset's column of the table, then what the command line says.

    Each row of the table, (name, a value for each of PRESETS, text), is an option --name of the value's type.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=PRESET, choices=PRESETS, help=f"column of the settings [{PRESET}]")
    preset = first.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[first], allow_abbrev=False)
    parser.add_argument("--out", default="out", help="results go into <out>/<preset>/ [out]")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it [0]")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--restart", action="store_true", help="start over instead of continuing")
    parser.add_argument("--allow_mixed", action="store_true", help="take files that were not made from one another")
    for name, *values, text in table:
        value = values[PRESETS.index(preset)]
        how = {"type": int_tuple if isinstance(value, tuple) else type(value)}
        if isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name}", default=value, help=f"{text} [%(default)s]", **how)
    cfg = parser.parse_args(argv)
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)):
            require(0 <= value < math.inf, f"--{name} {value} must be finite, and not negative")
    cfg.folder = Path(cfg.out, cfg.preset)
    return cfg


def settings_of(cfg):
    """The settings that a result depends on, as a dict. (Data is known by its content, not by its path.)"""
    others = ("out", "folder", "device", "restart", "allow_mixed", "data")
    return {name: value for name, value in vars(cfg).items() if name not in others}


def require_same_run(path, then, now):
    """Raises UserError unless the run that left `path` had the same settings. then, now: dicts."""
    differ = [f"{key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]]
    require(not differ, f"{path} belongs to a run with other settings ({'; '.join(differ)}). "
            "--restart starts over; another --out keeps both")


def run(main, table, doc, argv=None):
    """Calls main(settings). What the user can mend ends in one line and exit code 1, without a traceback."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
        main(read_settings(table, doc, argv))
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(str(stop) or "stopped: what was saved is kept, and the same command continues")
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: a smaller --batch, or more processes, need less")


def start(cfg, name):
    """Joins the other processes if there are any, prints the settings, and returns the torch.device to use."""
    gpu = cfg.device in ("auto", "cuda") and torch.cuda.is_available()
    if WORLD > 1 and not dist.is_initialized():  # whoever waits for another process for 10 minutes gives up
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=datetime.timedelta(minutes=10))
    try:
        device = torch.device("cpu" if cfg.device == "auto" else cfg.device)
        if gpu:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device} cannot be used: {str(error).splitlines()[0]}") from error
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # "fp32" means float32
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if getattr(cfg, "precision", "") == "auto":
        cfg.precision = "bf16" if has_bf16 else "fp32"
    torch.manual_seed(cfg.seed)  # the networks' first weights
    say(f"{name} | {device}, {torch.get_num_threads()} threads, {WORLD} process(es) | torch {torch.__version__}")
    say("settings | " + " ".join(f"{key}={value}" for key, value in settings_of(cfg).items()))
    return device


def say(text):
    """Prints a line, in process 0."""
    if RANK == 0:
        print(text, flush=True)


@contextlib.contextmanager
def process_0_first():
    """Process 0 goes through the block and makes a file; then the others do, and find it."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


# ----------------------------------------------------------------------------------------- files and pictures
# An artifact (.pt) is a dict: the run's preset and settings; `id`, a fingerprint of its content; `made_from`,
# {file name: id} of all that it was made from, so that nothing is mixed unnoticed; and tensors, numbers, strings.

def command_for(name, cfg):
    """The command that makes an artifact: the script whose number it carries."""
    script = next(Path(__file__).parent.glob(f"{name[:2]}_*.py")).name
    return f"python {script} --preset {cfg.preset}" + (f" --out {cfg.out}" if cfg.out != "out" else "")


def fingerprint(*tensors):
    """16 hexadecimal digits that change with any bit of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as file:` gives a binary file that gets its name only when it is complete. UserError."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        raise UserError(f"could not write {path}: {error.__context__ or error}; nothing was replaced") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path, **content):
    """Writes a dict as a .pt file, whole or not at all."""
    with writing(path) as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it replaces what was there


def read(path):
    """The dict in a .pt file, its tensors memory-mapped. No code is unpickled. UserError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch's files are zips, with checksums
            require(archive.testzip() is None, "a checksum is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged zip can fail in a dozen ways
        raise UserError(f"{path} is damaged or not one of ours ({' '.join(str(error).split())[:60]})") from error


def load(cfg, name):
    """The artifact <out>/<preset>/<name>. Its "lineage" is the made_from of whatever is made from it.

    Raises UserError, with the command that makes it again, if it is missing, damaged, of another preset, or if
    something that it was made from has been replaced since.
    """
    path, remedy = cfg.folder / name, f"make it with: {command_for(name, cfg)}"
    require(path.exists(), f"{path} is missing; {remedy}")
    try:
        artifact = read(path)
        require(artifact["preset"] == cfg.preset, f"{path} was made with --preset {artifact['preset']}")
        for parent, identity in artifact["made_from"].items():
            if (cfg.folder / parent).exists() and not cfg.allow_mixed:
                require(read(cfg.folder / parent)["id"] == identity, f"{path} is out of date: it was made from "
                        f"another {parent} than the one beside it")
        return {**artifact, "lineage": {**artifact["made_from"], name: artifact["id"]}}
    except (UserError, KeyError) as error:
        raise UserError(f"{error}; {remedy} --restart") from error


def save_network(cfg, name, net, made_from):
    """Process 0 writes the weights, and the arguments that build the network, as <out>/<preset>/<name>."""
    if RANK == 0:
        weights = {key: value.cpu() for key, value in net.state_dict().items()}
        save(cfg.folder / name, preset=cfg.preset, settings=settings_of(cfg), network=net.args, weights=weights,
             id=fingerprint(*weights.values()), made_from=made_from)


def load_network(cfg, name, device):
    """(UNet in eval mode, its artifact) from what save_network wrote. Raises UserError as load() does."""
    artifact = load(cfg, name)
    net = UNet(**artifact["network"])
    net.load_state_dict(artifact["weights"])
    return on_device(net, device, cfg.precision).eval(), artifact


def download(url, sha256, instead):
    """data/<file name>, a published file: downloaded if it is not there. Its sha256 begins with `sha256`.

    Raises UserError if it cannot be had; `instead` says what the user can do without it.
    """
    path = Path("data", url.split("/")[-1])
    try:
        with process_0_first():
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                say(f"downloading {url}")
                torch.hub.download_url_to_file(url, path, hash_prefix=sha256)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        require(found.startswith(sha256), f"the sha256 of {path} is {found}")
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(f"{url} is needed ({error}). Put it at {path}, or {instead}") from error
    return path


def save_grid(path, rows, titles=None):
    """Writes a PNG: a row of images (enlarged) for each float tensor (N, 3, H, W), and above it its title."""
    size = rows[0].shape[-1]
    cell, bar = size * max(1, 64 // size) + 2, 18 if titles else 0
    canvas = Image.new("RGB", (len(rows[0]) * cell + 2, len(rows) * (cell + bar) + 2), "white")
    for r, row in enumerate(rows):
        top = 2 + r * (cell + bar)
        if titles:
            ImageDraw.Draw(canvas).text((4, top), titles[r], "black", ImageFont.load_default(12))
        for i, image in enumerate(to_uint8(row.cpu())):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((cell - 2, cell - 2), Image.NEAREST)
            canvas.paste(tile, (2 + i * cell, top + bar))
    with writing(path) as file:
        canvas.save(file, "PNG")


# ------------------------------------------------------------------------------------------------------ data

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170 MB: the version without pickles
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
LARGEST_FILE = 100 * 2**20  # bytes. What is small in a zip may unpack to gigabytes
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (230, 60, 50), "yellow": (235, 205, 60), "green": (70, 190, 80),
           "cyan": (70, 195, 215), "blue": (70, 100, 235), "magenta": (215, 80, 205)}


def from_uint8(images):
    return images.float() / 127.5 - 1  # 0..255 -> float32 -1..1


def to_uint8(images):
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)  # -1..1, clipped -> 0..255


def noise_for(seed, indices, shape):
    """Noise z ~ N(0, I) for each index, float32 (len(indices), *shape): a function of (seed, index) alone."""
    noise = torch.empty(len(indices), *shape)
    for row, index in zip(noise.numpy(), indices):
        # Philox is a random generator with a key.
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
        generator.standard_normal(out=row, dtype=np.float32)
    return noise


def labels_for(seed, n, classes):
    """n labels, int64, uniform over the classes; None if there are none."""
    return torch.from_numpy(np.random.default_rng(seed).integers(classes, size=n)) if classes else None


def draw_shapes(n, image_size, seed=0):
    """n drawings of a circle, square or triangle on a dark ground, always the same for a seed.

    Returns images uint8 (n, 3, H, W) and attributes float32 (n, 5): shape 0..2, colour 0..5, then centre x,
    centre y and radius in units of the image's side.
    """
    rng = np.random.default_rng(seed)
    shape, colour = rng.integers(len(SHAPES), size=n), rng.integers(len(COLOURS), size=n)
    radius = rng.uniform(0.18, 0.34, size=n)
    centre_x, centre_y = rng.uniform(radius + 0.03, 0.97 - radius, size=(2, n))
    ground = rng.uniform(10, 60, size=(n, 1)) + rng.uniform(-8, 8, size=(n, 3))  # nearly grey
    ink = np.array(list(COLOURS.values()))[colour] + rng.uniform(-20, 20, size=(n, 3))
    images = np.empty((n, 3, image_size, image_size), dtype=np.uint8)
    pixel = (np.arange(image_size) + 0.5) / image_size
    for i in range(n):
        x = np.abs(pixel[None, :] - centre_x[i]) / radius[i]  # (1, W), in radii; all three shapes are symmetric
        y = (pixel[:, None] - centre_y[i]) / radius[i]  # (H, 1), downwards
        outline = (np.hypot(x, y) - 1, np.maximum(x, np.abs(y)) - 0.85,
                   np.maximum(0.884 * x - 0.467 * (y + 1), y - 0.8))  # distance from it in radii, negative inside
        # Antialiasing: a pixel within half a pixel of the outline is covered in part.
        cover = np.clip(0.5 - outline[shape[i]] * radius[i] * image_size, 0, 1)
        images[i] = (cover * ink[i, :, None, None] + (1 - cover) * ground[i, :, None, None]).round().clip(0, 255)
    attributes = np.stack([shape, colour, centre_x, centre_y, radius], axis=1)
    return torch.from_numpy(images), torch.from_numpy(attributes).float()


def load_images(source, image_size):
    """A data set: images uint8 (N, 3, H, W), and labels int64 (N,) or None.

    source      "shapes" (drawn here; label = 6 shape + colour), "cifar10" (downloaded), or a path: CIFAR-10's
                binary version (.tar.gz), or a folder or zip of PNG, JPEG and WebP images, with labels as EDM has
                them in dataset.json, {"labels": [["a/0.png", 3], ...]}, or else with a class for every folder
    image_size  other sizes are cropped to the centre square and resized; None: all have one size already

    Raises UserError for a source that is missing, empty or damaged, and names the file.
    """
    if source == "shapes":
        images, attributes = draw_shapes(16_384, image_size or 16)
        return images, (attributes[:, 0] * len(COLOURS) + attributes[:, 1]).long()
    path = Path(source)
    if source == "cifar10":
        path = download(CIFAR10_URL, CIFAR10_SHA256, "give another --data")
    require(path.exists(), f"{path} does not exist: --data is shapes, cifar10, or a folder or zip of images")
    return read_cifar10(path, image_size) if path.name.endswith(".tar.gz") else read_files(path, image_size)


def read_cifar10(path, image_size):
    """load_images for CIFAR-10's binary version: 5 x 10,000 records of a label byte and 3,072 pixel bytes."""
    require(image_size in (None, 32), f"{path} holds 32x32 images: set --image_size 32, not {image_size}")
    try:
        with tarfile.open(path) as archive:  # nothing is unpacked to the disk
            members = {Path(member.name).name: member for member in archive if member.size <= LARGEST_FILE}
            files = [archive.extractfile(members[f"data_batch_{i}.bin"]).read() for i in range(1, 6)]
        table = torch.frombuffer(bytearray().join(files), dtype=torch.uint8).view(50_000, 3073)
    except Exception as error:  # a damaged archive can fail in many ways
        raise UserError(f"{path} is not CIFAR-10 in its binary version, or is damaged: {error}") from error
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long()


def read_files(path, image_size):
    """load_images for a folder or zip: decoded once into data/cache/<key>.npy, which is then memory-mapped."""
    # 1. The files: {name: (bytes, date or checksum)}.
    try:
        archive = None if path.is_dir() else zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is neither a folder nor a zip that can be read: {error}") from error
    if archive:
        files = {info.filename: (info.file_size, info.CRC) for info in archive.infolist() if not info.is_dir()}
    else:
        stats = {file.relative_to(path).as_posix(): file.stat() for file in path.rglob("*") if file.is_file()}
        files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    names = [name for name in sorted(files) if name != "dataset.json" and "__MACOSX" not in name
             and not name.split("/")[-1].startswith((".", "Thumbs.db"))]
    require(names, f"{path} holds no PNG, JPEG or WebP images")

    def content(name):
        require(files[name][0] <= LARGEST_FILE, f"it has more than {LARGEST_FILE:,} bytes")
        return archive.read(name) if archive else (path / name).read_bytes()

    # 2. Labels.
    labels, folders = None, sorted({name.rpartition("/")[0] for name in names})
    if "dataset.json" in files:
        try:
            given = dict(json.loads(content("dataset.json"))["labels"] or {})
            labels = [given.pop(name) for name in names] if given else None
            require(not given, f"{list(given)[:1]} is not there")
            require(all(type(label) is int and label >= 0 for label in labels or []), "a label is no integer from 0")
        except (KeyError, TypeError, ValueError) as error:  # a KeyError names the image without a label
            raise UserError(f'{path}: dataset.json must be {{"labels": [["a/0.png", 3], ...]}}, with every image, or '
                            f'{{"labels": null}}; wrong is: {error}') from error
    elif len(folders) > 1:
        labels = [folders.index(name.rpartition("/")[0]) for name in names]

    # 3. The pixels.
    key = hashlib.sha256(repr((str(path.resolve()), image_size, sorted(files.items()))).encode()).hexdigest()[:16]
    cache, shape = Path("data", "cache", f"{key}.npy"), None
    with process_0_first(), contextlib.ExitStack() as stack:
        for name in [] if cache.exists() else names:
            try:
                image = decode(content(name), image_size)
                require(shape in (None, image.shape), f"it is {image.shape}, and the first image is {shape}")
            except Exception as error:  # so can a damaged image
                raise UserError(f"{path}: {name} is not a PNG, JPEG or WebP image that can be read ({error}); mend or "
                                "remove it") from error
            if shape is None:
                say(f"reading {len(names):,} images from {path} into {cache}")
                file, shape = stack.enter_context(writing(cache)), image.shape
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(image.tobytes())
    # Mode "c": a tensor has to be writable, but what is written never reaches the file.
    return torch.from_numpy(np.load(cache, mmap_mode="c")), None if labels is None else torch.tensor(labels)


def decode(content, image_size):
    """The bytes of an image file -> uint8 (3, image_size, image_size): RGB, the centre square, resized."""
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
        image = ImageOps.exif_transpose(image)  # a phone's photo may lie on its side, and says so
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    image = image.convert("RGB")
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


# ----------------------------------------------------------------------------------------------------- U-Net
# The paper's network: NCSN++ in its "DDPM++" form, which is also EDM's SongUNet. An encoder halves the image step
# by step, a decoder doubles it again, and each decoder block also gets what the encoder left at its size: a skip.
# The student of `shapes` (image_size 16, base 16, mult (1, 2, 2), blocks 1, attn (8,)), channels and size:
#
#     conv_in                              3 -> 16   16x16   leaves 16
#     encoder  block                      16 -> 16   16x16   leaves 16
#              block, halving             16 -> 16    8x8    leaves 16
#              block, attention           16 -> 32    8x8    leaves 32
#              block, halving; block      32 -> 32    4x4    leave 32, 32
#     middle   block, attention; block    32 -> 32    4x4
#     decoder  2 blocks; doubling         32 -> 32    8x8    take 32, 32 (appended: each sees 64 channels)
#              2 blocks, attention        32 -> 32    8x8    take 32, 16
#              doubling; 2 blocks         32 -> 16   16x16   take 16, 16
#     conv_out                            16 -> 3    16x16

# Official code: the scale of every branch's last layer. At first each block passes on its input, and the network
# answers 0; training adds to that little by little, which is how deep networks learn best.
NEARLY_ZERO = 1e-10


def init_(layer, scale=1.0):
    """Official code: Xavier-uniform weights with their variance multiplied by `scale`, biases 0."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    groups = min(channels // 4, 32)
    require(groups and channels % groups == 0, f"{channels} channels make no {groups} equal groups: choose a base that "
            "is a multiple of 32 (or of 4, while no layer has more than 128 channels)")
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
        if x.is_cuda:
            qkv = qkv.contiguous()  # fused attention wants the channels last in memory
        h = F.scaled_dot_product_attention(*qkv.unbind(1))  # q, k, v (B, 1, HW, C) -> (B, 1, HW, C)
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
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = self.skip(self.resample(x))
        return self.attention((x + h) * math.sqrt(0.5))  # a sum of two has twice the variance: undone


class UNet(nn.Module):
    """The velocity network v(x_t, t).

    image_size  height and width of the images; must halve len(mult) - 1 times
    base, mult  channels of the first level, and of each level in multiples of it; blocks per level
    attn        sizes at which attention follows the blocks (and always in the middle)
    classes     number of class labels, 0 for none
    """
    precision = "fp32"  # "bf16": convolutions and matrix products in bfloat16, all else in float32

    def __init__(self, image_size, channels=3, base=64, mult=(1, 2, 2), blocks=2, attn=(16,), classes=0, dropout=0.0):
        super().__init__()
        self.args = dict(image_size=image_size, channels=channels, base=base, mult=tuple(mult), blocks=blocks,
                         attn=tuple(attn), classes=classes, dropout=dropout)
        halvings = len(mult) - 1
        require(base >= 4 and blocks >= 1 and min(mult) >= 1 and dropout < 1, "the network needs base >= 4, blocks "
                f">= 1, mult >= 1 and dropout < 1, not {base}, {blocks}, {tuple(mult)} and {dropout}")
        require(image_size and image_size % 2**halvings == 0, f"image_size {image_size} cannot be halved {halvings} "
                f"times, as mult {tuple(mult)} asks for: it must be a multiple of {2**halvings}")
        c_emb = 4 * base
        self.time0, self.time1 = init_(nn.Linear(base, c_emb)), init_(nn.Linear(c_emb, c_emb))
        self.label = init_(nn.Linear(classes, base)) if classes else None
        # From 1 to 1/10000 in equal ratios: (base / 2,).
        frequencies = torch.exp(torch.arange(base // 2) * -(math.log(10_000) / (base // 2 - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.conv_in = init_(nn.Conv2d(channels, base, 3, padding=1))

        c, size, skips = base, image_size, [base]  # skips: the channels that the encoder leaves
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.encoder.append(ResBlock(c, base * m, c_emb, dropout, size in attn))
                c = base * m
                skips.append(c)
            if level < halvings:
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

    def embed(self, t, labels):
        """Time (B,) in [0, 1], and labels (B,) where there are classes -> (B, 4 base)."""
        assert (labels is None) == (self.label is None), "labels are for networks with classes, and only for them"
        # Official code: 999 t, because this embedding was made for step numbers from 0 to 999.
        angles = 999 * t[:, None] * self.frequencies  # (B, base / 2)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, base)
        if labels is not None:
            classes = self.label.in_features
            emb = emb + self.label(F.one_hot(labels, classes).to(emb.dtype) * math.sqrt(classes))
        return self.time1(F.silu(self.time0(emb)))

    def forward(self, x, t, labels=None):
        """x (B, C, H, W), t (B,) in [0, 1], labels int64 (B,) or None -> velocity (B, C, H, W)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            emb = self.embed(t, labels)
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


def on_device(net, device, precision):
    """The network on the device, computing in fp32 or bf16. CPUs are 10 % faster in fp32 with the channels last."""
    net.precision = precision
    last = device.type == "cpu" and precision == "fp32"
    return net.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)


# ------------------------------------------------------------------------------------- sampling and training

@torch.no_grad()
def euler(net, z, steps, labels=None):
    """Follows dx/dt = v(x, t) from noise z (B, C, H, W) to an image in about [-1, 1], in `steps` network calls.

    One step is x = z + v(z, EPS). Official code: N steps of 1/N, although times begin at EPS.
    """
    x = z
    for i in range(steps):
        # x <- x + v(x, t_i) / N,  t_i = EPS + (1 - EPS) i / N
        t = torch.full(x.shape[:1], EPS + (1 - EPS) * i / steps, device=x.device)
        x = x + net(x, t, labels) / steps
    return x


def samples(net, seed, n, steps):
    """The first n (n, 3, H, W) of the images that stage 05 judges, from the same noise and labels; on the CPU."""
    device, args, labels = net.conv_in.weight.device, net.args, labels_for(seed, n, net.args["classes"])
    z = noise_for(seed, range(EVALUATION, EVALUATION + n), (args["channels"], args["image_size"], args["image_size"]))
    return euler(net, z.to(device), steps, None if labels is None else labels.to(device)).cpu()


LOG_SECONDS, SAVE_SECONDS = 10, 300  # ours: between two log lines, and between two saved states
CLIP = 1.0  # paper: the gradient's norm is clipped at 1


def learning_rate(step, cfg):
    """Rises over the first cfg.warmup steps, and falls to 0 over the last cfg.cooldown (a fraction of all)."""
    rise = min(1.0, (step + 1) / max(1, cfg.warmup))
    fall = min(1.0, (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps))
    return cfg.lr * rise * fall


@torch.no_grad()
def ema_update(ema, net, decay, n):
    """theta' <- d theta' + (1 - d) theta,  d = min(decay, (1 + n) / (10 + n)),  n = updates with this one.

    The weights theta jitter from batch to batch. Their moving average theta' does not, and makes better images.
    At first d is small, because the first weights are not worth remembering.
    """
    d = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


class Trainer:
    """What surrounds a training step: Adam, clipping, learning rate, EMA, log lines, resuming, many processes.

        trainer = Trainer(cfg, "01 teacher", net, made_from)
        for step in trainer.steps():      # from 0, or from where the last run stopped
            loss = ... trainer.net ...    # of trainer.batch images
            trainer.update(loss)          # backward, clip, Adam, EMA
        trainer.ema                       # the averaged network: only this one makes images and is saved

    Before each step torch's generators are seeded from (seed, step, process): a run that continues draws what the
    unbroken one would have drawn, and no random state has to be saved.
    """

    def __init__(self, cfg, name, net, made_from):
        require(cfg.steps and cfg.batch and cfg.batch % WORLD == 0, f"--steps {cfg.steps}, --batch {cfg.batch}: both "
                f"must be at least 1, and the batch a multiple of the {WORLD} processes")
        self.cfg, self.name, self.path = cfg, name, cfg.folder / f"{name[:2]}_state.pt"
        self.batch = cfg.batch // WORLD  # of this process
        self.trained = net.train()  # with dropout
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)  # without
        # paper: Adam with these betas and eps
        self.optimizer = torch.optim.Adam(net.parameters(), cfg.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.losses, self.recent, self.note = [], [], ""  # recent: (loss, gradient norm) of steps not yet read
        self.run = {**settings_of(cfg), "made from": made_from}
        if cfg.restart and RANK == 0:
            self.path.unlink(missing_ok=True)
        if self.path.exists() and not cfg.restart:
            state = read(self.path)
            require_same_run(self.path, state["run"], self.run)
            net.load_state_dict(state["weights"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses = state["losses"].tolist()
            say(f"{name} | continues after step {len(self.losses)} of {cfg.steps}, from {self.path}")
        # Averages the gradients of all processes.
        self.net = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net

    def steps(self):
        """Yields the number of each step. In between it logs, saves, and ends the run when asked to."""
        cfg, first, asked_to_stop = self.cfg, len(self.losses), []
        if WORLD == 1:  # one process finishes its step; several end at once, and continue from the last state
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: asked_to_stop.append(True))
        began = logged = saved = time.time()
        for step in range(first, cfg.steps):
            seeds = np.random.SeedSequence(cfg.seed, spawn_key=(step, RANK))
            torch.manual_seed(int(seeds.generate_state(1)[0]))
            yield step
            done, now = step + 1, time.time()
            end, save_now = done == cfg.steps or bool(asked_to_stop), now - saved > SAVE_SECONDS
            if end or save_now or now - logged > LOG_SECONDS:
                loss, logged = self.read_recent(), now
                speed = (done - first) / (now - began)  # steps per second
                say(f"{self.name} | step {done:>6}/{cfg.steps} | loss {loss:.4f} | {self.note}lr "
                    f"{learning_rate(step, cfg):.1e} | {cfg.batch * speed:.0f} img/s | left "
                    f"{datetime.timedelta(seconds=round((cfg.steps - done) / speed))}")
            if end or save_now:
                saved = now
                if RANK == 0:
                    save(self.path, run=self.run, weights=self.trained.state_dict(), ema=self.ema.state_dict(),
                         optimizer=self.optimizer.state_dict(), losses=torch.tensor(self.losses))
            if end and done < cfg.steps:
                raise KeyboardInterrupt(f"stopped after step {done} of {cfg.steps}: {self.path} keeps it, and the "
                                        "same command continues (without --restart)")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    def update(self, loss, note=""):
        """One step of Adam down the gradient of `loss`, and one of the EMA. `note` is for the log line."""
        step = len(self.losses) + len(self.recent)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), CLIP)
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, self.cfg)
        self.optimizer.step()
        ema_update(self.ema, self.trained, self.cfg.ema, step + 1)
        self.recent.append(torch.stack([loss.detach(), norm]))  # to read it here would be to wait for the GPU
        self.note = f"{note} | " if note else ""

    def read_recent(self):
        """The mean loss of the steps since the last call. Raises UserError if a loss or gradient was not finite."""
        recent = torch.stack(self.recent).tolist()
        for step, (loss, norm) in enumerate(recent, len(self.losses)):
            require(math.isfinite(loss) and math.isfinite(norm), f"{'gradient' if math.isfinite(loss) else 'loss'} not "
                    f"finite at step {step}. The last state is kept. Look at the data, or --restart with a lower --lr")
        self.losses += [loss for loss, _ in recent]
        self.recent = []
        return sum(loss for loss, _ in recent) / len(recent)
