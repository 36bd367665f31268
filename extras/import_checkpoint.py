"""Turn a published checkpoint into an artifact that stages 02, 04 and 05 read.

The U-Net of common.py is the network of two published codes under other names:

    NCSN++     the authors' checkpoints: {"model": state dict, "ema": {"shadow_params": [...]}, ...}
    SongUNet   EDM's networks in their DDPM++ settings: a plain state dict

Only files that hold nothing but tensors are read. EDM's own are pickles that carry code; where its code is installed (a
clone of github.com/NVlabs/edm), one line saves what is needed from one of them:

    python -c "import pickle, sys, torch; torch.save(pickle.load(open(sys.argv[1], 'rb'))['ema'].model.state_dict(), 'edm.pt')" \\
        edm-cifar10-32x32-uncond-vp.pkl

Reads   --checkpoint PATH
Writes  out/<preset>/<--to>.pt
Next    as a teacher, 02_generate_pairs.py (EDM: with --sample_steps 18); as a 2-rectified flow, 04_flow_guided_distill.py;
        as a student, 05_eval_fid.py --only student
"""
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (Settings, UNet, UserError, command_for, count_parameters, file_digest, require, require_same_entries, run,
                    save_network, say, start)


@dataclass
class Config(Settings):
    checkpoint: str = ""  # the published file
    to: Literal["01_teacher", "03_reflow", "04_student"] = "01_teacher"  # what it becomes
    weights: Literal["ema", "model"] = "ema"  # which of the two sets in the authors' checkpoints
    predicts: Literal["auto", "velocity", "edm"] = "auto"  # auto: NCSN++ velocity, SongUNet what EDM's preconditioning asks for
    image_size: int = 0  # pixels; 0: from the checkpoint, where NCSN++ is taken to have its attention at 16x16
    dropout: float = 0.0  # for further training, in 04. paper: 0.15
    data: str = "cifar10"  # the images that it was trained on, for 05 to compare with


PRESETS = {"cifar10": {}, "cifar10_quick": {}, "ffhq64": {"data": "ffhq-64x64.zip"}, "imagenet64": {"data": "imagenet-64x64.zip"},
           "shapes": {"data": "shapes"}}


# ------------------------------------------------------------------------------------------------- names
# A layout lists every tensor of the U-Net as (our key, their keys, join, split): ours = join(*theirs), theirs = split(ours).

KEEP = (lambda a: a, lambda a: [a])


def residual_blocks(net):
    """(our prefix, block, SongUNet's name) of every residual block, in the order in which all three codes make them."""
    size, i = net.args["image_size"], 0
    for part, side in (("encoder", "enc"), ("middle", "dec"), ("decoder", "dec")):
        for index, block in enumerate(getattr(net, part)):
            if block.up or block.down:
                size, i = (size * 2, 0) if block.up else (size // 2, 0)
            kind = "up" if block.up else "down" if block.down else f"in{index}" if part == "middle" else f"block{i}"
            i += kind == f"block{i}"
            yield f"{part}.{index}", block, f"{side}.{size}x{size}_{kind}"
        i = 0


def both(ours, theirs):
    """The layout of a weight and a bias that are stored alike."""
    return [(f"{ours}.{part}", [f"{theirs}.{part}"], *KEEP) for part in ("weight", "bias")]


def ncsnpp_layout(net):
    """NCSN++: all_modules.<i>.<part>, i in the order of construction, attention a module of its own."""
    # NIN: y = x W + b with W (in, out), where we have a 1x1 convolution (out, in, 1, 1); q, k and v apart.
    matrix = (lambda *w: torch.cat([a.T for a in w])[:, :, None, None], lambda a: [w.T for w in a[:, :, 0, 0].split(a.shape[1])])
    vector = (lambda *b: torch.cat(b), lambda a: a.chunk(3))
    layout, i = [], 3
    for ours, index in (("time0", 0), ("time1", 1), ("conv_in", 2)):
        layout += both(ours, f"all_modules.{index}")
    for prefix, block, _ in residual_blocks(net):
        parts = {"norm0": "GroupNorm_0", "conv0": "Conv_0", "emb": "Dense_0", "norm1": "GroupNorm_1", "conv1": "Conv_1"}
        if hasattr(block.skip, "weight"):
            parts["skip"] = "Conv_2"
        for ours, theirs in parts.items():
            layout += both(f"{prefix}.{ours}", f"all_modules.{i}.{theirs}")
        i += 1
        if hasattr(block.attention, "qkv"):
            ours, theirs = f"{prefix}.attention", f"all_modules.{i}"
            layout += both(f"{ours}.norm", f"{theirs}.GroupNorm_0")
            layout += [(f"{ours}.qkv.weight", [f"{theirs}.NIN_{j}.W" for j in range(3)], *matrix),
                       (f"{ours}.qkv.bias", [f"{theirs}.NIN_{j}.b" for j in range(3)], *vector),
                       (f"{ours}.proj.weight", [f"{theirs}.NIN_3.W"], *matrix), (f"{ours}.proj.bias", [f"{theirs}.NIN_3.b"], *KEEP)]
            i += 1
    return layout + both("norm_out", f"all_modules.{i}") + both("conv_out", f"all_modules.{i + 1}")


def songunet_layout(net):
    """SongUNet: {enc,dec}.<size>x<size>_<block>.<part>, attention inside the block, rows of q, k and v interleaved."""
    interleaved = (lambda a: a.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1),  # row 3 c + s -> row s C + c
                   lambda a: [a.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)])
    size = net.args["image_size"]
    layout = both("time0", "map_layer0") + both("time1", "map_layer1") + both("conv_in", f"enc.{size}x{size}_conv")
    if net.label is not None:
        layout += both("label", "map_label")
    for prefix, block, name in residual_blocks(net):
        for ours, theirs in (("norm0", "norm0"), ("conv0", "conv0"), ("emb", "affine"), ("norm1", "norm1"), ("conv1", "conv1"),
                             ("skip", "skip"), ("attention.norm", "norm2"), ("attention.proj", "proj")):
            module, _, part = ours.partition(".")
            if hasattr(getattr(getattr(block, module), part, None) if part else getattr(block, module), "weight"):
                layout += both(f"{prefix}.{ours}", f"{name}.{theirs}")
        if hasattr(block.attention, "qkv"):
            layout += [(f"{prefix}.attention.qkv.{part}", [f"{name}.qkv.{part}"], *interleaved) for part in ("weight", "bias")]
    return layout + both("norm_out", f"dec.{size}x{size}_aux_norm") + both("conv_out", f"dec.{size}x{size}_aux_conv")


