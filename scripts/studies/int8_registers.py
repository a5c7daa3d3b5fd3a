"""Study: does a register reduce the error of int8 features? (model_cards/studies/int8_registers.md)

    python scripts/studies/int8_registers.py --model runs/encoder --train train.parquet --test test.parquet

MLP neurons that write a large norm to a few patches are planted in an encoder; large ViTs have such
neurons (arXiv 2506.08010). The planted model and three changes of it are quantized to int8:

    test-time register  the neurons write to an added register instead of the patches (arXiv 2506.08010)
    neurons removed     the neurons are zero
    cached prefix       the neurons are zero, and all tokens attend to cached keys and values of the register, as in
                        RegCache (arXiv 2510.04547), which deletes outlier patches instead of setting neurons to zero
"""

import copy
import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import openvino
import pyarrow.parquet as pq
import timm
import torch
import tyro
from PIL import Image
from random_weights import randomize_weights
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from modeling_vitcls import ViTCLSConfig, ViTCLSImageProcessor, ViTCLSModel, convert_from_timm
from modeling_vitcls.analysis.faults import is_outlier
from modeling_vitcls.export.exportable import NamedOutputsModel
from modeling_vitcls.export.onnx_file import write_onnx
from modeling_vitcls.export.tracing import INPUT_NAME, select_graph_shape, trace_model
from modeling_vitcls.model.blocks_vitcls import ViTCLSAttention
from modeling_vitcls.speed.cpu_kernels import use_plain_modules


LAYER = 1  # of the planted neurons
NUM_NEURONS = 2
SHARE = 0.03  # of the patches at which a neuron is active
ACTIVATION = 40.0  # at these patches, on average
NORM = 6.0  # written at these patches, on average, in median norms of last patches
NUM_TRAIN = 3000
NUM_TEST = 2000
NUM_CALIBRATION_IMAGES = 128


class RegisterNeurons(nn.Module):
    """Move activations of selected MLP neurons from the patches to the last register.

    For each neuron, the register receives the largest patch activation in magnitude, and all patch
    activations are set to 0 (Jiang et al. 2025, arXiv 2506.08010, section 4).
    """

    def __init__(self, config: ViTCLSConfig, neurons: list[int]) -> None:
        super().__init__()
        self.neurons = neurons
        self.first_patch = config.token_layout.patches.start

    def forward(self, activations: Tensor) -> Tensor:
        """Move the activations of `neurons`, in a copy of [B, N, intermediate]."""
        patches = activations[:, self.first_patch :, self.neurons]  # [B, patches, neurons]
        largest = patches.gather(1, patches.abs().argmax(dim=1, keepdim=True))
        edited = activations.clone()
        edited[:, self.first_patch :, self.neurons] = 0
        edited[:, self.first_patch - 1, self.neurons] = largest.squeeze(1)
        return edited


