"""What makes GPUs fast, as far as a CPU can show it: compiling, TF32, large batches, processes."""
import shutil
from types import SimpleNamespace

import pytest
import torch

import common
from common import compiled, noise_for
from conftest import artifact, call, filled, script, settings_of

NET = dict(image_size=16, base=8, mult=(1,),
           blocks=1, attn=())


class Fast(torch.nn.Module):
    """In place of a compiled network: the same, and it lists what it is given."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.given = []

    def forward(self, x, t, labels=None):
        shapes = [tensor.shape for tensor in (x, t, labels) if tensor is not None]
        self.given.append((*shapes, torch.is_grad_enabled()))
        return self.net(x, t, labels)

    def __len__(self):
        raise TypeError("UNet does not support len()")

    def __getattr__(self, name):  # all else is the network's, as with torch's own
        if name == "net":
            return super().__getattr__(name)
        return getattr(self.net, name)

    def batches(self):
        """The sizes of the batches that it was given."""
        return {x_shape[0] for x_shape, *_ in self.given}


@pytest.mark.parametrize("compile, device, calls, expected", [
    ("auto", "cuda", common.COMPILE_CALLS, True),
    ("auto", "cuda", common.COMPILE_CALLS - 1, False),
    ("auto", "cpu", 10**9, False),
    ("auto", "mps", 10**9, False),
    ("on", "cpu", 1, True),
    ("on", "cuda", 1, True),
    ("off", "cuda", 10**9, False)])
def test_it_compiles_on_cuda_from_so_many_calls_on_or_as_told(
        monkeypatch, compile, device, calls, expected):
    """Compiling takes a minute, so it is done where that pays, or where the user asks for it."""
    class Compiling(Exception):
        pass

    def asked(net, **how):
        assert how == dict(dynamic=False, mode="reduce-overhead")
        raise Compiling

    monkeypatch.setattr(torch, "compile", asked)
    cfg = SimpleNamespace(compile=compile)
    net = SimpleNamespace(device=SimpleNamespace(type=device))
    if expected:
        with pytest.raises(Compiling):
            compiled(cfg, net, calls, 4)
    else:
        assert compiled(cfg, net, calls, 4) is net


@pytest.mark.parametrize("training, classes, shapes", [
    (False, 0, [(5,)]),
    (True, 3, [(5,), (5,)])])
def test_what_is_compiled_has_been_called_as_it_will_be_and_is_as_it_was(
        monkeypatch, training, classes, shapes):
    """Compiling happens in trial calls like those to come. They leave no trace in the weights."""
    monkeypatch.setattr(torch, "compile", lambda net, **how: Fast(net))
    net = filled(**NET, classes=classes)
    before = [p.clone() for p in net.parameters()]
    fast = compiled(SimpleNamespace(compile="on"), net, 9, 5, training)
    assert fast.net is net
    assert fast.given == [((5, 3, 16, 16), *shapes, training)] * 3
    for p, old in zip(net.parameters(), before):
        assert p.grad is None
        assert torch.equal(p, old)


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why_unless_memory_ends(monkeypatch, capsys):
    """A compiler that fails costs speed only. Without memory the network could not run either."""
    def failing(error):
        def fails(*given):
            raise error
        monkeypatch.setattr(torch, "compile", lambda net, **how: fails)
        return compiled(SimpleNamespace(compile="on"), net, 9, 5)

    net = filled(**NET)
    assert failing(RuntimeError("no C++ compiler\nand 100 lines more")) is net
    _, reason = capsys.readouterr().out.splitlines()
    assert reason.startswith("not compiled, so slower: RuntimeError('no C++ compiler")
    assert failing(AssertionError()) is net  # an error without a text
    with pytest.raises(torch.OutOfMemoryError):
        failing(torch.OutOfMemoryError("much\nmore"))


def test_a_gpu_keeps_torchs_tf32(monkeypatch):
    """On a GPU start() leaves the precision to torch. A stand-in answers what start() asks."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    cfg = SimpleNamespace(device="auto", seed=0, precision="auto")
    before = torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # torch's own
        common.start(cfg, "test")
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark
    assert cfg.precision == "bf16"
    assert torch.get_float32_matmul_precision() == before


def test_inception_computes_in_all_bits_of_float32():
    """TF32 would change an FID, so Inception goes without it, and puts it back."""
    seen = []

    def network(x):
        seen.append(torch.backends.cudnn.allow_tf32)
        return x.mean((2, 3))

    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        for resize in ("tf1", "pytorch_fid"):
            script("05").inception_features(network, images, resize)
        assert torch.backends.cudnn.allow_tf32
    assert seen == [False, False]


