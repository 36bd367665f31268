"""Turn a published checkpoint into an artifact that the stages read.

The U-Net of common.py is the network of two published codes, in which its layers have other names.
One is NCSN++, which the authors use. Their files are
{"model": state dict, "ema": {"shadow_params": [...]}, ...}. The other is EDM's SongUNet in its
DDPM++ settings. EDM's own files hold code, and only files of tensors are read here. To get the
tensors out of one, run this in a clone of github.com/NVlabs/edm:

    import pickle, torch
    edm = pickle.load(open("edm-cifar10-32x32-uncond-vp.pkl", "rb"))
    torch.save(edm["ema"].model.state_dict(), "edm.pt")

The size of the network is read from the shapes of its tensors. An EDM network (the paper's best
teacher) needs its own sampler, so its pairs are made here, not in stage 02.

Reads   --checkpoint PATH
Writes  out/<preset>/<--to>.pt; for an EDM network 02_pairs.pt and 02_pairs.png instead (stage 05
        then needs --reference)
"""
import hashlib
import math
import pickle
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (PAIRS, UNet, UserError, load, require, run, save_grid, save_network, say, stage,
                    start)

SETTINGS = {
    "checkpoint": dict(others="", help="the published file"),
    "to": dict(others="01_teacher", choices=("01_teacher", "03_reflow", "04_student"),
               help="what it becomes"),
    "predicts": dict(others="auto", choices=("velocity", "edm", "auto"),
                     help="what the network was trained for; auto: edm for a SongUNet"),
    "image_size": dict(others=0, help="pixels, for an NCSN++; 0: such that attention is at 16x16"),
    "dropout": dict(others=1.0, help="for training it further, as stage 04 does with a flow; 1: "
                    "the preset's, from stage 01 for 01_teacher and from stage 03 for the others"),
    "data": dict(shapes="shapes", ffhq64="ffhq-64x64.zip", imagenet64="imagenet-64x64.zip",
                 others="cifar10", help="the images that it was trained on"),
    "n_pairs": dict(shapes=2048, imagenet64=200_000, others=50_000, help="for an EDM network"),
    "sample_steps": dict(others=18, help="Heun steps for each pair; EDM: 18"),
    "precision": dict(others="fp32", choices=("fp32", "bf16", "auto"), help="for an EDM network"),
}


def edm_slope(net, x, sigma, labels=None):
    """dx/dsigma = (x - D(x; sigma)) / sigma at x (B, C, H, W) = image + sigma noise; sigma > 0.

    D is the network's estimate of the image: Karras et al. 2022 (2206.00364), Eq. 7, with
    sigma_data = 0.5.
    """
    variance = sigma**2 + 0.25
    c_skip = 0.25 / variance
    c_out = 0.5 * sigma / math.sqrt(variance)
    c_in = 1 / math.sqrt(variance)
    c_noise = math.log(sigma) / 4
    t = torch.full(x.shape[:1], c_noise / 999, device=x.device)  # our network multiplies by 999
    # D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
    answer = net((c_in * x).float(), t, labels).to(x.dtype)
    denoised = c_skip * x + c_out * answer
    return (x - denoised) / sigma


@torch.no_grad()
def edm_heun(net, z, steps, labels=None):
    """EDM's sampler, its Algorithm 1: noise z (B, C, H, W) -> images, in 2 steps - 1 calls."""
    first, last = 80 ** (1 / 7), 0.002 ** (1 / 7)  # EDM: sigma_max and sigma_min, with rho = 7
    sigmas = []
    for i in range(steps):
        share = i / max(1, steps - 1)
        sigmas.append((first + share * (last - first)) ** 7)
    if z.device.type != "mps":  # which has no float64
        z = z.double()  # official code
    x = 80 * z
    for sigma, following in zip(sigmas, [*sigmas[1:], 0]):
        slope = edm_slope(net, x, sigma, labels)
        if following:  # the mean of the slopes at both ends of an Euler step
            end = x + (following - sigma) * slope
            slope = (slope + edm_slope(net, end, following, labels)) / 2
        x = x + (following - sigma) * slope
    return x.float()


