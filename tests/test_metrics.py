"""Frechet distances, judges and LPIPS: known answers, and reference implementations' numbers."""
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch.testing import assert_close

from common import UserError, from_uint8, to_uint8
from conftest import save_images, script, settings_of
from extras.drawings import draw_shapes

FIXTURES, CPU = Path(__file__).with_name("fixtures"), torch.device("cpu")


def test_frechet_distances_of_known_gaussians():
    """The distance is what its formula says, for singular covariances too."""
    distance = script("05").frechet_distance
    mu, eye = torch.zeros(4).double(), torch.eye(4).double()
    assert distance(mu, eye, mu + 3, eye) == approx(36)
    assert distance(mu, 4 * eye, mu, 9 * eye) == approx(4)  # 4 (3 - 2)^2
    a, b = torch.zeros(2, 4, 4).double()
    a[0, 0] = 1
    b[1, 1] = 4
    assert distance(mu, a, mu, b) == approx(5)
    assert distance(mu, a, mu, 4 * a) == approx(1)


def test_frechet_distances_equal_the_references():
    """A reference implementation found the same distances between the same Gaussians."""
    data = np.load(FIXTURES / "frechet.npz")
    parts = ("mu1", "sigma1", "mu2", "sigma2")
    for name in {key.split("::")[0] for key in data.files}:
        gaussians = [torch.from_numpy(data[f"{name}::{part}"]).double() for part in parts]
        found = script("05").frechet_distance(*gaussians)
        expected = float(data[f"{name}::dist"])
        assert found == approx(expected, rel=1e-9, abs=1e-9), name


def test_frechet_distances_are_of_the_features_mean_and_unbiased_covariance():
    """Batches of features give the mean and covariance of all of them, as torch computes them."""
    images, _ = draw_shapes(70, 4)
    features = images.flatten(1)[:, :10].double()
    batches = iter(features.split(32))
    mu, sigma = script("05").gaussian(batches, 10)
    assert_close(mu, features.mean(0), rtol=1e-12, atol=0)
    assert_close(sigma, features.T.cov(), rtol=1e-9, atol=0)


# ---------------------------------------------------------------------------------------- The judge

def blurred(images):
    """By a Gaussian of half a pixel."""
    kernel = torch.exp(-2 * torch.arange(-3.0, 4) ** 2)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 7, 7)
    padded = F.pad(from_uint8(images), (3, 3, 3, 3), "replicate")
    return to_uint8(F.conv2d(padded, kernel, groups=3))


def rounded_squares(x, y, maximum=np.maximum):
    """For np.maximum in draw_shapes: rounds the squares' corners with half of their half side."""
    if x.ndim > 1:  # the triangles' distance
        return maximum(x, y)
    u, v = x - 0.425, y - 0.425
    return np.hypot(maximum(u, 0), maximum(v, 0)) + np.minimum(maximum(u, v), 0) + 0.425


@torch.no_grad()
def test_fd_shapes_sees_what_a_person_would_see_and_the_judge_names_drawings(monkeypatch):
    def gaussian_of(images):
        return s.gaussian(map(features_of, images.split(512)), fc.in_features)

    s, (unseen, labels) = script("05"), draw_shapes(1024, 16, seed=1)
    features_of, fc, _, facts = s.feature_network(settings_of("05"), CPU)
    noise = 0.3 * torch.randn(unseen.shape)
    sets = {"unseen": unseen,
            "noise": to_uint8(from_uint8(unseen) + noise),
            "circles": unseen[labels < 6],
            "blur": blurred(unseen)}
    with monkeypatch.context() as patch:
        patch.setattr(np, "maximum", rounded_squares)
        sets["rounded"] = draw_shapes(1024, 16, seed=1)[0]
    no_square = (labels < 6) | (labels > 11)
    assert (sets["rounded"] == unseen)[no_square].all()
    real = gaussian_of(draw_shapes(8000, 16)[0])
    distances = {}
    for what, images in sets.items():
        distances[what] = s.frechet_distance(*gaussian_of(images), *real)
    floor = distances.pop("unseen")
    assert facts["metric"] == "FD-shapes"
    assert min(distances.values()) > 5 * floor, (floor, distances)
    test, kinds = draw_shapes(2000, 16, seed=10**6)
    assert (fc(features_of(test)).argmax(1) == kinds).float().mean() >= 0.995


