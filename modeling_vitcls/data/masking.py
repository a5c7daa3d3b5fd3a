"""Masks for masked image modeling.

    mask_block 1          mask_block 2          (ratio 0.5: 8 of the 4 x 4 patches are masked in both)
    # . . #               # # . .
    . # # .               # # . .
    # . . #               . . # #
    . # # .               . . # #

Every image has the same number of masked patches, so a mean over masked patches equals a mean over images. The model
defines the mask token and the loss.
"""

import torch

from ..options import MaskingOptions


class MaskChooser:
    """Draw random masks for a grid of patches.

    The masks consist of single patches (MAE, arXiv 2111.06377, section 3) or square blocks of patches (SimMIM, arXiv
    2111.09886, section 3.2).
    """

    def __init__(self, options: MaskingOptions, grid: tuple[int, int]) -> None:
        """`grid`: number of rows and columns of patches.

        Raises:
            ValueError: if the ratio masks none or all of the patches, or a block has more patches than are masked.
        """
        rows, columns = grid
        self.grid = grid
        self.block = options.mask_block
        self.num_hidden = round(options.mask_ratio * rows * columns)
        self.check(options.mask_ratio)

    def check(self, ratio: float) -> None:
        """Raise ValueError if the options do not fit the grid."""
        (rows, columns), block = self.grid, self.block
        if not 0 < self.num_hidden < rows * columns:
            raise ValueError(
                f"--mask-ratio {ratio} hides {self.num_hidden} of the {rows} x {columns} patches: choose one that "
                "hides some and leaves some, or a smaller --patch-size"
            )
        if min(block, rows) * min(block, columns) > self.num_hidden:
            raise ValueError(
                f"--mask-block {block} is more than the {self.num_hidden} of {rows} x {columns} patches that "
                f"--mask-ratio {ratio} hides: make it smaller"
            )

    def __call__(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return masks [B, rows * columns], True for masked patches.

        Blocks are masked in random order. The last block may be masked only in part, from its first row on, to reach
        the exact number of patches. `generator` replaces the default generator of the device.
        """
        rows, columns = self.grid
        across = (batch_size, -(-rows // self.block), -(-columns // self.block))
        squares = torch.rand(across, device=device, generator=generator)  # [B, squares down, squares across]
        patches = squares.repeat_interleave(self.block, dim=1).repeat_interleave(self.block, dim=2)
        order = patches[:, :rows, :columns].flatten(1).argsort(dim=1, stable=True)  # [B, rows * columns]
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, : self.num_hidden], True)