# ------------------------------------------------------------------------------------------- Names

PARTS = [  # the layers of a residual block: our name, NCSN++'s, SongUNet's
    ("norm0", ["GroupNorm_0"], "norm0"),
    ("conv0", ["Conv_0"], "conv0"),
    ("emb", ["Dense_0"], "affine"),
    ("norm1", ["GroupNorm_1"], "norm1"),
    ("conv1", ["Conv_1"], "conv1"),
    ("skip", ["Conv_2"], "skip"),
    ("attention.norm", ["GroupNorm_0"], "norm2"),
    ("attention.qkv", ["NIN_0", "NIN_1", "NIN_2"], "qkv"),
    ("attention.proj", ["NIN_3"], "proj"),
]


def layers(net):
    """Yields (our name, NCSN++'s names, SongUNet's name) of every layer of the U-Net.

    NCSN++: all_modules.<i>.<part>. The modules are numbered in the order in which they were made,
    and attention is a module of its own.
    SongUNet: {enc,dec}.<size>x<size>_<block>.<part>. Attention is a part of its block.
    """
    weights = net.state_dict()
    size = net.args["image_size"]
    yield "time0", ["all_modules.0"], "map_layer0"
    yield "time1", ["all_modules.1"], "map_layer1"
    yield "conv_in", ["all_modules.2"], f"enc.{size}x{size}_conv"
    if net.label is not None:
        yield "label", [], "map_label"  # an NCSN++ has no labels
    i = 2  # NCSN++'s number of the module
    for group, side in (("encoder", "enc"), ("middle", "dec"), ("decoder", "dec")):
        number = 0  # among the blocks of this size
        for index, block in enumerate(getattr(net, group)):
            name = f"block{number}"
            number += 1
            if group == "middle":
                name = f"in{index}"
            elif isinstance(block.resample, torch.nn.Upsample):
                size, number, name = size * 2, 0, "up"
            elif isinstance(block.resample, torch.nn.AvgPool2d):
                size, number, name = size // 2, 0, "down"
            for part, ncsnpp, songunet in PARTS:
                ours = f"{group}.{index}.{part}"
                if f"{ours}.weight" in weights:  # not every block has attention, or a skip layer
                    if part in ("norm0", "attention.norm"):  # here a module begins
                        i += 1
                    theirs = [f"all_modules.{i}.{layer}" for layer in ncsnpp]
                    yield ours, theirs, f"{side}.{size}x{size}_{name}.{songunet}"
    yield "norm_out", [f"all_modules.{i + 1}"], f"dec.{size}x{size}_aux_norm"
    yield "conv_out", [f"all_modules.{i + 2}"], f"dec.{size}x{size}_aux_conv"


def ncsnpp_layout(net):
    """[(our name, NCSN++'s names), ...] of all layers. Our qkv is three layers there."""
    return [(ours, theirs) for ours, theirs, _ in layers(net) if theirs]


def songunet_layout(net):
    """[(our name, [SongUNet's name]), ...] of all layers."""
    return [(ours, [theirs]) for ours, _, theirs in layers(net)]


def views(net, layout):
    """{their key: a view of our weights in their order}. Writing into it changes the network."""
    found = {}
    own = net.state_dict()
    for ours, theirs in layout:
        weights = own[f"{ours}.weight"].chunk(len(theirs))
        biases = own[f"{ours}.bias"].chunk(len(theirs))
        for name, weight, bias in zip(theirs, weights, biases):
            kind = "weight", "bias"
            if ".NIN_" in name:  # y = x W + b, W (in, out); our convolution has (out, in, 1, 1)
                kind = "W", "b"
                weight = weight[:, :, 0, 0].T
            elif name.endswith(".qkv"):
                # SongUNet's row 3 c + s (s = 0, 1, 2: of q, k, v) is our row s C + c.
                weight = weight.unflatten(0, (3, -1)).transpose(0, 1)
                bias = bias.unflatten(0, (3, -1)).transpose(0, 1)
            found[f"{name}.{kind[0]}"] = weight
            found[f"{name}.{kind[1]}"] = bias
    return found