@pytest.mark.parametrize("rounding, expected", [
    ("round", [0, 0, 1, 128, 255, 255]),
    ("truncate", [0, 0, 0, 127, 255, 255]),
])
def test_quantise_rounds_or_truncates(rounding, expected):
    """Values in -1..1 become 0..255, and others are clipped."""
    x = torch.tensor([-2.0, -1, -0.995, 0, 1, 2])
    assert script("05").quantise(x, rounding).tolist() == expected


def test_resize_tf1_has_no_half_pixel_centres():
    """The first pixel keeps its value and its place, and the last one is repeated."""
    x = torch.tensor([[0.0, 10.0]]).expand(1, 1, 2, 2)
    resized = script("05").resize_tf1(x, 4)
    assert resized[0, 0, 0].tolist() == [0, 5, 10, 10]


# ---------------------------------------------------------------------------------------- Inception

HASH = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))  # its shifts and factors


def weights_for(state):
    """Weights by the references' formula: a hash of (number of the tensor, position)."""
    weights, mask = {}, np.uint64(0xFFFFFFFF)
    keys = [key for key in state if not key.endswith("num_batches_tracked")]
    for i, key in enumerate(sorted(keys), 1):
        tensor = state[key]
        position = np.arange(tensor.numel(), dtype=np.uint64)
        h = position * 2654435761 + i * 2246822519
        h &= mask
        for shift, factor in HASH:
            h ^= h >> np.uint64(shift)
            h = h * np.uint64(factor) & mask
        u = h.astype(np.float64) / 2**32
        values = 0.2 * u - 0.1
        if tensor.ndim > 1:
            values = (2 * u - 1) * np.sqrt(6 / tensor[0].numel())
        elif key.endswith("bn.weight"):
            values += 1
        elif key.endswith("running_var"):
            values = 0.5 + u
        values = torch.from_numpy(values.astype(np.float32))
        weights[key] = values.view(tensor.shape)
    return weights


def stand_in(monkeypatch, s, kind, weights):
    """Saves weights where a stage expects a published file, and has it expect their checksum."""
    url = getattr(s, f"{kind}_URL")
    path = Path("data", url.split("/")[-1])
    path.parent.mkdir(exist_ok=True)
    torch.save(weights, path)
    digest = hashlib.sha256(path.read_bytes())
    monkeypatch.setattr(s, f"{kind}_SHA256", digest.hexdigest())


@pytest.fixture
def published(monkeypatch):
    """Stage 05, and a stand-in for the published file of 91 MB at data/inception.pth."""
    s = script("05")
    state = s.Inception().state_dict()
    weights = weights_for({key.replace("/", "."): state[key] for key in state})
    monkeypatch.setattr(s, "INCEPTION_URL", "http://127.0.0.1:9/inception.pth")
    stand_in(monkeypatch, s, "INCEPTION", weights)
    return s


def test_inception_features_equal_the_references_and_other_weights_are_refused(published):
    """Inception, in eval mode, is the published network, and it takes the published file only."""
    data = np.load(FIXTURES / "inception.npz")
    images = torch.from_numpy(data["images"])
    net = published.load_inception(CPU)
    ours = {key.replace("/", ".") for key in net.state_dict()}
    assert ours == set(data["keys"].tolist())
    for resize, name in (("tf1", "feat_tf1"), ("pytorch_fid", "feat_pytorchfid")):
        features = published.inception_features(net, images, resize)
        difference = features.numpy() - data[name]
        assert np.abs(difference).max() < 1e-4, resize
    Path("data/inception.pth").write_bytes(b"nonsense")
    refusal = "data/inception.pth is damaged, or another file: delete it.*--metric none"
    with pytest.raises(UserError, match=refusal):
        published.load_inception(CPU)


