"""Check the results file of a benchmark."""

import json
from pathlib import Path
from typing import Any


KEYS = {
    "work",
    "name",
    "against",
    "ratio",
    "quartiles",
    "pairs",
    "ours_images_per_second",
    "theirs_images_per_second",
    "ratios",
    "largest_difference_of_outputs",
}


def check_file(file: Path, num_pairs: int) -> list[dict[str, Any]]:
    """Return the comparisons in a results file, after a check of their keys and values."""
    results = json.loads(file.read_text())
    assert {"processor", "cores", "threads", "load"} <= set(results["machine"])
    assert {"modeling_vitcls", "torch", "transformers", "timm"} <= set(results["versions"])
    for entry in results["comparisons"]:
        assert set(entry) >= KEYS
        assert entry["pairs"] == len(entry["ratios"]) == num_pairs and min(entry["ratios"]) > 0
        assert entry["quartiles"][0] <= entry["ratio"] <= entry["quartiles"][1]
    return results["comparisons"]
