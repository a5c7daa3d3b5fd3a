"""The table of layers and groups of tokens agrees with the hidden states and the attention maps."""

import torch
from helpers.tiny_models import build_tiny_config, randomize
from pytest import approx
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.analysis.layer_table import measure_layers
from modeling_vitcls.inference.image_pass import ImageBatch


GROUPS = {"cls": [0], "registers": [1, 2], "patches": slice(3, None)}


@torch.no_grad()
def test_norms_attention_outliers_and_similarities_are_those_of_states_and_maps() -> None:
    config = build_tiny_config(num_register_tokens=2, attn_implementation="eager")
    model = randomize(ViTCLSForImageClassification(config)).eval()
    model.vitcls.embeddings.position_embeddings.patches.data *= torch.logspace(0, 3, 16)[:, None]
    pixels = torch.randn(6, 3, 32, 32)
    table, found = measure_layers(model, [ImageBatch(part) for part in pixels.split(4)])

    outputs = model(pixels, output_hidden_states=True, output_attentions=True)
    assert_close(torch.stack(found[""]), outputs.logits)
    states = outputs.hidden_states
    assert len(table) == len(GROUPS) * len(outputs.attentions)
    for (layer, group), row in table.iterrows():
        tokens = GROUPS[group]
        norms = states[layer].norm(dim=-1)
        limits = 3 * norms[:, GROUPS["patches"]].median(dim=1, keepdim=True).values
        attention = outputs.attentions[layer - 1]  # [B, heads, query, key]
        similarity = cosine_similarity(states[layer - 1], states[layer], dim=-1)
        assert row["norm"] == approx(norms[:, tokens].mean().item(), rel=1e-4)
        received = attention[..., tokens].mean().item() * attention.shape[-1]
        assert row["attention"] == approx(received, rel=1e-4)
        assert row["similarity"] == approx(similarity[:, tokens].mean().item(), abs=1e-4)
        outliers = (norms > limits)[:, tokens].float().mean().item()
        assert row["outliers"] == approx(outliers)
