"""Maps on the pixels of the image, compared with the input that image processors create."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, randomize
from PIL import Image
from torch.testing import assert_close

from modeling_vitcls import (
    ViTCLSImageProcessor,
    ViTCLSImageProcessorPil,
    ViTCLSModel,
)
from modeling_vitcls.analysis.maps import (
    extract_patch_maps,
)
from modeling_vitcls.data.aspect_ratio import get_visible_region


# Maps ---------------------------------------------------------------------------------------------


def test_patch_maps_contain_the_attention_to_each_patch():
    config = build_tiny_config(
        num_cls_tokens=2, num_distillation_tokens=1, num_register_tokens=3, patch_size=[8, 4]
    )
    config._attn_implementation = "eager"
    model = randomize(ViTCLSModel(config))
    pixel_values = build_images(height=24, width=41)  # 3 x 10 patches, and one additional pixel
    with torch.no_grad():
        maps = extract_patch_maps(model.token_attention(pixel_values), config, (24, 41))
        attentions = model(pixel_values, output_attentions=True).attentions

    expected = torch.stack(attentions, dim=1)[..., :6, config.token_layout.patches]
    assert_close(maps, expected.unflatten(-1, (3, 10)), atol=1e-6, rtol=0)


# The visible part of the image --------------------------------------------------------------------

BLACK = 10  # added to coordinates, so that padding can be distinguished


def build_coordinates(height: int, width: int) -> Image.Image:
    """Return an image whose red channel is the column of each pixel plus 10, and green the row."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x + BLACK, y + BLACK, 0 * x], axis=-1).astype(np.uint8))


PROCESSORS = {
    "half_pixel_even": {
        "size": {"shortest_edge": 64},
        "do_center_crop": True,
        "crop_size": 58,
        "crop_rounding": "even",
    },
    "longest_edge_pads": {
        "size": {"shortest_edge": 64, "longest_edge": 72},
        "do_center_crop": True,
        "crop_size": 64,
    },
    "crop_pads_one_side": {
        "do_resize": False,
        "do_center_crop": True,
        "crop_size": {"height": 195, "width": 101},
    },
    "pad": {
        "size": {"height": 48, "width": 40},
        "do_pad": True,
        "pad_size": {"height": 64, "width": 60},
    },
}


@pytest.mark.parametrize(
    ("backend", "size"),
    [(ViTCLSImageProcessor, (180, 240)), (ViTCLSImageProcessorPil, (240, 180))],
    ids=str,
)
@pytest.mark.parametrize("settings", PROCESSORS.values(), ids=PROCESSORS)
def test_the_visible_part_equals_the_input_of_the_model(settings, backend, size):
    processor = backend(resample=2, do_rescale=False, do_normalize=False, **settings)
    shown = processor(build_coordinates(*size), return_tensors="pt")["pixel_values"][0]  # [3, H, W]
    left, top, right, bottom = get_visible_region(processor, size, (1, 1))
    for axis, (start, stop) in enumerate([(left, right), (top, bottom)]):
        values = shown[axis].amax(dim=axis)  # along x, then y; padding is 0
        # coordinates of centers
        expected = start + (torch.arange(len(values)) + 0.5) * (stop - start) / len(values) - 0.5
        inside = (expected > -0.5) & (expected < size[1 - axis] - 0.5)
        assert torch.equal(values > 0, inside)
        edge = (stop - start) / len(
            values
        ) + 1  # at the border, the filter lacks pixels on one side
        whole = (expected > edge) & (expected < size[1 - axis] - 1 - edge)
        assert whole.sum() > 10
        assert (
            values[whole] - BLACK - expected[whole]
        ).abs().max() < 0.76  # rounded to integer gray levels
