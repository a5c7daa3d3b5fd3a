"""Distillation of features without labels, from one or several teachers.

The command is `vitcls pretrain --teachers A B`.

    pixels -> teacher k -> pooled vector -> standardization -> target k
    pixels -> encoder   -> distillation token k -> linear   -> prediction k         loss = mean over k of UNIC's loss

With `--distill-patches`, the patches also imitate the patches of each teacher, resampled to the
same grid, through another linear layer. The linear layers are dropped after pre-training. All
teachers can share one token, or the pooled token if the encoder has no distillation token.

    UNIC's loss (Sariyildiz et al. 2024, arXiv 2408.05088)     0.5 * (1 - cosine) + 0.5 * smooth L1
    PHI-S (Ranzinger et al. 2024, arXiv 2410.01680)            (x - mean) U H^T / sqrt(mean(eigenvalues))

U contains the eigenvectors of the covariance of a teacher's features, and H is a normalized
Hadamard matrix: with it, all channels of a target have variance 1, although all distances change by
the same factor only. teacher.py loads the teachers, and losses.py contains the objective.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from ..data.batches import Batch, Normalizer
from ..model.modeling_vitcls import ViTCLSModel, ViTCLSPreTrainedModel
from .teacher import Teacher, TeacherCache


class Distillation(ViTCLSPreTrainedModel):
    """An encoder with a linear layer for each target.

    The linear layers are dropped after pre-training.
    """

    def __init__(self, encoder: ViTCLSModel, teachers: list[Teacher], with_patches: bool) -> None:
        config = encoder.config
        super().__init__(config)
        self.num_tokens = config.num_distillation_tokens
        width = config.hidden_size if self.num_tokens else config.pooled_size
        teacher_configs = [teacher.model.config for teacher in teachers]

        self.projectors = nn.ModuleList(
            nn.Linear(width, each.pooled_size) for each in teacher_configs
        )
        self.patch_projectors = nn.ModuleList(
            nn.Linear(config.hidden_size, each.hidden_size)
            for each in teacher_configs
            if with_patches
        )

        self.post_init()
        # after the initialization of the linear layers, which keeps these weights
        self.vitcls = encoder
        if self.num_tokens and encoder.pooler is not None:
            encoder.pooler.requires_grad_(False)  # not part of the loss

    def forward(self, pixel_values: Tensor, project: bool = False, **kwargs: Any) -> Any:
        """Return the predictions for all targets, in the order of `FeatureTeachers`.

        Without `project`, return the encoder's output.
        """
        outputs = self.vitcls(pixel_values, **kwargs)
        if not project:
            return outputs

        states = outputs.last_hidden_state  # [B, N, D]
        layout = self.config.token_layout
        tokens = [outputs.pooler_output]
        if self.num_tokens:
            tokens = states[:, layout.distillation].unbind(dim=1)
        if len(tokens) == 1:  # shared by all teachers
            tokens = [tokens[0]] * len(self.projectors)

        predictions = [
            projector(token) for projector, token in zip(self.projectors, tokens, strict=True)
        ]
        return predictions + [
            projector(states[:, layout.patches]) for projector in self.patch_projectors
        ]


@dataclass
class FeatureTeachers:
    """Standardized features: the pooled vectors of all teachers, then the patches of all."""

    teachers: list[Teacher]
    with_patches: bool
    autocast: Callable[[], Any]
    # mean and matrix for each target
    standardizations: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch], num_images: int) -> None:
        """Fit the standardization of each target to the first `num_images` images of batches.

        For patches, it is fitted to one patch of each image.
        """
        samples: list[list[Tensor]] = []
        for batch in batches:
            features = self.compute_features(batch, self.teachers)
            indices = torch.arange(len(batch["pixels"])) + sum(len(each[0]) for each in samples)
            rows = torch.arange(len(indices))
            samples.append(
                [
                    each if each.ndim == 2 else each[rows, indices % each.shape[1]]
                    for each in features
                ]
            )

        for vectors in zip(*samples, strict=True):
            mean, matrix = fit_phi_s(torch.cat(vectors)[:num_images].cpu().double())
            self.standardizations.append((mean.to(vectors[0]), matrix.to(vectors[0])))

    def compute_features(
        self, batch: Batch, sources: Sequence[Teacher | TeacherCache]
    ) -> list[Tensor]:
        """Return the pooled vectors [B, P] and patches [B, N, D] of teachers or their caches."""
        with self.autocast():
            outputs = [source.predict(batch) for source in sources]
        configs = [teacher.model.config for teacher in self.teachers]
        pooled = [
            each[:, : config.pooled_size] for each, config in zip(outputs, configs, strict=True)
        ]
        if not self.with_patches:
            return pooled
        return pooled + [
            each[:, config.pooled_size :].unflatten(1, (-1, config.hidden_size))
            for each, config in zip(outputs, configs, strict=True)
        ]

    def compute_targets(
        self, batch: Batch, sources: Sequence[Teacher | TeacherCache] | None = None
    ) -> list[Tensor]:
        """Return the standardized features; `sources` are the teachers by default."""
        features = self.compute_features(batch, self.teachers if sources is None else sources)
        return [
            (each - mean) @ matrix
            for each, (mean, matrix) in zip(features, self.standardizations, strict=True)
        ]


def compute_cosines(
    teachers: FeatureTeachers, normalize: Normalizer, model: Any, pixel_values: Tensor
) -> Tensor:
    """Return the cosines [B, teachers] of predictions and targets, for images [B, C, H, W]."""
    predictions = model(pixel_values, project=True)
    with torch.autocast(pixel_values.device.type, enabled=False):
        targets = teachers.compute_targets({"pixels": normalize.invert(pixel_values)})
    pairs = zip(predictions[: len(teachers.teachers)], targets, strict=False)
    cosines = [
        nn.functional.cosine_similarity(prediction.float(), target) for prediction, target in pairs
    ]
    return torch.stack(cosines, dim=1)


# Loss and targets ---------------------------------------------------------------------------------


def compute_feature_loss(predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Return UNIC's loss, averaged over targets, images and patches (section 3).

    Example:
        >>> import torch
        >>> from modeling_vitcls.training.distillation import compute_feature_loss
        >>> teacher = torch.randn(8, 384)
        >>> compute_feature_loss([teacher], [teacher]).item() < 1e-6
        True
    """
    losses = []
    for prediction, target in zip(predictions, targets, strict=True):
        cosine = nn.functional.cosine_similarity(prediction.float(), target, dim=-1).mean()
        losses.append(
            0.5 * (1 - cosine) + 0.5 * nn.functional.smooth_l1_loss(prediction.float(), target)
        )
    return torch.stack(losses).mean()