def test_fid_of_two_sets_without_networks(published, monkeypatch, tmp_path):
    """extras/fid.py gives the distance of two folders, or of one from published statistics."""
    frechet_distance = published.frechet_distance

    def of_64_features(mu1, sigma1, mu2, sigma2):  # of the 2048, which would take seconds
        return frechet_distance(
            mu1[:64],
            sigma1[:64, :64],
            mu2[:64],
            sigma2[:64, :64],
        )

    def measured(reference, *flags):
        cfg = settings_of("fid", *flags, images="a", reference=reference)
        return script("fid").main(cfg)

    monkeypatch.setattr(published, "frechet_distance", of_64_features)
    images, _ = draw_shapes(7, 16)
    save_images(tmp_path / "a", images[:3])
    save_images(tmp_path / "b", images[3:])
    net = published.load_inception(CPU)
    features = published.inception_features(net, images)
    ours = published.gaussian([features[:3]], 2048)
    mu, sigma = published.gaussian([features[3:]], 2048)
    np.savez("edm.npz", mu=mu, sigma=sigma)  # statistics as EDM publishes them
    expected = of_64_features(*ours, mu, sigma)
    assert expected > 1e-3
    for reference in ("b", "edm.npz"):
        assert measured(reference, "--allow_few") == approx(expected, rel=1e-4)
    save_images(tmp_path / "small", images[:3, :, :8, :8])
    with pytest.raises(UserError, match="small holds images of another size than a"):
        measured("small", "--allow_few")
    with pytest.raises(UserError, match="3 images are fewer than the 2048 features"):
        measured("b", "--no-allow_few")


# -------------------------------------------------------------------------------------------- LPIPS

# VGG16's convolutions by their numbers. Between two groups is a pooling.
GROUPS = [
    (0, 2),
    (5, 7),
    (10, 12, 14),
    (17, 19, 21),
    (24, 26, 28),
]


def second_lpips(state, x, y):
    """LPIPS as its definition says, from the names of the weights."""
    shift = torch.tensor([-0.030, -0.088, -0.188])
    scale = torch.tensor([0.458, 0.448, 0.450])
    h = torch.cat([x, y]) - shift[:, None, None]
    h = h / scale[:, None, None]
    distance = 0
    for number, group in enumerate(GROUPS):
        if number > 0:
            h = F.max_pool2d(h, 2)
        for i in group:
            weight, bias = state[f"features.{i}.weight"], state[f"features.{i}.bias"]
            h = F.conv2d(h, weight, bias, padding=1).relu()
        a, b = F.normalize(h).chunk(2)
        difference = F.conv2d((a - b) ** 2, state[f"lin{number}.model.1.weight"])
        distance = distance + difference.mean((1, 2, 3))
    return distance


def published_lpips(monkeypatch):
    """LPIPS and its weights, from stand-ins for the two published files."""
    s = script("04")
    vgg = {"classifier.0.weight": torch.ones(1)}  # LPIPS has no use for it
    lpips = {}
    for key, weight in weights_for(s.LPIPS().state_dict()).items():
        if key.startswith("lin"):
            lpips[key] = weight.abs()
        else:
            vgg[key] = weight
    stand_in(monkeypatch, s, "VGG", vgg)
    stand_in(monkeypatch, s, "LPIPS", lpips)
    return s.load_lpips(CPU), vgg | lpips


def test_lpips_is_what_its_definition_says_with_weights_from_the_published_files(monkeypatch):
    """It equals a second derivation, compares at 64x64, and always has a gradient."""
    lpips, state = published_lpips(monkeypatch)
    assert not any(p.requires_grad for p in lpips.parameters())
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    assert_close(lpips(x, y), second_lpips(state, x, y))
    assert lpips(x, x).abs().max() == 0

    # Smaller images are enlarged.
    small = x[:, :, ::2, ::2]
    large = F.interpolate(small, (64, 64), mode="bilinear", align_corners=True)
    assert_close(lpips(small, y), lpips(large, y))

    # With every ReLU off, nothing is divided by 0.
    for i in (0, 2):
        lpips.features[i].bias.fill_(-100.0)
    distance = lpips(x.requires_grad_(), y).sum()
    distance.backward()
    assert distance.isfinite()
    assert x.grad.isfinite().all()
