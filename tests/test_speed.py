"""What makes a GPU fast, as far as a CPU can show it: when networks are compiled, TF32, sizes of batches."""
from types import SimpleNamespace

import pytest
import torch

import common
from common import compiled, noise_for
from conftest import artifact, call, filled, script

NET = dict(image_size=16, base=8, mult=(1,), blocks=1, attn=())


class Fast(torch.nn.Module):
    """In place of a compiled network: the same, and it keeps what it is given."""

    def __init__(self, net):
        super().__init__()
        self.given, self.net = [], net

    def forward(self, x, t, labels=None):
        labels_shape = None if labels is None else labels.shape
        self.given.append((x.shape, t.shape, labels_shape, torch.is_grad_enabled()))
        return self.net(x, t, labels)

    def __len__(self):
        raise TypeError("UNet does not support len()")

    def __getattr__(self, name):  # all else is the network's, as with torch's own
        return super().__getattr__(name) if name == "net" else getattr(self.net, name)


@pytest.mark.parametrize("compile, device, calls, expected", [
    ("auto", "cuda", common.COMPILE_CALLS, True), ("auto", "cuda", common.COMPILE_CALLS - 1, False),
    ("auto", "cpu", 10**9, False), ("auto", "mps", 10**9, False), ("on", "cpu", 1, True),
    ("on", "cuda", 1, True), ("off", "cuda", 10**9, False)])
def test_it_compiles_on_cuda_from_so_many_calls_on_or_as_told(monkeypatch, compile, device, calls, expected):
    class Compiling(Exception):
        pass

    def asked(net, **how):
        assert how == dict(dynamic=False, mode="reduce-overhead")
        raise Compiling

    monkeypatch.setattr(torch, "compile", asked)
    cfg, net = SimpleNamespace(compile=compile), SimpleNamespace(device=SimpleNamespace(type=device))
    try:
        found = compiled(cfg, net, calls, 4)
    except Compiling:
        found = None
    assert (found is None) == expected and found in (None, net)


@pytest.mark.parametrize("training, classes", [(False, 0), (True, 3)])
def test_what_is_compiled_has_been_called_as_it_will_be_and_is_as_it_was(monkeypatch, training, classes):
    monkeypatch.setattr(torch, "compile", lambda net, **how: Fast(net))
    net = filled(**NET, classes=classes)
    before = [p.clone() for p in net.parameters()]
    fast = compiled(SimpleNamespace(compile="on"), net, 9, 5, training)
    assert fast.net is net and len(fast.given) == 3
    assert set(fast.given) == {((5, 3, 16, 16), (5,), (5,) if classes else None, training)}
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(net.parameters(), before))


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why_unless_memory_ends(monkeypatch, capsys):
    def failing(error):
        def fails(*given):
            raise error
        monkeypatch.setattr(torch, "compile", lambda net, **how: fails)
        return compiled(SimpleNamespace(compile="on"), net, 9, 5)

    net = filled(**NET)
    assert failing(RuntimeError("no C++ compiler\nand 100 lines more")) is net
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("not compiled, so slower: RuntimeError('no C++ compiler")
    assert failing(AssertionError()) is net  # without a word
    with pytest.raises(torch.OutOfMemoryError):
        failing(torch.OutOfMemoryError("much\nmore"))


def test_a_gpu_keeps_torchs_tf32(monkeypatch):
    """A stand-in for a GPU, as far as start() asks."""
    zeros, before = torch.zeros, torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    for name, answer in (("is_available", True), ("set_device", None), ("is_bf16_supported", True)):
        monkeypatch.setattr(torch.cuda, name, lambda *given, answer=answer, **more: answer)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # torch's own
        cfg = SimpleNamespace(device="auto", seed=0, precision="auto")
        common.start(cfg, "test")
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.benchmark
    assert cfg.precision == "bf16" and torch.get_float32_matmul_precision() == before


def test_inception_computes_in_all_bits_of_float32():
    def network(x):
        seen.append(torch.backends.cudnn.allow_tf32)
        return x.mean((2, 3))

    seen, images = [], torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        for resize in ("tf1", "pytorch_fid"):
            script("05").inception_features(network, images, resize)
        assert seen == [False, False] and torch.backends.cudnn.allow_tf32  # afterwards as before


def test_the_size_of_batches_changes_no_pair_and_no_image_but_by_rounding(finished, tmp_path, monkeypatch):
    """Whole batches go to the compiled network, and the last, smaller one to the network itself."""
    sizes, fasts, real = [], [], common.UNet.forward

    def forward(net, x, t, labels=None):
        sizes.append(len(x))
        return real(net, x, t, labels)

    def stand_in(cfg, net, calls, batch):
        fasts.append(Fast(net))
        return fasts[-1]

    monkeypatch.setattr(common.UNet, "forward", forward)
    pairs, (s02, s05) = artifact(finished, "02_pairs.pt"), (script("02"), script("05"))
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/01_teacher.pt").symlink_to(finished / "shapes/01_teacher.pt")
    for s in (s02, s05):
        monkeypatch.setattr(s, "sampling_batch", lambda net: 6)
    monkeypatch.setattr(s02, "compiled", stand_in)
    call("02", tmp_path)  # 40 pairs in files of 16, 16 and 8
    assert sizes == [6, 6, 6, 6, 4, 4] * 2 + [6, 6, 2, 2]
    assert {given[0][0] for given in fasts[0].given} == {6}
    again = artifact(tmp_path, "02_pairs.pt")
    assert torch.equal(again["z"], pairs["z"]) and torch.equal(again["labels"], pairs["labels"])
    torch.testing.assert_close(again["x"], pairs["x"], atol=2e-3, rtol=1e-3)

    net = filled(**NET, classes=18)
    cfg, labels = SimpleNamespace(seed=3, rounding="round"), common.labels_for(3, 16, 18)
    fast = Fast(net)
    sizes.clear()
    images = s05.make_images(net, cfg, 16, 2, labels, fast)
    assert sizes == [6, 6, 6, 6, 4, 4] and {given[0][0] for given in fast.given} == {6}
    z = noise_for(3, range(common.EVALUATION, common.EVALUATION + 16), (3, 16, 16))
    expected = common.euler(net, z, 2, labels)
    assert (images.int() - common.to_uint8(expected)).abs().max() <= 1
    x = s02.follow(net, fast, z.half(), 2, labels, common.euler)  # each noise with its own label
    expected = common.euler(net, z.half().float(), 2, labels)
    torch.testing.assert_close(x.float(), expected, atol=2e-3, rtol=1e-3)
