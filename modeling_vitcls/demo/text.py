"""The sentences of the demo's page, in Markdown: which model this is, how to load it, what its attention says."""

from pathlib import Path

from huggingface_hub import constants

from .reader import Reader


MEAN_OF_HEADS = "mean of all heads"


def title(reader: Reader) -> str:
    """The model's name."""
    return Path(reader.source).resolve().name if reader.commit is None else reader.source


def header(reader: Reader) -> str:
    """The title, where the model is from, and its special tokens."""
    config = reader.model.config
    origin = "A model in a folder of this machine"
    if reader.commit is not None:
        address = f"{constants.ENDPOINT}/{reader.source}"
        short = reader.commit[:7]
        origin = f"[{reader.source}]({address}) at commit [`{short}`]({address}/tree/{reader.commit})"
    tokens = f"special tokens: {', '.join(reader.tokens)}" if reader.tokens else "no special tokens"
    return (
        f"# {title(reader)}\n{origin}. A Vision Transformer of {counted(reader.num_layers, 'layer')} with "
        f"{counted(config.num_attention_heads, 'head')} each; {tokens}."
    )


def counted(number: int, word: str) -> str:
    """Such as "1 layer", "2 layers"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def how_to_load(reader: Reader) -> str:
    """Code to copy."""
    pinned = "" if reader.commit is None else f', revision="{reader.commit}"'
    pinned += f', code_revision="{reader.code_revision}"' if reader.code_revision else ""
    auto_class = "AutoModelForImageClassification" if reader.is_classifier else "AutoModel"
    place = "the repository that its config.json names" if reader.code_revision else "that repository"
    note = "" if reader.commit is None else f"\nThis runs code from {place}: the commit says which.\n"
    where = f'"{reader.source}"{pinned}, trust_remote_code=True'
    return f"""```python
from transformers import AutoImageProcessor, {auto_class}

model = {auto_class}.from_pretrained({where})
processor = AutoImageProcessor.from_pretrained({where})
```
{note}"""


def what_is_missing(reader: Reader) -> str:
    """Why there are no labels, or no attention; empty where both are there."""
    if not reader.has_labels:
        return (
            "This model is an encoder without a classifier, so there are no labels: see below what its tokens look at."
        )
    if not reader.tokens:
        return "This model has no special tokens (CLS, distillation, register), so there is no attention to show."
    if reader.merges_patches:
        return "This model merges patches, so its attention cannot be shown: only with `merged_patches_per_layer=0`."
    return ""


def attention_in_words(reader: Reader, token: int, layer: int, head: int | None, shares: list[float]) -> str:
    """Where a token's attention goes, in percent.

    Args:
        shares: for each special token, then for all patches.
    """
    heads = MEAN_OF_HEADS if head is None else reader.heads[head]
    *special, patches = shares
    others = ", ".join(f"{name} {share:.1%}" for name, share in zip(reader.tokens, special, strict=True))
    return (
        f"**{reader.tokens[token]}**, layer {layer + 1} of {reader.num_layers}, {heads}: {patches:.1%} of its "
        f"attention goes to the patches, {sum(special):.1%} to special tokens ({others})."
    )
