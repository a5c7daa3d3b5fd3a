"""Register neurons that were planted are found, and moved into a register without training."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from helpers.tiny_models import build_tiny_config, raises_one_line, randomize, save_both
from pytest import CaptureFixture, LogCaptureFixture
from torch import Tensor
from torch.testing import assert_close
from torchvision.transforms.v2.functional import to_pil_image

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    convert_to_transformers,
    export,
    find_register_neurons,
    inspect_tokens,
    look,
)
from modeling_vitcls.conversion.open_model import open_model
from modeling_vitcls.conversion.weight_rules import ConversionError
from modeling_vitcls.inference.load_model import load_model


LAYER, NEURON = 2, 5  # the layer counts from 1
MARKED = [3, 10]  # patches at which the neuron fires
LAYOUTS = {
    "OpenCLIP": {"hidden_act": "quick_gelu", "pre_norm": True, "patch_bias": False},
    "DINOv2": {"layer_scale_init_value": 1.0},
    "DINOv2-g": {"layer_scale_init_value": 1.0, "mlp_type": "swiglu"},
}


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plant(image: Tensor, **fields: Any) -> ViTCLSForImageClassification:
    """Return a classifier in which a neuron fires at the marked patches of an image, and writes a massive vector."""
    config = build_tiny_config(num_hidden_layers=4, image_size=32, patch_size=8, **fields)
    model = randomize(ViTCLSForImageClassification(config)).eval()
    layer = model.vitcls.layers[LAYER - 1]
    inputs: list[Tensor] = []
    hook = layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    model(image)
    hook.remove()

    target = torch.full((len(inputs[0]),), -8.0)
    target[[config.token_layout.num_prefix_tokens + patch for patch in MARKED]] = 20.0
    gate = layer.mlp.fc1 if config.mlp_type == "mlp" else layer.mlp.gate_proj
    linear = layer.mlp.fc2 if config.mlp_type == "mlp" else layer.mlp.down_proj
    gate.weight[NEURON] = torch.linalg.pinv(inputs[0]) @ target
    gate.bias[NEURON] = 0
    if config.mlp_type == "swiglu":  # the value of the gated neuron is 1
        layer.mlp.up_proj.weight[NEURON] = 0
        layer.mlp.up_proj.bias[NEURON] = 1
    linear.weight[:, NEURON] = 20 * torch.randn(config.hidden_size)
    return model


def move(model: Any) -> Any:
    return model.adapt(
        num_register_tokens=1, register_neurons={LAYER: [NEURON]}, token_fade_in_steps=0
    )


@torch.no_grad()
def compute_by_hand(model: Any, image: Tensor) -> Tensor:
    """Compute the logits of a model with a zero token, with the neuron cut at patches and added at the token."""
    with_token = model.adapt(num_register_tokens=1, token_fade_in_steps=0).eval()
    with_token.vitcls.embeddings.register_tokens.zero_()
    mlp = with_token.vitcls.layers[LAYER - 1].mlp
    linear = mlp.fc2 if hasattr(mlp, "fc2") else mlp.down_proj

    def edit(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (activations,) = inputs
        edited = activations.clone()
        for row in range(len(activations)):
            largest = max(activations[row, 2 + patch, NEURON].item() for patch in range(16))
            for patch in range(16):
                edited[row, 2 + patch, NEURON] = 0
            edited[row, 1, NEURON] = largest
        return (edited,)

    with linear.register_forward_pre_hook(edit):
        return with_token(image).logits


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_planted_neuron_is_found(name: str, image: Tensor) -> None:
    model = plant(image, **LAYOUTS[name])
    assert find_register_neurons(model, image, num_neurons=1) == {LAYER: [NEURON]}
    norms = model.vitcls(image, output_hidden_states=True).hidden_states[LAYER][0, 1:].norm(dim=-1)
    limit = 0.9 * norms[MARKED].min().item()
    found = find_register_neurons(
        model, [image, image], num_neurons=1, outlier_layer=LAYER, threshold=limit, last_layer=LAYER
    )
    assert found == {LAYER: [NEURON]}


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_outliers_move_into_the_register(name: str, image: Tensor) -> None:
    model = plant(image, **LAYOUTS[name])
    moved = move(model)
    before, after = (
        each.vitcls(image, output_hidden_states=True).hidden_states[LAYER][0].norm(dim=-1)
        for each in (model, moved)
    )
    patches, others = before[1:], [each for each in range(16) if each not in MARKED]
    assert patches[MARKED].min() > 3 * patches.median()
    assert after[2:][MARKED].max() < 2 * after[2:][others].max()
    assert after[1] > 3 * after[2:].median()
    assert not find_register_neurons(moved, image)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@torch.no_grad()
def test_logits_are_those_of_the_neuron_cut_and_added_by_hand(
    name: str, attention: str, dtype: torch.dtype, limit: float, image: Tensor
) -> None:
    model = plant(image, **LAYOUTS[name]).to(dtype)
    model.set_attn_implementation(attention)
    images = torch.cat([image, image.flip(-1)])
    expected = compute_by_hand(model, images)
    assert_close(
        move(model)(images).logits, expected, rtol=0, atol=limit * expected.abs().max().item()
    )
    assert not torch.equal(model(images).logits, expected)


@torch.no_grad()
def test_hidden_tokens_stay_hidden(image: Tensor) -> None:
    """The marked patches are hidden from attention, and their neuron still moves."""
    model = plant(image)
    mask = torch.ones(1, 17)
    mask[:, [1 + patch for patch in MARKED]] = 0
    moved = move(model)
    with_register = torch.cat([mask[:, :1], torch.ones(1, 1), mask[:, 1:]], dim=1)
    states = [
        model.vitcls(image, attention_mask=mask, output_hidden_states=True).hidden_states,
        moved.vitcls(image, attention_mask=with_register, output_hidden_states=True).hidden_states,
    ]
    assert states[1][LAYER][0, 1].norm() > 3 * states[0][LAYER][0, 1:].norm(dim=-1).median()


@torch.no_grad()
def test_a_saved_folder_has_them_and_the_same_logits(image: Tensor, tmp_path: Path) -> None:
    moved = move(plant(image))
    moved.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.register_neurons == {LAYER: [NEURON]}
    assert torch.equal(again(image).logits, moved(image).logits)


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_graph_moves_them_at_any_size(image: Tensor, tmp_path: Path) -> None:
    moved = move(plant(image))
    folder = save_both(moved, tmp_path / "model", ViTCLSImageProcessor(size=32))
    export(folder, tmp_path / "model.onnx")
    graph = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for each in (image, torch.randn(2, 3, 40, 48)):
        (logits, *_) = graph.run(["logits"], {"pixel_values": each.numpy()})
        assert_close(torch.from_numpy(logits), moved(each).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_packed_layers_move_them(image: Tensor, tmp_path: Path) -> None:
    moved = move(plant(image))
    folder = save_both(moved, tmp_path / "model", ViTCLSImageProcessor(size=32))
    packed = load_model(open_model(str(folder)))
    assert_close(packed(image).logits, moved(image).logits, rtol=0, atol=1e-5)


def test_no_class_of_transformers_moves_them(image: Tensor) -> None:
    with pytest.raises(ConversionError, match="register_neurons"):
        convert_to_transformers(move(plant(image)))


def test_a_model_without_outliers_has_nothing_to_move(
    image: Tensor, caplog: LogCaptureFixture
) -> None:
    model = randomize(ViTCLSModel(build_tiny_config(image_size=32, patch_size=8))).eval()
    assert find_register_neurons(model, image, threshold=1e6) == {}
    assert "there is nothing to move into a register" in caplog.text


def test_inspect_and_look_say_whether_there_are_outliers(
    image: Tensor, tmp_path: Path, capsys: CaptureFixture
) -> None:
    photo = tmp_path / "photo.png"
    pixels = ((image[0] / image.abs().max() + 1) * 127.5).byte()
    to_pil_image(pixels).save(photo)
    processor = ViTCLSImageProcessor(size=32)
    model = plant(processor(photo, return_tensors="pt")["pixel_values"])
    found = {}
    for name, each in (("planted", model), ("moved", move(model))):
        folder = save_both(each, tmp_path / name, processor)
        inspect_tokens(folder, [photo], output=tmp_path / "table.csv")
        look(folder, photo, output=tmp_path / "sheet.html")
        found[name] = capsys.readouterr().out, (tmp_path / "sheet.html").read_text()
    for text in found["planted"]:
        assert "outliers: 12.5% of the patches after layer" in text
    assert "so registers have nothing to take over" in found["moved"][0]
    assert "outliers" not in found["moved"][1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_register_tokens": 0, "register_neurons": {1: [0]}}, "requires a register"),
        ({"num_register_tokens": 1, "register_neurons": {9: [0]}}, "has layers 1 to"),
        ({"num_register_tokens": 1, "register_neurons": {1: [10**6]}}, "with neurons 0 to"),
        ({"num_register_tokens": 1, "register_neurons": {1: [0]}, "mlp_norm": True}, "inner norm"),
    ],
)
def test_neurons_that_do_not_exist_are_an_error(fields: dict[str, Any], words: str) -> None:
    with raises_one_line(words):
        build_tiny_config(**fields)
