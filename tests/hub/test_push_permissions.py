"""The check before training that a token may push to a repository, with the real huggingface_hub client."""

import pytest
from hub_tokens import TOKENS
from local_hub import LocalHub
from tiny_models import raises_one_line

from modeling_vitcls.hub.push_permissions import check_namespace, check_push_permissions, check_token


@pytest.fixture
def hub(hub: LocalHub) -> LocalHub:
    """Start an empty Hub for this process, as ann."""
    hub.tokens |= TOKENS
    return hub


@pytest.mark.parametrize(
    ("token", "asked", "found"),
    [
        ("hf_ann", None, "ann/my-run"),
        ("hf_ann", "model", "ann/model"),
        ("hf_ann", "Ann/model", "Ann/model"),
        ("hf_ann", "lab/model", "lab/model"),
        ("hf_ann", "club/model", "club/model"),
        ("hf_all_of_ann", "ann/model", "ann/model"),
        ("hf_one_model", "ann/there", "ann/there"),
    ],
)
def test_a_token_with_permission_returns_the_full_id(
    hub: LocalHub, token: str, asked: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("ann/there", private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    assert check_push_permissions(asked, "my-run") == found
    assert set(hub.repositories) == {"ann/there"}
    assert {method for method, _ in hub.requests} == {"GET"}


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (None, None, ["requires a Hugging Face token", "hf auth login", "HF_TOKEN"]),
        ("hf_wrong", None, ["is invalid", "hf auth login"]),
        ("hf_read", None, ["is read-only", "ann/my-run", "'write'"]),
        ("hf_fine_read", None, ["fine-grained", "ann/my-run", "Write access"]),
        ("hf_one_model", "ann/other", ["fine-grained", "ann/other"]),
        ("hf_one_model", "ann/deleted", ["fine-grained", "ann/deleted"]),  # the token may not create it
        ("hf_ann", "bob/model", ["bob is neither your user name nor", "ann, lab, club, school"]),
        ("hf_ann", "school/model", ["role in school is 'read'"]),
        ("hf_ann", "ann/my model", ["--hub-model-id"]),
        ("hf_ann", "a/b/c", ["--hub-model-id"]),
    ],
)
def test_a_token_without_permission_is_an_error_and_nothing_is_pushed(
    hub: LocalHub, token: str | None, repo_id: str | None, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("ann/there", private=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with raises_one_line(*words):
        check_push_permissions(repo_id, "my-run")
    assert set(hub.repositories) == {"ann/there"}
    assert {method for method, _ in hub.requests} <= {"GET"}


def test_unknown_roles_and_tokens_are_tested_by_the_push() -> None:
    """The Hub may not return a role or a token, for example for a login in a browser."""
    for organization in ({"name": "Lab"}, {"name": "lab", "roleInOrg": None}, {"name": "lab", "roleInOrg": "admin"}):
        check_namespace("lab/model", {"name": "ann", "orgs": [organization]}, "model")
    with raises_one_line("role in lab is 'read'", "push to ann/model"):
        check_namespace("lab/model", {"name": "ann", "orgs": [{"name": "lab", "roleInOrg": "read"}]}, "model")
    for account in ({"name": "ann"}, {"name": "ann", "auth": {}}, {"auth": {"accessToken": {"role": "write"}}}):
        check_token("ann/model", account, repo_exists=False)


def test_a_private_push_to_a_public_repository_is_an_error(hub: LocalHub) -> None:
    hub.create("ann/public", private=False)
    hub.create("ann/private", private=True)
    assert check_push_permissions("ann/private", "my-run", private=True) == "ann/private"
    assert check_push_permissions("ann/new", "my-run", private=True) == "ann/new"
    assert check_push_permissions("ann/private", "my-run") == "ann/private"
    hub.fail("GET", "/api/models/ann/private", 400)
    with raises_one_line("does not respond: HTTP 400", "or push later", error=OSError):
        check_push_permissions("ann/private", "my-run")
    with raises_one_line("ann/public exists and is public"):
        check_push_permissions("ann/public", "my-run", private=True)


def test_a_model_and_a_space_may_have_the_same_name(hub: LocalHub) -> None:
    hub.create("spaces/ann/space", private=False)
    hub.create("ann/model", private=False)
    with raises_one_line("ann/space exists and is public", "--space-id"):
        check_push_permissions("ann/space", "demo", private=True, repo_type="space")
    assert check_push_permissions("ann/model", "demo", private=True, repo_type="space") == "ann/model"
    with raises_one_line("neither your user name nor one of your organizations", "--space-id"):
        check_push_permissions("bob/demo", "demo", repo_type="space")
