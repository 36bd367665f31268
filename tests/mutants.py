"""Do the tests notice? Spoils the method in one place at a time, and sees whether a test fails.

    python tests/mutants.py               # all of them, in a quarter of an hour
    python tests/mutants.py --short       # six of them
    python tests/mutants.py --only TEXT   # those that mention TEXT

Each change below stands for an idea that somebody might spoil when they edit the code. It is
applied to a copy of the project, and then a test must fail. "network second" means the tests of
test_network.py with "second" in their names. A change no longer applies if its old text does not
occur exactly once. The exit code is 1 unless every change is caught.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = {  # file: (old text, new text, the idea that it ruins, the tests that must notice)
    "01_train_teacher.py": [
        ("x_t = s * x + (1 - s) * z", "x_t = s * z + (1 - s) * x",
         "t = 0 is noise", "maths flow_loss"),
        ("labels) - (x - z))", "labels) - (z - x))",
         "the velocity leads to the image", "maths flow_loss"),
        ("cfg.t_distribution, device)", '"uniform", device)', "the setting of t", "stages 01"),
        ("EPS + (1 - EPS) * t\n", "t\n", "t begins at EPS", "maths draw_t"),
        ("torch.randn(n, device=device).sigmoid()", "torch.rand(n)",
         "logit-normal t", "maths draw_t"),
        ("torch.rand(len(x), 1, 1, 1, ", "torch.rand(1, 1, 1, 1, ",
         "each flips on its own", "stages 01"),
        ("x.flip(3)", "x.flip(2)", "left and right are mirrored", "stages 01"),
        ('"01_teacher.pt", trainer.ema,', '"01_teacher.pt", trainer.trained,',
         "the average is kept", "pipeline ema"),
        ("labels.max() == classes - 1", "True",
         "own images: labels have no gaps", "data far_off"),
        ("net.class_names = names[:classes]", "pass", "class names: known from stage 01 on",
         "pipeline ones_own")],
    "02_generate_pairs.py": [
        ("range(first_index + first,", "range(first,",
         "own pairs, own noises", "stages 04"),
        ("z.to(net.device).float(), steps, labels)", "z.to(net.device).float(), 1, labels)",
         "pairs take many steps", "pipeline ema"),
        ("labels[first:last]", "labels[:last - first]",
         "labels belong to the noises", "speed size"),
        ("fast if len(indices) == batch else net", "fast", "a smaller last batch", "speed size"),
        ("list(files)[RANK::WORLD]", "list(files)", "processes share the parts", "speed own_parts"),
        ('"made from": made_from, "pairs"', '"pairs"', "no parts of another teacher",
         "speed own_parts"),
        ('"steps": steps, ', "", "pairs continue with the same steps", "pipeline same_settings"),
        (',\n              "precision": net.precision}', "}",
         "pairs continue in the same precision",
         "pipeline same_settings")],
    "03_annealing_reflow.py": [
        ("math.sqrt(1 - b**2) * z + b *", "(1 - b) * z + b *",
         "z_beta has variance 1", "maths reflow"),
        ("b * torch.randn_like(z)", "b * z.flip(0)", "z' is fresh in every step", "maths reflow"),
        ("labels) - (x - z_beta))", "labels) - (x - z))",
         "the line of the mixed pair", "maths reflow"),
        ("return max(0.0, 1 - k)", "return max(0.1, 1 - k)", "annealing ends at 0", "maths beta"),
        ("math.cos(math.pi * min(1.0, k))", "math.cos(math.pi * k)",
         "beta stays at 0", "maths beta"),
        ("torch.where(mirrored, z.flip(3), z)", "z",
         "both ends of a pair are mirrored", "stages 03"),
        ("draw_t(len(x), cfg.t_distribution, device)",
         "draw_t(1, cfg.t_distribution, device).expand(len(x))",
         "each pair has a t of its own", "stages 03"),
        ('pairs.get("class_names") or', "",
         "class names: from the pairs", "pipeline ones_own")],
    "04_flow_guided_distill.py": [
        ("torch.full(z.shape[:1], EPS,", "torch.full(z.shape[:1], 0.0,",
         "jumping at EPS", "maths distill"),
        ("x_t = z + s * velocity", "x_t = z + s * flow(z, 0 * t, labels)", "the student's own step",
         "maths guided"),
        ("x_t + (1 - s) * flow(", "x_t + s * flow(", "the second step arrives", "maths guided"),
        ("    with torch.no_grad():\n        # x_t", "    if True:\n        # x_t",
         "the target is fixed", "maths guided"),
        ("loss + cfg.guidance * guided", "loss + guided",
         "the weight of the guidance", "stages 04"),
        ("cfg.t_low + (cfg.t_high - cfg.t_low) *", "cfg.t_high *", "t is above t_low", "stages 04"),
        ('torch.randn_like(z) if cfg.guide_from == "noise" else z', "z",
         "fresh noise", "stages 04"),
        ("                               OWN_PAIRS)", "                               0)",
         "own pairs, own noises", "stages 04"),
        ("trainer.done, cfg.batch // WORLD)", "trainer.done, cfg.batch)",
         "processes share a batch: the flow", "speed share_of_the_work"),
        ("weights_only=True", "weights_only=False", "no code in LPIPS's weights",
         "pipeline no_code"),
        ("c = 0.00054 *", "c = 0.0054 *", "c of pseudo-Huber", "maths distill"),
        ("align_corners=True)", "align_corners=False)", "LPIPS aligns corners", "metrics lpips"),
        ("self.compared.append(len(layers) - 1)", "self.compared.append(len(layers) - 2)",
         "the layers that LPIPS compares", "metrics lpips"),
        (" + 1e-20).sqrt()", ").sqrt()", "LPIPS has a gradient where all is 0", "metrics lpips"),
        ("student.class_names = flow.class_names", "pass", "class names: of a new student",
         "pipeline ones_own")],
    "05_eval_fid.py": [
        ("known in (None, fingerprint(images))", "True", "the reference is what the teacher saw",
         "pipeline teacher_saw"),
        ("- 2 * root_trace", "- root_trace",
         "the trace of the root counts twice", "metrics frechet"),
        ("/ (n - 1).clamp(min=1)", "/ n", "the covariance is unbiased", "metrics frechet"),
        ("* (n / size)", "* ((n - 1) / (size - 1))", "TensorFlow 1's resize", "metrics tf1"),
        ("(resize_tf1(x) - 128) / 128", "resize_tf1(x) / 127.5 - 1",
         "scales by 128", "metrics inception"),
        ("(average, nn.MaxPool2d(3, 1, 1))", "(average, average)", "Inception ends with max",
         "metrics inception"),
        ("count_include_pad=False", "count_include_pad=True", "Inception's average has no padding",
         "metrics inception"),
        ("(255 * x).to(", "(255 * x + 0.5).to(",
         "the official code truncates", "metrics quantise"),
        ("fewest >= dimensions or", "True or",
         "few images make FID too large", "pipeline bad_settings"),
        ("argmax(1)", "argmin(1)", "the judge names the highest score", "pipeline named"),
        ("require(not judge_classes or", "require(True or",
         "a judge measures images of its classes", "extras judge_of"),
        ('removesuffix("_judge")', "upper()", "the name of a judge's distance", "extras judge_of"),
        ("return (self(x) + self(x.flip(3))) / 2", "return self(x)",
         "a judge of photos sees mirror images alike", "extras judge_of"),
        ("if not self.mirrored:", "if False:", "the judge of drawings does not", "extras judge_of"),
        ("x = x + conv(x)", "x = conv(x)", "a judge's convolutions add", "extras later_conv"),
        ("operations -= sum(", "operations -= 0 * sum(",
         "MACs as the paper counts", "network parameters"),
        ("numbers = mine[first:first + batch]", "numbers = mine[:min(batch, len(mine) - first)]",
         "each batch has its own noises", "speed size"),
        ("fast if len(numbers) == batch else net", "fast",
         "a smaller last batch", "speed size"),
        ("range(RANK, n, WORLD)", "range(WORLD - 1 - RANK, n, WORLD)",
         "each process makes its own images", "pipeline two_processes"),
        ("n_samples // WORLD // batch", "n_samples // batch", "processes share the images",
         "speed share_of_the_work"),
        ("weights_only=True", "weights_only=False", "no code in Inception's weights",
         "pipeline no_code"),
        ("benchmark=True, allow_tf32=False", "benchmark=True, allow_tf32=True",
         "Inception without TF32", "speed inception"),],
    "extras/drawings.py": [
        ("SHAPES[labels[i] // len(COLOURS)]", "SHAPES[labels[i] % 3]",
         "labels name the shape", "data drawings")],
    "extras/image_files.py": [
        (" {n:,}\" for y, n", "\" for y, n", "own images: the line has the sizes", "data order"),
        ("if len(counts) <= 20", "if len(counts) <= 21",
         "own images: 20 classes by name", "data many"),
        ("ImageOps.exif_transpose(image)", "image", "photos are turned upright", "data upright"),
        ("ImageOps.fit(image,", "ImageOps.pad(image,", "the centre is cropped", "data upright"),
        ('.mode.startswith("I")', '.mode.startswith("Z")',
         "own images: 16-bit grey is refused", "data odd"),
        ("classes.sort(key=int)", "pass", "own images: 2 is before 10", "data order"),
        (r'(\.[^/]|', "(", "own images: hidden folders are no classes", "data order"),
        ("__MACOSX/)", "x/)", "own images: nor is __MACOSX", "data order"),
        ("image = Image.alpha_composite(", "(",
         "own images: what is hidden is not seen", "data transparency"),
        ("[3][0] < 255", "[3][0] < 999",
         "own images: opaque is not transparent", "data transparency"),
        ("        if not path.is_dir():", "        if path.is_symlink() or not path.is_dir():",
         "own images: links are followed", "data circle"),
        ("elif not any(path.samefile(above) for above in path.parents)", "else",
         "own images: links in a circle are not", "data circle"),
        ("Counter(Path(name).suffix.lower()", "Counter('' and Path(name).suffix.lower()",
         "own images: what is left out is said", "data second"),
        ("changed.update(changes)", "pass", "own images: what is changed is said", "data second"),
        ("image.width != image.height", "False", "own images: cropping is said", "data second"),
        ("min(image.size) < image_size", "False", "own images: enlarging is said", "data second"),
        ("bad.append(f", "require(False, f",
         "own images: all bad ones are named at once", "data once"),
        ("bad[:10]", "bad", "own images: ten are named", "data once"),
        ("labels.ndim == 1 and (labels == numbers).all()", "True", "own images: labels are whole",
         "data other_labels"),
        ('len(given) == len(dataset["labels"])', "True", "own images: an image has one label",
         "data other_labels"),
        ("numbers.long()", "numbers", "own images: 1.0 is a label, too", "data whole_numbers"),
        ('.replace("\\\\", "/")', "", "own images: a backslash is a slash", "data backslashes"),
        ("require(name not in files", "require(True",
         "own images: a name occurs once", "data backslashes"),
        ("require(not below", "require(True",
         "own images: dataset.json is at the top", "data below"),
        ("return bool(read(cache, checksums=False))", "return cache.exists()",
         "own images: a cache file is whole", "data whole_is_made"),
        ("str(path.resolve()), image_size,", "image_size,", "decoded images: of one place",
         "pipeline decoded"),
        ("path.resolve()), image_size, ", "path.resolve()), ", "decoded images: of one size",
         "pipeline decoded"),
        ("image_size, names, stamps", "image_size, stamps", "decoded images: of these names",
         "pipeline decoded"),
        ("(stat.st_size, stat.st_mtime_ns)", "stat.st_mtime_ns",
         "decoded images: of files of this size", "pipeline decoded"),
        ("(stat.st_size, stat.st_mtime_ns)", "stat.st_size",
         "decoded images: of files of this date", "pipeline decoded"),
        ("tempfile.NamedTemporaryFile(dir=cache.parent)", "open(f'{cache}.new', 'w+b')",
         "own images: two runs at once", "data two_runs")],
    "common.py": [
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "one run in a folder",
         "pipeline one_run"),
        ("RANK < WORLD and (WORLD == 1", "True or (WORLD == 1",
         "left-over RANK is refused", "pipeline torchruns"),
        ('or "MASTER_PORT" in os.environ', "or True",
         "left-over WORLD_SIZE is refused", "pipeline torchruns"),
        ('WORLD == 1 or ":" not in cfg.device', "True",
         "each process has its GPU", "pipeline torchruns"),
        ("if not set(attn) <= set(sizes)", "if False",
         "attention nowhere is said", "pipeline attention"),
        ("cfg.folder / parent, checksums=False", "cfg.folder / parent",
         "parents are not read whole", "pipeline parent"),
        ("10**9, 2 * 10**9", "10**9, 10**9",
         "no noise is judged that was trained on", "maths noise"),
        ("[EVALUATION + i for", "[i for", "no noise is judged that was trained on", "maths noise"),
        ("float() / 127.5 - 1", "float() / 128 - 1", "255 is white", "data drawings"),
        ("127.5).round()", "127.5)", "rounding to uint8", "data drawings"),
        ("class_names=net.class_names", "class_names=[]", "class names: kept", "pipeline ones_own"),
        ('artifact.get("class_names") or', 'artifact["class_names"] or',
         "class names: older artifacts", "data numbers_and"),
        ("class_names=net.class_names", "class_names=[]", "class names: kept with a network",
         "pipeline ones_own"),
        ("[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]",
         "sines first", "network second"),
        ("999 * t[:, None]", "100 * t[:, None]", "t counts to 999", "network second"),
        ("self.attention((x + h) * math.sqrt(0.5))", "self.attention(x + h)",
         "variance", "network second"),
        ("* math.sqrt(classes))", ")", "the scale of labels", "network known"),
        ("self.conv1(self.dropout(h))", "self.conv1(h)", "dropout", "network begins"),
        ("F.silu(self.norm1(h))", "F.silu(self.norm1(self.dropout(h)))",
         "dropout comes once", "network dropout"),
        ("F.silu(self.norm1(h))\n        h = self.conv1(self.dropout(h))",
         "F.silu(self.norm1(self.dropout(h)))\n        h = self.conv1(h)",
         "dropout comes after the SiLU", "network dropout"),
        ("NEARLY_ZERO = 1e-10", "NEARLY_ZERO = 1.0",
         "the network begins by answering 0", "network begins"),
        ("net(x, t, labels) / steps", "net(x, t, labels)", "Euler's step is 1/N", "maths euler"),
        ("EPS + (1 - EPS) * i / steps", "i / steps", "sampling begins at EPS", "maths euler"),
        ("(n + 1) / max(1", "n / max(1", "the first step counts", "maths hand"),
        ("max(1.0, falling)", "1.0", "the learning rate falls", "maths hand"),
        ("min(cfg.ema, (1 + n) / (10 + n))\n", "cfg.ema\n", "the EMA forgets", "maths hand"),
        ("lerp_(gradient, 0.05)", "lerp_(gradient, 0.1)", "Muon's momentum", "maths hand"),
        ("gradient.lerp(momentum, 0.95)", "momentum", "Nesterov's look ahead", "maths hand"),
        ("beta=3.4445", "beta=3.4", "Newton-Schulz", "maths hand"),
        ("min(p.shape[:2]) > 3", "min(p.shape[:2]) > 2", "Muon is for hidden layers", "maths hand"),
        ("betas=(0.9, 0.999)", "betas=(0.9, 0.99)", "Adam's betas", "maths hand"),
        ("self.weights, 1.0)", "self.weights, 9.0)", "clipping", "maths hand"),
        ("self.trained = net.train()", "self.trained = net.eval()",
         "dropout in training", "stages 03"),
        ("copy.deepcopy(net).eval()", "copy.deepcopy(net)",
         "no dropout in the average", "stages 03"),
        ("spawn_key=(step, RANK)", "spawn_key=(RANK,)", "no number is drawn twice", "stages 03"),
        ("spawn_key=(step, RANK)", "spawn_key=(step,)", "processes draw others", "maths process"),
        ("tensor = tensor[i]\n", "tensor = tensor[i.sort()[0] if tensor.ndim > 1 else i]\n",
         "labels belong to the images", "stages 01"),
        ("calls < COMPILE_CALLS", "calls > COMPILE_CALLS", "compiling pays after some calls",
         "speed so_many"),
        ('(net.device.type != "cuda" or', "(", "a CPU does not compile by itself", "speed so_many"),
        ('if cfg.compile == "off":', 'if cfg.compile == "never":',
         "--compile off", "speed so_many"),
        ('dynamic=False, mode="reduce-overhead")', "dynamic=False)",
         "CUDA graphs", "speed so_many"),
        ("torch.set_grad_enabled(training)", "torch.set_grad_enabled(True)",
         "sampling has no gradient", "speed called"),
        ("                net.zero_grad()\n", "", "compiling leaves no gradient", "speed called"),
        ("    except torch.OutOfMemoryError:\n        raise\n", "",
         "memory ends the run", "speed cannot"),
        ('say(f"not compiled, so slower: {error!r:.200}")', "raise", "what cannot be compiled runs",
         "speed cannot"),
        ("cudnn.benchmark = True", "cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False",
         "TF32 stays on", "speed tf32"),
        ("                if step == first:", "                if step == 0:",
         "speed without the first step", "maths speed"),
        ("self.log(None)", "self.log(now - logged)", "speed without the first step", "maths speed"),
        ("contextlib.suppress(ValueError):  # only", "contextlib.suppress():  # only",
         "threads cannot catch signals", "maths thread"),
        ("[loss, norm]", "[loss + 0 * loss.item(), norm]", "no step waits", "stages float64"),
        ('load_state_dict(state["ema"])', 'load_state_dict(state["weights"])', "the state's EMA",
         "maths bits"),
        ('self.adam.load_state_dict(state["adam"])', "pass",
         "the state has Adam's moments", "maths bits"),
        ("[momentum.to(self.device) for", "[0 * momentum for",
         "the state has Muon's momenta", "maths bits"),
        ('state["done"], state["strips"]', 'state["done"], {}',
         "the state has the samples", "maths bits"),
        ('require_same_run(self.path, state["run"], self.run)', "pass",
         "other settings are refused", "maths another"),
        ("(self.cfg.batch // WORLD,)", "(self.cfg.batch,)", "processes share a batch: rows",
         "speed share_each"),
        ("batch // WORLD, training=True", "batch, training=True",
         "processes share a batch: compiling", "speed share_each"),
        ("cfg.batch % WORLD == 0", "True", "processes share a batch: evenly", "speed share_each"),
        ("WORLD > 1:  # averages", "WORLD > 2:  # averages", "processes average their gradients",
         "speed share_each"),
        ("    if RANK == 0:\n        save(cfg.folder", "    if True:\n        save(cfg.folder",
         "process 0 writes the network", "speed only_process_0"),
        ("        if RANK == 0:\n            save(", "        if True:\n            save(",
         "process 0 writes the state", "speed only_process_0"),
        ("if RANK == 0:\n        with writing(path)", "if True:\n        with writing(path)",
         "process 0 writes the picture", "speed only_process_0"),
        ("weights_only=True, mmap", "weights_only=False, mmap", "no code in an artifact",
         "pipeline no_code"),
        ("recent.isfinite().all()", "True", "NaN is noticed", "maths finite"),
        ("require(found == identity", "require(found",
         "what is out of date is refused", "pipeline mixed"),
        ("archive.testzip() is None", "True", "damage is noticed", "maths damaged")],
    "extras/fid.py": [
        ("allow_pickle=False", "allow_pickle=True", "no code in statistics", "pipeline no_code")],
    "extras/train_judge.py": [
        ("& columns[:, None", "| columns[:, None", "a judge does not see a square",
         "extras square"),
        ("1 - side, size, (2, n, 1)", "1 - side, size, (2, 1, 1)",
         "each image has its own square", "extras square")],
    "extras/prepare_images.py": [
        ("values // 257", "values // 256 // 256",
         "own images: 16-bit grey is scaled", "data command_reads"),
        ("return label.index(1)", "return 0", "own images: one-hot labels", "data command_reads"),
        ("os.path.join(os.path.dirname(found[0]), name", "(name",
         "own images: dataset.json is read where it lies", "data below"),
        ("                continue\n", "                raise\n",
         "own images: bad ones are left out", "data command_reads")],
}
SHORT = (
    "t = 0 is noise",
    "z_beta has variance 1",
    "the student's own step",
    "sines first",
    "Nesterov",
    "the covariance is unbiased")


def verdict(copy, name, old, new, tests):
    """Makes the change in the copy of the project: "caught" if the tests fail with it."""
    text = (ROOT / name).read_text()
    if text.count(old) != 1:
        return "NO LONGER APPLIES"
    path = copy / name
    path.write_text(text.replace(old, new))
    file, keyword = tests.split()
    command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/test_{file}.py", "-k", keyword]
    # Bytecode is kept by the date of its source, and the changes follow each other too fast for it.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True)
    path.write_text(text)
    known = {0: "SURVIVED", 1: "caught"}
    return known.get(done.returncode, f"pytest ended with {done.returncode}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="six of them")
    parser.add_argument("--only", default="", help="those that mention this text")
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        left_out = shutil.ignore_patterns(".*", "out", "data", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=left_out)
        for name, mutants in MUTANTS.items():
            for old, new, idea, tests in mutants:
                if given.short and not idea.startswith(SHORT):
                    continue
                if given.only not in f"{name} {old} {new} {idea} {tests}":
                    continue
                found.append(verdict(copy, name, old, new, tests))
                print(f"| {found[-1]:8} | {name[:2]} | {idea} | {old!r} -> {new!r}", flush=True)
    caught = found.count("caught")
    print(f"{caught} of {len(found)} caught")
    sys.exit(caught < len(found))


if __name__ == "__main__":
    main()
