"""Teachers: labels and preprocessing, distillation losses, and the cache of their predictions."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.photo_folders import draw_pixels, get_unicode_forms
from helpers.tiny_models import (
    build_tiny_config,
    build_tiny_resnet,
    get_largest_difference,
    raises_one_line,
    randomize,
    save_with_processor,
)
from timm.models import save_for_hf
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTImageProcessor,
    ResNetModel,
    ViTImageProcessor,
)

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.data.labels import OneLabel
from modeling_vitcls.model.heads_vitcls import compute_distillation_loss
from modeling_vitcls.training.teacher import Teacher, load_teacher, match_labels


CPU = torch.device("cpu")
NAMES = ["ant", "bee", "cat"]


def load_labeled_teacher(source: object, *names: str, channels: int = 3) -> Teacher:
    """Return the teacher of a student with these labels."""
    student = ViTCLSConfig(num_channels=channels, image_size=32)
    return load_teacher(str(source), OneLabel({"label": list(names or NAMES)}), student, CPU)


def build_pixels(channels: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    """Return random 8-bit images [2, C, H, W]."""
    return torch.from_numpy(draw_pixels(2, channels, height, width))


def build_half_processor(**settings: Any) -> ViTImageProcessor:
    return ViTImageProcessor(**{"size": {"height": 24, "width": 24}, **settings})


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """Return the folder of a teacher with three named labels, at 24 x 24 pixels."""
    return save_with_processor(build_tiny_resnet(), tmp_path / "resnet", build_half_processor())


# Outputs ------------------------------------------------------------------------------------------


def build_mobile_vit() -> tuple[Any, Any]:
    """Its image processor swaps red and blue, which constant preprocessing tables would not do."""
    sizes = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 6 + [16], "image_size": 64}
    config = MobileViTConfig(**sizes, num_attention_heads=2, id2label=dict(enumerate(NAMES)))
    settings = {"size": {"height": 64, "width": 64}, "do_center_crop": False}
    return MobileViTForImageClassification(config), MobileViTImageProcessor(**settings)


def build_vitcls() -> tuple[Any, Any]:
    config = build_tiny_config(id2label=dict(enumerate(NAMES)), num_distillation_tokens=1)
    return ViTCLSForImageClassification(config), ViTCLSImageProcessor(
        size={"height": 32, "width": 32}, resample=2
    )


TEACHERS = {
    "resnet": lambda: (
        build_tiny_resnet(),
        build_half_processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
    ),
    "mobilevit": build_mobile_vit,
    "ours": build_vitcls,
}


@pytest.mark.parametrize("build", TEACHERS.values(), ids=TEACHERS)
@torch.no_grad()
def test_teachers_predict_as_with_their_own_image_processor(build: Any, tmp_path: Path) -> None:
    model, processor = build()
    folder = save_with_processor(model, tmp_path / "teacher", processor)
    batch = build_pixels()
    teacher = load_labeled_teacher(folder)
    size = teacher.preprocessing.height_width
    # requires no resizing
    shown = nn.functional.interpolate(batch.float(), size=size).to(torch.uint8)
    processor = AutoImageProcessor.from_pretrained(folder)
    alone = AutoModelForImageClassification.from_pretrained(folder).eval()
    whole = processor(list(shown), do_resize=False, do_center_crop=False, return_tensors="pt")
    assert get_largest_difference(teacher(shown), alone(**whole).logits) <= 1e-5
    expected = alone(**processor(list(batch), return_tensors="pt")).logits
    assert get_largest_difference(teacher(batch), expected) <= 1e-5


@pytest.mark.parametrize(
    ("resample", "mode"), [(0, "nearest-exact"), (1, "bicubic"), (2, "bilinear")]
)
def test_teachers_resize_with_the_filter_of_their_processor(
    resample: Any, mode: str, tmp_path: Path
) -> None:
    """Lanczos (1) is replaced by bicubic.

    The weights of a teacher in half precision are converted to float32.
    """
    model = build_tiny_resnet().bfloat16()
    folder = save_with_processor(model, tmp_path, build_half_processor(resample=resample))
    teacher = load_labeled_teacher(f"transformers:{folder}")
    pixels = build_pixels(height=40, width=56)
    expected = functional.resize(pixels, [24, 24], InterpolationMode(mode), antialias=True)

    assert torch.equal(teacher.preprocessing(pixels), teacher.preprocessing(expected))
    assert teacher(pixels).dtype == torch.float32
    assert (
        get_largest_difference(teacher(pixels), model.float()(teacher.preprocessing(pixels)).logits)
        <= 1e-6
    )


def test_the_whole_crop_is_used_without_a_center_crop(tmp_path: Path) -> None:
    settings = {
        "size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
    }
    folder = save_with_processor(
        build_tiny_resnet(), tmp_path / "crops", build_half_processor(**settings)
    )
    teacher = load_labeled_teacher(folder)
    assert teacher.preprocessing.height_width == (16, 16)
    border = build_pixels()
    border[:, :, 8:24, 8:24] = 100  # the part that a center crop would keep
    other = border.clone()
    other[:, :, :8] = 0

    assert get_largest_difference(teacher(border), teacher(other)) > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_color_images_are_converted(channels: int, tmp_path: Path) -> None:
    one_mean = {"image_mean": [0.5], "image_std": [0.5]}
    grey = save_with_processor(
        build_tiny_resnet(num_channels=1), tmp_path / "grey", build_half_processor(**one_mean)
    )
    colour = save_with_processor(build_tiny_resnet(), tmp_path / "colour", build_half_processor())
    batch = build_pixels(channels=channels)
    for folder in (grey, colour):
        assert load_labeled_teacher(folder, channels=channels)(batch).shape == (2, 3)
    in_color = batch.expand(-1, 3, -1, -1)
    found, expected = (
        load_labeled_teacher(colour, channels=each.shape[1])(each) for each in (batch, in_color)
    )

    assert get_largest_difference(found, expected) <= 1e-5


# Labels -------------------------------------------------------------------------------------------


def test_labels_are_matched_by_name(resnet: Path) -> None:
    plain = load_labeled_teacher(resnet)(build_pixels())
    permuted = load_labeled_teacher(resnet, "cat", "ant", "bee")
    assert torch.equal(permuted(build_pixels()), plain[:, [2, 0, 1]])
    some = load_labeled_teacher(resnet, "cat", "ant")
    assert torch.equal(some(build_pixels()), plain[:, [2, 0]])
    composed, decomposed = get_unicode_forms("café")
    assert match_labels("teacher", ["a", decomposed], [composed, "a"]) == ([1, 0], "")


def test_labels_without_names_are_matched_by_index_with_a_message(tmp_path: Path) -> None:
    folder = save_with_processor(
        build_tiny_resnet(names=None), tmp_path / "unnamed", build_half_processor()
    )
    teacher = load_labeled_teacher(folder)
    assert "order" in teacher.description
    with raises_one_line("3 labels without names"):
        load_labeled_teacher(folder, "ant", "bee")


def test_labels_that_the_teacher_lacks_are_named(resnet: Path) -> None:
    with raises_one_line("'dog'", "ant, bee, cat"):
        load_labeled_teacher(resnet, "ant", "dog", "cat")
    with raises_one_line("'ant'"):
        match_labels("teacher", ["ant", "ant", "bee"], ["ant", "bee"])


# Invalid teachers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        # whose scores do not exclude one another, so they are no probabilities of one label
        (
            lambda: build_tiny_resnet(problem_type="multi_label_classification"),
            "not trained with one label per image",
        ),
        (
            lambda: build_tiny_resnet(problem_type="regression"),
            "not trained with one label per image",
        ),
        (lambda: ResNetModel(build_tiny_resnet().config), "lacks the weight classifier"),
    ],
)
def test_a_teacher_without_a_classifier_of_one_label_is_an_error(
    build: Any, message: str, tmp_path: Path
) -> None:
    folder = save_with_processor(build(), tmp_path, build_half_processor())
    with raises_one_line(message):
        load_labeled_teacher(folder)


def test_a_state_dict_is_converted_before_it_teaches(tmp_path: Path) -> None:
    file = tmp_path / "deit.pth"
    torch.save({}, file)
    with raises_one_line(f"vitcls convert {file} FOLDER", error=OSError):
        load_labeled_teacher(file)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    auto_map = '{"AutoConfig": "theirs.Config", "AutoModelForImageClassification": "theirs.Model"}'
    (tmp_path / "config.json").write_text(f'{{"model_type": "theirs", "auto_map": {auto_map}}}')
    (tmp_path / "theirs.py").write_text("raise SystemExit('this code was run')")
    with raises_one_line("not executed", "timm:NAME", error=OSError):
        load_labeled_teacher(tmp_path)


# timm ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_timm_preprocessing_equals_timm(tmp_path: Path) -> None:
    model = randomize(timm.create_model("test_vit", num_classes=3))
    model.pretrained_cfg["label_names"] = NAMES
    save_for_hf(model, tmp_path, model_config={"label_names": NAMES})
    teacher = load_labeled_teacher(f"timm:local-dir:{tmp_path}", "cat", "bee", "ant")
    settings = timm.data.resolve_model_data_config(model) | {"crop_pct": 1.0}
    transform = timm.data.create_transform(**settings, is_training=False)
    height, width = settings["input_size"][1:]
    batch = build_pixels(height=height, width=width)
    expected = model(torch.stack([transform(functional.to_pil_image(each)) for each in batch]))
    assert get_largest_difference(teacher(batch), expected[:, [2, 1, 0]]) <= 1e-5
    resized = functional.resize(
        build_pixels(), [height, width], InterpolationMode.BICUBIC, antialias=True
    )

    assert torch.equal(teacher.preprocessing(build_pixels()), teacher.preprocessing(resized))


# Losses -------------------------------------------------------------------------------------------


def build_logits(seed: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).mul(3).bfloat16()


def test_hard_loss_is_the_mean_negative_log_likelihood_of_the_teacher_label() -> None:
    student = build_logits(seed=1)
    teacher = build_logits(seed=2)
    probabilities = student.float().softmax(-1)[torch.arange(6), teacher.argmax(-1)]
    found = compute_distillation_loss(student, teacher, "hard")
    assert get_largest_difference(found, -probabilities.log().mean()) <= 1e-6


def test_soft_loss_is_the_scaled_kl_divergence_from_the_teacher() -> None:
    student = build_logits(seed=1)
    teacher = build_logits(seed=2)
    tau = 3.0  # DeiT's
    of_student, of_teacher = ((logits.float() / tau).softmax(-1) for logits in (student, teacher))
    expected = tau**2 * (of_teacher * (of_teacher / of_student).log()).sum(-1).mean()
    assert (
        get_largest_difference(compute_distillation_loss(student, teacher, "soft"), expected)
        <= 1e-5
    )
    assert compute_distillation_loss(teacher, teacher.float() + 5, "soft").abs() <= 1e-5
