# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""What importing the package changes in its process: the Auto classes know ViTCLS, and no more.

Two exceptions: Pillow's warnings about harmless properties of files are not shown, and scikit-learn sets
two variables of the environment.
"""

import subprocess
import sys

import pytest


PROGRAM = """
import logging, os, signal, warnings
import sys
import torch, transformers
from PIL import Image
from transformers import AutoImageProcessor, pipelines
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LIBRARIES = ("OMP", "MKL", "OPENBLAS")


def list_state():
    tasks = pipelines.PIPELINE_REGISTRY.supported_tasks
    module, optimizer = torch.nn.modules.module, sys.modules["torch.optim.optimizer"]
    return {
        "pipelines": {name: (task["impl"], *task["pt"]) for name, task in tasks.items()},
        "optimizer hooks": [
            *optimizer._global_optimizer_pre_hooks, *optimizer._global_optimizer_post_hooks
        ],
        "module hooks": [
            *module._global_forward_hooks, *module._global_forward_pre_hooks,
            *module._global_backward_hooks, *module._global_module_registration_hooks,
        ],
        "step": torch.optim.Optimizer.__dict__.get("step"),
        "call": torch.nn.Module.__call__,
        "attention": {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS},
        "from_pretrained": transformers.PreTrainedModel.from_pretrained.__func__,
        "trainer": transformers.Trainer.training_step,
        "threads": torch.get_num_threads(),
        "precision": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "grad": torch.is_grad_enabled(),
        "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
        "warnings": [each for each in warnings.filters if "PIL" not in repr(each)],
        "logging": (logging.root.level, logging.root.handlers[:]),
        "largest image": Image.MAX_IMAGE_PIXELS,
        "threads of libraries": [os.environ.get(f"{name}_NUM_THREADS") for name in LIBRARIES],
    }


transformers.Trainer, transformers.ViTForImageClassification
before = list_state()
import modeling_vitcls

for name in modeling_vitcls.__all__:
    getattr(modeling_vitcls, name)
after = list_state()
print({name: (before[name], after[name]) for name in before if before[name] != after[name]})
print("vitcls" in CONFIG_MAPPING)
"""


@pytest.mark.integration
def test_importing_every_public_name_adds_the_auto_classes_and_changes_nothing_else() -> None:
    command = [sys.executable, "-c", PROGRAM]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["{}", "True"]
