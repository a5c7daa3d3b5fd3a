"""Random values for every weight of a peer, so that no zero bias or small LayerScale hides a mistake."""

from modeling_vitcls.conversion.random_weights import randomize_weights


__all__ = ["randomize_weights"]
