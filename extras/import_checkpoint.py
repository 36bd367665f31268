"""Turn a published checkpoint into an artifact that the stages read.

The U-Net of common.py is the network of two published codes under other names: NCSN++ in the authors' files,
{"model": state dict, "ema": {"shadow_params": [...]}, ...}, and EDM's SongUNet in its DDPM++ settings. Files
may hold only tensors. EDM's own hold code: this, in a clone of github.com/NVlabs/edm, keeps the tensors:

    import pickle, torch
    edm = pickle.load(open("edm-cifar10-32x32-uncond-vp.pkl", "rb"))
    torch.save(edm["ema"].model.state_dict(), "edm.pt")

An EDM network (the paper's best teacher) has a sampler of its own: it makes its pairs here, not in stage 02.

Reads   --checkpoint PATH
Writes  out/<preset>/<--to>.pt; for an EDM network 02_pairs.pt, 02_pairs.png (05 then needs --reference)
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
                     help="auto: edm for a SongUNet"),
    "image_size": dict(others=0, help="pixels, for an NCSN++; 0: the size whose attention is at 16x16"),
    "dropout": dict(others=0.0, help="for training it further: that of the preset"),
    "data": dict(shapes="shapes", ffhq64="ffhq-64x64.zip", imagenet64="imagenet-64x64.zip",
                 others="cifar10", help="its training images"),
    "n_pairs": dict(shapes=2048, imagenet64=200_000, others=50_000, help="of an EDM network"),
    "sample_steps": dict(others=18, help="Heun steps of each pair. EDM: 18"),
    "precision": dict(others="fp32", choices=("fp32", "bf16", "auto"), help="of an EDM network"),
}


def edm_slope(net, x, sigma, labels=None):
    """dx/dsigma = (x - D(x; sigma)) / sigma at x (B, C, H, W) = image + sigma noise, sigma a float > 0.

    D is the image that the network sees in x: Karras et al. 2022 (2206.00364), Eq. 7, with sigma_data = 0.5.
    """
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.sqrt(sigma**2 + 0.25)
    c_in, c_noise = 1 / math.sqrt(sigma**2 + 0.25), math.log(sigma) / 4
    t = torch.full(x.shape[:1], c_noise / 999, device=x.device)  # our network multiplies by 999
    # D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
    denoised = c_skip * x + c_out * net((c_in * x).float(), t, labels).to(x.dtype)
    return (x - denoised) / sigma


@torch.no_grad()
def edm_heun(net, z, steps, labels=None):
    """EDM's sampler, its Algorithm 1: 80 z, z noise (B, C, H, W) -> images, by 2 steps - 1 network calls."""
    first, last = 80 ** (1 / 7), 0.002 ** (1 / 7)  # EDM: sigma_max and sigma_min, with rho = 7
    sigmas = [(first + i / max(1, steps - 1) * (last - first)) ** 7 for i in range(steps)] + [0]
    x = 80 * z.to(torch.float32 if z.device.type == "mps" else torch.float64)  # official code: double
    for sigma, following in zip(sigmas, sigmas[1:]):
        slope = edm_slope(net, x, sigma, labels)
        if following:  # the mean of the slopes at both ends of an Euler step
            end = x + (following - sigma) * slope
            slope = (slope + edm_slope(net, end, following, labels)) / 2
        x = x + (following - sigma) * slope
    return x.float()


# ---------------------------------------------------------------------------------------------------- names

PARTS = [  # the layers of a residual block: our name, NCSN++'s, SongUNet's
    ("norm0", ["GroupNorm_0"], "norm0"), ("conv0", ["Conv_0"], "conv0"), ("emb", ["Dense_0"], "affine"),
    ("norm1", ["GroupNorm_1"], "norm1"), ("conv1", ["Conv_1"], "conv1"), ("skip", ["Conv_2"], "skip"),
    ("attention.norm", ["GroupNorm_0"], "norm2"), ("attention.qkv", ["NIN_0", "NIN_1", "NIN_2"], "qkv"),
    ("attention.proj", ["NIN_3"], "proj")]