def test_the_size_of_batches_changes_no_pair_and_no_image_but_by_rounding(
        finished, tmp_path, monkeypatch):
    """Whole batches go to the compiled network, and the last, smaller one to the network itself."""
    sizes, fasts = [], []
    forward = common.UNet.forward

    def listed(net, x, t, labels=None):
        sizes.append(len(x))
        return forward(net, x, t, labels)

    def stand_in(cfg, net, calls, batch):
        fasts.append(Fast(net))
        return fasts[-1]

    stage_02, stage_05 = script("02"), script("05")
    monkeypatch.setattr(common.UNet, "forward", listed)
    monkeypatch.setattr(stage_02, "sampling_batch", lambda net: 6)
    monkeypatch.setattr(stage_05, "sampling_batch", lambda net: 6)
    monkeypatch.setattr(stage_02, "compiled", stand_in)

    # 1. Stage 02: 40 pairs, each of two steps.
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / "01_teacher.pt").symlink_to(finished / "shapes/01_teacher.pt")
    call("02", tmp_path)
    assert sizes == 12 * [6] + [4, 4]
    assert fasts[0].batches() == {6}
    again, pairs = artifact(tmp_path, "02_pairs.pt"), artifact(finished, "02_pairs.pt")
    assert torch.equal(again["z"], pairs["z"])
    assert torch.equal(again["labels"], pairs["labels"])
    torch.testing.assert_close(again["x"], pairs["x"], atol=2e-3, rtol=1e-3)

    # 2. Stage 05: 16 images.
    net = filled(**NET, classes=18)
    fast = Fast(net)
    labels = common.labels_for(3, 16, 18)
    cfg = SimpleNamespace(seed=3, rounding="round")
    sizes.clear()
    images = stage_05.make_images(net, fast, cfg, 16, 2, labels)
    assert sizes == [6, 6, 6, 6, 4, 4]
    assert fast.batches() == {6}
    numbers = range(common.EVALUATION, common.EVALUATION + 16)
    z = noise_for(3, numbers, (3, 16, 16))
    expected = common.euler(net, z, 2, labels)
    assert (images.int() - common.to_uint8(expected)).abs().max() <= 1

    # 3. Each noise keeps its own label.
    cfg = settings_of("02", out=tmp_path / "own", seed=3)
    stage_02.make_pairs(cfg, "02_pairs.pt", net, {}, 16, 2, common.EVALUATION)
    made = common.read(cfg.folder / "02_pairs.pt")
    expected = common.euler(net, z.half().float(), 2, labels)
    torch.testing.assert_close(made["x"].float(), expected, atol=2e-3, rtol=1e-3)


# ------------------------------------------------------------------------------- several processes

@pytest.fixture
def compilations(monkeypatch):
    """Nothing is compiled. The list of (calls, batch) for which something would have been."""
    found = []

    def listed(cfg, net, calls, batch, training=False):
        found.append((calls, batch))
        return net

    for module in (common, script("04"), script("05")):
        monkeypatch.setattr(module, "compiled", listed)
    return found


def test_the_processes_share_each_batch_and_average_their_gradients(
        tmp_path, monkeypatch, compilations):
    """The size of a batch does not depend on the number of processes, so each draws a part."""
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda net, **how: Fast(net))
    cfg = settings_of("03", out=tmp_path, batch=8, steps=5)
    net = filled(**NET)
    trainer = common.Trainer(cfg, "03 reflow", net, {}, 16)
    assert compilations == [(5, 8)]
    assert isinstance(trainer.net, Fast)
    rows, = trainer.draw(torch.arange(100))
    assert len(rows) == 4
    cfg.batch = 9
    with pytest.raises(common.UserError, match="the batch a multiple of the 2 processes"):
        common.Trainer(cfg, "03 reflow", net, {}, cfg.batch)


def test_a_process_compiles_for_its_share_of_the_work(
        finished, tmp_path, monkeypatch, compilations):
    """The flow that guides in 04, and the networks in 05, see a part of each batch or sample."""
    shutil.copytree(finished / "shapes", tmp_path / "shapes")
    monkeypatch.setattr(script("04"), "WORLD", 2)
    monkeypatch.setattr(script("05"), "WORLD", 2)
    monkeypatch.setattr(script("05"), "sampling_batch", lambda net: 4)
    call("04", tmp_path, "--restart")
    call("05", tmp_path, only="student", metric="none", n_samples=24)
    student, flow, judged = compilations
    assert flow == (4, 4)
    assert judged == (3, 4)


def test_a_process_makes_its_own_parts_of_the_pairs(tmp_path, monkeypatch):
    """The parts of the pairs are shared out, and all must be made by the same network."""
    stage_02 = script("02")
    monkeypatch.setattr(stage_02, "RANK", 1)
    monkeypatch.setattr(stage_02, "WORLD", 2)
    cfg = settings_of("02", out=tmp_path)
    net = filled(**NET)
    stage_02.make_pairs(cfg, "02_pairs.pt", net, {}, 40, 2, 0)
    parts = (cfg.folder / "02_pairs.pt.parts").iterdir()
    assert [path.name for path in parts] == ["000000016.pt"]
    with pytest.raises(common.UserError, match="made from was {}, is {'01_teacher.pt': 'another'}"):
        stage_02.make_pairs(cfg, "02_pairs.pt", net, {"01_teacher.pt": "another"}, 40, 2, 0)


def test_only_process_0_writes(tmp_path, monkeypatch):
    """All processes have the same networks and pictures, so one of them writes them."""
    monkeypatch.setattr(common, "RANK", 1)
    cfg = settings_of("03", out=tmp_path)
    net = filled(**NET)
    common.Trainer(cfg, "03 reflow", net, {}, cfg.batch).save_state()
    common.save_network(cfg, "03_reflow.pt", net, {})
    common.save_grid(cfg.folder / "03_samples.png", [torch.zeros(1, 3, 8, 8)])
    assert not cfg.folder.exists()
