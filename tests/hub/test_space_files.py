"""The files of a Space, without a Hub and a browser. test_space.py tests the Space itself."""

from packaging.requirements import Requirement

from modeling_vitcls.hub.revisions import HubCommit
from modeling_vitcls.hub.space import PublishedModel, build_space_files


MODEL = PublishedModel(HubCommit("ann/mine", "0" * 40, needs_token=False))


def test_every_required_library_has_a_minimum_version() -> None:
    content = build_space_files(MODEL)["requirements.txt"]
    assert isinstance(content, bytes)
    requirements = [Requirement(line) for line in content.decode().splitlines()]
    assert {"torch", "transformers", "matplotlib"} <= {requirement.name for requirement in requirements}
    for requirement in requirements:
        assert [specifier.operator for specifier in requirement.specifier] == [">="], requirement