def fit_phi_s(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [C] of features [N, C] and the matrix [C, C] of PHI-S.

    Raise ValueError if no Hadamard matrix of size C is known.
    """
    mean = features.mean(dim=0)
    centered = features - mean
    eigenvalues, eigenvectors = torch.linalg.eigh(centered.T @ centered / len(features))
    hadamard = torch.from_numpy(build_hadamard_matrix(len(mean))).to(features) / len(mean) ** 0.5
    return mean, eigenvectors @ hadamard.T / eigenvalues.mean().clamp(min=1e-12).sqrt()


def build_hadamard_matrix(size: int) -> np.ndarray:
    """Return a matrix of 1 and -1 [size, size] with orthogonal rows.

    The matrix is the Kronecker product of Sylvester's matrix of size 2^n and Paley's of size q + 1,
    for a prime q with q mod 4 = 3. Raise ValueError if `size` has no such factors.
    """
    power = size & -size  # largest power of 2 that divides the size
    if power == size:
        return scipy.linalg.hadamard(size)

    while power >= 1:
        prime = size // power - 1
        if prime % 4 == 3 and all(
            prime % divisor for divisor in range(3, math.isqrt(prime) + 1, 2)
        ):
            squares = {value**2 % prime for value in range(1, prime)}
            signs = np.array([0] + [1 if value in squares else -1 for value in range(1, prime)])
            paley = np.ones((prime + 1, prime + 1), dtype=int)
            paley[1:, 0] = -1
            paley[1:, 1:] = scipy.linalg.circulant(signs) + np.eye(prime, dtype=int)
            return np.kron(scipy.linalg.hadamard(power), paley)
        power //= 2
    raise ValueError(
        "the standardization of teachers requires a width such as 384, 768 or 1024, but a teacher "
        f"has width {size}. Use a teacher of another width"
    )
