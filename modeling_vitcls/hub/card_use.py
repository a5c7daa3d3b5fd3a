"""The sections of a card on how to use and how to cite a model.

The text of the section "Use" is in model_cards/use.md.j2. Its first code block runs without changes, the next one pins
a commit.
"""

from jinja2 import Template

from ..configuration_vitcls import MIN_TRANSFORMERS
from ..version import __version__
from .card_training import TEMPLATE
from .code_files import READING_ORDER, compute_code_digest
from .verification_script import AUTO_CLASSES


# Auto class -> the outputs that the first code block prints.
PRINTED_OUTPUTS = {
    "AutoModel": "outputs.last_hidden_state.shape",
    "AutoModelForImageClassification": "outputs.logits",
    "AutoModelForMaskedImageModeling": "outputs.reconstruction.shape",
    "AutoBackbone": "[feature_map.shape for feature_map in outputs.feature_maps]",
}
CITATION = f"""## Citation

```bibtex
@software{{modeling_vitcls,
  title = "modeling_vitcls: Vision Transformers whose CLS, register and distillation tokens are configuration",
  author = "{{The modeling_vitcls maintainers}}",
  version = "{__version__}",
  year = "2026"
}}
```"""


def build_use_section(
    name: str,
    architecture: str,
    has_pipeline: bool,
    revision: str = "main",
    finetune_dataset: str | None = None,
    is_native: bool = False,
) -> str:
    """Return the section "Use".

    Args:
        name: The model's id on the Hub, or its folder's name.
        architecture: The model's class.
        has_pipeline: Whether the image-classification pipeline supports the model.
        revision: Branch that the first code block loads. With a branch, transformers does not print a warning for
            each code file.
        finetune_dataset: Dataset in the command for fine-tuning. Default: no such command.
        is_native: Whether the class is part of transformers, so that no code of the repository runs.
    """
    auto_class = AUTO_CLASSES.get(architecture, "AutoModel")
    if is_native and architecture.endswith("ForImageClassification"):
        auto_class = "AutoModelForImageClassification"
    template = Template(TEMPLATE.with_name("use.md.j2").read_text(encoding="utf-8"))
    return template.render(
        name=name,
        auto_class=auto_class,
        has_pipeline=has_pipeline,
        newest="" if is_native else f', revision="{revision}", trust_remote_code=True',
        expression=PRINTED_OUTPUTS[auto_class],
        is_native=is_native,
        finetune_dataset=finetune_dataset,
        min_transformers=".".join(map(str, MIN_TRANSFORMERS)),
        version=__version__,
        code_digest=compute_code_digest(),
        reading_order=", ".join(f"`{name}`" for name in READING_ORDER),
    ).strip()