def layers(net):
    """Yields (our name, NCSN++'s names, SongUNet's name) of every layer of the U-Net.

    NCSN++: all_modules.<i>.<part>, i in the order of construction, attention a module of its own.
    SongUNet: {enc,dec}.<size>x<size>_<block>.<part>, attention inside the block.
    """
    weights, size, i = net.state_dict(), net.args["image_size"], 2
    yield "time0", ["all_modules.0"], "map_layer0"
    yield "time1", ["all_modules.1"], "map_layer1"
    yield "conv_in", ["all_modules.2"], f"enc.{size}x{size}_conv"
    if net.label is not None:
        yield "label", [], "map_label"  # an NCSN++ has no labels
    for group, side in (("encoder", "enc"), ("middle", "dec"), ("decoder", "dec")):
        number = 0  # among the blocks of this size
        for index, block in enumerate(getattr(net, group)):
            name = f"in{index}" if group == "middle" else f"block{number}"
            number += 1
            if block.up:
                size, number, name = size * 2, 0, "up"
            elif isinstance(block.resample, torch.nn.AvgPool2d):
                size, number, name = size // 2, 0, "down"
            for part, ncsnpp, songunet in PARTS:
                ours = f"{group}.{index}.{part}"
                if f"{ours}.weight" in weights:  # not all have attention, or a layer in their skip
                    i += 1 if part in ("norm0", "attention.norm") else 0  # here a module begins
                    theirs = [f"all_modules.{i}.{layer}" for layer in ncsnpp]
                    yield ours, theirs, f"{side}.{size}x{size}_{name}.{songunet}"
    yield "norm_out", [f"all_modules.{i + 1}"], f"dec.{size}x{size}_aux_norm"
    yield "conv_out", [f"all_modules.{i + 2}"], f"dec.{size}x{size}_aux_conv"


def ncsnpp_layout(net):
    """[(our name, NCSN++'s names), ...] of all layers: three of its layers are our qkv."""
    return [(ours, theirs) for ours, theirs, _ in layers(net) if theirs]


def songunet_layout(net):
    """[(our name, [SongUNet's name]), ...] of all layers."""
    return [(ours, [theirs]) for ours, _, theirs in layers(net)]


def views(net, layout):
    """{their key: what it holds of our weights, in their order}. To write into it changes the network."""
    found, own = {}, net.state_dict()
    for ours, theirs in layout:
        weights, biases = (own[f"{ours}.{kind}"].chunk(len(theirs)) for kind in ("weight", "bias"))
        for name, weight, bias in zip(theirs, weights, biases):
            if ".NIN_" in name:  # y = x W + b, W (in, out); our 1x1 convolution has (out, in, 1, 1)
                found |= {f"{name}.W": weight[:, :, 0, 0].T, f"{name}.b": bias}
            elif name.endswith(".qkv"):  # SongUNet: row 3 c + s of q, k, v (s = 0, 1, 2) is our row s C + c
                found |= {f"{name}.weight": weight.unflatten(0, (3, -1)).transpose(0, 1),
                          f"{name}.bias": bias.unflatten(0, (3, -1)).transpose(0, 1)}
            else:
                found |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return found


def export(net, layout):
    """Their state dict of our network."""
    return {key: view.flatten(0, 1) if ".qkv." in key else view for key, view in views(net, layout).items()}


def fill(net, layout, state_dict):
    """Gives the network their weights. Raises UserError, with the first entries, if they do not fit."""
    shapes = {key: value.shape for key, value in export(net, layout).items()}
    missing = [key for key in shapes if key not in state_dict]
    unexpected = [key for key in state_dict if key not in shapes]
    misshapen = [key for key in shapes if key in state_dict and state_dict[key].shape != shapes[key]]
    for fault, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        require(not keys, f"the file does not fit: {len(keys)} entries {fault}, first {', '.join(keys[:3])}")
    for key, view in views(net, layout).items():
        view.copy_(state_dict[key].detach().reshape(view.shape))
    return net.eval()


