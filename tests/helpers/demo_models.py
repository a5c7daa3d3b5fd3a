"""A model of the demo page: a tiny classifier with a register token."""

from helpers.tiny_models import build_tiny_config, randomize
from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.demo.reader import DemoModel


def build_classifier_demo() -> DemoModel:
    """Return a demo model with random weights, for images of 32 x 32 pixels."""
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1)))
    return DemoModel(model, ViTCLSImageProcessor(size=32), "mine", None, None, is_classifier=True)
