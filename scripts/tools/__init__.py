"""Programs of the repository, which write pages and measure, and random weights to measure with."""
