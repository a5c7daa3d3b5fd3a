"""The pages: links, names, flags, error messages and code blocks.

Fast tests resolve the imports of Python blocks; slow tests run the blocks. The Python blocks and the
commands of a page run one after the other, as a reader runs them, offline, in one folder with
    photos/cat/*.png, photos/dog/*.png, photo.jpg    real digits as images
    more/..., weather/..., new/bird/*.png            other digits
    dino                                             a small random encoder with patches of 14 pixels
    runs/photos                                      the default run of `finetune` on both
    scripts/studies/digits.yaml                      the recipe with two seeds and two steps per run

An HTML comment in the line before a block changes what happens to it:
    <!-- not run: REASON -->                     the block requires the network, a GPU or minutes
    <!-- run with: "NEW" instead of "OLD" -->    the block runs with one text replaced

The flags of all commands are compared with `vitcls NAME --help`, even in blocks that do not run.
"""

import ast
import contextlib
import doctest
import importlib
import importlib.metadata
import inspect
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command_in_process import run_here
from helpers.doc_pages import PACKAGE, PAGES, ROOT, Block, check_imports, read_blocks, read_prose
from helpers.fresh_processes import run_python
from helpers.page_commands import SMALL_MODEL
from helpers.photo_folders import write_digits
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import save_both
from pytest import MonkeyPatch, approx
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import modeling_vitcls
from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    convert_from_timm,
    finetune,
)
from modeling_vitcls.cli.commands import COMMANDS
from scripts.tools import make_address


MODULE = ["-m", "modeling_vitcls.cli"]
OTHER_COMMANDS = (
    "cd curl python3 git hf sbatch torchrun make pip uvicorn .venv/bin/pip .venv/bin/python "
    "pre-commit"
).split()
# flags of pip, hf, pytest, accelerate and servers that the text mentions
OTHER_FLAGS = {
    *"--workers --preload --cpu --num_processes --mixed_precision --config_file".split(),
    *"--help --help-all --tyro-print-completion --node-rank --version --include".split(),
    *"--local-dir --revision --shm-size --torch-backend".split(),
}
# programs that are no subcommands of vitcls
PROGRAMS = (
    "scripts/benchmark.py",
    "scripts/studies/compare_features.py",
    "scripts/studies/compare_tools.py",
    "scripts/push_space.py",
    "scripts/space/transformers_js.py",
    "scripts/study.py",
)
ALL_PROGRAMS = (*COMMANDS, *PROGRAMS)
OTHER_PROGRAMS = {"--version", "--tyro-print-completion", "env"}  # without flags

LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(
    r"(?P<variables>(?:[A-Z_]+=\S+ )*)(?:accelerate launch (?P<launcher>.*?)-m modeling_vitcls\.cli"
    r"|vitcls|(?:python|accelerate launch)(?= scripts/)) (?P<program>-?-?[a-z][\w/.-]+) ?(?P<flags>.*)"
)
INLINE = re.compile(r"`([^`\n]+)`")
FLAG = re.compile(r"--[a-z][a-z0-9_-]*")
PRINTED = re.compile(
    r"^# (?=[{(\[])", re.MULTILINE
)  # comments that show the output of the line before
FILE = re.compile(
    r"[\w./-]+\.(?:py|toml|j2)|(?:modeling_vitcls|scripts|tests|docs|model_cards)/[\w./-]*"
)
STUDY = ROOT / "scripts/studies/digits.yaml"
FOLDERS = (ROOT, PACKAGE, PACKAGE / "model", ROOT / "tests")  # start of relative paths in the pages
# written by `make gpu` and `vitcls push`, or shown on a page; timm's program
OTHER_FILES = {"docs/speed-gpu.md", "answer.py", "handler.py", "serve.py", "train.py"}


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
# test_readme.py runs the blocks of README
RUN_PAGES = {block.page for block in BLOCKS if block.is_run and block.page.parent == ROOT / "docs"}


