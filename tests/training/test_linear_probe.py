"""Linear probing on cached features equals training with the encoder in every step; after caching, the encoder never
runs.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.tiny_models import (
    LAYOUTS,
    TASKS,
    assert_same_outputs,
    build_images,
    build_tiny_config,
    get_largest_difference,
    raises_one_line,
    randomize,
)
from helpers.warm_processes import METHOD, find_free_port
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification, ViTCLSImageProcessor
from modeling_vitcls.data.augmentation import build_augmentation
from modeling_vitcls.data.batches import Normalizer, iterate_training_batches
from modeling_vitcls.data.images import LabeledImages, UnreadableImage
from modeling_vitcls.data.labels import LabelSpace
from modeling_vitcls.data.sampling import BatchPlan
from modeling_vitcls.data.streaming import build_training_dataset
from modeling_vitcls.inference.evaluator import Evaluator
from modeling_vitcls.options import AugmentationOptions, TrainingOptions
from modeling_vitcls.training.linear_probe import (
    build_classifier_heads,
    build_probe_evaluator,
    cache_features,
    compute_features,
    find_trainable_parameters_outside_heads,
    iterate_feature_batches,
    split_keys,
)
from modeling_vitcls.training.losses import (
    ClassificationObjective,
    MultiTaskLoss,
    PixelTransform,
    SingleLabelLoss,
    add_feature_inputs,
)
from modeling_vitcls.training.model import set_train_mode, set_trainable_parameters


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NUM_IMAGES = 23
NAMES = ["ant", "bee", "cat"]
STILL = AugmentationOptions(crop_scale=1.0, flip=False, shift=0.0)
SHIFTED = AugmentationOptions(crop_scale=0.5, flip=True, rotation=20, shift=0.0)

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (ViTCLSForImageClassification, fields) for name, fields in LAYOUTS.items()},
    "cls_mean": (ViTCLSForImageClassification, {"pooling": "cls_mean", "num_cls_tokens": 2, "cls_pooling": "concat"}),
    "only the CLS head answers": (
        ViTCLSForImageClassification,
        {"num_distillation_tokens": 2, "distillation_inference": "cls", "head_type": "mlp"},
    ),
    "several tasks": (ViTCLSForMultiTaskClassification, {"num_cls_tokens": 2, "tasks": TASKS}),
}
each_model = pytest.mark.parametrize(("model_class", "fields"), MODELS.values(), ids=MODELS)


class MemoryImages:
    """Images in memory. Images with an index in `unreadable` raise an error."""

    def __init__(self, unreadable: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(0)
        arrays = torch.randint(0, 256, (NUM_IMAGES, 40, 36, 3), generator=generator, dtype=torch.uint8)
        self.images = [Image.fromarray(array.numpy()) for array in arrays]
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Image.Image:
        if index in self.unreadable:
            raise UnreadableImage(f"picture {index} is broken")
        return self.images[index]


class Probe:
    """A model whose heads are trained, with its data and options."""

    def __init__(
        self,
        model_class: Any = ViTCLSForImageClassification,
        options: AugmentationOptions = STILL,
        views: int = 1,
        unreadable: tuple[int, ...] = (),
        **fields: Any,
    ) -> None:
        self.model = set_trainable_parameters(randomize(model_class(build_tiny_config(**fields))), "head")
        self.processor = ViTCLSImageProcessor(size={"height": 32, "width": 32})
        self.normalise = Normalizer(self.processor, torch.device("cpu"))
        self.accelerator = Accelerator(cpu=True)
        self.views = views
        tasks = fields.get("tasks")
        one = range(NUM_IMAGES)
        labels: list[Any] = [{task: i % n for task, n in tasks.items()} if tasks else i % 3 for i in one]
        self.source = LabeledImages(MemoryImages(unreadable), labels)  # type: ignore[arg-type]
        columns = {name: [str(i) for i in range(n)] for name, n in tasks.items()} if tasks else {"label": NAMES}
        self.labels = LabelSpace("multi_task" if tasks else "single_label_classification", columns)
        augmentation = build_augmentation(options, self.processor)
        self.images = build_training_dataset(self.source, augmentation, to_rgb=True, seed=3, num_views=views)
        self.label_loss = MultiTaskLoss(0.1) if tasks else SingleLabelLoss(0.1)
        training = TrainingOptions(max_steps=8, batch_size=4, gradient_accumulation_steps=2)
        self.plan = BatchPlan.from_options(NUM_IMAGES, training, num_processes=1)

    def cache(self, **changes: Any) -> dict[str, Any]:
        keys = [(view, index) for view in range(self.views) for index in range(NUM_IMAGES)]
        settings = {"batch_size": 5, "num_workers": 0, "accelerator": self.accelerator} | changes
        return cache_features(self.model, self.images, keys, self.normalise, **settings)

    def train(self, module: Any, batches: Any, inputs: Any) -> None:
        """Train eight steps of two batches each, in train mode."""
        set_train_mode(module)
        objective = ClassificationObjective(inputs, self.label_loss)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for number, batch in enumerate(batches):
            (objective(module, batch)["loss"] / self.plan.accumulation_steps).backward()
            if (number + 1) % self.plan.accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()

    def count_calls(self) -> list[int]:
        """Return a list that grows with each batch that the encoder processes."""
        calls: list[int] = []
        self.model.vitcls.register_forward_hook(lambda module, inputs, outputs: calls.append(len(inputs[0])))
        return calls


# Heads ---------------------------------------------------------------------------------------------------------------


@each_model
def test_heads_on_features_predict_as_the_whole_model(model_class: Any, fields: dict[str, Any]) -> None:
    model = randomize(model_class(build_tiny_config(**fields)))
    with torch.no_grad():
        found = build_classifier_heads(model)(compute_features(model, build_images()))
        assert_same_outputs(found, model(build_images()), tolerance=1e-6)
        assert type(found) is type(model(build_images()))


@each_model
def test_their_parameters_are_the_models_own(model_class: Any, fields: dict[str, Any]) -> None:
    model = set_trainable_parameters(model_class(build_tiny_config(**fields)), "head")
    heads = dict(build_classifier_heads(model).named_parameters())
    of_model = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert heads.keys() == of_model.keys()
    assert all(heads[name] is of_model[name] for name in heads)


@pytest.mark.parametrize(
    ("fields", "choice", "fresh", "expected"),
    [
        ({}, "head", set(), set()),
        ({"pooling": "attention"}, "head", set(), {"vitcls.pooler.probe"}),
        ({"num_distillation_tokens": 1}, "head", {"vitcls.embeddings.distillation_token"}, None),
        ({}, "last-1", set(), {"vitcls.layernorm.weight"}),
        ({}, "lora", set(), {"vitcls.embeddings.cls_token"}),
    ],
)
def test_what_is_trained_outside_the_heads(
    fields: dict[str, Any], choice: str, fresh: set[str], expected: set[str] | None
) -> None:
    model = set_trainable_parameters(ViTCLSForImageClassification(build_tiny_config(**fields)), choice, 4, fresh)
    found = find_trainable_parameters_outside_heads(model)
    assert set(found) >= (fresh if expected is None else expected)
    assert bool(found) == (expected != set())


# Training on cached features -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_distillation_tokens": 1, "num_register_tokens": 2},
        {"options": SHIFTED, "views": 2},
        {"unreadable": (0, 7)},
        {"model_class": ViTCLSForMultiTaskClassification, "num_cls_tokens": 2, "tasks": TASKS},
    ],
    ids=["still", "distillation", "views", "broken", "tasks"],
)
def test_trained_heads_equal_those_of_training_with_the_frozen_encoder(changes: dict[str, Any]) -> None:
    noisy: dict[str, Any] = {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.3}
    slow, fast = Probe(**noisy, **changes), Probe(**noisy, **changes)
    slow.train(slow.model, iterate_training_batches(slow.images, slow.plan, 0, 0), PixelTransform(slow.normalise))

    cached = fast.cache()
    calls = fast.count_calls()
    batches = iterate_feature_batches(cached, fast.plan, 0, fast.views)
    fast.train(build_classifier_heads(fast.model), batches, add_feature_inputs)
    assert calls == []  # more than two epochs
    assert fast.plan.count_epochs(fast.plan.num_steps) > 2

    before = dict(randomize(type(fast.model)(fast.model.config)).named_parameters())
    for (name, wanted), found in zip(slow.model.named_parameters(), fast.model.parameters(), strict=True):
        assert get_largest_difference(wanted, found) <= 1e-5, name
        assert wanted.requires_grad == (not torch.equal(found, before[name])), name


def test_batches_equal_those_of_the_plan_without_pixels() -> None:
    probe = Probe(options=SHIFTED, views=2, unreadable=(4,))
    cached = probe.cache()
    expected = list(iterate_training_batches(probe.images, probe.plan, 0, 0))
    found = list(iterate_feature_batches(cached, probe.plan, 0, 2))
    assert len(found) == len(expected) == 16
    for one, other in zip(found, expected, strict=True):
        pixels = other.pop("pixels")
        features = one.pop("features")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)
        with torch.no_grad():
            assert (
                get_largest_difference(features, compute_features(probe.model.eval(), probe.normalise(pixels))) <= 1e-5
            )
    resumed = next(iterate_feature_batches(cached, probe.plan, 0, 2, first_step=5))
    assert torch.equal(resumed["index"], found[10]["index"]) and torch.equal(resumed["epoch"], found[10]["epoch"])


def test_each_view_of_each_image_is_encoded_once() -> None:
    probe = Probe(options=SHIFTED, views=3)
    calls = probe.count_calls()
    cached = probe.cache(batch_size=7)
    assert cached["features"].shape == (3 * NUM_IMAGES, 16)
    assert sum(calls) == 70 and set(calls) == {7}  # 69, and one repeated key that fills the last batch
    assert cached["view"].tolist() == [view for view in range(3) for _ in range(NUM_IMAGES)]
    assert cached["index"].tolist() == list(range(NUM_IMAGES)) * 3
    first, second, _ = cached["features"].chunk(3)
    assert get_largest_difference(first, second) > 1e-2


def test_caching_restores_the_mode_of_the_model_and_uses_workers() -> None:
    probe = Probe(hidden_dropout_prob=0.5)
    probe.model.train()
    here = probe.cache()
    assert probe.model.training and torch.equal(probe.cache(num_workers=1)["features"], here["features"])


def test_an_error_of_a_worker_is_one_line() -> None:
    probe = Probe(unreadable=tuple(range(NUM_IMAGES)))
    with raises_one_line("none of the 23 images can be read"):
        probe.cache(num_workers=1)


@pytest.mark.parametrize("num_keys", [1, 4, 8, 9, 23])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_shards_of_processes_combine_to_all_keys_in_order(num_keys: int, num_processes: int) -> None:
    keys = [(0, index) for index in range(num_keys)]
    parts = [split_keys(keys, 4, process, num_processes) for process in range(num_processes)]
    gathered = [key for turn in zip(*parts, strict=True) for batch in turn for key in batch]
    assert gathered[:num_keys] == keys
    assert set(gathered[num_keys:]) <= {keys[-1]}
    assert len(gathered) - num_keys < 4 * num_processes


def assert_same_metrics(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that metrics and predictions are equal up to rounding."""
    assert found.keys() == expected.keys()
    assert found["confusion_matrix"] == expected["confusion_matrix"]
    numbers = [name for name, value in expected.items() if isinstance(value, int | float)]
    assert [found[name] for name in numbers] == pytest.approx([expected[name] for name in numbers], abs=1e-5)


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_evaluating_the_heads_equals_evaluating_the_model() -> None:
    unreadable = (2, *range(8, 16))  # also a whole batch
    probe = Probe(num_distillation_tokens=1, hidden_dropout_prob=0.5, unreadable=unreadable)
    said: list[str] = []
    evaluator = Evaluator(
        probe.source, probe.processor, probe.labels, 8, 0, probe.accelerator, max_unreadable_images=9, warn=said.append
    )
    probe.model.eval()
    expected = evaluator(probe.model)
    calls = probe.count_calls()
    cheap = build_probe_evaluator(evaluator, probe.model.train())
    assert probe.model.training
    num_encoded = NUM_IMAGES - len(unreadable) + 1  # one placeholder for the batch without images
    assert sum(calls) == num_encoded and expected["num_images"] == NUM_IMAGES - len(unreadable)
    heads = build_classifier_heads(probe.model).eval()
    for _ in range(2):
        assert_same_metrics(cheap(heads), expected)
    assert sum(calls) == num_encoded
    assert evaluator(probe.model.eval()) == expected and len(said) == len(unreadable)


