"""How the attention of the first special token changes with depth, in sentences for the report.

    describe_attention_depth(use, findings)    up to three sentences

The same values by layer are curves in figures.py, and lists in the JSON file of `vitcls inspect`.
"""

from ..inference.token_names import get_token_names
from .token_statistics import Findings
from .token_use import TokenUse


# A map is nearly the same in every image if it varies less between images (`map_variation`) than
# this fraction of its distance from uniform attention.
MAX_SHARED_VARIATION = 0.3
# minimum `map_selectivity` of such a map: uniform attention is equal in all images, too
MIN_SHARED_SELECTIVITY = 0.1
MIN_IMAGES = 5  # minimum number of images for statements about all images


def describe_attention_depth(use: TokenUse, findings: Findings) -> list[str]:
    """Return sentences on the attention of the first special token by layer.

    They say over how many tokens it is spread, where it becomes selective, and where its map is the
    same in every image.

    The number of tokens is the exponential of the entropy, averaged over heads: uniform attention
    to n tokens gives n. Only layers in which the attention is used are described. A model without
    special tokens has no sentences.
    """
    names = get_token_names(use.config)
    num_layers = use.num_layers[0]
    if not names or not num_layers:
        return []
    num_tokens = findings.entropy[:num_layers, :, 0].mean(dim=1).exp().tolist()
    num_visible = findings.uniform_entropy_by_token[0].exp().item()

    narrowest = min(range(num_layers), key=num_tokens.__getitem__)
    sentence = (
        f"{names[0]} spreads its attention over about {num_tokens[0]:.0f} of {num_visible:.0f} "
        "tokens in layer 1"
    )
    if num_layers > 1:
        sentence += f" and over {num_tokens[-1]:.0f} in layer {num_layers}"
    if narrowest not in (0, num_layers - 1):
        sentence += f"; over the fewest, {num_tokens[narrowest]:.0f}, in layer {narrowest + 1}"
    sentences = [f"{sentence}."]

    selective = [
        layer for layer, number in enumerate(num_tokens, start=1) if number < num_visible / 2
    ]
    if not selective:
        sentences.append(
            "It covers at least half of the tokens in every layer, so its maps select little."
        )
    elif selective[0] > 1:
        sentences.append(
            f"It becomes selective in layer {selective[0]}, the first in which it covers less than "
            "half."
        )

    is_shared = findings.map_variation[:num_layers, 0] < MAX_SHARED_VARIATION
    is_shared &= findings.map_selectivity[:num_layers, 0] >= MIN_SHARED_SELECTIVITY
    shared = (is_shared.nonzero().flatten() + 1).tolist()
    if shared and findings.num_images >= MIN_IMAGES:
        sentences.append(
            f"Its map is nearly the same in every image in {format_layers(shared)}: such a map "
            "says little about a single image."
        )
    return sentences


def format_layers(layers: list[int]) -> str:
    """Return layer numbers as text, such as "layer 3" or "layers 1 to 3 and 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])

    texts = [
        f"{run[0]} to {run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in runs
    ]
    if len(texts) > 1:
        texts = [
            ", ".join(text.replace(" and ", ", ") for text in texts[:-1]) + f" and {texts[-1]}"
        ]
    return f"layer{'s' if len(layers) > 1 else ''} {texts[0]}"
