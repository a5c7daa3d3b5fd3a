"""timm's models, loaded under the rule of loading.py: a Hub that does not answer costs seconds.

    model, commit = load_timm("vit_small_patch16_224")          # the repository is timm's choice, and so is its commit
    model, commit = load_timm("hf-hub:someone/their-model")     # also @REVISION

timm must be installed.
"""

from contextlib import nullcontext

from torch import nn

from .loading import briefly_asked


def load_timm(name: str, with_weights: bool = True) -> tuple[nn.Module, str | None]:
    """A model by its name in timm, and the hash of the commit of a repository that the name gives itself.

    Raises:
        OSError: in one line, where the Hub does not have the repository, or does not answer.
        Exception: whatever else timm raises.
    """
    import timm

    kind, colon, place = name.partition(":")
    if not colon:
        known = timm.get_pretrained_cfg(name) if with_weights else None
        with briefly_asked(known.hf_hub_id) if known is not None and known.hf_hub_id else nullcontext():
            return timm.create_model(name, pretrained=with_weights), None
    if kind.lower().replace("_", "-") != "hf-hub":
        return timm.create_model(name, pretrained=with_weights), None
    repo_id, _, revision = place.partition("@")
    with briefly_asked(repo_id, revision=revision or None) as commit:
        pinned = f"{kind}:{repo_id}@{commit}" if commit else name
        return timm.create_model(pinned, pretrained=with_weights), commit
