"""Losses of the distillation token against a teacher (DeiT, Touvron et al. 2021, arXiv 2012.12877, section 4).

    total = (1 - alpha) * loss of the CLS head against the labels + alpha * distillation_loss

Each is a mean over the pictures of the batch, of terms that do not depend on the other pictures. The teacher itself is
in teacher.py.
"""

from collections.abc import Callable

import torch
from torch import nn


def distillation_loss(
    kind: str, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tau: float
) -> torch.Tensor:
    """Mean loss of the distillation head's logits [B, L] against the teacher's [B, L]; a scalar, `float32`.

    Args:
        kind: "hard": against the teacher's most probable label; "soft": against its probabilities.
        tau: temperature of "soft"; "hard" has none.

    Raises:
        ValueError: for an unknown kind, or logits of different shapes.
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown distillation {kind!r}: use {' or '.join(LOSSES)}")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"the teacher's logits have the shape {tuple(teacher_logits.shape)} and the student's "
            f"{tuple(student_logits.shape)}: give a teacher of the same labels"
        )
    return LOSSES[kind](student_logits.float(), teacher_logits.float(), tau)


def hard_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, tau: float) -> torch.Tensor:
    """Cross-entropy against the teacher's answer (equation 3)."""
    return nn.functional.cross_entropy(student_logits, teacher_logits.argmax(dim=-1))


def soft_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, tau: float) -> torch.Tensor:
    """tau² times the divergence of the student's softened probabilities from the teacher's (equation 2).

    The teacher's are the reference: sum of p_teacher * log(p_teacher / p_student) (Hinton et al. 2015, arXiv
    1503.02531). tau² keeps the size of the gradients when tau changes.
    """
    student = nn.functional.log_softmax(student_logits / tau, dim=-1)
    teacher = nn.functional.log_softmax(teacher_logits / tau, dim=-1)
    return tau**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {"soft": soft_loss, "hard": hard_loss}
