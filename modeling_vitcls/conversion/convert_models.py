"""Convert models in memory between other projects and this package, and compare their outputs.

    model = convert_from_timm(timm.create_model("vit_base_patch16_clip_224.openai", pretrained=True))
    model = convert_from_transformers(AutoModel.from_pretrained("facebook/dinov2-base"))
    built_in = convert_to_transformers(ViTCLSForImageClassification.from_pretrained(path))

A conversion reads settings and weights. What else a program changed in a model, such as an activation
or a `forward`, shows only in the outputs, so each function compares those of both models.
"""

import copy

from torch import nn
from transformers import PreTrainedModel

from ..model.adaptation_vitcls import remove_open_fade_in
from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from .from_timm import convert_timm_model
from .from_transformers import convert_transformers_model
from .parity_report import check_in_memory
from .source_models import TimmSource, TransformersSource
from .to_transformers import build_transformers_model, find_transformers_class
from .weight_rules import ConversionError


def convert_from_timm(model: nn.Module) -> ViTCLSPreTrainedModel:
    """Convert a timm ViT to a vitcls model in eval mode with the same outputs, dtype and device.

    The source is left unchanged. A model with a classifier becomes a
    `ViTCLSForImageClassification`. A model without a classifier (`num_classes=0`) becomes a
    `ViTCLSModel`, whose `pooler_output`, if any, equals the output of timm's model. For image sizes
    other than the native size, the outputs equal those that the source returns after a call to its
    `set_input_size`.

    Raises:
        ConversionError: If the class or a feature is not supported, or the outputs differ, because
            the model computes something else than its class.

    Examples:
        >>> import timm, torch
        >>> from modeling_vitcls import convert_from_timm
        >>> source = timm.create_model("vit_tiny_patch16_224").eval()
        >>> model = convert_from_timm(source)
        >>> image = torch.randn(1, 3, 224, 224)
        >>> torch.testing.assert_close(model(image).logits, source(image), rtol=0, atol=1e-4)
    """
    return check_in_memory(
        convert_timm_model(model), TimmSource(type(model).__name__, model, None, [])
    )


def convert_from_transformers(model: PreTrainedModel) -> ViTCLSPreTrainedModel:
    """Convert a transformers ViT to a vitcls model with the same outputs, dtype and device.

    The result is in eval mode, and the source is left unchanged. A classifier becomes a
    `ViTCLSForImageClassification` with the same labels. An image embedding model (CLIP with
    projection) also becomes a `ViTCLSForImageClassification`, with the embeddings as logits. Any
    other model becomes a `ViTCLSModel`.

    For image sizes other than the native size, the outputs equal the outputs of the source with
    `interpolate_pos_encoding=True`. The converted MAE encoder uses all patches in order, without
    random masking. The `image_size` of a converted RADIO model is the maximum image size, because
    RADIO stores position embeddings for that size.

    Raises:
        ConversionError: If the class or a feature is not supported, weights are missing or
            unexpected, or the outputs differ, because the model computes something else than its
            class.

    Examples:
        >>> from modeling_vitcls import convert_from_transformers
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=96, num_attention_heads=3, intermediate_size=384)
        >>> model = convert_from_transformers(ViTModel(config).eval())
        >>> model.config.token_counts
        (1, 0, 0)
    """
    return check_in_memory(
        convert_transformers_model(model), TransformersSource(type(model).__name__, "", model, [])
    )


def convert_to_transformers(
    model: ViTCLSPreTrainedModel, native_size_only: bool = False
) -> PreTrainedModel:
    """Convert a model to a transformers model in eval mode with the same outputs, dtype and device.

    `ViTCLSForImageClassification` becomes an image classification model of type ViT, DeiT, DINOv2
    or DINOv2 with registers. `ViTCLSModel` becomes the base model of one of these architectures, or
    of DINOv3. Biases and LayerScale values that only the transformers class has are set to 0 and 1,
    respectively. If the transformers class has no mask token, the mask token is dropped with a
    warning. If no class supports the model directly, an equivalent form of the model is converted.

    Args:
        model: Model to convert.
        native_size_only: Whether the outputs must be equal only for images of `config.image_size`.
            The transformers class may then resample position embeddings differently from the model
            at other sizes.

    Raises:
        ConversionError: If no class supports the model (the message names the nearest class and the
            unsupported fields), or the outputs differ, because the model computes something else
            than its class.

    Examples:
        >>> from modeling_vitcls import ViTCLSConfig, ViTCLSModel, convert_to_transformers
        >>> model = ViTCLSModel(ViTCLSConfig.from_preset("tiny"))
        >>> type(convert_to_transformers(model)).__name__
        'ViTModel'
    """
    if model.config.fading_tokens:
        model = copy.deepcopy(model)
        remove_open_fade_in(model)
    target, config, resampling = find_transformers_class(type(model).__name__, model.config)
    if resampling and not native_size_only:
        raise ConversionError(
            f"{target} has the same outputs only at {model.config.image_size} pixels, because "
            f"it resamples position embeddings differently: {', '.join(resampling)}. Set "
            "`native_size_only=True` if one size is enough"
        )
    converted = build_transformers_model(target, config, model)
    check_in_memory(model, TransformersSource(type(converted).__name__, "", converted, []))
    return converted
