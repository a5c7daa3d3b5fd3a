"""Options of tiny training runs."""

from modeling_vitcls.options import AugmentationOptions, ModelOptions


TINY = ModelOptions(
    model="vitcls-tiny",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=16,
    num_register_tokens=2,
)
PLAIN = AugmentationOptions(crop_scale=1.0, flip=False, shift=0.0)
