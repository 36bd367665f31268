"""Write the student as one file that makes images without this project: its network, in float32 for a CPU.

    import torch
    generate = torch.export.load("out/shapes/05_student.pt2").module()
    x = generate(torch.randn(16, 3, 16, 16))  # any number of images in about [-1, 1], as large as the noise
    # A student that knows classes: generate(z, labels), with labels int64 (16,).

Reads   out/<preset>/04_student.pt
Writes  out/<preset>/05_student.pt2
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import euler, labels_for, load_network, require, run, say, start, writing

SETTINGS = {"steps": dict(others=1, help="Euler steps: network calls for an image")}


class Generator(torch.nn.Module):
    """Noise z (B, 3, H, W), and labels int64 (B,) where there are classes -> images."""

    def __init__(self, net, steps):
        super().__init__()
        self.net, self.steps = net.to(memory_format=torch.contiguous_format), steps

    def forward(self, z, labels=None):
        return euler(self.net, z, self.steps, labels)


def main(cfg):
    cfg.precision, path = "fp32", cfg.folder / "05_student.pt2"
    start(cfg, "export")
    require(cfg.steps, "--steps must be at least 1")
    net, _ = load_network(cfg, "04_student.pt", torch.device("cpu"))
    z = torch.zeros(2, net.args["channels"], net.args["image_size"], net.args["image_size"])
    inputs = (z, labels_for(0, 2, net.args["classes"])) if net.args["classes"] else (z,)
    any_length = tuple({0: torch.export.Dim("batch")} for _ in inputs)  # the 2 is an example only
    with torch.no_grad():
        program = torch.export.export(Generator(net, cfg.steps).eval(), inputs, dynamic_shapes=any_length)
    with writing(path) as file:
        torch.export.save(program, file)
    say(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
