"""Build small random encoders and measure their tokens, for tests of figures."""

from typing import Any

from helpers.tiny_models import build_images, build_tiny_config, randomize
from helpers.varied_models import collect_findings
from modeling_vitcls import ViTCLSModel
from modeling_vitcls.analysis.token_statistics import Findings


TOKENS = {"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 5}


def measure(**fields: Any) -> tuple[Any, Findings]:
    """Return configuration and findings of a small random model with three layers by default."""
    model = randomize(ViTCLSModel(build_tiny_config(**{"num_hidden_layers": 3} | fields)))
    return model.config, collect_findings(model, build_images(4))