def export(net, layout):
    """Their state dict of our network."""
    state_dict = views(net, layout)
    for key, view in state_dict.items():
        if ".qkv." in key:
            state_dict[key] = view.flatten(0, 1)
    return state_dict


def fill(net, layout, state_dict):
    """Gives the network their weights. Raises UserError if they do not fit: it names entries."""
    def refuse(fault, keys):
        require(not keys, f"the file does not fit {net.args}: {len(keys)} entries {fault}, "
                f"first {', '.join(keys[:3])}")

    ours = export(net, layout)
    refuse("missing", [key for key in ours if key not in state_dict])
    refuse("unexpected", [key for key in state_dict if key not in ours])
    misshapen = [key for key in ours if ours[key].shape != state_dict[key].shape]
    refuse("misshapen", misshapen)
    for key, view in views(net, layout).items():
        view.copy_(state_dict[key].detach().reshape(view.shape))
    return net.eval()


def from_ncsnpp(state_dict, image_size=None):
    """The authors' network as a UNet. Raises UserError if it is incomplete, or another network.

    state_dict: keys with or without "module."
    image_size: if it is not given, the one whose attention is at 16x16, as published
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    state_dict.pop("sigmas", None)  # a table that the network does not use
    conv_in = state_dict.get("all_modules.2.weight", torch.empty(0))
    require(conv_in.ndim == 4, "no NCSN++: all_modules.2.weight is missing or misshapen")
    base, channels = conv_in.shape[:2]

    # With L levels of n residual blocks there are (2 n + 3) L in all. 2 (L - 1) of them halve or
    # double the size: these have a convolution in their skip although the width stays the same.
    blocks, resizing = [], 0
    for i in range(len(state_dict)):
        if f"all_modules.{i}.Dense_0.bias" in state_dict:
            blocks.append(i)
        skip = state_dict.get(f"all_modules.{i}.Conv_2.weight", torch.empty(0))
        if skip.shape[:1] == skip.shape[1:2]:
            resizing += 1
    levels = 1 + resizing // 2
    n = (len(blocks) // levels - 3) // 2
    require(n > 0 and len(blocks) == (2 * n + 3) * levels,
            f"no NCSN++: {len(blocks)} residual blocks, {resizing} of which change the size")

    mult, attended = [], []
    for level in range(levels):
        i = blocks[level * (n + 1)]  # the first block of the level, in the encoder
        mult.append(state_dict[f"all_modules.{i}.Dense_0.bias"].numel() // base)
        if f"all_modules.{i + 1}.NIN_0.W" in state_dict:
            attended.append(level)
    if not image_size:
        require(attended, "no attention outside of the middle: --image_size is needed")
        image_size = 16 * 2 ** attended[0]
    attn = [image_size // 2**level for level in attended]
    net = UNet(image_size, channels, base, mult, n, attn)
    return fill(net, ncsnpp_layout(net), state_dict)


def from_songunet(theirs):
    """EDM's SongUNet as a UNet. Raises UserError if it is incomplete, or another network.

    theirs: its state dict, keys with or without "model.". The layer for augmentation labels is left
    out: they are 0 when images are made.
    """
    state_dict = {}
    by_edm = False
    for key, value in theirs.items():
        if key.endswith("resample_filter"):  # a constant that only EDM's own code has
            by_edm = True
        elif not key.endswith("map_augment.weight"):
            state_dict[key.removeprefix("model.")] = value
    conv_in = re.search(r"enc\.(\d+)x\1_conv\.weight", "\n".join(state_dict))
    require(conv_in, "neither an NCSN++ nor a SongUNet")
    base, channels = state_dict[conv_in[0]].shape[:2]
    image_size = size = int(conv_in[1])
    mult, attn = [], []
    while f"enc.{size}x{size}_block0.conv0.bias" in state_dict:
        mult.append(state_dict[f"enc.{size}x{size}_block0.conv0.bias"].numel() // base)
        if f"enc.{size}x{size}_block0.qkv.weight" in state_dict:
            attn.append(size)
        size //= 2
    blocks = 0
    while f"enc.{image_size}x{image_size}_block{blocks}.conv0.bias" in state_dict:
        blocks += 1
    classes = 0
    if "map_label.weight" in state_dict:
        classes = state_dict["map_label.weight"].shape[1]
    require(mult, "neither an NCSN++ nor a SongUNet")
    net = UNet(image_size, channels, base, mult, blocks, attn, classes)
    if by_edm:  # the same numbers, rounded as EDM does: at angles up to 999 the fifth digit differs
        exponents = torch.arange(base // 2) / (base // 2 - 1)
        net.frequencies = (1 / 10_000) ** exponents
    return fill(net, songunet_layout(net), state_dict)


def read_checkpoint(path, image_size=None):
    """(UNet, "ncsnpp" or "songunet") from a published file: with its EMA weights, if it has any."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged, or holds code as EDM's own files do: see "
                        "--help") from error
    state_dict = None
    if isinstance(content, dict):
        state_dict = content.get("model", content)
    require(isinstance(state_dict, dict) and all(map(torch.is_tensor, state_dict.values())),
            f"{path} holds no state dict")
    if not any("all_modules." in key for key in state_dict):
        return from_songunet(state_dict), "songunet"
    if "ema" in content:  # a list without names, in the order of the trained parameters
        names = [key for key in state_dict if not key.endswith("sigmas")]
        shadow = content["ema"].get("shadow_params", [])
        require(len(names) == len(shadow),
                f"{path}: the EMA has {len(shadow)} of {len(names)} tensors")
        state_dict = dict(zip(names, shadow))
    return from_ncsnpp(state_dict, image_size), "ncsnpp"


