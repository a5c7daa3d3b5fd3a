"""The card under another name: README.md as it is published, where the repository is not called what the card says.

    card of the folder `my-run`          pushed to ann/digits-vit
    # my-run                        ->   # ann/digits-vit
    from_pretrained("my-run", ...)  ->   from_pretrained("ann/digits-vit", ...)
    model-index: - name: my-run     ->   model-index: - name: ann/digits-vit

Only the names that the card itself was made with are changed, and only there: what a person wrote stays.
"""

import re
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump


# What stands before the model's name where the card shows how to use it.
USES = r"from_pretrained\(\s*\"|pipeline\([^()\n]*model=\"|--model "


def card_under(repo_id: str, text: str, folder_name: str) -> str:
    """The card with the repository's id in its title, its code and its metadata.

    Args:
        repo_id: `namespace/name`.
        text: of README.md.
        folder_name: of the model's folder: what a card calls the model that no repository was named for.
    """
    header = REGEX_YAML_BLOCK.match(text)
    body = text[header.end() :] if header else text
    names = {folder_name, title_of(body), *index_names(header[2] if header else "")} - {"", repo_id}
    used = {name for name in names if in_use(name).search(body)}
    for name in used:
        body = in_use(name).sub(lambda found: f"{found[1]}{repo_id}", body)
        body = re.sub(rf"(?m)\A(\s*# ){re.escape(name)}$", lambda found: f"{found[1]}{repo_id}", body)
    if header is None:
        return body
    metadata = renamed_index(header[2], used | {folder_name}, repo_id)
    return f"{header[1]}{metadata}{header[3]}{body}"


def title_of(body: str) -> str:
    """What the first line of the text is, as a title; "" where it is none."""
    found = re.match(r"\s*# (.+)$", body, re.MULTILINE)
    return found[1].strip() if found else ""


def in_use(name: str) -> re.Pattern[str]:
    """Where the card loads a model of this name; the first group is what stands before it."""
    return re.compile(rf"({USES}){re.escape(name)}(?=[\"\s])")


def index_names(metadata: str) -> list[str]:
    """What model-index calls the models."""
    return [entry["name"] for entry in model_index(read_metadata(metadata)) if isinstance(entry.get("name"), str)]


def renamed_index(metadata: str, names: set[str], repo_id: str) -> str:
    """The metadata with another name in its model-index; as they were, to the letter, where there is none of these."""
    content = read_metadata(metadata)
    entries = [entry for entry in model_index(content) if entry.get("name") in names]
    if not entries:
        return metadata
    for entry in entries:
        entry["name"] = repo_id
    return yaml_dump(content, sort_keys=False).rstrip("\n")


def model_index(content: Any) -> list[dict[str, Any]]:
    """The entries of model-index."""
    entries = content.get("model-index") if isinstance(content, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def read_metadata(metadata: str) -> Any:
    """The card's YAML; None where it is wrong, which the Hub says at the push."""
    try:
        return yaml.safe_load(metadata)
    except yaml.YAMLError:
        return None
