"""timm's ViTs -> ours: `VisionTransformer`, `VisionTransformerDistilled` (DeiT) and `Eva` (EVA, PE, DINOv3, ...).

    model = convert_from_timm(timm.create_model("vit_base_patch16_clip_224.openai", pretrained=True))

Modules are read in timm_modules.py, names translated by timm_tables.py, odd blocks rewritten in timm_rewrites.py.
"""

from torch import nn

from ..configuration_vitcls import ViTCLSConfig
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .classifier import ClassifierChoice, assemble, split_classifier
from .engine import ConversionError, convert_weights
from .timm_modules import class_name, has_pooler, read_model
from .timm_rewrites import rewritten_state_dict, to_half_layout, turns_interleaved_channels
from .timm_tables import rules_for


CLASSES = ("VisionTransformer", "VisionTransformerDistilled", "Eva")


def convert_from_timm(
    model: nn.Module, *, classifier: ClassifierChoice = "keep", num_labels: int | None = None
) -> ViTCLSPreTrainedModel:
    """Take over a ViT of timm: same outputs, same dtype and device, in eval mode; the source stays as it is.

    With a classifier it becomes `ViTCLSForImageClassification`; without (`num_classes=0`) `ViTCLSModel`, whose
    `pooler_output` is what timm's model returns. Images of other sizes are taken as after `set_input_size`.

    Args:
        classifier: "keep" the source's, start a "new" one, or "drop" it (`ViTCLSModel`).
        num_labels: of a new classifier.

    Raises:
        ConversionError: for another class, a feature that ours lacks, which is named, or a choice of classifier that
            does not fit the source.
    """
    if class_name(model) not in CLASSES or not type(model).__module__.startswith("timm."):
        raise ConversionError(f"{class_name(model)} is none of timm's {', '.join(CLASSES)}: it cannot be converted")
    try:
        config = ViTCLSConfig(**read_model(model))
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(str(error)) from None
    weights = convert_weights(rewritten_state_dict(model), rules_for(model), config)
    if turns_interleaved_channels(model):
        weights = to_half_layout(weights, config)
    encoder, head = split_classifier(weights)
    return assemble(config, encoder, head, classifier, num_labels, with_pooler=has_pooler(model))
