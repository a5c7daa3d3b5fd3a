"""The values that the scripts of the report read, decoded as the scripts decode them, compared with the inspection.

tests/analysis/test_report.py tests the page in a browser.
"""

import io
import math
from base64 import b64decode
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_tiny_config
from helpers.varied_models import center_logits
from matplotlib import colormaps
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis import report_data
from modeling_vitcls.analysis.artifacts import PatchDiagnosis, SecondMode
from modeling_vitcls.analysis.diagnosis import Verdict
from modeling_vitcls.analysis.figures_of_states import compute_norm_histogram
from modeling_vitcls.analysis.image_report import ImagePrediction
from modeling_vitcls.analysis.inspection import Inspection, inspect_model
from modeling_vitcls.analysis.maps import COLORMAP
from modeling_vitcls.analysis.patch_features import (
    compress_patch_features,
    compute_patch_colors,
    compute_patch_similarity,
)
from modeling_vitcls.analysis.patch_sizes import PatchSizeRow
from modeling_vitcls.analysis.report_data import build_json_values, build_page_data, encode_data_url, round_values


NUM_LAYERS, NUM_TOKENS, NUM_HEADS, GRID = 3, 3, 2, (4, 4)
NUM_BYTES = NUM_LAYERS * math.prod(GRID)  # bytes of all layers of an image, with one byte per patch


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    """Return the inspection of a classifier with one CLS token and two registers, on three images."""
    crop = {"height": 32, "width": 32}
    processor = ViTCLSImageProcessor(size={"shortest_edge": 40}, do_center_crop=True, crop_size=crop)
    noise = np.random.default_rng(0).integers(0, 256, (3, 60, 90, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in noise]
    config = build_tiny_config(num_hidden_layers=NUM_LAYERS, num_register_tokens=2)
    model = ViTCLSForImageClassification(config)
    return inspect_model(
        center_logits(model, processor(images, return_tensors="pt")["pixel_values"]), processor, images
    )


def decode(text: str, dtype: str, *shape: int) -> torch.Tensor:
    """Return the values of a base64 text, in little-endian order."""
    array = np.frombuffer(b64decode(text), dtype=np.dtype(dtype).newbyteorder("<"))
    return torch.from_numpy(array.astype(dtype)).view(shape)


def check_maps(packed: dict[str, str], expected: torch.Tensor) -> None:
    """Compare encoded maps with maps [..., gh, gw]."""
    shape = expected.shape[:-2]
    largest = decode(packed["largest"], "float32", *shape)
    assert torch.allclose(largest, expected.amax(dim=(-2, -1)), rtol=1e-6)
    assert torch.allclose(decode(packed["sum"], "float32", *shape), expected.sum(dim=(-2, -1)), rtol=1e-5)
    roots = decode(packed["values"], "uint8", *expected.shape).double() / 255
    error = roots - (expected / largest[..., None, None]).double().sqrt()
    assert error.abs().max() <= 0.5 / 255 + 1e-6


def test_maps_are_decoded_from_bytes(inspection: Inspection) -> None:
    images = build_page_data(inspection)["images"]
    for image, report in zip(images, inspection.image_reports, strict=True):
        mean = report.attention.mean(dim=1, keepdim=True)
        check_maps(image["attention"], torch.cat([mean, report.attention], dim=1))
        check_maps(image["rollout"], report.rollout)
        check_maps(image["attribution"], torch.stack(report.attributions))
        assert image["num_heads"] == NUM_HEADS and image["grid"] == list(GRID)
        assert (image["width"], image["height"]) == (90, 60)
        # The processor resizes 90 x 60 to 60 x 40 pixels and crops the 32 x 32 pixels in the center.
        assert image["visible_region"] == pytest.approx([21 / 90, 6 / 60, 69 / 90, 54 / 60])
        assert image["attributed"] == [report.predictions[0].top_label]


def test_heads_and_features_of_the_first_images_are_kept(
    inspection: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are exactly the sizes of the maps of one image and of the features of two images."""
    monkeypatch.setattr(report_data, "MAX_MAP_BYTES", NUM_HEADS * NUM_TOKENS * NUM_BYTES)
    monkeypatch.setattr(report_data, "MAX_FEATURE_BYTES", 2 * 32 * NUM_BYTES)
    data = build_page_data(inspection)
    assert [image["num_heads"] for image in data["images"]] == [NUM_HEADS, 0, 0] and len(data["heads"]) == NUM_HEADS
    assert [image["features"] is not None for image in data["images"]] == [True, True, False]
    check_maps(data["images"][1]["attention"], inspection.image_reports[1].attention.mean(dim=1, keepdim=True))
    for layer, components in enumerate(data["components"]):  # of the two images only
        expected = compress_patch_features([report.features[layer] for report in inspection.image_reports[:2]])
        assert components["scale"] == pytest.approx(expected.scale.tolist(), rel=1e-4)
    monkeypatch.setattr(report_data, "MAX_MAP_BYTES", 0)
    monkeypatch.setattr(report_data, "MAX_FEATURE_BYTES", 0)
    data = build_page_data(inspection)
    assert data["heads"] == data["components"] == []
    assert [image["features"] for image in data["images"]] == [None] * 3


def test_patch_colors_have_a_transparent_background(inspection: Inspection) -> None:
    """Check both kinds of colors: of all patches, and of the foreground."""
    images = build_page_data(inspection)["images"]
    backgrounds = []
    for kind in (0, 1):
        for layer in range(NUM_LAYERS):
            features = [report.features[layer] for report in inspection.image_reports]
            for image, expected in zip(images, compute_patch_colors(features, foreground_only=kind == 1), strict=True):
                found = decode(image["colors"][kind], "uint8", NUM_LAYERS, *GRID, 4)[layer].double() / 255
                background = expected.isnan().any(dim=-1)
                backgrounds.append(background)
                assert torch.equal(found[..., 3], (~background).double())
                assert ((found[..., :3] - expected).abs()[~background] <= 0.5 / 255 + 1e-6).all()
    assert 0 < torch.stack(backgrounds).float().mean() < 1


def test_features_have_the_similarity_of_the_patches(inspection: Inspection) -> None:
    data = build_page_data(inspection)
    for layer, components in enumerate(data["components"]):
        scale = torch.tensor(components["scale"])
        assert len(scale) > 1 and scale[0] > scale[-1]  # each component has its own scale
        for image, report in zip(data["images"], inspection.image_reports, strict=True):
            values = decode(image["features"], "int8", NUM_LAYERS, *GRID, len(scale))[layer].flatten(0, 1) * scale
            products = values @ values.T + components["offset"]
            cosines = products[6] / (products.diagonal() * products[6, 6]).sqrt()
            expected = compute_patch_similarity(report.features[layer], 1, 2).flatten()
            assert (cosines - expected).abs().max() < 0.02


def test_curves_are_the_findings(inspection: Inspection) -> None:
    findings, curves = inspection.findings, build_page_data(inspection)["curves"]

    def check(found: Any, expected: torch.Tensor) -> None:
        values = torch.tensor(found)
        assert values.shape == expected.shape and torch.allclose(values, expected.float(), rtol=1e-4)

    for name in ("entropy", "spread", "received"):
        values = getattr(findings, name)  # [L, H, S]
        assert len(curves[name]) == NUM_TOKENS
        for token, curve in enumerate(curves[name]):
            check(curve["mean"], values[:, :, token].mean(dim=1))
            check(curve["low"], values[:, :, token].min(dim=1).values)
            check(curve["high"], values[:, :, token].max(dim=1).values)
    (curve,) = curves["patch_distance"]
    check(curve["high"], findings.patch_distance.max(dim=1).values)
    for layer in range(NUM_LAYERS):
        fractions = findings.attention_fractions[layer].mean(dim=0)  # [S, 4]
        check([[row[layer] for row in token] for token in curves["mass"]], fractions)
    for name in ("to_patches", "variation", "token_norms"):
        check(curves[name], torch.stack(list(getattr(findings, name)), dim=1))
    norms = findings.patch_norms.numpy()  # [L + 1, n]
    for name, level in {"low": 0.05, "median": 0.5, "high": 0.95, "largest": 1.0}.items():
        check(curves["patch_norms"][name], torch.from_numpy(np.quantile(norms, level, axis=1)))
    check(curves["outliers"], findings.outliers)
    assert curves["uniform"]["received"] == pytest.approx(1 / (NUM_TOKENS + math.prod(GRID)), rel=1e-4)
    assert curves["uniform"]["entropy"] == pytest.approx(math.log(NUM_TOKENS + math.prod(GRID)), rel=1e-4)


def test_tokens_have_their_groups_and_read_layers(inspection: Inspection) -> None:
    """The head uses the CLS token. Registers and patches of the last layer are not used."""
    data = build_page_data(inspection)
    assert [token["group"] for token in data["tokens"]] == ["cls", "registers", "registers"]
    assert [token["name"] for token in data["tokens"]] == ["CLS", "register 1", "register 2"]
    assert [token["read"] for token in data["tokens"]] == [NUM_LAYERS, NUM_LAYERS - 1, NUM_LAYERS - 1]
    assert (data["layers"], data["patches_read"]) == (NUM_LAYERS, NUM_LAYERS - 1)
    assert len(data["histograms"]) == NUM_LAYERS + 1
    colors = np.frombuffer(bytes.fromhex(data["colors"]), dtype=np.uint8).reshape(256, 3)
    assert np.abs(colors - 255 * colormaps[COLORMAP](np.arange(256))[:, :3]).max() <= 0.5


def test_an_encoder_outputs_the_patches_of_the_last_layer(inspection: Inspection) -> None:
    data = build_page_data(replace(inspection, has_head=False))
    assert (data["layers"], data["patches_read"]) == (NUM_LAYERS, NUM_LAYERS)
    assert [token["read"] for token in data["tokens"]] == [NUM_LAYERS, NUM_LAYERS - 1, NUM_LAYERS - 1]


def test_attributions_of_tasks_are_named_by_task_and_label(inspection: Inspection) -> None:
    tasks = [ImagePrediction(task, [("cat", 0.9), ("dog", 0.1)], "cat") for task in ("kind", "age")]
    report = replace(inspection.image_reports[0], predictions=tasks)
    (image,) = build_page_data(replace(inspection, image_reports=[report]))["images"]
    assert image["attributed"] == ["kind: cat", "age: cat"]


def test_the_values_for_programs(inspection: Inspection) -> None:
    """Keys are part of the documented format. tests/analysis/test_report.py checks the values of the findings."""
    mode, rare_mode = SecondMode(2.5, 4.0, 0.0625, 5.0), SecondMode(1.5, 3.0, 0.125, 6.0)
    patches = PatchDiagnosis("artifacts", "bad", "Artifacts.", 1, 48, mode, rare_mode)
    row = PatchSizeRow((8, 4), True, (4, 8), 33, 1.5, 0.25, 2.5, "a CPU", 3, None, 1.0, "")
    group = Verdict("all 2 registers", "harmful", "bad", "more accurate.", {"effect": 0.5})
    changed = replace(
        inspection, patches=patches, patch_sizes=[row], group_verdicts=[group], num_null_images=3, num_unreadable=2
    )
    values = build_json_values(changed)
    assert (values["num_null_images"], values["num_broken"], values["artifacts"]) == (3, 2, "Artifacts.")
    histogram = compute_norm_histogram(inspection.config, inspection.findings, 1)
    assert values["patches"] == {
        "diagnosis": "artifacts",
        "meaning": "bad",
        "statement": "Artifacts.",
        "layer": 1,
        "num_patches": 48,
        "second_mode": {"threshold": 2.5, "ratio": 4.0, "fraction": 0.0625, "score": 5.0},
        "second_mode_without_registers": {"threshold": 1.5, "ratio": 3.0, "fraction": 0.125, "score": 6.0},
        "histogram": round_values(asdict(histogram)),
    }
    assert values["patch_sizes"] == [asdict(row)]
    assert values["groups"] == [
        {
            "token": "all 2 registers",
            "diagnosis": "harmful",
            "meaning": "bad",
            "statement": "more accurate.",
            "effect": 0.5,
        }
    ]
    assert values["verdicts"] == [
        {"token": verdict.token, "word": verdict.word, "meaning": verdict.rating, "reason": verdict.reason}
        for verdict in inspection.verdicts
    ]
    assert build_json_values(replace(inspection, has_head=False))["effects"] is None


def test_small_images_are_exact_and_large_images_are_scaled_down() -> None:
    def open_url(url: str) -> Image.Image:
        return Image.open(io.BytesIO(b64decode(url.partition(",")[2])))

    noise = np.random.default_rng(0).integers(0, 256, (60, 96, 3), dtype=np.uint8)
    url = encode_data_url(Image.fromarray(noise))
    assert url.startswith("data:image/png;base64,") and np.array_equal(np.asarray(open_url(url)), noise)
    large = Image.new("RGB", (1280, 320), (200, 100, 50))
    url = encode_data_url(large)
    assert url.startswith("data:image/jpeg;base64,") and large.size == (1280, 320)
    assert open_url(url).format == "JPEG" and open_url(url).size == (640, 160)
    assert open_url(encode_data_url(Image.new("RGB", (97, 20)))).format == "JPEG"
    assert np.abs(np.asarray(open_url(url), dtype=int) - [200, 100, 50]).max() <= 4


def test_values_are_rounded_and_not_finite_values_are_unknown() -> None:
    values = {"a": torch.tensor([[1.0, math.nan]]), "b": [1234567.0, {"c": -math.inf}], "d": ("x", 1), "e": True}
    expected = {"a": [[1.0, None]], "b": [1234600.0, {"c": None}], "d": ("x", 1), "e": True}
    assert round_values(values) == expected
