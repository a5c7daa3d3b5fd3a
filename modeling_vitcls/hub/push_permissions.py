"""May the user's token push to a repository? Asked before hours of training, and without changing anything.

repo_id = check_push_rights("someone/their-model", default_name="my-run")
"""

from typing import Any, Literal

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .connection import HUB_ERRORS, check_is_online, no_answer, patience, status_of


# Seconds after which a Hub that says nothing counts as unreachable.
PATIENCE = 10.0

TOKEN_PAGE = "https://huggingface.co/settings/tokens"
ROLES_THAT_WRITE = ("admin", "write", "contributor")

RepoType = Literal["model", "space"]
# The flag that names the repository.
FLAGS: dict[RepoType, str] = {"model": "--hub-model-id", "space": "--space-id"}


def check_push_rights(
    repo_id: str | None, default_name: str, private: bool = False, repo_type: RepoType = "model"
) -> str:
    """The full id, `namespace/name`, of the repository that a push would go to.

    Only asks the Hub, and writes nothing: neither there nor here. Call it on the main process alone.

    Args:
        repo_id: `namespace/name`, or a name in the user's own namespace; None: `default_name` there.
        default_name: such as the name of the output folder.
        private: whether the repository is meant to be private.
        repo_type: what it holds.

    Raises:
        ValueError: in one line with what to do: no token, a wrong one, one that may not write there, a namespace that
            is not the user's, a name that the Hub does not allow, or a public repository where a private one is meant.
        OSError: in one line, where the Hub does not answer.
    """
    check_is_online()
    account = who_am_i()
    name = repo_id or default_name
    full_id = name if "/" in name else f"{account['name']}/{name}"
    check_name(full_id, repo_type)
    check_namespace(full_id, account, repo_type)
    exists = check_existing(full_id, private, repo_type)
    check_token(full_id, account, exists)
    return full_id


def who_am_i() -> dict[str, Any]:
    """What the Hub says about the user and his token."""
    if get_token() is None:
        raise ValueError(
            f"no Hugging Face token was found, which a push needs: make one of the type 'write' at {TOKEN_PAGE}, then "
            "run `hf auth login`, or set HF_TOKEN"
        )
    try:
        with patience(PATIENCE):
            return HfApi().whoami()
    except HUB_ERRORS as error:
        if status_of(error) == 401:
            raise ValueError(
                "the Hub does not know the Hugging Face token (HF_TOKEN, else the one of `hf auth login`): make a new "
                f"one of the type 'write' at {TOKEN_PAGE}, and log in with it"
            ) from None
        raise unreachable(error) from error


def unreachable(error: BaseException) -> OSError:
    """The error where the Hub does not answer as it should."""
    return OSError(f"{no_answer(error)}, or leave the push for later")


def check_name(repo_id: str, repo_type: RepoType) -> None:
    """Raise ValueError for a name that the Hub would not take."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{repo_id!r} cannot be the name of a repository: give {FLAGS[repo_type]} namespace/name, of letters, "
            "digits, '-', '_' and '.', at most 96 characters"
        ) from None


def check_namespace(repo_id: str, account: dict[str, Any], repo_type: RepoType) -> None:
    """Raise ValueError unless the user may create repositories under this namespace."""
    namespace = repo_id.partition("/")[0]
    if is_same(namespace, account["name"]):
        return
    organisations = {entry["name"]: entry.get("roleInOrg") for entry in account.get("orgs", ())}
    roles = [role for name, role in organisations.items() if is_same(name, namespace)]
    if not roles:
        own = ", ".join([account["name"], *organisations])
        raise ValueError(
            f"cannot push to {repo_id}: {namespace} is neither you nor an organisation of yours; give "
            f"{FLAGS[repo_type]} with one of {own}"
        )
    if roles[0] is not None and roles[0] not in ROLES_THAT_WRITE:
        raise ValueError(
            f"cannot push to {repo_id}: your role in {namespace} is {roles[0]!r}, which may not write; ask an "
            f"administrator of {namespace}, or push to {account['name']}/{repo_id.partition('/')[2]}"
        )


def check_existing(repo_id: str, private: bool, repo_type: RepoType) -> bool:
    """Whether the repository exists. Raises ValueError where it is public, and is meant to be private."""
    try:
        with patience(PATIENCE):
            found = HfApi().repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        return False
    except HUB_ERRORS as error:
        raise unreachable(error) from error
    if private and not found.private:
        raise ValueError(
            f"{repo_id} exists and is public, and a private one was asked for: make it private in its settings on the "
            f"Hub, or choose another name with {FLAGS[repo_type]}"
        )
    return True


def is_private(repo_id: str) -> bool:
    """Whether a model's repository is there, and open to some alone; not where the Hub does not say."""
    try:
        with patience(PATIENCE):
            return bool(HfApi().model_info(repo_id, timeout=PATIENCE).private)
    except HUB_ERRORS:
        return False


def check_token(repo_id: str, account: dict[str, Any], exists: bool) -> None:
    """Raise ValueError unless the token may write to the repository, or create it where it does not exist."""
    token = account.get("auth", {}).get("accessToken")
    if token is None:  # a login by other means, which only the push itself can try
        return
    advice = f"make one of the type 'write' at {TOKEN_PAGE}, and log in with it (`hf auth login`, or HF_TOKEN)"
    if token["role"] == "read":
        raise ValueError(f"the Hugging Face token may only read, so it cannot push to {repo_id}: {advice}")
    if token["role"] == "fineGrained" and not is_in_scope(repo_id, token.get("fineGrained", {}), exists):
        raise ValueError(
            f"the fine-grained Hugging Face token has no permission to write to {repo_id}: add 'Write access to "
            f"contents' of its namespace at {TOKEN_PAGE}, or {advice}"
        )


def is_in_scope(repo_id: str, fine_grained: dict[str, Any], exists: bool) -> bool:
    """Whether a fine-grained token may write there: to all of the namespace, or to this repository if it exists."""
    names = [
        entry["entity"].get("name", "")
        for entry in fine_grained.get("scoped", ())
        if "repo.write" in entry.get("permissions", ())
    ]
    wanted = [repo_id.partition("/")[0]] + ([repo_id] if exists else [])
    return any(is_same(name, want) for name in names for want in wanted)


def is_same(name: str, other: str) -> bool:
    """The Hub's names are equal whatever their case."""
    return name.casefold() == other.casefold()
