"""A dense prediction head of transformers on `ViTCLSBackbone`: patches keep their places."""

from helpers.tiny_models import (
    build_images,
    build_tiny_config,
    get_largest_difference,
    randomize,
    record_outputs,
)
from transformers import DPTConfig, DPTForDepthEstimation

from modeling_vitcls import ViTCLSModel


def test_a_depth_head_gets_the_cls_token_and_the_patches_of_each_stage() -> None:
    """The head receives the first CLS token and the patches of each stage, row by row."""
    tokens = {"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 2}
    size = (24, 48)
    sizes = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [2, 1], "fusion_hidden_size": 8}
    config = build_tiny_config(out_indices=[1, 2], reshape_hidden_states=False, **tokens)
    model = randomize(
        DPTForDepthEstimation(DPTConfig(backbone_config=config, neck_ignore_stages=[], **sizes))
    )
    received = record_outputs(model.backbone)
    depth = model(build_images(2, *size)).predicted_depth

    assert depth.shape[0] == 2
    assert depth.isfinite().all()
    assert depth.std() > 0

    encoder = ViTCLSModel(config, add_pooling_layer=False).eval()
    encoder.load_state_dict(model.backbone.state_dict())
    expected = encoder(build_images(2, *size)).tokens
    last = received[0].feature_maps[-1]

    assert get_largest_difference(last[:, 0], expected["cls"][:, 0]) <= 1e-6
    assert get_largest_difference(last[:, 1:], expected["patches"]) <= 1e-6
