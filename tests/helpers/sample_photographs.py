"""Real photographs, for tests of image processors and models."""

import PIL.Image
from sklearn.datasets import load_sample_image


def photograph(name: str) -> PIL.Image.Image:
    """Return a photograph of 640 x 427 pixels, an odd size, so that crops start at half pixels."""
    return PIL.Image.fromarray(load_sample_image(name))
