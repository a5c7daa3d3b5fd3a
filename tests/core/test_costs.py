"""FLOPs compared with torch's counter, the memory estimate compared with autograd, and the measured GEMM peak.

FLOPs are exact. Memory is an estimate, within the factors in `CLOSE`.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import BLOCKS, LAYOUTS, build_images, build_tiny_config, each_kind, raises_one_line, randomize
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, ViTCLSForMaskedImageModeling, ViTCLSModel
from modeling_vitcls.system import measure_gemm_peak
from modeling_vitcls.training.costs import count_forward_flops, estimate_memory


# Fields that change the matrix products, in addition to the fields of all tests.
OTHERS: dict[str, dict[str, Any]] = {
    "parallel": {"layer_type": "parallel"},
    "post": {"layer_type": "post"},
    "rmsnorm": {"norm_type": "rmsnorm"},
    "differential": {"attention_type": "differential"},
    "more_norms": {"attention_norm": True, "mlp_norm": True},
    "attention_pooling_of_all": {
        "pooling": "attention",
        "attention_pool_tokens": "all",
        "attention_pool_intermediate_size": 40,
    },
    "attention_pooling_without_mlp": {"pooling": "attention", "attention_pool_mlp": False},
    "pooled_layer": {"pooled_activation": "tanh", "pooled_norm": True},
    "concatenated": {"num_cls_tokens": 3, "cls_pooling": "concat"},
    "cls_mean": {"pooling": "cls_mean"},
    "other_head_size": {"attention_head_size": 32},
    "gates": {"num_register_tokens": 2, "gated_tokens": {"registers": 1}},
    "distances": {"relative_position_bias": "layer"},
    "register_neurons": {"num_register_tokens": 1, "register_neurons": [[1, 2]]},
    "rope_mixed": {"position_embedding_type": "rope_mixed"},
    "antialias": {"position_antialias": True},
}
CASES = LAYOUTS | BLOCKS | OTHERS
each_case = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)

# Large enough that the numbers per head, which are estimated roughly, can be neglected.
WIDER = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "image_size": 64,
}
CLOSE = (0.8, 1.2)  # estimate divided by measurement


def count_attention_flops(query: tuple, key: tuple, value: tuple, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of attention, from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


def count_flops(call: Callable[[], Any]) -> int:
    """Return the FLOPs that torch counts; older versions do not count the CPU's fused attention."""
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def measure_saved_bytes(model: torch.nn.Module, call: Callable[[], Any]) -> int:
    """Return the bytes that autograd saves in a forward pass, without parameters. Shared memory counts once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # keeps the storages alive, so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    assert result.requires_grad
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


def compute_loss(model: Any, autocast: torch.dtype | None = None, batch: int = 4, side: int = 64) -> torch.Tensor:
    """Return the loss of a training step."""
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        return model(build_images(batch, side, side), labels=torch.arange(batch) % 3).loss


# Operations


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_equal_those_of_torch(fields: dict[str, Any], attention: str) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
    model.set_attn_implementation(attention)
    assert model.flops() == count_forward_flops(model) == count_flops(lambda: model(build_images(1)))
    larger = count_flops(lambda: model(build_images(3, 40, 56)))
    assert model.flops([40, 56], batch_size=3) == count_forward_flops(model, [40, 56], batch_size=3) == larger


@each_kind
def test_flops_of_all_model_classes(model_class: type, fields: dict[str, Any], inputs: dict[str, Any]) -> None:
    model = randomize(model_class(build_tiny_config(**fields, num_channels=1, patch_drop_rate=0.5)))
    wanted = count_flops(lambda: model(build_images(2, 32, 40, channels=1)))
    assert model.flops((32, 40), batch_size=2) == count_forward_flops(model, (32, 40), batch_size=2) == wanted
    assert model.config._attn_implementation == "sdpa"


def test_flops_with_patches_that_are_not_square() -> None:
    config = build_tiny_config(patch_size=[8, 4], image_size=[24, 32], num_register_tokens=2)
    model = randomize(ViTCLSForImageClassification(config))
    assert model.flops() == count_forward_flops(model) == count_flops(lambda: model(build_images(1, 24, 32)))


def test_flops_of_all_tokens_in_the_last_layer() -> None:
    """A classifier computes the last layer for the tokens that it reads, an encoder for all tokens."""
    config = build_tiny_config(num_register_tokens=4)
    classifier, encoder = ViTCLSForImageClassification(config), ViTCLSModel(config)
    head = 2 * 16 * 3
    assert classifier.flops() - head < encoder.flops() == count_flops(lambda: encoder(build_images(1)))
    config.output_hidden_states = True
    assert classifier.flops() - head == encoder.flops() == count_flops(lambda: classifier(build_images(1))) - head


def test_costs_on_the_meta_device() -> None:
    """ViT-B/16 at 224 pixels has 17.6 billion multiply-adds."""
    with torch.device("meta"):
        model = ViTCLSModel(ViTCLSConfig())
    assert round(model.flops() / 2e9, 1) == 17.6
    estimate = estimate_memory(model)
    assert estimate.parameters == 4 * sum(parameter.numel() for parameter in model.parameters())
    half = estimate_memory(model.bfloat16())
    assert (2 * half.parameters, 2 * half.activations) == pytest.approx(
        (estimate.parameters, estimate.activations), rel=0.02
    )


@pytest.mark.parametrize("function", [ViTCLSModel.flops, count_forward_flops, estimate_memory])
def test_images_that_are_too_small(function: Callable[..., Any]) -> None:
    with raises_one_line("32 x 7", "8 x 8"):
        function(ViTCLSModel(build_tiny_config()), (32, 7))


# Memory


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", CASES)
def test_estimated_activations_are_close_to_saved_bytes(
    name: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_vitcls.cpu_kernels_vitcls.MAX_CHUNKED_KEYS", 0)  # fused attention on every processor
    monkeypatch.setattr("modeling_vitcls.cpu_kernels_vitcls.EMULATED_DTYPES", set())
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**WIDER | CASES[name]))).train()
    estimate = estimate_memory(model, batch_size=4, autocast=autocast).activations
    assert CLOSE[0] <= estimate / measure_saved_bytes(model, lambda: compute_loss(model, autocast)) <= CLOSE[1]


EFFECTS: list[dict[str, Any]] = [
    {"norm_type": "rmsnorm"},
    {"attention_norm": True},
    {"qk_norm": True},
    {"layer_scale_init_value": 0.1},
    {"pre_norm": True},
    {"layer_type": "parallel"},
    {"mlp_type": "swiglu"},
    {"pooling": "attention"},
]
EFFECTS_IN_FLOAT32: list[dict[str, Any]] = [
    {"num_register_tokens": 2, "gated_tokens": {"registers": 1}},
    {"attention_type": "differential"},
]


@pytest.mark.parametrize(
    ("fields", "autocast"),
    [
        *((fields, autocast) for fields in EFFECTS for autocast in (None, torch.bfloat16)),
        *((fields, None) for fields in EFFECTS_IN_FLOAT32),
    ],
    ids=str,
)
def test_estimated_effects_of_fields_are_close_to_saved_bytes(
    fields: dict[str, Any], autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The effects are small in relation to all activations."""
    monkeypatch.setattr("modeling_vitcls.cpu_kernels_vitcls.MAX_CHUNKED_KEYS", 0)  # fused attention on every processor
    monkeypatch.setattr("modeling_vitcls.cpu_kernels_vitcls.EMULATED_DTYPES", set())
    estimates, measured = [], []
    for changes in ({}, fields):
        model = randomize(ViTCLSForImageClassification(build_tiny_config(**WIDER | changes))).train()
        estimates.append(estimate_memory(model, batch_size=4, autocast=autocast).activations)
        measured.append(measure_saved_bytes(model, lambda model=model: compute_loss(model, autocast)))
    assert estimates[1] - estimates[0] == pytest.approx(measured[1] - measured[0], rel=0.13)