def get_name(page: Path) -> str:
    return page.name if page.parent == ROOT else f"docs/{page.name}"


# Text ---------------------------------------------------------------------------------------------


def get_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", read_prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=get_name)
def test_links_resolve(page: Path) -> None:
    links = LINK.findall(re.sub(INLINE, "", read_prose(page)))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{get_name(page)}: {link} does not exist"
        if anchor:
            assert anchor in get_anchors(target), f"{get_name(page)}: {link} has no such heading"


# Commands and flags -------------------------------------------------------------------------------


@cache
def read_flags(name: str) -> frozenset[str]:
    """Return the flags in `vitcls NAME --help`, or in the help of a program of scripts/."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        if name in PROGRAMS:
            assert run_in_process(name.removeprefix("scripts/"), "--help") == 0
        else:
            assert run_here(name, "--help-all") == 0
    return frozenset(FLAG.findall(output.getvalue()))


def read_own_flags(page: Path) -> str:
    """Return the prose of a page without flags of other programs and flags that were removed."""
    text = read_prose(page).partition("\n## What was removed")[0]
    if page.name == "coming-from.md":  # the first column of its first table
        text = re.sub(r"^(\| (?:`--|–).*?) \| .*$", r"\1", text, flags=re.MULTILINE)
    return text


def read_commands() -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the position and the parts of each command, also of those in inline code.

    Commands of other projects are left out; a block has no command that is not known.
    """
    for block in BLOCKS:
        for line in block.get_commands() if block.language == "bash" else ():
            found = COMMAND.match(line)
            if found:
                yield str(block), found
            else:
                first = line.split()[0]
                assert first in OTHER_COMMANDS or "=" in first, f"{block}: {line}"
    for page in PAGES:
        for code in INLINE.findall(read_own_flags(page)):
            if found := COMMAND.match(code):
                yield get_name(page), found


def test_commands_have_the_flags_of_their_programs() -> None:
    programs = set()
    for place, command in read_commands():
        program = command["program"]
        if program in OTHER_PROGRAMS:
            continue
        if program not in ALL_PROGRAMS:
            assert (ROOT / program).is_file(), f"{place}: there is no {program}"
            continue
        words = shlex.split(command["flags"], comments=True)
        unknown = {word for word in words if word.startswith("--")} - read_flags(program)
        assert not unknown, f"{place}: `vitcls {program}` has no {', '.join(unknown)}"
        programs.add(program)
    assert programs == {*ALL_PROGRAMS} - {"env"}


@pytest.mark.parametrize("page", PAGES, ids=get_name)
def test_flags_in_the_text_exist(page: Path) -> None:
    known = set().union(*map(read_flags, ALL_PROGRAMS)) | OTHER_FLAGS
    for code in INLINE.findall(read_own_flags(page)):
        assert set(FLAG.findall(code)) <= known, f"{get_name(page)}: {code}"


def test_the_pages_contain_the_address_of_pyproject() -> None:
    for page in make_address.PAGES:
        text = page.read_text()
        assert make_address.write_address(text, make_address.read_address()) == text, page


# Names and messages -------------------------------------------------------------------------------


