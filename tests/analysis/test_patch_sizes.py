"""Costs and predictions of a model after resampling it to other patch sizes."""

import logging
from typing import Any

import pytest
import torch
from helpers.tiny_models import TASKS, build_tiny_config, raises_one_line, randomize
from helpers.varied_models import center_logits
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.analysis import patch_sizes
from modeling_vitcls.analysis.patch_sizes import (
    PatchSizeRow,
    compare_patch_sizes,
    count_flops,
    describe_patch_sizes,
    resolve_patch_sizes,
)


NUM_IMAGES = 6


def build_pil_images(height: int = 40, width: int = 40, count: int = NUM_IMAGES) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()).resize((width, height)) for one in noise]


def build_processor(height: int = 32, width: int = 32) -> ViTCLSImageProcessor:
    return ViTCLSImageProcessor(size={"height": height, "width": width})


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(num_labels=20, **fields)
    (pixels,) = build_processor()(build_pil_images(), return_tensors="pt").values()
    return center_logits(ViTCLSForImageClassification(config), pixels)


@torch.no_grad()
def predict(model: Any, processor: Any) -> torch.Tensor:
    """Return the predicted class of each image, [images]."""
    return model(processor(build_pil_images(), return_tensors="pt")["pixel_values"]).logits.argmax(dim=-1)


def index_by_size(rows: list[PatchSizeRow]) -> dict[Any, PatchSizeRow]:
    return {row.patch_size: row for row in rows}


def test_each_size_is_measured_on_the_adapted_model() -> None:
    model, processor = build_classifier(num_register_tokens=2), build_processor()
    own = predict(model, processor)
    labels = own.tolist()
    assert len(set(labels)) > 1
    labels[0] = (labels[0] + 1) % 20  # one wrong prediction of the original model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = compare_patch_sizes(model.train(), processor, build_pil_images(), labels, [16, 4, 8], batch_size=1)
    assert model.training and all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [row.patch_size for row in rows] == [4, 8, 16]
    assert [row.is_native for row in rows] == [False, True, False]
    assert [row.grid for row in rows] == [(8, 8), (4, 4), (2, 2)]
    assert [row.sequence_length for row in rows] == [67, 19, 7]
    for row in rows:
        there = predict(model.eval().adapt(patch_size=row.patch_size), processor)
        assert row.accuracy == pytest.approx((there == torch.tensor(labels)).float().mean().item())
        assert row.agreement == pytest.approx((there == own).float().mean().item())
        assert row.milliseconds > 0 and row.num_images == NUM_IMAGES
        assert f", {torch.get_num_threads()} thread" in row.device
        total, in_maps = count_flops(model.adapt(patch_size=row.patch_size), (32, 32))
        assert row.gflops == pytest.approx(total / 1e9) and row.attention_share == pytest.approx(in_maps / total)
    assert index_by_size(rows)[8].agreement == 1 and index_by_size(rows)[8].accuracy == pytest.approx(5 / 6)
    assert min(row.agreement for row in rows) < 1
    assert rows[0].gflops > rows[1].gflops > rows[2].gflops


def test_the_time_is_the_median_per_image_without_the_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forward pass takes 12 ms, but the warmup takes one second. The batches have 4 and 2 images, and five
    batches are measured: 3, 6, 3, 6 and 3 ms per image."""
    clock, passes = [0.0], []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(args[0]))
        clock[0] += 1.0 if len(passes) <= 2 else 0.012
        return plain_forward(self, *args, **kwargs)

    plain_forward = ViTCLSModel.forward
    monkeypatch.setattr(ViTCLSModel, "forward", forward)
    monkeypatch.setattr(patch_sizes.time, "perf_counter", lambda: clock[0])
    model = randomize(ViTCLSModel(build_tiny_config()))
    rows = compare_patch_sizes(model, build_processor(), build_pil_images(), None, [16], batch_size=4)
    assert [row.milliseconds for row in rows] == [pytest.approx(3.0)] * 2
    assert passes[2:12:2] == passes[3:12:2] == [4, 2, 4, 2, 4]  # both sizes in turn


def test_the_original_size_is_always_measured() -> None:
    rows = compare_patch_sizes(build_classifier(), build_processor(), build_pil_images(), None, [16])
    assert [(row.patch_size, row.is_native) for row in rows] == [(8, True), (16, False)]
    assert [row.accuracy for row in rows] == [None, None] and rows[0].agreement == 1
    own, other, *_ = describe_patch_sizes(rows)
    assert "1/4 of the image's side: patches may be too large" in own and "the model's own" in own
    assert "1/2 of the image's side: patches may be too large" in other and "the model's own" not in other


def test_rectangles() -> None:
    """Check rectangular patches, and images of another size than the model's: positions are resampled once."""
    model, processor = build_classifier(patch_size=[8, 4]), build_processor(24, 48)
    expected = predict(model.adapt(patch_size=8, image_size=[24, 48]), processor)
    assert not torch.equal(expected, predict(model, processor))
    rows = compare_patch_sizes(model, processor, build_pil_images(), expected.tolist(), [8])
    assert [row.patch_size for row in rows] == [(8, 4), 8]
    assert [row.grid for row in rows] == [(3, 12), (3, 6)]
    assert rows[1].accuracy == 1 > rows[0].accuracy
    own = describe_patch_sizes(rows)[0]
    assert own.startswith("8 x 4 (the model's own): 37 tokens") and "1/3 of the image's side" in own


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_register_tokens": 2, "pooling": "attention"},
        {"position_embedding_type": "rope_2d", "mlp_type": "swiglu"},
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
        {"relative_position_bias": "shared"},
        {"attention_type": "differential"},
        {"num_register_tokens": 1, "gated_tokens": {"registers": 1}, "layer_type": "parallel"},
    ],
    ids=lambda fields: ", ".join(fields) or "plain",
)
@torch.no_grad()
def test_flops_equal_those_of_the_real_model(fields: dict[str, Any]) -> None:
    """Compare the count without weights with PyTorch's counter."""
    model = build_classifier(**fields)
    # older versions do not count fused kernels
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, 24, 56))
    total, in_maps = count_flops(model, (24, 56))
    assert total == counter.get_total_flops()
    assert 0 < in_maps < total
    assert model.config._attn_implementation == "sdpa" and model.device.type == "cpu"