def main(cfg):
    device = start(cfg, "import")
    path = Path(cfg.checkpoint)
    require(path.is_file(), f"--checkpoint {cfg.checkpoint!r} does not exist")
    elsewhere = path.resolve().parent != cfg.folder.resolve()
    require(elsewhere and not re.match(r"0\d_", path.name),
            f"{path}: move it out of {cfg.folder}, and give it a name that no result has")

    # 1. Read it under our names.
    net, kind = read_checkpoint(path, cfg.image_size)
    edm = cfg.predicts == "edm"
    if cfg.predicts == "auto":
        edm = kind == "songunet"
    say(f"{kind} | {net.args} | EDM: {edm}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    made_from = {path.name: digest[:16]}

    # 2. An EDM network makes the pairs.
    if edm:
        require(cfg.to == "01_teacher",
                f"an EDM network is a teacher, not {cfg.to}: it predicts no velocity")
        net.precision = cfg.precision
        stage("02").make_pairs(cfg, "02_pairs.pt", net.to(device), made_from, cfg.n_pairs,
                               cfg.sample_steps, PAIRS, sampler=edm_heun)
        images = load(cfg, "02_pairs.pt")["x"][:64]
        save_grid(cfg.folder / "02_pairs.png", images.split(8))
        say(f"wrote {cfg.folder}/02_pairs.pt, 02_pairs.png")
        return

    # 3. A velocity network is saved as a stage would have saved it.
    target = cfg.folder / f"{cfg.to}.pt"
    require(cfg.restart or not target.exists(), f"{target} exists: --restart replaces it")
    if cfg.dropout == 1:
        number = "01" if cfg.to == "01_teacher" else "03"
        row = stage(number).SETTINGS["dropout"]
        cfg.dropout = row.get(cfg.preset, row["others"])
    net.args["dropout"] = cfg.dropout
    save_network(cfg, target.name, net, made_from)
    say(f"wrote {target}")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