def export(net, layout):
    """Their state dict of our network."""
    own = net.state_dict()
    return {key: value for ours, theirs, _, split in layout for key, value in zip(theirs, split(own[ours]))}


def fill(net, layout, state_dict, source):
    """Gives the network the weights of a state dict in their names. Raises UserError with the first entries that do not fit."""
    require_same_entries({key: value.shape for key, value in export(net, layout).items()}, state_dict, source)
    net.load_state_dict({ours: join(*[state_dict[key] for key in theirs]) for ours, theirs, join, _ in layout})
    return net.eval()


# ------------------------------------------------------------------------------------------------- networks

def from_ncsnpp(state_dict, image_size=None):
    """The authors' network as a UNet. state_dict: keys with or without "module."; its size follows from the shapes.

    Nothing in it tells the image size; unless given, it is the one at which attention is at 16x16, as in all published ones.
    Raises UserError, with the names of the first entries, if it is incomplete or of another kind.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    state_dict.pop("sigmas", None)  # a table that the network does not use
    shape_of = lambda key: tuple(getattr(state_dict.get(key), "shape", ()))
    conv_in = shape_of("all_modules.2.weight")
    require(len(conv_in) == 4, "not an NCSN++ state dict: all_modules.2.weight is missing or misshapen")

    # Every residual block: (channels in, channels out, has a skip convolution, is followed by attention).
    count = 1 + max(int(key.split(".")[1]) for key in state_dict if re.match(r"all_modules\.\d+\.", key))
    parts = {i: [key for key in state_dict if key.startswith(f"all_modules.{i}.")] for i in range(count)}
    is_block = lambda i: any("Conv_" in key or "Dense_0" in key for key in parts[i])
    is_attention = lambda i: i < count and any("NIN_" in key for key in parts[i])
    blocks = []
    for i in filter(is_block, range(3, count)):
        c_out, c_in = (shape_of(f"all_modules.{i}.Conv_0.weight") + (0, 0))[:2]
        blocks.append((c_in, c_out, f"all_modules.{i}.Conv_2.weight" in state_dict, is_attention(i + 1)))

    # L levels of n blocks are 2 L n + 3 L in all; the encoder's n-th, (2 n + 1)-th, ... halve the size: same width, and a skip.
    for levels in range(1, len(blocks) // 5 + 1):
        n, rest = divmod(len(blocks) - 3 * levels, 2 * levels)
        encoder = blocks[:levels * n + levels - 1]
        halving = [i for i, (c_in, c_out, skip, _) in enumerate(encoder) if skip and c_in == c_out]
        if rest == 0 and halving == [n + i * (n + 1) for i in range(levels - 1)]:
            first = encoder[::n + 1]  # of each level
            break
    else:
        raise UserError(f"not an NCSN++ state dict: {len(blocks)} residual blocks of these widths make no U-Net")
    with_attention = [level for level, block in enumerate(first) if block[3]]
    require(image_size or with_attention, "the state dict has no attention outside the middle: give the image size")
    image_size = image_size or 16 * 2 ** with_attention[0]
    net = UNet(image_size, conv_in[1], conv_in[0], [block[1] // conv_in[0] for block in first], n,
               [image_size // 2**level for level in with_attention])
    return fill(net, ncsnpp_layout(net), state_dict, "the NCSN++ state dict")


def from_songunet(state_dict):
    """EDM's SongUNet (DDPM++ settings) as a UNet. state_dict: keys with or without "model.".

    Its augmentation labels are left out: they are 0 whenever images are made. Its constant tables (resample_filter) tell
    that EDM's code wrote it, and so how the time embedding was rounded; export() writes none. Raises UserError, with the names
    of the first entries, if it is incomplete or of another kind.
    """
    by_edm = any(key.endswith("resample_filter") for key in state_dict)
    state_dict = {key.removeprefix("model."): value for key, value in state_dict.items()
                  if not key.endswith(("resample_filter", "map_augment.weight"))}  # constants; unused
    conv_in = [(int(match[1]), value) for key, value in state_dict.items()
               if (match := re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", key))]
    require(len(conv_in) == 1, "not a SongUNet state dict of the DDPM++ kind: it must have one enc.<size>x<size>_conv.weight"
            + ("; an ADM network (EDM's ImageNet-64) is built differently" if "out_conv.weight" in state_dict else ""))
    image_size, (base, channels) = conv_in[0][0], conv_in[0][1].shape[:2]
    mult, attn, n = [], [], 1
    for size in (image_size >> level for level in range(image_size.bit_length())):
        level = {key: value for key, value in state_dict.items() if key.startswith(f"enc.{size}x{size}_block")}
        widths = [len(value) for key, value in level.items() if ".conv1." in key]
        if not widths:
            break
        mult.append(max(widths) // base)
        attn += [size] if any(".qkv." in key for key in level) else []
        n = max(n, *(1 + int(re.search(r"_block(\d+)", key)[1]) for key in level))
    label = state_dict.get("map_label.weight")
    net = UNet(image_size, channels, base, mult, n, attn, classes=0 if label is None else label.shape[1],
               edm_embedding=by_edm)
    return fill(net, songunet_layout(net), state_dict, "the SongUNet state dict")


def read_checkpoint(path, weights, image_size=None):
    """(UNet, "ncsnpp" or "songunet") from a published file. weights: "ema" or "model", in the authors' checkpoints."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged, or holds code and not only tensors (as EDM's own files do; --help gives the line "
                        "that makes a plain state dict of one)") from error
    require(isinstance(content, dict), f"{path} holds no state dict")
    state_dict = content.get("model", content)
    require(isinstance(state_dict, dict) and all(torch.is_tensor(v) for v in state_dict.values()), f"{path} holds no state dict")
    if not any("all_modules." in key for key in state_dict):
        return from_songunet(state_dict), "songunet"
    if weights == "ema" and "ema" in content:
        # The EMA is a list without names, in the order of the trained parameters.
        names, shadow = [key for key in state_dict if not key.endswith("sigmas")], content["ema"].get("shadow_params", [])
        require(len(names) == len(shadow), f"{path}: the EMA has {len(shadow)} tensors, and the network {len(names)} parameters")
        state_dict = dict(zip(names, shadow))
    return from_ncsnpp(state_dict, image_size), "ncsnpp"