def test_activations_of_masked_image_modeling() -> None:
    model = randomize(ViTCLSForMaskedImageModeling(build_tiny_config(**WIDER))).train()
    mask = torch.arange(4 * 64).view(4, 64) % 3 == 0
    measured = measure_saved_bytes(model, lambda: model(build_images(4, 64, 64), bool_masked_pos=mask).loss)
    assert CLOSE[0] <= estimate_memory(model, batch_size=4).activations / measured <= CLOSE[1]


def test_eager_attention_saves_its_maps() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**WIDER))).train()
    fused = estimate_memory(model, 128, batch_size=2).activations
    model.set_attn_implementation("eager")
    eager = estimate_memory(model, 128, batch_size=2).activations
    assert eager > 1.3 * fused
    assert 0.8 <= eager / measure_saved_bytes(model, lambda: compute_loss(model, batch=2, side=128)) <= 1.2


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("fields", [{}, {"attention_probs_dropout_prob": 0.1}, {"mlp_type": "swiglu"}], ids=str)
def test_estimates_for_another_device(fields: dict[str, Any], autocast: torch.dtype | None) -> None:
    """Estimates depend on the device of the training: CPUs recompute some activations, and save maps under dropout."""
    model = ViTCLSForImageClassification(build_tiny_config(**WIDER | fields))
    here = estimate_memory(model, batch_size=4, autocast=autocast)
    elsewhere = estimate_memory(model, batch_size=4, autocast=autocast, device="cuda")
    assert elsewhere != here == estimate_memory(model, batch_size=4, autocast=autocast, device=torch.device("cpu"))
    moved = model.to("meta")
    assert elsewhere == estimate_memory(moved, batch_size=4, autocast=autocast)
    assert here == estimate_memory(moved, batch_size=4, autocast=autocast, device="cpu")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_frozen_layers_save_nothing(autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_vitcls.cpu_kernels_vitcls.EMULATED_DTYPES", set())
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**WIDER))).train()
    everything = estimate_memory(model, batch_size=4, autocast=autocast)
    for part in (model.vitcls.embeddings, *model.vitcls.layers[:2]):
        part.requires_grad_(False)
    some = estimate_memory(model, batch_size=4, autocast=autocast)
    assert CLOSE[0] <= some.activations / measure_saved_bytes(model, lambda: compute_loss(model, autocast)) <= CLOSE[1]
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert (some.parameters, some.gradients, some.optimizer) == (everything.parameters, trained, 2 * trained)
    assert some.total == some.parameters + 3 * trained + some.activations
    assert some.activations < everything.activations / 3


