"""The Frechet distance between any two sets of images, or from published statistics.

    python extras/fid.py --images mine.zip --reference theirs/
    python extras/fid.py --images mine.zip --reference cifar10-32x32.npz   # mu and sigma, as EDM's

It is FID with Inception's published weights; --metric shapes or cifar10 takes a judge's features.

Reads   two folders or zips of images of one size, or one of them and an .npz with mu and sigma
Writes  nothing: it prints the distance, and all that it depends on
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, load_data, require, run, say, stage, start

SETTINGS = {
    "images": dict(others="", help="a folder or zip"),
    "reference": dict(others="", help="a folder or zip, or an .npz"),
    "metric": dict(others="fid", help="whose features: fid (Inception's), or a judge's (stage 05)"),
    "resize": dict(others="tf1", choices=("tf1", "pytorch_fid"), help="for FID. paper: tf1"),
    "allow_few": dict(others=False, help="fewer images than features, too"),
}


def read_statistics(path, dimensions):
    """mu (D,) and sigma (D, D) from an .npz, as EDM publishes them. Raises UserError."""
    try:
        content = np.load(path, allow_pickle=False)
        mu = torch.from_numpy(content["mu"]).double()
        sigma = torch.from_numpy(content["sigma"]).double()
    except Exception as error:  # a damaged file can fail in many ways
        raise UserError(f"{path} is no .npz with mu and sigma that can be read: {error}") from error
    require(sigma.shape == (dimensions, dimensions) and mu.shape == (dimensions,),
            f"{path} has not {dimensions} features, but mu {mu.shape} and sigma {sigma.shape}")
    require(mu.isfinite().all() and sigma.isfinite().all(), f"{path} holds what is not finite")
    require(torch.allclose(sigma, sigma.T), f"sigma in {path} is not symmetric")
    return mu, sigma


def main(cfg):
    require(cfg.images and cfg.reference, "give --images and --reference")
    device, evaluation = start(cfg, "fid"), stage("05")
    features_of, fc, _, facts = evaluation.feature_network(cfg, device)
    gaussians, shapes, dimensions = [], [], fc.in_features
    for source in (cfg.images, cfg.reference):
        if source.endswith(".npz"):
            gaussians.append(read_statistics(source, dimensions))
            continue
        images = load_data(source, None)[0]
        require(len(images) >= dimensions or cfg.allow_few, f"{len(images)} images are fewer than "
                f"the {dimensions} features of {facts['metric']}, which makes the distance too "
                "large. Take more, or --allow_few")
        shapes.append(images.shape[1:])
        require(shapes[-1] == shapes[0], f"{source} holds images of another size than "
                f"{cfg.images}: bring them to one size first")
        parts = images.split(evaluation.BATCH)
        batches = (features_of(part.to(device)) for part in parts)
        gaussians.append(evaluation.gaussian(batches, dimensions))
    distance = evaluation.frechet_distance(*gaussians[0], *gaussians[1])
    say(f"{facts['metric']} {distance:.3f} | {cfg.images}, {cfg.reference}, {facts}")
    return distance


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