def test_flops_of_a_plain_model_equal_a_manual_count() -> None:
    model = ViTCLSModel(build_tiny_config(), add_pooling_layer=False)
    tokens, width, hidden, patches = 17, 16, 24, 16
    maps = 2 * 2 * tokens * tokens * width
    layer = 2 * tokens * (4 * width * width + 2 * width * hidden)
    assert count_flops(model, (32, 32)) == (2 * patches * 8 * 8 * 3 * width + 2 * (layer + maps), 2 * maps)


def test_kinds_of_models() -> None:
    """Models with several tasks or labels have predictions. An encoder has only costs."""
    (pixels,) = build_processor()(build_pil_images(), return_tensors="pt").values()
    config = build_tiny_config(num_cls_tokens=2, tasks=TASKS)
    tasks = center_logits(ViTCLSForMultiTaskClassification(config), pixels)
    labels = [{"species": 1, "age": 0}, {"age": 1}, {}, None, {"species": 2}, {"age": 1, "species": -100}]
    rows = compare_patch_sizes(tasks, build_processor(), build_pil_images(), labels, [4])
    assert all(0 <= row.accuracy <= 1 for row in rows) and rows[1].agreement == 1
    with torch.no_grad():
        own, adapted = tasks(pixels).logits, tasks.adapt(patch_size=4)(pixels).logits
    is_same = torch.stack([own[task].argmax(-1) == adapted[task].argmax(-1) for task in own])  # [tasks, images]
    assert rows[0].agreement == pytest.approx(is_same.all(dim=0).float().mean().item())
    assert not torch.equal(is_same.all(dim=0), is_same.any(dim=0))
    several = build_classifier(problem_type="multi_label_classification")
    labels = [[0.0, 1.0] * 10] * 5 + [None]
    rows = compare_patch_sizes(several, build_processor(), build_pil_images(), labels, [4])
    with torch.no_grad():
        right = (several(pixels[:5]).logits > 0) == torch.tensor([False, True] * 10)
    assert rows[1].accuracy == pytest.approx(right.float().mean().item())
    rows = compare_patch_sizes(
        randomize(ViTCLSModel(build_tiny_config())), build_processor(), build_pil_images(), [0] * 6, [4]
    )
    assert [row.accuracy for row in rows] == [row.agreement for row in rows] == [None, None]
    assert rows[0].gflops > rows[1].gflops and len(describe_patch_sizes(rows)) == 2


