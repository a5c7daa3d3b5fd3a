"""Replace the model's name in a card with the repository id before a push.

    card of the folder `my-run`          pushed to ann/digits-vit
    # my-run                        ->   # ann/digits-vit
    from_pretrained("my-run", ...)  ->   from_pretrained("ann/digits-vit", ...)
    model-index: - name: my-run     ->   model-index: - name: ann/digits-vit

Only generated names in the title, code examples and metadata are replaced. Text written by the user is left unchanged.
"""

import re
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump


def replace_model_name(repo_id: str, text: str, folder_name: str) -> str:
    """Return the text of README.md with the repository id in its title, code examples and metadata.

    A card contains the name of the model folder if no repository id was set when the card was built.
    """
    yaml_block = REGEX_YAML_BLOCK.match(text)
    header, body = (yaml_block[0], text[yaml_block.end() :]) if yaml_block else ("", text)
    metadata = read_metadata(yaml_block[2]) if yaml_block else None
    indexed_models = get_model_index(metadata)
    titles = [title.strip() for title in re.findall(r"\A\s*# (.+)$", body, re.MULTILINE)]
    names = {folder_name, *titles, *(model["name"] for model in indexed_models)} - {"", repo_id}
    used_names = {name for name in names if compile_loading_pattern(name).search(body)}
    for name in used_names:
        body = compile_loading_pattern(name).sub(lambda match: f"{match[1]}{repo_id}", body)
        body = re.sub(rf"(?m)\A(\s*# ){re.escape(name)}(?=\s*$)", lambda match: f"{match[1]}{repo_id}", body)
    renamed_models = [model for model in indexed_models if model["name"] in used_names | {folder_name}]
    for model in renamed_models:
        model["name"] = repo_id
    if yaml_block and renamed_models:
        header = yaml_block[1] + yaml_dump(metadata, sort_keys=False).rstrip("\n") + yaml_block[3]
    return header + body


def compile_loading_pattern(name: str) -> re.Pattern[str]:
    """Return a pattern for code that loads the model `name`; its first group is the text before the name."""
    return re.compile(
        rf"(from_pretrained\((?:base, |\s*)\"|pipeline\([^()\n]*model=\"|--model ){re.escape(name)}(?=[\"\s])"
    )


def get_model_index(metadata: Any) -> list[dict[str, Any]]:
    """Return the entries of the model-index that have a name."""
    models = metadata.get("model-index") if isinstance(metadata, dict) else None
    entries = models if isinstance(models, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)]


def read_metadata(text: str) -> Any:
    """Return the metadata of a card; None for invalid YAML, which the Hub reports during the push."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None
