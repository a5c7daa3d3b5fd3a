"""Markdown text of the demo page: the header, code that loads the model, and captions of attention maps."""

from pathlib import Path

from huggingface_hub import constants

from .reader import DemoModel


MEAN_OF_HEADS = "mean of all heads"
UNUSED_OUTPUT_NOTE = " The model does not use the output of this token in this layer."


def get_title(demo_model: DemoModel) -> str:
    """Return the title of the page: the name of the folder, or the Hub id."""
    return Path(demo_model.source).resolve().name if demo_model.commit is None else demo_model.source


def build_header(demo_model: DemoModel) -> str:
    """Return the title, provenance, size and special tokens of the model in Markdown."""
    provenance = "A model in a local folder"
    if demo_model.commit is not None:
        url = f"{constants.ENDPOINT}/{demo_model.source}"
        commit_link = f"[`{demo_model.commit[:7]}`]({url}/tree/{demo_model.commit})"
        provenance = f"[{demo_model.source}]({url}) at commit {commit_link}"
    names = demo_model.token_names
    token_text = f"special tokens: {', '.join(names)}" if names else "no special tokens"
    return (
        f"# {get_title(demo_model)}\n{provenance}. A Vision Transformer with "
        f"{format_count(demo_model.config.num_hidden_layers, 'layer')} and "
        f"{format_count(demo_model.config.num_attention_heads, 'head')} per layer; {token_text}."
    )


def format_count(count: int, noun: str) -> str:
    """Format a count with its noun. The function is duplicated from system.py, which is not part of a Space."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def build_loading_code(demo_model: DemoModel) -> str:
    """Return Python code that loads the model."""
    revision_argument = "" if demo_model.commit is None else f', revision="{demo_model.commit}"'
    revision_argument += f', code_revision="{demo_model.code_revision}"' if demo_model.code_revision else ""
    auto_class = "AutoModelForImageClassification" if demo_model.is_classifier else "AutoModel"
    repository = "the code repository named in config.json" if demo_model.code_revision else "the model's repository"
    note = ""
    if demo_model.commit is not None:
        note = f"\n`trust_remote_code=True` runs code from {repository} at the given commit.\n"
    arguments_text = f'"{demo_model.source}"{revision_argument}, trust_remote_code=True'
    return f"""```python
from transformers import AutoImageProcessor, {auto_class}

model = {auto_class}.from_pretrained({arguments_text})
processor = AutoImageProcessor.from_pretrained({arguments_text})
```
{note}"""


def explain_missing_output(demo_model: DemoModel) -> str:
    """Return the reason why the page has no labels or no attention maps, or an empty string."""
    if not demo_model.has_labels:
        return (
            "This model is an encoder without a classifier, so there are no labels. The patch features and the "
            "attention of the special tokens are shown below."
        )
    if not demo_model.token_names:
        return "This model has no special tokens (CLS, distillation, register), so there are no attention maps."
    return ""


def describe_attention(demo_model: DemoModel, token: int, layer: int, head: int | None, fractions: list[float]) -> str:
    """Describe the attention fractions of a token as percentages."""
    names = demo_model.token_names
    head_name = MEAN_OF_HEADS if head is None else demo_model.head_names[head]
    *special_token_fractions, patch_fraction = fractions
    special_text = ", ".join(f"{name} {value:.1%}" for name, value in zip(names, special_token_fractions, strict=True))
    note = "" if demo_model.is_token_output_used(token, layer) else UNUSED_OUTPUT_NOTE
    return (
        f"**{names[token]}**, layer {layer + 1} of {demo_model.config.num_hidden_layers}, {head_name}: "
        f"{patch_fraction:.1%} of its attention goes to the patches, {sum(special_token_fractions):.1%} to special "
        f"tokens ({special_text}).{note}"
    )
