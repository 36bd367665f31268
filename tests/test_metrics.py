"""Frechet distances, judges and LPIPS: known answers, and reference implementations' numbers (fixtures)."""
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import UserError, draw_shapes, from_uint8, to_uint8
from conftest import save_images, script, settings_of

FIXTURES, CPU = Path(__file__).with_name("fixtures"), torch.device("cpu")


def test_frechet_distances_of_known_gaussians_and_of_the_references_and_gaussians_of_features():
    distance, mu, eye = script("05").frechet_distance, torch.zeros(4), torch.eye(4)
    assert distance(mu, eye, mu + 3, eye) == pytest.approx(36)
    assert distance(mu, 4 * eye, mu, 9 * eye) == pytest.approx(4 * (3 - 2) ** 2)
    a, b = torch.diag(torch.tensor([1.0, 0, 0, 0])), torch.diag(torch.tensor([0, 4.0, 0, 0]))  # singular
    assert distance(mu, a, mu, b) == pytest.approx(5) and distance(mu, a, mu, 4 * a) == pytest.approx(1)
    with pytest.raises(UserError, match="not finite"):
        distance(mu / 0, eye, mu, eye)
    data = np.load(FIXTURES / "frechet.npz")
    for name in {key.split("::")[0] for key in data.files}:
        gaussians = (data[f"{name}::{part}"] for part in ("mu1", "sigma1", "mu2", "sigma2"))
        assert distance(*gaussians) == pytest.approx(float(data[f"{name}::dist"]), rel=1e-9, abs=1e-9), name
    features = draw_shapes(70, 4)[0].flatten(1)[:, :10].double()
    mu, sigma = script("05").gaussian(iter(features.split(32)), 10)
    np.testing.assert_allclose(mu, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.numpy().T), rtol=1e-9)


# ------------------------------------------------------------------------------------------------ The judge

def blurred(images):
    """By a Gaussian of half a pixel."""
    kernel = torch.exp(-2 * torch.arange(-3.0, 4) ** 2)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 7, 7)
    return to_uint8(F.conv2d(F.pad(from_uint8(images), (3, 3, 3, 3), "replicate"), kernel, groups=3))


def rounded_squares(x, y, maximum=np.maximum):
    """In place of np.maximum in draw_shapes: rounds the squares' corners with half of their half side."""
    if x.ndim > 1:  # the triangles' distance
        return maximum(x, y)
    u, v = x - 0.425, y - 0.425
    return np.hypot(maximum(u, 0), maximum(v, 0)) + np.minimum(maximum(u, v), 0) + 0.425


@torch.no_grad()
def test_fd_shapes_sees_what_a_person_would_see_and_the_judge_names_drawings(monkeypatch):
    def gaussian_of(images):
        return s.gaussian(map(features_of, images.split(512)), fc.in_features)

    s, (unseen, labels) = script("05"), draw_shapes(1024, 16, seed=1)
    features_of, fc, facts = s.feature_network(settings_of("05"), CPU)
    sets = {"unseen": unseen, "noise": to_uint8(from_uint8(unseen) + 0.3 * torch.randn(unseen.shape)),
            "circles": unseen[labels < 6], "blur": blurred(unseen)}
    with monkeypatch.context() as patch:
        patch.setattr(np, "maximum", rounded_squares)
        sets["rounded"] = draw_shapes(1024, 16, seed=1)[0]
    assert (sets["rounded"] == unseen).flatten(1).all(1)[(labels < 6) | (labels > 11)].all()  # only squares
    real = gaussian_of(draw_shapes(8000, 16)[0])
    floor, *others = (s.frechet_distance(*gaussian_of(images), *real) for images in sets.values())
    assert facts["metric"] == "FD-shapes" and min(others) > 5 * floor, (floor, others)
    test, kinds = draw_shapes(2000, 16, seed=10**6)
    assert (fc(features_of(test)).argmax(1) == kinds).float().mean() >= 0.995


def test_quantise_rounds_or_truncates_and_resize_tf1_has_no_half_pixel_centres():
    x = torch.tensor([-2.0, -1, -0.995, 0, 1, 2])
    assert script("05").quantise(x, "round").tolist() == [0, 0, 1, 128, 255, 255]
    assert script("05").quantise(x, "truncate").tolist() == [0, 0, 0, 127, 255, 255]
    x = torch.tensor([[0.0, 10.0]]).expand(1, 1, 2, 2)
    assert script("05").resize_tf1(x, 4)[0, 0, 0].tolist() == [0, 5, 10, 10]


# ---------------------------------------------------------------------------------------------- Inception

def weights_for(state):
    """Weights by the references' formula, a hash of (number of the tensor, position): no random state."""
    weights, keys = {}, sorted(key for key in state if not key.endswith("num_batches_tracked"))
    for i, key in enumerate(keys):
        h = (np.arange(state[key].numel(), dtype=np.uint64) * 2654435761 + (i + 1) * 2246822519) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
        u = h.astype(np.float64) / 2**32
        values = 0.2 * u - 0.1
        if state[key].ndim > 1:
            values = (2 * u - 1) * np.sqrt(6 / state[key][0].numel())
        elif key.endswith("bn.weight"):
            values += 1
        elif key.endswith("running_var"):
            values = 0.5 + u
        weights[key] = torch.from_numpy(values.astype(np.float32)).view(state[key].shape)
    return weights