def main(cfg):
    start(cfg, "import")
    path = Path(cfg.checkpoint)
    require(path.is_file(), f"--checkpoint {cfg.checkpoint!r} does not exist")

    target = cfg.folder / f"{cfg.to}.pt"
    require(cfg.restart or not target.exists(), f"{target} is there already: --restart replaces it, another --out keeps both")

    # 1. Read it under our names.
    net, kind = read_checkpoint(path, cfg.weights, cfg.image_size or None)
    edm = cfg.predicts == "edm" or cfg.predicts == "auto" and kind == "songunet"
    require(not edm or cfg.to == "01_teacher", f"an EDM network can be the teacher only, not {cfg.to}: it predicts no velocity")
    say(f"{kind} | {count_parameters(net):,} parameters | {net.args} | predicts {'what EDM asks for' if edm else 'the velocity'}")

    net.args["dropout"] = cfg.dropout

    # 2. Save it as a stage would have.
    save_network(target, cfg, net, edm=edm, imported_from=path.name, sha256=file_digest(path, "sha256"))
    following = {"01_teacher": "02_generate_pairs.py", "03_reflow": "04_flow_guided_distill.py", "04_student": "05_eval_fid.py"}[cfg.to]
    say(f"wrote {target} | next: {command_for(following, cfg)}" + (" --sample_steps 18" if edm else "")
          + (" --only student" if cfg.to == "04_student" else ""))


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