def test_checkpointing_saves_inputs_and_one_layer() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**WIDER))).train()
    full = estimate_memory(model, batch_size=4).activations
    model.gradient_checkpointing_enable()
    estimate = estimate_memory(model, batch_size=4).activations
    between_layers = measure_saved_bytes(model, lambda: compute_loss(model))
    assert between_layers < estimate < full
    assert full / 3 * 0.8 <= estimate - between_layers <= full / 3 * 1.6  # three layers, of which the last is reduced


def test_the_optimizer_estimate_is_for_adamw() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config())).train()
    optimizer = torch.optim.AdamW(model.parameters())
    compute_loss(model, side=32).backward()
    optimizer.step()
    estimate = estimate_memory(model, batch_size=4)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert estimate.optimizer == sum(moment.nbytes for moment in moments)
    assert estimate.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())


# The machine


def test_gemm_peak_is_not_slower_than_a_plain_loop() -> None:
    """Check that matrix products in a plain loop take at least as long as the peak predicts."""
    side = 512
    first, second = torch.randn(side, side), torch.randn(side, side)
    torch.nn.functional.linear(first, second)
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        torch.nn.functional.linear(first, second)
        seconds.append(time.perf_counter() - started)
    reached = 2 * side**3 / statistics.median(seconds)  # other programs may run during some of them
    began = time.perf_counter()
    peak = max(measure_gemm_peak("cpu", torch.float32) for _ in range(3))  # other programs may slow down some of them
    assert time.perf_counter() - began < 60  # about two seconds on an idle machine
    assert 0.05 * peak < reached < 4 * peak