class PrefixAttention(ViTCLSAttention):
    """Attention to the tokens, and to cached keys and values [1, heads, 1, head_dim]."""

    def project_qkv(
        self, hidden_states: Tensor, num_queries: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project_qkv(hidden_states, num_queries)
        cached_key, cached_value = (
            cached.expand(key.shape[0], -1, -1, -1) for cached in self.prefix
        )
        return query, torch.cat([key, cached_key], dim=2), torch.cat([value, cached_value], dim=2)


@torch.no_grad()
def plant_outliers(model: Any, images: Tensor, seed: int) -> tuple[Any, list[list[int]]]:
    """Return a copy of the model with planted neurons, and the neurons.

    A planted neuron is active at patches similar to a random one.
    """
    model, first_patch, inputs = copy.deepcopy(model), model.config.token_layout.patches.start, []
    layer = model.layers[LAYER]
    generator = torch.Generator().manual_seed(seed)
    hook = layer.mlp.register_forward_pre_hook(
        lambda module, arguments: inputs.append(arguments[0])
    )
    norm = (
        model(images, output_hidden_states=True)
        .hidden_states[-1][:, first_patch:]
        .norm(dim=-1)
        .median()
    )
    hook.remove()
    special = inputs[0][:, :first_patch].flatten(0, 1)
    patches = inputs[0][:, first_patch:].flatten(0, 1)
    for neuron in range(NUM_NEURONS):
        for candidate in torch.randperm(len(patches), generator=generator):
            direction = patches[candidate] - special.mean(0)
            values = patches @ direction
            threshold = values.sort().values[int((1 - SHARE) * len(values))]
            if (special @ direction).max() < threshold:  # not active at the CLS token
                break
        scale = ACTIVATION / (values[values > threshold].mean() - threshold)
        layer.mlp.fc1.weight[neuron] = scale * direction
        layer.mlp.fc1.bias[neuron] = -scale * threshold
        layer.mlp.fc2.weight[:, neuron] = 0
        layer.mlp.fc2.weight[torch.randint(len(direction), (), generator=generator), neuron] = (
            NORM * norm / ACTIVATION
        )
    return model, [[LAYER, neuron] for neuron in range(NUM_NEURONS)]


@torch.no_grad()
def add_test_time_register(model: Any, neurons: list[list[int]]) -> Any:
    """Return a copy of the model with a register of zeros that receives the neurons' activations."""
    adapted = model.adapt(num_register_tokens=1, gate_new_tokens=False)
    adapted.embeddings.register_tokens.zero_()
    # The norm between both linear layers is the identity.
    adapted.layers[LAYER].mlp.norm = RegisterNeurons(
        adapted.config, [index for _, index in neurons]
    )
    return adapted


@torch.no_grad()
def compute_outlier_fraction(model: Any, images: Tensor) -> float:
    """Return the fraction of patches with outlier norms after the last layer."""
    states = model(images, output_hidden_states=True).hidden_states[-1]
    norms = states[:, model.config.token_layout.patches].float().norm(dim=-1)
    return is_outlier(norms).float().mean().item()


@torch.no_grad()
def build_arms(model: Any, neurons: list[list[int]], images: Tensor) -> dict[str, Any]:
    """Return the models to compare."""
    with_register = add_test_time_register(model, neurons).eval()
    without_neurons = copy.deepcopy(model)
    use_plain_modules(with_register)
    for layer, neuron in neurons:
        without_neurons.layers[layer].mlp.fc1.weight[neuron] = 0
        without_neurons.layers[layer].mlp.fc1.bias[neuron] = 0
    with_prefix = copy.deepcopy(without_neurons)
    register = with_register.config.token_layout.registers
    for source, target in zip(with_register.layers, with_prefix.layers, strict=True):
        target.attention.__class__ = PrefixAttention
        target.attention.prefix = []
        source.attention.recorder = lambda query, key, value, *_, target=target: (
            target.attention.prefix.extend(
                states[:, :, register].mean(0, keepdim=True) for states in (key, value)
            )
        )
    with_register(images)
    for source in with_register.layers:
        source.attention.recorder = None
    names = ("no register", "test-time register", "neurons removed", "cached prefix")
    return dict(zip(names, (model, with_register, without_neurons, with_prefix), strict=True))


def simulate_int8(model: Any) -> Any:
    """Return a copy whose linear layers compute in int8.

    Weights are rounded per output channel, and inputs per tensor.
    """
    model = copy.deepcopy(model)
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = round_to_int8(
                module.weight.data, module.weight.data.abs().amax(1, keepdim=True)
            )
            module.register_forward_pre_hook(
                lambda module, inputs: round_to_int8(inputs[0], inputs[0].abs().max())
            )
    return model


def round_to_int8(values: Tensor, largest: Tensor) -> Tensor:
    """Round values to multiples of largest / 127."""
    scale = largest.clamp(min=1e-12) / 127
    return (values / scale).round() * scale


def export_int8(model: Any, images: Tensor, folder: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """Export the model, and quantize it with NNCF for OpenVINO."""
    shape = select_graph_shape(model, None, dynamic=False)
    file = Path(folder, "model.onnx")
    graph = trace_model(model, shape, torch.float32)
    write_onnx(graph, shape, list(NamedOutputsModel(model)(images[:2])), file)
    core = openvino.Core()
    calibration = list(images[:NUM_CALIBRATION_IMAGES].split(1))
    quantized = nncf.quantize(
        core.read_model(file),
        nncf.Dataset(calibration, lambda image: {INPUT_NAME: image.numpy()}),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calibration),
        ignored_scope=nncf.IgnoredScope(types=["Convolution"]),
    )
    compiled = core.compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: {
        "last_hidden_state": torch.from_numpy(compiled(batch.numpy())["last_hidden_state"].copy())
    }


@torch.no_grad()
def compute_tokens(model: Any, images: Tensor, num_patches: int) -> Tensor:
    """Return the CLS token and the patches after the final norm, [B, 1 + patches, D]."""
    tokens = torch.cat([model(batch)["last_hidden_state"] for batch in images.split(64)])
    return torch.cat([tokens[:, :1], tokens[:, -num_patches:]], dim=1)


def compare(tokens: Tensor, expected: Tensor) -> str:
    """Return the mean relative errors of the CLS token and of the patches, in percent."""
    errors = 100 * (tokens - expected).norm(dim=-1) / expected.norm(dim=-1)
    return f"CLS {errors[:, 0].mean():.1f}, patches {errors[:, 1:].mean():.1f}"


def load_images(file: Path, count: int, processor: Any) -> tuple[Tensor, list[int]]:
    """Return preprocessed images [B, C, H, W] and their labels."""
    table = pq.read_table(file).slice(0, count).to_pydict()
    images = [Image.open(io.BytesIO(image["bytes"])) for image in table["image"]]
    return processor(images, return_tensors="pt")["pixel_values"], table["label"]


def main(model: Path, train: Path, test: Path, seeds: int = 3) -> None:
    """Print one line of measurements per model.

    A line contains the fraction of outlier patches, the relative errors (%) of simulated int8 and
    of OpenVINO's int8, the difference from the planted model in float32 (%), and the accuracy of
    k-NN in float32 and int8.

    Args:
        model: Folder of an encoder without registers.
        train: Parquet file with the columns image and label: images for calibration, and neighbors
            for k-NN.
        test: Parquet file with the same columns.
        seeds: Number of random choices of planted neurons in the encoder.
    """
    encoder: Any = ViTCLSModel.from_pretrained(model).eval()
    processor = ViTCLSImageProcessor.from_pretrained(model)
    train_images, train_labels = load_images(train, NUM_TRAIN, processor)
    test_images, test_labels = load_images(test, NUM_TEST, processor)
    converted = convert_from_timm(
        randomize_weights(timm.create_model("vit_tiny_patch16_224"))
    ).vitcls.eval()
    large = nn.functional.interpolate(
        torch.cat([train_images[:NUM_CALIBRATION_IMAGES], test_images[:64]]), 224
    )
    for name, source, images, compared in (
        ("trained", encoder, train_images, test_images),
        ("converted, random", converted, large[:-64], large[-64:]),
    ):
        use_plain_modules(source)
        calibration = images[:NUM_CALIBRATION_IMAGES]
        num_patches = math.prod(source.config.grid_size)
        arms = {"as it is": source}
        for seed in range(seeds if source is encoder else 1):
            planted, neurons = plant_outliers(source, calibration, seed)
            arms |= {
                f"{arm}, seed {seed}": each
                for arm, each in build_arms(planted, neurons, calibration).items()
            }
        for arm, each in arms.items():
            fraction = compute_outlier_fraction(each, compared[:64])
            expected = compute_tokens(each, compared, num_patches)
            if not arm.startswith(("test-time", "neurons", "cached")):
                planted_tokens = expected
            simulated = compare(
                compute_tokens(simulate_int8(each), compared, num_patches), expected
            )
            with tempfile.TemporaryDirectory() as folder:
                graph = export_int8(each, calibration, folder)
                tokens = compute_tokens(graph, compared, num_patches)
                line = (
                    f"{name} | {arm} | {fraction:.1%} | {simulated} | {compare(tokens, expected)}"
                )
                line += f" | {compare(expected, planted_tokens)}"
                for run, features in (
                    ((each, expected), (graph, tokens)) if source is encoder else ()
                ):
                    neighbors = compute_tokens(run, images, num_patches)[:, 0]
                    classifier = KNeighborsClassifier(20, metric="cosine").fit(
                        neighbors, train_labels
                    )
                    line += f" | {classifier.score(features[:, 0], test_labels):.2%}"
            print(line, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