def from_ncsnpp(state_dict, image_size=None):
    """The authors' network as a UNet. UserError, naming the first entries, if it is incomplete or another.

    state_dict: keys with or without "module."; image_size: if not given, attention is at 16x16, as published.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    state_dict.pop("sigmas", None)  # a table that the network does not use
    conv_in = state_dict.get("all_modules.2.weight", torch.empty(0))
    require(conv_in.ndim == 4, "not an NCSN++ state dict: all_modules.2.weight is missing or misshapen")
    base, channels = conv_in.shape[:2]
    # L levels of n residual blocks have (2 n + 3) L in all. 2 (L - 1) of them halve or double the size: they
    # have a convolution in their skip although the width stays.
    blocks = [i for i in range(len(state_dict)) if f"all_modules.{i}.Dense_0.bias" in state_dict]
    resizing = [key for key, value in state_dict.items()
                if key.endswith("Conv_2.weight") and value.shape[:1] == value.shape[1:2]]
    levels = 1 + len(resizing) // 2
    n = (len(blocks) // levels - 3) // 2
    require(n > 0 and len(blocks) == (2 * n + 3) * levels, f"{len(blocks)} residual blocks make no NCSN++")
    first = blocks[:(n + 1) * levels:n + 1]  # of each level of the encoder
    mult = [state_dict[f"all_modules.{i}.Dense_0.bias"].numel() // base for i in first]
    attended = [level for level, i in enumerate(first) if f"all_modules.{i + 1}.NIN_0.W" in state_dict]
    require(image_size or attended, "there is no attention outside the middle: give --image_size")
    image_size = image_size or 16 * 2 ** attended[0]
    net = UNet(image_size, channels, base, mult, n, [image_size // 2**level for level in attended])
    return fill(net, ncsnpp_layout(net), state_dict)


def from_songunet(state_dict):
    """EDM's SongUNet as a UNet. UserError, naming the first entries, if it is incomplete or another.

    state_dict: keys with or without "model.". Its augmentation labels are left out: when sampling they are 0.
    """
    by_edm = any(key.endswith("resample_filter") for key in state_dict)  # a constant that only their code has
    state_dict = {key.removeprefix("model."): value for key, value in state_dict.items()
                  if not key.endswith(("resample_filter", "map_augment.weight"))}
    names = "\n".join(state_dict)
    sizes = sorted(map(int, re.findall(r"enc\.(\d+)x\1_block0\.conv0\.bias", names)), reverse=True)
    levels = [f"enc.{size}x{size}" for size in sizes]  # of the encoder
    require(levels and f"{levels[0]}_conv.weight" in state_dict, "neither an NCSN++ nor a SongUNet")
    base, channels = state_dict[f"{levels[0]}_conv.weight"].shape[:2]
    mult = [len(state_dict[f"{level}_block0.conv0.bias"]) // base for level in levels]
    attn = [size for size, level in zip(sizes, levels) if f"{level}_block0.qkv.weight" in state_dict]
    blocks = len(re.findall(rf"{levels[0]}_block\d+\.conv0\.bias", names))
    classes = state_dict["map_label.weight"].shape[1] if "map_label.weight" in state_dict else 0
    net = UNet(sizes[0], channels, base, mult, blocks, attn, classes)
    if by_edm:  # the same numbers but for the rounding, which at angles up to 999 shows in the fifth digit
        net.frequencies = (1 / 10_000) ** (torch.arange(base // 2) / (base // 2 - 1))
    return fill(net, songunet_layout(net), state_dict)


def read_checkpoint(path, image_size=None):
    """(UNet, "ncsnpp" or "songunet") from a published file: its EMA, if it has one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged, or holds code, as EDM's own files do: see --help") from error
    state_dict = content.get("model", content) if isinstance(content, dict) else None
    require(isinstance(state_dict, dict) and all(map(torch.is_tensor, state_dict.values())),
            f"{path} holds no state dict")
    if not any("all_modules." in key for key in state_dict):
        return from_songunet(state_dict), "songunet"
    if "ema" in content:  # a list without names, in the order of the trained parameters
        names = [key for key in state_dict if not key.endswith("sigmas")]
        shadow = content["ema"].get("shadow_params", [])
        require(len(names) == len(shadow), f"{path}: the EMA has {len(shadow)} of {len(names)} tensors")
        state_dict = dict(zip(names, shadow))
    return from_ncsnpp(state_dict, image_size), "ncsnpp"


def main(cfg):
    device, path = start(cfg, "import"), Path(cfg.checkpoint)
    require(path.is_file(), f"--checkpoint {cfg.checkpoint!r} does not exist")
    require(path.resolve().parent != cfg.folder.resolve() and not re.match(r"0\d_", path.name),
            f"{path}: move it out of {cfg.folder}, and give it a name that no result has")

    # 1. Read it under our names.
    net, kind = read_checkpoint(path, cfg.image_size or None)
    edm = cfg.predicts == "edm" or (cfg.predicts == "auto" and kind == "songunet")
    say(f"{kind} | {net.args} | predicts {'what EDM asks for' if edm else 'the velocity'}")
    made_from = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]}

    # 2. An EDM network makes the pairs.
    if edm:
        require(cfg.to == "01_teacher", f"an EDM network is a teacher, not {cfg.to}: it predicts no velocity")
        make_pairs, net.precision = stage("02").make_pairs, cfg.precision
        make_pairs(cfg, "02_pairs.pt", net.to(device), made_from, cfg.n_pairs, cfg.sample_steps, PAIRS,
                   sampler=edm_heun)
        save_grid(cfg.folder / "02_pairs.png", load(cfg, "02_pairs.pt")["x"][:64].split(8))
        say(f"wrote {cfg.folder}/02_pairs.pt, 02_pairs.png")
        return

    # 3. A velocity network is saved as a stage would have.
    target, net.args["dropout"] = cfg.folder / f"{cfg.to}.pt", cfg.dropout
    require(cfg.restart or not target.exists(), f"{target} is there already: --restart replaces it")
    save_network(cfg, target.name, net, made_from)
    say(f"wrote {target}")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
