"""Do the tests notice? Ruins the method in one place at a time, and sees whether a test fails.

    python tests/mutants.py              # all, in about ten minutes; --short: six of them; --only TEXT: some

Each change below stands for an idea that somebody who changes the code might ruin. It is applied to a copy of
the project, where a test must fail: "network second" are those of test_network.py with "second" in the name.
A change whose old text does not occur exactly once no longer applies. The exit code is 1 if any survived.
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
        ("x_t = s * x + (1 - s) * z", "x_t = s * z + (1 - s) * x", "t = 0 is noise", "maths flow_loss"),
        ("labels) - (x - z))", "labels) - (z - x))", "the velocity leads to the image", "maths flow_loss"),
        ("cfg.t_distribution, device)", '"uniform", device)', "the setting of t", "stages 01"),
        ("EPS + (1 - EPS) * t\n", "t\n", "t begins at EPS", "maths draw_t"),
        ("torch.randn(n, device=device).sigmoid()", "torch.rand(n)", "logit-normal t", "maths draw_t"),
        ("torch.rand(len(x), 1, 1, 1, ", "torch.rand(1, 1, 1, 1, ", "each flips on its own", "stages 01"),
        ("x.flip(3)", "x.flip(2)", "left and right are mirrored", "stages 01"),
        ('"01_teacher.pt", trainer.ema,', '"01_teacher.pt", trainer.trained,', "the average is kept",
         "pipeline ema"),
        ("number not in numbers]", "number < 0]", "own images: labels have no gaps", "data far_off"),
        ("net.class_names = names[:classes]", "pass", "class names: known from stage 01 on",
         "pipeline ones_own")],
    "02_generate_pairs.py": [
        ("noise_for(cfg.seed, range(first_index + first,", "noise_for(cfg.seed, range(first,",
         "own pairs, own noises", "stages 04"),
        ("x = sampler(net, z.to(device).float(), steps, y)", "x = sampler(net, z.to(device).float(), 1, y)",
         "pairs take many steps", "pipeline ema"),
        ("labels[first:last]", "labels[:last - first]", "labels belong to the pairs", "pipeline ema"),
        ("class_names=net.class_names", "class_names=[]", "class names: kept with pairs",
         "pipeline ones_own")],
    "03_annealing_reflow.py": [
        ("math.sqrt(1 - b**2) * z + b *", "(1 - b) * z + b *", "z_beta has variance 1", "maths reflow"),
        ("b * torch.randn_like(z)", "b * z.flip(0)", "z' is fresh in every step", "maths reflow"),
        ("labels) - (x - z_beta))", "labels) - (x - z))", "the line of the mixed pair", "maths reflow"),
        ("return max(0.0, 1 - k)", "return max(0.1, 1 - k)", "annealing ends at 0", "maths beta"),
        ("math.cos(math.pi * min(1.0, k))", "math.cos(math.pi * k)", "beta stays at 0", "maths beta"),
        ("torch.where(mirrored, z.flip(3), z)", "z", "both ends of a pair are mirrored", "stages 03"),
        ("draw_t(len(x), cfg.t_distribution, device)", "draw_t(1, cfg.t_distribution, device).expand(len(x))",
         "each pair has a t of its own", "stages 03"),
        ('pairs.get("class_names", [])', "[]", "class names: from the pairs", "pipeline ones_own")],
    "04_flow_guided_distill.py": [
        ("torch.full(z.shape[:1], EPS,", "torch.full(z.shape[:1], 0.0,", "jumping at EPS", "maths distill"),
        ("x_t = z + s * velocity", "x_t = z + s * flow(z, 0 * t, labels)", "the student's own step",
         "maths guided"),
        ("x_t + (1 - s) * flow(", "x_t + s * flow(", "the second step arrives", "maths guided"),
        ("    with torch.no_grad():\n        # x_t", "    if True:\n        # x_t", "the target is fixed",
         "maths guided"),
        ("loss + cfg.guidance * guided", "loss + guided", "the weight of the guidance", "stages 04"),
        ("cfg.t_low + (cfg.t_high - cfg.t_low) *", "cfg.t_high *", "t is above t_low", "stages 04"),
        ('torch.randn_like(z) if cfg.guide_from == "noise" else z', "z", "fresh noise", "stages 04"),
        ("cfg.pair_steps, OWN_PAIRS)", "cfg.pair_steps, 0)", "own pairs, own noises", "stages 04"),
        ("c = 0.00054 *", "c = 0.0054 *", "c of pseudo-Huber", "maths distill"),
        ("align_corners=True)", "align_corners=False)", "LPIPS aligns corners", "metrics lpips"),
        ("15: 256, 22: 512", "15: 256, 20: 512", "the layers that LPIPS compares", "metrics lpips"),
        (" + 1e-20).sqrt()", ").sqrt()", "LPIPS has a gradient where all is 0", "metrics lpips"),
        ("student.class_names = flow.class_names", "pass", "class names: of a new student",
         "pipeline ones_own")],
    "05_eval_fid.py": [
        ("- 2 * root_trace)", "- root_trace)", "the trace of the root counts twice", "metrics frechet"),
        ("/ (n - 1).clamp(min=1)", "/ n", "the covariance is unbiased", "metrics frechet"),
        ("* (n / size)", "* ((n - 1) / (size - 1))", "TensorFlow 1's resize", "metrics tf1"),
        ("(resize_tf1(x) - 128) / 128", "resize_tf1(x) / 127.5 - 1", "scales by 128", "metrics inception"),
        ('"Mixed_7c", nn.MaxPool2d(3, 1, 1)', '"Mixed_7c", average', "Inception ends with max",
         "metrics inception"),
        ("count_include_pad=False", "count_include_pad=True", "Inception's average has no padding",
         "metrics inception"),
        ("+ 1) / 2 * 255)", "+ 1) / 2 * 255 + 0.5)", "the official code truncates", "metrics quantise"),
        ("names.index(cfg.label)", "0", "--label draws what is asked for", "pipeline png"),
        ("n_fewest >= fc.in_features or", "True or", "few images make FID too large", "metrics fid_of"),
        ("argmax(1)", "argmin(1)", "the judge names the highest score", "pipeline named"),
        ("macs -= sum(", "macs -= 0 * sum(", "MACs as the paper counts", "network parameters"),
        ("return net.class_names or", "return", "class names: names before numbers", "pipeline ones_own")],
    "common.py": [
        ("10**9, 2 * 10**9", "10**9, 10**9", "no noise is judged that was trained on", "maths noise"),
        ("EVALUATION + i for", "i for", "no noise is judged that was trained on", "maths noise"),
        ("float() / 127.5 - 1", "float() / 128 - 1", "255 is white", "data drawings"),
        ("127.5).round()", "127.5)", "rounding to uint8", "data drawings"),
        ("[labels[i] // len(COLOURS)]", "[labels[i] % 3]", "labels name the shape", "data drawings"),
        ("ImageOps.exif_transpose(image)", "image", "photos are turned upright", "data upright"),
        ("ImageOps.fit(image,", "ImageOps.pad(image,", "the centre is cropped", "data upright"),
        ('.mode.startswith("I")', '.mode.startswith("Z")', "own images: 16-bit grey is refused", "data odd"),
        ("classes.sort(key=int)", "pass", "own images: 2 is before 10", "data order"),
        (r'(\.[^/]|', "(", "own images: hidden folders are no classes", "data order"),
        ("__MACOSX/)", "x/)", "own images: nor is __MACOSX", "data order"),
        (" {n:,}\" for label, n", "\" for label, n", "own images: the line has the sizes", "data order"),
        ("if len(counts) > 20", "if len(counts) > 21", "own images: 20 classes by name", "data many"),
        ("image = Image.alpha_composite(", "(", "own images: what is hidden is not seen", "data transparency"),
        ("[3][0] < 255", "[3][0] < 999", "own images: opaque is not transparent", "data transparency"),
        ("        if not path.is_dir():", "        if path.is_symlink() or not path.is_dir():",
         "own images: links are followed", "data circle"),
        ("elif not any(path.samefile(above) for above in path.parents)", "else",
         "own images: links in a circle are not", "data circle"),
        ('Counter(os.path.splitext(name)[1].lower()', "Counter('' and os.path.splitext(name)[1].lower()",
         "own images: what is left out is said", "data second"),
        ("changed.update(changes)", "pass", "own images: what is changed is said", "data second"),
        ("image.width != image.height", "False", "own images: cropping is said", "data second"),
        ("min(image.size) < image_size", "False", "own images: enlarging is said", "data second"),
        ("bad.append(f", "require(False, f", "own images: all bad ones are named at once", "data once"),
        ("bad[:10]", "bad", "own images: ten are named", "data once"),
        ("labels.ndim == 1 and (labels == numbers).all()", "True", "own images: labels are whole",
         "data other_labels"),
        ('len(given) == len(dataset["labels"])', "True", "own images: an image has one label",
         "data other_labels"),
        ("numbers.long()", "numbers", "own images: 1.0 is a label, too", "data whole_numbers"),
        ('.replace("\\\\", "/")', "", "own images: a backslash is a slash", "data backslashes"),
        ("require(name not in files", "require(True", "own images: a name occurs once", "data backslashes"),
        ("require(not below", "require(True", "own images: dataset.json is at the top", "data below"),
        ("file.seek(-FOOTER, os.SEEK_END)", "return [[2, 3, 8, 8], '']", "own images: a cache file is whole",
         "data whole_is_made"),
        (".{os.urandom(4).hex()}", ".new", "own images: two runs at once", "data two_runs"),
        ('artifact.get("class_names", [])', 'artifact["class_names"]', "class names: older artifacts",
         "data numbers_and"),
        ("class_names=net.class_names", "class_names=[]", "class names: kept with a network",
         "pipeline ones_own"),
        ("[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]", "sines first", "network second"),
        ("999 * t[:, None]", "100 * t[:, None]", "t counts to 999", "network second"),
        ("self.attention((x + h) * math.sqrt(0.5))", "self.attention(x + h)", "variance", "network second"),
        ("* math.sqrt(classes))", ")", "the scale of labels", "network known"),
        ("self.dropout(F.silu(self.norm1(h)))", "F.silu(self.norm1(h))", "dropout", "network begins"),
        ("NEARLY_ZERO = 1e-10", "NEARLY_ZERO = 1.0", "the network begins by answering 0", "network begins"),
        ("net(x, t, labels) / steps", "net(x, t, labels)", "Euler's step is 1/N", "maths euler"),
        ("EPS + (1 - EPS) * i / steps", "i / steps", "sampling begins at EPS", "maths euler"),
        ("(n + 1) / max(1", "n / max(1", "the first step counts", "maths hand"),
        ("max(1.0, cfg.cooldown *", "max(1.0, 0 *", "the learning rate falls", "maths hand"),
        ("min(cfg.ema, (1 + n) / (10 + n))\n", "cfg.ema\n", "the EMA forgets", "maths hand"),
        ("lerp_(gradient, 0.05)", "lerp_(gradient, 0.1)", "Muon's momentum", "maths hand"),
        ("gradient.lerp(momentum, 0.95)", "momentum", "Nesterov's look ahead", "maths hand"),
        ("beta=3.4445", "beta=3.4", "Newton-Schulz", "maths hand"),
        ("min(p.shape[:2]) > 3", "min(p.shape[:2]) > 2", "Muon is for hidden layers", "maths hand"),
        ("betas=(0.9, 0.999)", "betas=(0.9, 0.99)", "Adam's betas", "maths hand"),
        ("self.weights, 1.0)", "self.weights, 9.0)", "clipping", "maths hand"),
        ("self.trained = net.train()", "self.trained = net.eval()", "dropout in training", "stages 03"),
        ("copy.deepcopy(net).eval()", "copy.deepcopy(net)", "no dropout in the average", "stages 03"),
        ("spawn_key=(step, RANK)", "spawn_key=(RANK,)", "no number is drawn twice", "stages 03"),
        ("spawn_key=(step, RANK)", "spawn_key=(step,)", "processes draw others", "maths process"),
        ("else tensor[i] for", "else tensor[i.sort()[0] if tensor.ndim > 1 else i] for",
         "labels belong to the images", "stages 01"),
        ("[loss, norm]", "[loss + 0 * loss.item(), norm]", "no step waits", "stages float64"),
        ('load_state_dict(state["ema"])', 'load_state_dict(state["weights"])', "the state's EMA",
         "maths bits"),
        ('self.adam.load_state_dict(state["adam"])', "pass", "the state has Adam's moments", "maths bits"),
        ("[momentum.to(self.device) for", "[0 * momentum for", "the state has Muon's momenta", "maths bits"),
        ('state["done"], state["strips"]', 'state["done"], {}', "the state has the samples", "maths bits"),
        ('require_same_run(self.path, state["run"], self.run)', "pass", "other settings are refused",
         "maths another"),
        ("recent.isfinite().all()", "True", "NaN is noticed", "maths finite"),
        ('["id"] == identity', '["id"] != ""', "what is out of date is refused", "pipeline mixed"),
        ("archive.testzip() is None", "True", "damage is noticed", "maths damaged")],
    "extras/prepare_images.py": [
        ("values // 257", "values // 256 // 256", "own images: 16-bit grey is scaled", "data command_reads"),
        ("return label.index(1)", "return 0", "own images: one-hot labels", "data command_reads"),
        ("os.path.join(os.path.dirname(found[0]), name", "(name", "own images: dataset.json is read where it lies", "data below"),
        ("                continue\n", "                raise\n", "own images: bad ones are left out",
         "data command_reads")],
}
SHORT = ("t = 0 is noise", "z_beta has variance 1", "the student's own step", "sines first", "Nesterov",
         "the covariance is unbiased")


def verdict(copy, name, old, new, tests):
    """"caught" if the tests fail once the text is changed, in the copy of the project."""
    path, text = copy / name, (ROOT / name).read_text()
    if text.count(old) != 1:
        return "NO LONGER APPLIES"
    path.write_text(text.replace(old, new))
    tests, names = tests.split()
    command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/test_{tests}.py", "-k", names]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # the text changes faster than its date
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True)
    path.write_text(text)
    return {0: "SURVIVED", 1: "caught"}.get(done.returncode, f"pytest ended with {done.returncode}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="six of them")
    parser.add_argument("--only", default="", help="those that mention this text")
    given, found = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "data", "__pycache__"))
        for name, mutants in MUTANTS.items():
            for old, new, idea, tests in mutants:
                short = not given.short or idea.startswith(SHORT)
                if short and given.only in f"{name} {old} {new} {idea} {tests}":
                    found.append(verdict(copy, name, old, new, tests))
                    print(f"| {found[-1]:8} | {name[:2]} | {idea} | {old!r} -> {new!r}", flush=True)
    print(f"{found.count('caught')} of {len(found)} caught")
    sys.exit(found.count("caught") < len(found))


if __name__ == "__main__":
    main()