@pytest.fixture
def published(monkeypatch):
    """Stage 05, and a stand-in for the published file of 91 MB at data/inception.pth."""
    s, path = script("05"), Path("data/inception.pth")
    path.parent.mkdir()
    torch.save(weights_for({k.replace("/", "."): v for k, v in s.Inception().state_dict().items()}), path)
    monkeypatch.setattr(s, "INCEPTION_URL", "http://127.0.0.1:9/inception.pth")
    monkeypatch.setattr(s, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return s


def test_inception_features_equal_the_references_and_other_weights_are_refused(published):
    data, net = np.load(FIXTURES / "inception.npz"), published.load_inception(CPU)
    assert {key.replace("/", ".") for key in net.state_dict()} == set(data["keys"].tolist())
    for resize, name in (("tf1", "feat_tf1"), ("pytorch_fid", "feat_pytorchfid")):  # in eval mode
        features = published.inception_features(net, torch.from_numpy(data["images"]), resize)
        assert np.abs(features.numpy() - data[name]).max() < 1e-4, resize
    Path("data/inception.pth").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="data/inception.pth is damaged, or another file: delete it.*--metric none"):
        published.load_inception(CPU)


def test_fid_of_two_sets_without_networks(published, monkeypatch, tmp_path):
    def of_64_features(*gaussians):  # of the 2048, which would take seconds
        return frechet_distance(*(a[:64, :64] if a.ndim == 2 else a[:64] for a in gaussians))

    def measured(reference, *flags):
        return script("fid").main(settings_of("fid", *flags, images="a", reference=reference))

    images, frechet_distance = draw_shapes(7, 16)[0], published.frechet_distance
    monkeypatch.setattr(published, "frechet_distance", of_64_features)
    save_images(tmp_path / "a", images[:3])
    save_images(tmp_path / "b", images[3:])
    features = published.inception_features(published.load_inception(CPU), images).split([3, 4])
    (mu, sigma), reference = (published.gaussian([part], 2048) for part in features)
    np.savez("edm.npz", mu=reference[0], sigma=reference[1])  # statistics as EDM publishes them
    for against in ("b", "edm.npz"):
        expected = of_64_features(mu, sigma, *reference)
        assert 1e-3 < expected == pytest.approx(measured(against, "--allow_few"), rel=1e-4)
    save_images(tmp_path / "small", images[:3, :, :8, :8])
    with pytest.raises(UserError, match="small holds images of another size than a"):
        measured("small", "--allow_few")
    with pytest.raises(UserError, match="3 images are fewer than the 2048 features"):
        measured("b", "--no-allow_few")


# -------------------------------------------------------------------------------------------------- LPIPS

def test_lpips_is_what_its_definition_says_with_weights_from_the_published_files(monkeypatch):
    """A second derivation, from the names of the weights: VGG16's convolutions by number."""
    s = script("04")
    state = weights_for(s.LPIPS().state_dict())
    state |= {key: state[key].abs() for key in state if key.startswith("lin")}
    Path("data").mkdir()
    for kind, more in (("LPIPS", {}), ("VGG", {"classifier.0.weight": torch.ones(1)})):
        path = Path("data", getattr(s, f"{kind}_URL").split("/")[-1])
        part = {key: state[key] for key in state if key.startswith("lin") == (kind == "LPIPS")}
        torch.save(more | part, path)
        monkeypatch.setattr(s, f"{kind}_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    (x, y), lpips, expected = torch.rand(2, 2, 3, 64, 64) * 2 - 1, s.load_lpips(CPU), []
    h = torch.cat([x, y]) - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    h = h / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        h = F.max_pool2d(h, 2) if i in (5, 10, 17, 24) else h
        h = F.relu(F.conv2d(h, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
        if i in (2, 7, 14, 21, 28):
            a, b = F.normalize(h).chunk(2)
            weight = state[f"lin{len(expected)}.model.1.weight"]
            expected.append(F.conv2d((a - b) ** 2, weight).mean((1, 2, 3)))
    torch.testing.assert_close(lpips(x, y), sum(expected))
    assert lpips(x, x).abs().max() == 0 and not any(p.requires_grad for p in lpips.parameters())
    large = F.interpolate(x[:, :, ::2, ::2], (64, 64), mode="bilinear", align_corners=True)
    torch.testing.assert_close(lpips(x[:, :, ::2, ::2], y), lpips(large, y))
    for i in (0, 2):
        lpips.features[i].bias.fill_(-100.0)  # every ReLU is off: no division of 0 by 0
    distance = lpips(x.requires_grad_(), y).sum()
    distance.backward()
    assert distance.isfinite() and x.grad.isfinite().all()
