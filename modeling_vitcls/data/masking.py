"""Which patches masked image modelling hides.

    mask_block 1          mask_block 2          (ratio 0.5: in each case 8 of the 4 x 4 patches)
    # . . #               # # . .
    . # # .               # # . .
    # . . #               . . # #
    . # # .               . . # #

Every image has exactly as many hidden patches as the ratio says, so that a mean over patches is one over images. What
is put in their place, and the loss, are the model's.
"""

import torch

from ..options import MaskingOptions


class MaskChooser:
    """Draws masks for a grid of patches, by chance.

    Single patches (MAE, arXiv 2111.06377, section 3), or squares of patches (SimMIM, arXiv 2111.09886, section 3.2).
    """

    def __init__(self, options: MaskingOptions, grid: tuple[int, int]) -> None:
        """`grid`: rows and columns of patches.

        Raises:
            ValueError: in one line, for a ratio that would hide none or all of the patches, or squares that are larger
                than the part to hide.
        """
        rows, columns = grid
        self.grid = grid
        self.block = options.mask_block
        self.num_hidden = round(options.mask_ratio * rows * columns)
        self.check(options.mask_ratio)

    def check(self, ratio: float) -> None:
        """Raise ValueError for options that do not fit the grid."""
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
        """Masks [B, rows * columns], true where hidden, from the device's own random numbers or a generator's.

        Squares are hidden in random order. Of the last one only its first rows may be, where the number of patches
        asks for that.
        """
        rows, columns = self.grid
        across = (batch_size, -(-rows // self.block), -(-columns // self.block))
        squares = torch.rand(across, device=device, generator=generator)  # [B, squares down, squares across]
        patches = squares.repeat_interleave(self.block, dim=1).repeat_interleave(self.block, dim=2)
        order = patches[:, :rows, :columns].flatten(1).argsort(dim=1, stable=True)  # [B, rows * columns]
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, : self.num_hidden], True)