def list_message_patterns() -> Iterator[str]:
    """Yield a pattern for each text of the package in which values or parameters are filled in."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
                ]
                text = re.sub(r"`[\w\0]+(=\S+)?`", "\0", "".join(map(str, parts)))
                if len(text) > 15:
                    yield re.escape(text).replace("\0", ".+")


def test_messages_in_the_faq_are_those_of_the_program() -> None:
    messages = re.findall(r'^\| "(.+)" \|', (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(messages) >= 10
    pattern = re.compile("|".join(list_message_patterns()))
    assert [message for message in messages if not pattern.fullmatch(message)] == []


@pytest.mark.parametrize("page", PAGES, ids=get_name)
def test_files_in_the_text_exist(page: Path) -> None:
    for code in INLINE.findall(read_prose(page)):
        for path in (
            [code] if FILE.fullmatch(code) else re.findall(r"(?<!\S)scripts/[\w./-]+", code)
        ):
            pattern = path.replace("NAME", "*").replace("x.py", "*.py")
            exists = any(any(folder.glob(pattern)) for folder in FOLDERS)
            assert exists or path in OTHER_FILES, f"{get_name(page)}: {path} does not exist"


def test_the_pages_of_the_site_are_those_of_the_repository() -> None:
    """And the two that scripts/tools/site_hooks.py writes."""
    listed = set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {*(ROOT / "docs").glob("[a-z]*.md"), *(ROOT / "model_cards").rglob("*.md")}
    found = {path.relative_to(ROOT).as_posix().removeprefix("docs/") for path in pages}
    written = {"contents.md", "api.md", *(path.name for path in ROOT.glob("C*.md"))}
    assert listed == found | written | {"SECURITY.md"}


def test_links_of_the_package_page_are_absolute(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    described: list[str] = []
    monkeypatch.setattr(
        "setuptools.setup", lambda **arguments: described.append(arguments["long_description"])
    )
    for name in ("README.md", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    settings = (ROOT / "pyproject.toml").read_text()
    address = '[project.urls]\nRepository = "https://example.org/vitcls"\n'
    (tmp_path / "pyproject.toml").write_text(settings.replace("[project.urls]\n", address))
    runpy.run_path(str(tmp_path / "setup.py"))
    targets = re.findall(r"\]\(([^)]+)\)", described[0])

    assert targets
    assert all(target.startswith(("https://", "http://")) for target in targets)
    assert "https://example.org/vitcls/raw/main/docs/images/look.jpg" in targets


def test_the_study_in_the_docs_is_the_recipe() -> None:
    blocks = [
        block for block in read_blocks(ROOT / "docs/evaluating.md") if block.language == "yaml"
    ]
    (shown,) = (yaml.safe_load(block.text) for block in blocks)
    recipe = yaml.safe_load(STUDY.read_text())
    assert {**shown, "question": ""} == {**recipe, "question": ""}


TIMM_CALL = re.compile(r"^\| `(model\.[^`]+)` \| `((?:model\.|\[each|ViTCLSBackbone)[^`]+)`", re.M)


def test_timms_calls_and_those_beside_them_have_the_same_outputs(tmp_path: Path) -> None:
    size = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 12, "num_heads": 2}
    source = VisionTransformer(**size, reg_tokens=4, num_classes=3).eval()
    for parameter in source.parameters():
        parameter.data.normal_(0, 0.05)
    converted = convert_from_timm(source).eval()
    converted.save_pretrained(tmp_path)

    calls = TIMM_CALL.findall((ROOT / "docs/own-loop.md").read_text())
    assert len(calls) == 6
    names = {"x": torch.randn(2, 3, 56, 56), "folder": tmp_path, "ViTCLSBackbone": ViTCLSBackbone}
    with torch.no_grad():
        names["features"] = source.forward_features(names["x"])
        for theirs, ours in calls:
            expected = eval(theirs, names | {"model": source})
            actual = eval(ours, names | {"model": converted})
            if "apply_layernorm" in ours:  # the last map is normalized, as the page says
                expected, actual = expected[:-1], actual[:-1]
            assert_close(actual, expected)


TOOL = re.compile(r"^\| `([a-z]+)` \| [^|]+ \| ([\d.]+) \| ([^|]+) \|", re.M)
TOOLS = TOOL.findall((ROOT / "docs/own-loop.md").read_text())


@pytest.mark.parametrize(("tool", "version", "files"), TOOLS, ids=[tool for tool, *_ in TOOLS])
def test_a_tool_is_tested_from_the_version_on_that_the_page_names(
    tool: str, version: str, files: str
) -> None:
    requirements = (ROOT / "pyproject.toml").read_text()
    assert f'"{tool}>={version}"' in requirements
    for file in re.findall(r"`([^`]+)`", files):
        assert re.search(rf"\b{tool}\b", (ROOT / file).read_text()), file


# Running ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(module_path: Path) -> Path:
    """Return a folder with the images and the models that the pages use."""
    for folder, digit, part in (
        ("photos/cat", 0, slice(30)),  # Fewer, because a page looks at each of them
        ("photos/dog", 7, slice(75)),
        ("more/cat", 0, slice(80, 90)),
        ("more/dog", 7, slice(80, 90)),
        ("weather/rain", 1, slice(12)),
        ("weather/sun", 4, slice(12)),
        ("more-weather/rain", 1, slice(12, 24)),
        ("more-weather/sun", 4, slice(12, 24)),
        ("new/bird", 3, slice(12)),
    ):
        write_digits(module_path / folder, digit, part)
    shutil.copy(module_path / "more/dog/0.png", module_path / "photo.jpg")
    write_encoder(module_path / "dino")
    with contextlib.chdir(module_path):
        # the layers that a run on photos chooses with a trained encoder (studies/first_answer.md)
        layers = (-4, -3, -2, -1)
        finetune("dino", "photos", "runs/photos", pooled_layers=layers, num_workers=0, report=False)
    # instead of README's command, which takes a minute
    write_encoder(module_path / "runs/digits", id2label=dict(enumerate("0123456789")))
    # instead of the study of the repository, which takes minutes
    study = yaml.safe_load(STUDY.read_text())
    study["stages"]["finetune"]["max_steps"] = 2
    study["seeds"] = [0, 1]
    shutil.copytree(ROOT / "scripts", module_path / "scripts")
    (module_path / "scripts/studies/digits.yaml").write_text(yaml.safe_dump(study))
    return module_path


def write_encoder(folder: Path, **fields: Any) -> None:
    """Write a small encoder with random weights and, as DINOv2, patches of 14 pixels."""
    config = ViTCLSConfig.from_preset(
        "tiny",
        image_size=56,
        patch_size=14,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=12,
        intermediate_size=128,
        initializer_range=0.14,  # as a run sets it for this width
        num_register_tokens=2,
        **fields,
    )
    torch.manual_seed(0)  # To some random encoders, all digits of one kind are shots of one scene.
    model_class = ViTCLSForImageClassification if fields else ViTCLSModel
    save_both(model_class(config), folder, ViTCLSImageProcessor(size={"height": 56, "width": 56}))


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Run:
    """Return a function that runs Python with flags, offline in a copy of the prepared folder."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    hub = {"HF_HOME": str(tmp_path / "huggingface"), "HF_HUB_OFFLINE": "1"}
    hub["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])

    def start(
        command: Sequence[str], variables: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        environment = os.environ | hub | dict(each.split("=", 1) for each in variables)
        return run_python(*command, environment=environment, cwd=tmp_path)

    return start


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.onnx"])
def test_a_dockerfile_copies_and_installs_what_its_programs_need(name: str) -> None:
    texts = [block.text for block in read_blocks(ROOT / "docs/serving.md")]
    files = {text.partition("\n")[0].removeprefix("# "): text for text in texts}
    copied = " ".join(re.findall(r"^COPY (.+) \S+$", files[name], re.M)).split()
    assert "serve.py" in copied
    assert {*copied} <= {*files, "modeling_vitcls", "runs/photos", "model.onnx"}

    requirements = re.findall(r"^RUN pip install (.+)", files[name], re.M)
    if "modeling_vitcls" in copied:
        requirements += ["modeling_vitcls", *(importlib.metadata.requires("modeling_vitcls") or ())]
    installed = {
        "anyio",
        *re.findall(r"[\w-]+", " ".join(requirements).lower()),
    }  # anyio: of fastapi
    owners = importlib.metadata.packages_distributions()
    program = files["answer.py" if "answer.py" in copied else "serve.py"]
    for module in {*re.findall(r"^(?:from|import) (\w+)", program, re.M)} & owners.keys():
        assert owners[module][0].lower() in installed


def test_imports_of_python_blocks_resolve() -> None:
    assert sum(check_imports(block.text) for block in BLOCKS if block.language == "python") > 20


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(RUN_PAGES), ids=get_name)
def test_blocks_run_in_order(page: Path, run: Run, tmp_path: Path) -> None:
    blocks = [block for block in read_blocks(page) if block.is_run]
    source = "\n\n".join(map(write_program, blocks))
    program = f"from helpers.page_commands import run_command\n\n{source}"
    (tmp_path / "page.py").write_text(program)
    done = run(["page.py"])

    for line in source.splitlines():
        if PRINTED.match(line):
            assert line.removeprefix("# ") in done.stdout.splitlines()


def write_program(block: Block) -> str:
    """Return the Python code that runs a block."""
    if block.language == "python":
        return block.get_source()
    return "\n".join(f"run_command({line!r})" for line in block.get_commands())


@pytest.mark.slow
def test_the_page_finds_planted_wrong_labels(run: Run, tmp_path: Path) -> None:
    (tmp_path / "photos/cat/0.png").rename(tmp_path / "photos/dog/planted.png")
    (block,) = (
        block
        for block in read_blocks(ROOT / "docs/evaluating.md")
        if "find_label_issues" in block.text
    )
    (tmp_path / "page.py").write_text(block.text)
    found = run(["page.py"]).stdout.partition("prediction\n")[2]
    assert "dog/planted.png" in found.splitlines()[0]


@pytest.mark.slow
def test_openvino_and_a_quantized_graph_keep_the_accuracy(run: Run, tmp_path: Path) -> None:
    flags = ["--model", "vitcls-tiny", "--dataset", "photos", "--output-dir", "runs/trained"]
    schedule = ["--epochs", "20", "--batch-size", "8", "--num-workers", "0", "--no-report"]
    run([*MODULE, "finetune", *flags, *schedule, *SMALL_MODEL.split()])
    run([*MODULE, "export", "--model", "runs/trained", "--output", "runs/trained/model.onnx"])
    blocks = [
        block.text
        for block in read_blocks(ROOT / "docs/exporting.md")
        if block.comment.startswith("not run: in tests/") and block.language == "python"
    ]
    source = "\n".join(blocks).replace("100)", "40)").replace("runs/photos", "runs/trained")
    source += """
found = [labels[compiled(read(file))["logits"].argmax()] for file in files]
print("openvino", sum(map(str.__eq__, found, [file.parent.name for file in files])) / len(files))
"""
    (tmp_path / "page.py").write_text(source)
    printed = dict(re.findall(r"^(\S+) ([\d.]+)$", run(["page.py"]).stdout, re.MULTILINE))
    accuracies = {name: float(value) for name, value in printed.items()}

    expected = accuracies["runs/trained/model.onnx"]
    assert expected > 0.8
    assert accuracies["openvino"] == expected
    assert accuracies["int8.onnx"] == approx(expected, abs=0.05)


@pytest.mark.slow
def test_examples_in_docstrings_run(run: Run, tmp_path: Path) -> None:
    objects = [getattr(modeling_vitcls, name) for name in modeling_vitcls.__all__]
    documented = [each for each in objects if callable(each)]
    lines = []

    for each in documented:
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(each) or "")
        assert examples, f"{each.__name__} has no example"
        for example in examples:
            if doctest.SKIP in example.options:  # It needs the Hub
                continue
            expected = example.want.strip()
            is_value = expected and not example.source.startswith("print")
            source = example.source.strip()
            lines.append(f"assert repr(({source})) == {expected!r}" if is_value else source)

    # README's command, shorter
    flags = ["--config", "digits", "--output-dir", "runs/digits", "--epochs", "5", "--no-report"]
    run([*MODULE, "finetune", *flags, "--overwrite"])
    (tmp_path / "page.py").write_text("\n\n".join(lines))
    run(["page.py"])
