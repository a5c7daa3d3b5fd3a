"""The table of layers and groups of tokens agrees with the hidden states and the attention maps."""

import pytest
import torch
from helpers.photo_folders import draw_noise
from helpers.tiny_models import build_tiny_config, randomize
from torch import Tensor
from torch.nn.functional import cosine_similarity

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis.layer_table import measure_layers
from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.data.labels import UNLABELED
from modeling_vitcls.evaluation.token_effects import read_batches


Group = tuple[int, str]


@pytest.fixture(scope="module")
def measured() -> tuple[dict[Group, dict[str, float]], dict[Group, tuple[Tensor, Tensor, Tensor]]]:
    """The table, and of each group the states before and after a layer and the attention it receives."""
    config = build_tiny_config(num_register_tokens=2, attn_implementation="eager")
    model = randomize(ViTCLSForImageClassification(config)).eval()
    model.vitcls.embeddings.position_embeddings.patches.data[:, 5] = 1e3
    processor = ViTCLSImageProcessor(size={"height": 32, "width": 32})
    images = LabeledImages(draw_noise(*[(32, 32)] * 6), [None] * 6)
    batches, _ = read_batches(model, processor, images, UNLABELED, batch_size=4)
    table = measure_layers(model, batches).to_dict("index")

    pixel_values = torch.cat([batch.pixel_values for batch in batches])
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    states = outputs.hidden_states
    expected = {}
    for layer, attention in enumerate(outputs.attentions, start=1):
        for group, tokens in [("cls", [0]), ("registers", [1, 2]), ("patches", slice(3, None))]:
            received = attention.mean(dim=(1, 2)) * attention.shape[-1]
            parts = (states[layer - 1], states[layer], received)
            expected[layer, group] = tuple(part[:, tokens] for part in parts)
    return table, expected


def test_the_table_has_a_row_for_each_layer_and_group(measured: tuple) -> None:
    table, expected = measured
    assert table.keys() == expected.keys()


def test_norms_and_similarities_are_those_of_the_hidden_states(measured: tuple) -> None:
    table, expected = measured
    for group, (before, after, _) in expected.items():
        assert table[group]["norm"] == pytest.approx(after.norm(dim=-1).mean().item(), rel=1e-4)
        similarity = cosine_similarity(before, after, dim=-1).mean().item()
        assert table[group]["similarity"] == pytest.approx(similarity, abs=1e-4)


def test_attention_is_what_the_tokens_of_a_group_receive(measured: tuple) -> None:
    table, expected = measured
    for group, (_, _, received) in expected.items():
        assert table[group]["attention"] == pytest.approx(received.mean().item(), rel=1e-4)


def test_outliers_have_three_times_the_median_norm_of_the_patches(measured: tuple) -> None:
    table, expected = measured
    for layer, group in expected:
        limit = 3 * expected[layer, "patches"][1].norm(dim=-1).median(dim=1, keepdim=True).values
        share = (expected[layer, group][1].norm(dim=-1) > limit).float().mean().item()
        assert table[layer, group]["outliers"] == pytest.approx(share)
    assert table[1, "patches"]["outliers"] > 0
