"""Check before training that the token may push to a repository. The check makes no changes.

repo_id = check_push_permissions("someone/their-model", default_name="my-run")
"""

from typing import Any, Literal

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..hub.connection import HUB_ERRORS, check_is_online, describe_no_response, set_hub_timeout
from ..hub.loading import is_hub_id


TIMEOUT = 10.0  # maximum time without a response, in seconds

TOKEN_SETTINGS_URL = "https://huggingface.co/settings/tokens"
WRITE_ROLES = ("admin", "write", "contributor")

PushRepoType = Literal["model", "space"]
# Repository type -> the flag that sets the repository id.
REPO_ID_FLAGS: dict[PushRepoType, str] = {"model": "--hub-model-id", "space": "--space-id"}


def check_push_permissions(
    repo_id: str | None, default_name: str, private: bool = False, repo_type: PushRepoType = "model"
) -> str:
    """Check that the token may push to a repository, and return the full repository id, `namespace/name`.

    The check only reads from the Hub and writes no files. Call this function only on the main process. `repo_id` is
    `namespace/name`, or a name in the user's namespace (default: `default_name`). If `private` is True, an existing
    repository must be private.

    Raise ValueError if the name is invalid, or if the token, the namespace or the visibility does not permit the push,
    and OSError if the Hub does not respond. The message is a single line and names the remedy.
    """
    check_is_online()
    account = fetch_account()
    name = repo_id or default_name
    full_repo_id = name if "/" in name else f"{account['name']}/{name}"
    if not is_hub_id(full_repo_id):
        raise ValueError(
            f"{full_repo_id!r} is not a valid repository id. Set {REPO_ID_FLAGS[repo_type]} to namespace/name, with "
            "at most 96 characters (letters, digits, '-', '_' and '.')"
        )
    check_namespace(full_repo_id, account, repo_type)
    check_token(full_repo_id, account, is_existing_repo(full_repo_id, private, repo_type))
    return full_repo_id


def fetch_account() -> dict[str, Any]:
    """Return the Hub's information about the user and the token."""
    if get_token() is None:
        raise ValueError(
            f"a push requires a Hugging Face token, but no token was found. Create a 'write' token at "
            f"{TOKEN_SETTINGS_URL}, and run `hf auth login` or set HF_TOKEN"
        )
    try:
        with set_hub_timeout(TIMEOUT):
            return HfApi().whoami()
    except HUB_ERRORS as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise ValueError(
                "the Hugging Face token (HF_TOKEN, or the token of `hf auth login`) is invalid. Create a 'write' "
                f"token at {TOKEN_SETTINGS_URL}, and log in with this token"
            ) from None
        raise OSError(f"{describe_no_response(error)}, or push later") from error


def check_namespace(repo_id: str, account: dict[str, Any], repo_type: PushRepoType) -> None:
    """Raise ValueError unless the user may create repositories in the namespace."""
    namespace = repo_id.partition("/")[0]
    if namespace.casefold() == account["name"].casefold():
        return
    organizations = account.get("orgs", ())
    roles = [
        organization.get("roleInOrg")
        for organization in organizations
        if organization["name"].casefold() == namespace.casefold()
    ]
    if not roles:
        namespaces_text = ", ".join([account["name"], *(organization["name"] for organization in organizations)])
        raise ValueError(
            f"cannot push to {repo_id}: {namespace} is neither your user name nor one of your organizations. Set "
            f"{REPO_ID_FLAGS[repo_type]} to a name in one of these namespaces: {namespaces_text}"
        )
    if roles[0] is not None and roles[0] not in WRITE_ROLES:
        raise ValueError(
            f"cannot push to {repo_id}: your role in {namespace} is {roles[0]!r}, which does not permit pushing. "
            f"Contact an administrator of {namespace}, or push to {account['name']}/{repo_id.partition('/')[2]}"
        )


def is_existing_repo(repo_id: str, private: bool, repo_type: PushRepoType) -> bool:
    """Return whether the repository exists. Raise ValueError if the repository is public but has to be private."""
    try:
        with set_hub_timeout(TIMEOUT):
            repo_info = HfApi().repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        return False
    except HUB_ERRORS as error:
        raise OSError(f"{describe_no_response(error)}, or push later") from error
    if private and not repo_info.private:
        raise ValueError(
            f"{repo_id} exists and is public, but a private repository is required. Make the repository private in "
            f"the settings on the Hub, or set a different name with {REPO_ID_FLAGS[repo_type]}"
        )
    return True


def is_private_repo(repo_id: str) -> bool:
    """Return whether a model's repository exists and is private; False if the Hub does not respond."""
    try:
        with set_hub_timeout(TIMEOUT):
            return bool(HfApi().model_info(repo_id, timeout=TIMEOUT).private)
    except HUB_ERRORS:
        return False


def check_token(repo_id: str, account: dict[str, Any], repo_exists: bool) -> None:
    """Raise ValueError unless the token may write to the repository, or create the repository if it does not exist."""
    token = account.get("auth", {}).get("accessToken")
    if token is None:  # another type of login, whose permissions can only be tested by a push
        return
    remedy = (
        f"create a 'write' token at {TOKEN_SETTINGS_URL}, and log in with this token (`hf auth login`, or HF_TOKEN)"
    )
    if token["role"] == "read":
        raise ValueError(f"the Hugging Face token is read-only, so it cannot push to {repo_id}. To push, {remedy}")
    if token["role"] != "fineGrained":
        return
    writable_names = {
        scope["entity"].get("name", "").casefold()
        for scope in token.get("fineGrained", {}).get("scoped", ())
        if "repo.write" in scope.get("permissions", ())
    }
    # Write permission for the namespace, or for an existing repository, is sufficient.
    accepted_names = {repo_id.partition("/")[0].casefold()}
    if repo_exists:
        accepted_names.add(repo_id.casefold())
    if not writable_names & accepted_names:
        raise ValueError(
            f"the fine-grained Hugging Face token has no permission to write to {repo_id}. Add 'Write access to "
            f"contents' for the namespace at {TOKEN_SETTINGS_URL}, or {remedy}"
        )