def test_logs_do_not_list_weights(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compare_patch_sizes(build_classifier(), build_processor(), build_pil_images(), None, [4])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        build_classifier().adapt(patch_size=4)
    assert caplog.records  # as before


def test_unsupported_sizes_are_one_line_errors() -> None:
    model = build_classifier()
    with raises_one_line("patch size 5", "32 x 32", "1, 2, 4, 8, 16, 32"):
        compare_patch_sizes(model, build_processor(), build_pil_images(), None, [4, 5])
    with raises_one_line("patch size 16", "24 x 48", "1, 2, 3, 4, 6, 8, 12, 24"):
        compare_patch_sizes(model, build_processor(24, 48), build_pil_images(), None, [16])
    with raises_one_line("no images"):
        compare_patch_sizes(model, build_processor(), [], None, [4])
    scoped = build_classifier(num_cls_tokens=2, cls_scopes=["image", [4, 4, 0, 1]])
    with raises_one_line("patch size 16", "cls_scopes"):
        compare_patch_sizes(scoped, build_processor(), build_pil_images(), None, [16])
    several = ViTCLSImageProcessor(size={"shortest_edge": 32})
    with raises_one_line("one size", "do_center_crop"):
        compare_patch_sizes(model, several, [*build_pil_images(), *build_pil_images(40, 80)], None, [4])
    with raises_one_line("patch size 12", "24 x 56", "Choose from 1, 2, 4, 8."):
        resolve_patch_sizes([12], (24, 56), 8)
    for size in (0, -4):
        with raises_one_line(f"patch size {size} does not divide"):
            resolve_patch_sizes([size], (32, 32), 8)
    assert resolve_patch_sizes([4, 4, 14], (28, 56), 14) == [4, 14]
    assert resolve_patch_sizes([14], (27, 27), 14) == [14]  # with the original size, pixels may remain


def row(patch_size: int, **values: Any) -> PatchSizeRow:
    plain: dict[str, Any] = {
        "is_native": False,
        "grid": (28, 28),
        "sequence_length": 785,
        "gflops": 46.0,
        "attention_share": 0.3,
        "milliseconds": 50.0,
        "device": "some processor",
        "num_images": 200,
        "accuracy": 0.89,
        "agreement": 0.93,
        "note": "",
    }
    return PatchSizeRow(patch_size, **plain | values)


def test_the_advice() -> None:
    native = row(16, is_native=True, sequence_length=197, gflops=10.0, milliseconds=10.0, accuracy=0.912, agreement=1)
    sentences = describe_patch_sizes([row(8), native])
    assert sentences[0].startswith("16 (the model's own): 197 tokens, 10 GFLOPs and 10 ms")
    assert "some processor" in sentences[0] and "accuracy 91.2%" in sentences[0]
    assert sentences[1] == (
        "8: 4 times the tokens, 4.6 times the compute, 5 times the time, accuracy 89.0% instead of 91.2% before any "
        "fine-tuning."
    )
    assert sentences[2] == (
        "Recommended: 16 (the model's own), the cheapest patch size whose accuracy on 200 images is within 1 "
        "percentage point of the best accuracy (91.2%, at this size)."
    )
    assert "200 images" in sentences[3] and "before any fine-tuning" in sentences[3]
    remarkable = row(16, is_native=True, note="a patch spans 1/4 of the image's side: patches may be too large")
    note = "(a patch spans 1/4 of the image's side: patches may be too large)."
    assert describe_patch_sizes([remarkable])[0].endswith(note)
    unknown = [row(8, accuracy=None, note="coarse"), row(16, is_native=True, accuracy=None)]
    assert describe_patch_sizes(unknown)[1].endswith(
        "the same predictions for 93.0% of the images before any fine-tuning (coarse)."
    )
    assert len(describe_patch_sizes([native])) == 1
    assert "accuracy 0.0% instead of 91.2% before" in describe_patch_sizes([row(8, accuracy=0.0), native])[1]
    unlike = [row(8, accuracy=None, agreement=0.0), row(16, is_native=True, accuracy=None)]
    assert "the same predictions for 0.0% of the images" in describe_patch_sizes(unlike)[1]


def test_the_advice_compares_costs_and_accuracy() -> None:
    def get_advice(*accuracies: float | None) -> list[str]:
        """Return the advice for patches of 4, 8, 16 and 32 pixels; 16 is the original size."""
        rows = [
            row(2 ** (2 + place), is_native=place == 2, gflops=64 / 4**place, accuracy=accuracy)
            for place, accuracy in enumerate(accuracies)
        ]
        return [sentence for sentence in describe_patch_sizes(rows) if sentence.startswith("Recommended")]

    start = "cheapest patch size whose accuracy on 200 images is within 1 percentage point of the best accuracy"
    assert get_advice(0.92, 0.911, 0.9, 0.5) == [
        f"Recommended: 8, the {start} (92.0%, with patch size 4). Patch size 8 requires 0.25 times the compute of "
        "patch size 4."
    ]
    (own,) = get_advice(0.92, 0.915, 0.912, 0.9)
    assert own.startswith(f"Recommended: 16 (the model's own), the {start} (92.0%, with patch size 4). Patch size 16")
    assert "requires 0.062" in own
    assert get_advice(0.9, 0.92, 0.92, 0.92) == [f"Recommended: 32, the {start} (92.0%, at this size)."]
    assert get_advice(0.95, 0.9, 0.9, 0.9) == [f"Recommended: 4, the {start} (95.0%, at this size)."]
    assert get_advice(None, None, None, None) == []


def test_a_large_share_of_attention_is_mentioned() -> None:
    """With small patches of large images, most of the compute is for attention maps."""
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    rows = compare_patch_sizes(model, build_processor(), build_pil_images(count=1), None, [1])
    assert rows[0].patch_size == 1 and rows[0].attention_share > 0.5
    assert "attention maps" in describe_patch_sizes(rows)[1] and isinstance(model.vitcls, nn.Module)
