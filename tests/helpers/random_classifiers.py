"""Build tiny classifiers with random weights, for tests of training."""

from typing import Any

from helpers.tiny_options import TINY
from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification


def build_random_model(**values: Any) -> ViTCLSForImageClassification:
    """Return a classifier with these fields of the configuration, and those of TINY."""
    return ViTCLSForImageClassification(ViTCLSConfig(**(TINY.get_config_values() | values)))
