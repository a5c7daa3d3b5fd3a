"""The teacher's answers, kept, so that it is asked once about each augmented view of a picture.

With `--teacher-views V` every picture has V views that recur; a view is known by (view, index). The answers stay in
memory and in no checkpoint: after a resumption the teacher is asked again, in other batches, and its answers
are the same up to rounding before they are kept in half precision.
"""

from typing import Any

import torch

from .options import AugmentationOptions
from .teacher import Teacher


class TeacherCache:
    """Asks a teacher about batches with `pixels`, `view` [B] and `index` [B].

    Each process keeps what it has seen. An answer is rounded to the type it is kept in before it is used for the first
    time, and a batch is always asked about as a whole, so that it makes no difference when it was asked.
    """

    def __init__(
        self, teacher: Teacher, num_pictures: int, num_views: int, num_labels: int, dtype: torch.dtype = torch.float16
    ) -> None:
        """Takes num_views * num_pictures * num_labels numbers of `dtype` of memory."""
        self.teacher = teacher
        self.logits = torch.empty(num_views, num_pictures, num_labels, dtype=dtype)
        self.is_known = torch.zeros(num_views, num_pictures, dtype=torch.bool)

    def ask(self, batch: dict[str, Any]) -> torch.Tensor:
        """The teacher's logits [B, labels] on a batch, `float32`, on the device of its pixels."""
        view, index = batch["view"].cpu(), batch["index"].cpu()
        unknown = ~self.is_known[view, index]  # [B]
        if unknown.any():
            answers = self.teacher.ask(batch).to("cpu", self.logits.dtype)
            self.logits[view[unknown], index[unknown]] = answers[unknown]
            self.is_known[view, index] = True
        return self.logits[view, index].to(batch["pixels"].device, torch.float32)


def check_teacher_views(num_views: int, augmentation: AugmentationOptions) -> None:
    """Raise ValueError where pictures are mixed: then no view of one recurs."""
    for flag in ("mixup", "cutmix"):
        if num_views and getattr(augmentation, flag):
            raise ValueError(f"--teacher-views keeps answers about single pictures: leave out --{flag}, or it")
