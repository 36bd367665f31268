"""The data set of the preset `shapes`: a coloured shape on a dark ground, 18 classes.

A program draws as many as are needed, so there is nothing to download.
"""
import numpy as np
import torch

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (230, 60, 50),
    "yellow": (235, 205, 60),
    "green": (70, 190, 80),
    "cyan": (70, 195, 215),
    "blue": (70, 100, 235),
    "magenta": (215, 80, 205),
}
CLASSES = []  # a label is an index into it
for shape in SHAPES:
    for colour in COLOURS:
        CLASSES.append(f"{colour} {shape}")


def draw_shapes(n, image_size, seed=0):
    """n drawings, the same for a seed: images uint8 (n, 3, H, W), labels int64 (n,) of CLASSES."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(CLASSES), size=n)
    radius = rng.uniform(0.18, 0.34, size=n)  # in units of the image's side
    centre_x, centre_y = rng.uniform(radius + 0.03, 0.97 - radius, size=(2, n))
    grey = rng.uniform(10, 60, size=(n, 1))
    ground = grey + rng.uniform(-8, 8, size=(n, 3))
    colours = np.array(list(COLOURS.values()))
    tint = rng.uniform(-20, 20, size=(n, 3))
    ink = colours[labels % len(COLOURS)] + tint
    images = np.empty((n, 3, image_size, image_size), dtype=np.uint8)
    pixel = (np.arange(image_size) + 0.5) / image_size
    for i in range(n):
        x = np.abs(pixel - centre_x[i]) / radius[i]  # (W,), in radii; all shapes are symmetric
        y = (pixel[:, None] - centre_y[i]) / radius[i]  # (H, 1), downwards
        shape = SHAPES[labels[i] // len(COLOURS)]
        # The distance from the outline, in radii; negative inside. (H, W)
        if shape == "circle":
            distance = np.hypot(x, y) - 1
        elif shape == "square":
            distance = np.maximum(x, np.abs(y)) - 0.85
        else:  # its right side has the normal (0.884, -0.467)
            right_side = 0.884 * x - 0.467 * (y + 1)
            distance = np.maximum(right_side, y - 0.8)
        # Antialiasing: a pixel within half a pixel of the outline is covered in part.
        cover = np.clip(0.5 - distance * radius[i] * image_size, 0, 1)
        shown = cover * ink[i, :, None, None]
        hidden = (1 - cover) * ground[i, :, None, None]
        images[i] = (shown + hidden).round().clip(0, 255)
    return torch.from_numpy(images), torch.from_numpy(labels)
