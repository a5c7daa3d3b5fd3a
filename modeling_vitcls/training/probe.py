"""Probe of the frozen encoder before fine-tuning: k-NN and logistic regression on the features of the images.

    images -> frozen encoder, once -> CLS | mean of the patches | CLS + mean | the model's own pooling
                                      -> k-NN, logistic regression -> accuracies
                                      -> weights of the classifier (regression on the model's own pooling)

Fine-tuning then starts from the regression instead of a random classifier (linear probing, then fine-tuning: Kumar et
al. 2022, arXiv 2202.10054). With `--select best`, the frozen model takes part in the selection: fine-tuning must be
better than the frozen model by more than chance, and nothing is trained if there are too few
selection images to tell. If the frozen model is selected, the regression is fitted again, to the training and
selection images. The classifiers are those of `vitcls evaluate --frozen` (inference/frozen.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..distributed import run_on_main
from ..inference.frozen import FeatureEvaluator, build_classifier
from .reporter import Reporter


MAX_PROBE_IMAGES = 10_000  # maximum number of training images for the probe, drawn at random
MIN_SELECTION_IMAGES = 50  # with fewer images, the accuracy of the frozen model has a standard error of up to 7 points
ABSENT_CLASS_MARGIN = 100.0  # difference of a class without training images to the smallest bias, in logits


class ProbeEvaluator(FeatureEvaluator):
    """Computes the features of a frozen classifier's encoder."""

    def compute_features(self, model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features [B, P + 2 D] of images: own pooling, CLS tokens, mean of the patches."""
        outputs = model.vitcls(pixel_values)
        tokens = outputs.tokens
        cls = tokens["cls"] if tokens["cls"].shape[1] else tokens["patches"]
        vectors = [outputs.pooler_output, cls.mean(dim=1), tokens["patches"].mean(dim=1)]
        return torch.cat([vector.float() for vector in vectors], dim=1)


def explain_missing_probe(options: Any, model: Any, new_parameter_names: set[str], label_kind: str) -> str | None:
    """Return the reason why a run has no probe, or None if it has one."""
    reasons = {
        "--no-probe is set": not options.training.probe,
        "the dataset is a stream": options.data.streaming,
        "the dataset does not have one label per image": label_kind != "single_label_classification",
        "the model has a distillation head": getattr(model, "distillation_classifier", None) is not None,
        "the head is an MLP": not isinstance(getattr(model, "classifier", None), nn.Linear),
        "the pooler has random weights": any(name.startswith("vitcls.pooler.") for name in new_parameter_names),
        "the checkpoint has a classifier for these labels": "classifier.weight" not in new_parameter_names,
    }
    return next((reason for reason, is_true in reasons.items() if is_true), None)


@dataclass(frozen=True)
class Probe:
    """The probe of a classifier. At most `max_images` training images are used."""

    model: Any
    max_images: int | None
    evaluator_arguments: dict[str, Any]  # of `ProbeEvaluator`, except for the images

    def run(self, data: Any, reporter: Reporter) -> dict[str, Any]:
        """Set the classifier to the logistic regression on the frozen features, print the accuracies of the frozen
        model, and return them for results.json. The accuracies are measured on the selection images, or the held-out
        images if there are no selection images."""
        config = self.model.config
        features, labels = self.compute_features(data.train.draw(self.max_images))
        images = data.held_out if data.selection is None else data.selection
        evaluation = self.compute_features(images, warn=reporter.warn) if len(images) else None
        size, width = config.pooled_size, config.hidden_size

        def fit() -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
            own = slice(0, size)
            columns = {
                "CLS": slice(size, size + width),
                "mean of the patches": slice(size + width, None),
                "CLS + mean": slice(size, None),
            }
            if not config.num_cls_tokens:
                columns = {"mean of the patches": columns["mean of the patches"]}
            own_name = next(
                (name for name, part in columns.items() if np.array_equal(features[:, part], features[:, own])), None
            )
            if own_name is None:
                columns[own_name := f"pooling {config.pooling}"] = own
            classifiers = {
                (kind, name): build_classifier(kind, len(labels)).fit(features[:, part], labels)
                for name, part in columns.items()
                for kind in ("knn", "logreg")
                if evaluation is not None or (kind, name) == ("logreg", own_name)
            }
            probe: dict[str, Any] = {"num_training_images": len(labels), "features": own_name}
            if evaluation is not None:
                for (kind, name), classifier in classifiers.items():
                    accuracy = classifier.score(evaluation[0][:, columns[name]], evaluation[1])
                    probe.setdefault(kind, {})[name] = round(float(accuracy), 6)
            return probe, fold_standardization(classifiers["logreg", own_name], config.num_labels)

        probe, classifier = run_on_main(reporter.accelerator, fit)
        self.set_classifier(*classifier)
        if reporter.printed_metrics:  # none in a dry run
            reporter.print_line("frozen", describe_probe(probe))
        return probe

    def refit(self, data: Any, accelerator: Accelerator) -> None:
        """Fit the regression again, to the training and the selection images together."""
        parts = [self.compute_features(images) for images in (data.train.draw(self.max_images), data.selection)]
        features, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        config = self.model.config

        def fit() -> tuple[np.ndarray, np.ndarray]:
            pipeline = build_classifier("logreg", len(labels)).fit(features[:, : config.pooled_size], labels)
            return fold_standardization(pipeline, config.num_labels)

        self.set_classifier(*run_on_main(accelerator, fit))

    def compute_features(
        self, images: Any, warn: Callable[[str], None] = lambda message: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return features and labels. Training reports unreadable images, so that the default does not."""
        evaluator = ProbeEvaluator(images, **(self.evaluator_arguments | {"warn": warn}))
        outputs = evaluator(self.model.to(evaluator.accelerator.device).eval())
        return outputs["features"], outputs["labels"]

    def set_classifier(self, weight: np.ndarray, bias: np.ndarray) -> None:
        with torch.no_grad():
            self.model.classifier.weight.copy_(torch.from_numpy(weight))
            self.model.classifier.bias.copy_(torch.from_numpy(bias))


def fold_standardization(pipeline: Any, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight [L, F] and the bias [L] of the linear layer that predicts the same classes and probabilities
    as a `StandardScaler` followed by a `LogisticRegression`. Classes without training images are never predicted."""
    scaler, regression = pipeline[0], pipeline[1]
    coefficients, intercepts = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # the sigmoid of z is the softmax of [-z / 2, z / 2]
        coefficients, intercepts = np.vstack([-coefficients, coefficients]) / 2, np.append(-intercepts, intercepts) / 2
    weight = np.zeros((num_labels, coefficients.shape[1]))
    bias = np.full(num_labels, intercepts.min() - ABSENT_CLASS_MARGIN)
    weight[regression.classes_] = coefficients / scaler.scale_
    bias[regression.classes_] = intercepts - weight[regression.classes_] @ scaler.mean_
    return weight.astype(np.float32), bias.astype(np.float32)


def describe_probe(probe: dict[str, Any]) -> str:
    """Return the accuracies as text: "k-NN 78.9%, logistic regression 82.1% (CLS + mean)"."""
    if "knn" not in probe:
        return f"the classifier starts from logistic regression on {probe['features']}"
    best = {kind: max(probe[kind].items(), key=lambda item: item[1]) for kind in ("knn", "logreg")}
    (knn_name, knn), (name, accuracy), own_name = best["knn"], best["logreg"], probe["features"]
    return (
        f"k-NN {knn:.1%} ({knn_name}), logistic regression {accuracy:.1%} ({name}); the classifier starts from the "
        f"regression on {own_name} ({probe['logreg'][own_name]:.1%})"
    )
