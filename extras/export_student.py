"""Write the student as one file that makes images without this project: in float32, for CPUs.

    import torch
    generate = torch.export.load("out/shapes/05_student.pt2").module()
    z = torch.randn(16, 3, 16, 16)  # any number of images, of the size of the student's
    x = generate(z)  # in about [-1, 1]
    x = generate(z, labels)  # instead, if the student knows classes; labels: int64 (16,)

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
    """Noise z (B, 3, H, W), and labels int64 (B,) if the network has classes -> images."""

    def __init__(self, net, steps):
        super().__init__()
        self.net = net.to(memory_format=torch.contiguous_format)
        self.steps = steps

    def forward(self, z, labels=None):
        return euler(self.net, z, self.steps, labels)


def main(cfg):
    cfg.precision = "fp32"
    start(cfg, "export")
    require(cfg.steps, "--steps must be at least 1")
    net, _ = load_network(cfg, "04_student.pt", torch.device("cpu"))
    inputs = [torch.zeros(2, *net.shape)]  # an example: other numbers of images are allowed, too
    classes = net.args["classes"]
    if classes:
        inputs.append(labels_for(0, 2, classes))
    any_length = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    generator = Generator(net, cfg.steps).eval()
    with torch.no_grad():
        program = torch.export.export(generator, tuple(inputs), dynamic_shapes=any_length)
    path = cfg.folder / "05_student.pt2"
    with writing(path) as file:
        torch.export.save(program, file)
    say(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
