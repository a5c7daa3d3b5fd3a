"""Tokens of users of the local Hub, with different roles and permissions."""

from local_hub import Token


TOKENS = {
    "hf_ann": Token("ann", {"lab": "write", "club": "contributor", "school": "read"}),
    "hf_read": Token("ann", role="read"),
    "hf_all_of_ann": Token("ann", role="fineGrained", scopes={("user", "ann"): ["repo.content.read", "repo.write"]}),
    "hf_one_model": Token(
        "ann", role="fineGrained", scopes={("model", name): ["repo.write"] for name in ("ann/there", "ann/deleted")}
    ),
    "hf_fine_read": Token("ann", role="fineGrained", scopes={("user", "ann"): ["repo.content.read"]}),
    "hf_bob": Token("bob"),
}