# Two processes -------------------------------------------------------------------------------------------------------


def run_process_share(rank: int, num_processes: int) -> dict[str, Any]:
    """Run the share of one process: encode, train the heads for four steps of eight images in total, evaluate."""
    probe = Probe(num_distillation_tokens=1, options=SHIFTED, views=2)
    assert probe.accelerator.num_processes == num_processes
    training = TrainingOptions(max_steps=4, batch_size=8 // num_processes)
    plan = BatchPlan.from_options(NUM_IMAGES, training, num_processes)
    evaluator = Evaluator(probe.source, probe.processor, probe.labels, 8, 0, probe.accelerator)
    cached = probe.cache()
    cheap = build_probe_evaluator(evaluator, probe.model)

    heads = build_classifier_heads(probe.model)
    prepared, optimizer = probe.accelerator.prepare(heads, torch.optim.SGD(heads.parameters(), lr=0.1))
    objective = ClassificationObjective(add_feature_inputs, probe.label_loss)
    for batch in iterate_feature_batches(cached, plan, rank, probe.views):
        probe.accelerator.backward(objective(prepared, batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    record = {"cached": cached, "weights": heads.state_dict(), "metrics": cheap(prepared.eval())}
    return record | {"of the whole model": evaluator(probe.model.eval())}


def probe_in_a_process(rank: int, port: int, folder: Path) -> None:
    """Run one of two processes, which writes its results to the folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(run_process_share(rank, 2), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(probe_in_a_process, (find_free_port(), tmp_path), 2, start_method=METHOD)
    alone = run_process_share(0, 1)
    for record in (torch.load(tmp_path / f"{rank}.pt") for rank in range(2)):
        assert torch.equal(record["cached"]["index"], alone["cached"]["index"])
        assert_same_outputs(record["cached"], alone["cached"], tolerance=1e-5)
        assert_same_outputs(record["weights"], alone["weights"], tolerance=1e-5)
        assert_same_metrics(record["metrics"], alone["metrics"])
        assert_same_metrics(record["metrics"], record["of the whole model"])
    assert alone["metrics"]["num_images"] == NUM_IMAGES
