"""Images at URLs in a table: which addresses are fetched."""

import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow.parquet
import pytest
from helpers.photo_folders import write_photos
from helpers.tiny_models import raises_one_line

from modeling_vitcls.data import urls
from modeling_vitcls.data.images import UnreadableImage, decode_image
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import load_training_data
from modeling_vitcls.data.urls import FetchError, fetch
from modeling_vitcls.inference.embed_images import EmbedImages
from modeling_vitcls.inference.inputs import ImageRecord, open_input, prepare_image
from modeling_vitcls.inference.options import PredictOptions


class Network:
    """A network in which each host has an address, and each URL an answer."""

    def __init__(self, addresses: dict[str, str], redirects: dict[str, str]) -> None:
        self.addresses = addresses
        self.redirects = redirects
        self.requested: list[str] = []

    def find_address(self, host: str, *args: Any) -> list[Any]:
        return [(socket.AF_INET, None, 0, "", (self.addresses.get(host, host), 0))]

    def request(self, method: str, url: str, **settings: Any) -> Any:
        self.requested.append(url)
        if "silent" in url:
            raise TimeoutError("timed out")
        target = self.redirects.get(url)
        return SimpleNamespace(
            status_code=302 if target else 200,
            headers={"location": target} if target else {},
            content=b"content",
            raise_for_status=lambda: None,
        )


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """Return a network instead of that of this machine."""
    network = Network({"photos.org": "93.184.216.34", "inner.org": "10.0.0.7"}, {})
    monkeypatch.setattr(urls, "http_backoff", network.request)
    monkeypatch.setattr(urls.socket, "getaddrinfo", network.find_address)
    monkeypatch.setattr(urls, "SILENT_HOSTS", set())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return network


def write_table(tmp_path: Path, *addresses: str) -> str:
    """Write a table of local photos and addresses."""
    photos = write_photos(tmp_path / "photos", range(5))
    rows = [f"{file},{file.parent.name}" for file in photos.glob("*/*.png")]
    rows += [f"{address},cat" for address in addresses]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *rows]), encoding="utf-8")
    return str(tmp_path / "table.csv")


@pytest.mark.parametrize("address", ["http://photos.org/a.png", "HTTPS://photos.org/a.png"])
def test_addresses_in_a_table_require_a_flag(
    tmp_path: Path, network: Network, address: str
) -> None:
    table = write_table(tmp_path, address)
    with raises_one_line("1 of the images are at web addresses", "`allow_urls=True`"):
        load_training_data(DataOptions(dataset=table))
    with raises_one_line("`allow_urls=True`"):
        open_input(PredictOptions(model="model", dataset=table))
    with raises_one_line("`allow_urls=True`"):
        data = load_training_data(DataOptions(dataset=table, streaming=True, held_out_fraction=0.5))
        list(data.train.iterate_pass(0, 0, 0, 1))
    assert not network.requested

    assert (
        open_input(PredictOptions(model="model", dataset=table, allow_urls=True)).num_images == 11
    )
    load_training_data(DataOptions(dataset=table, allow_urls=True))


def test_addresses_in_a_list_or_in_a_batch_require_the_same_flag(
    tmp_path: Path, network: Network
) -> None:
    file = tmp_path / "list.txt"
    file.write_text("http://photos.org/a.png\nhttp://inner.org/b.png\n", encoding="utf-8")
    with raises_one_line(f"{file}: 2 of the images are at web addresses", "`allow_urls=True`"):
        open_input(PredictOptions(model="model", list=file))
    embed = EmbedImages("model")
    embed.predictor = object()  # type: ignore[assignment]
    with raises_one_line("the column path: 1 of the images", "`allow_urls=True`"):
        embed({"path": ["a.png", "http://photos.org/a.png"]})
    assert not network.requested

    source = open_input(PredictOptions(model="model", list=file, allow_urls=True))
    _, second = source.read_records(range(2))
    assert "private network" in (prepare_image(None, second).error or "")  # type: ignore


@pytest.mark.parametrize("is_stored", [False, True])
def test_addresses_in_a_parquet_file_are_found_in_columns_of_any_type(
    tmp_path: Path, network: Network, is_stored: bool
) -> None:
    """polars writes large strings; a photo that the table contains may have an address as its path."""
    photos = sorted(write_photos(tmp_path / "photos", range(5)).glob("*/*.png"))
    addresses = [f"http://photos.org/{photo.name}" for photo in photos]
    images: Any = pyarrow.array(addresses, pyarrow.large_string())
    if is_stored:
        contents = [photo.read_bytes() for photo in photos]
        images = pyarrow.array(
            [{"bytes": each, "path": path} for each, path in zip(contents, addresses, strict=True)]
        )
    labels = [photo.parent.name for photo in photos]
    file = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), file)

    for read in (
        lambda: load_training_data(DataOptions(dataset=str(file))),
        lambda: open_input(PredictOptions(model="model", dataset=str(file))),
    ):
        with (
            nullcontext() if is_stored else raises_one_line("10 of the images", "`allow_urls=True`")
        ):
            read()
    assert not network.requested


@pytest.mark.parametrize(
    "address",
    [
        "simplecache::http://photos.org/a.png",
        "zip://a.png::http://photos.org/a.zip",
        "dir::http://photos.org",
        "filecache::hf://datasets/ann/photos/a.png",
        "file:///etc/passwd",
        "ftp://photos.org/a.png",
    ],
)
def test_other_schemes_are_refused(network: Network, address: str, tmp_path: Path) -> None:
    with raises_one_line("only http, https and hf", error=UnreadableImage):
        decode_image({"path": address, "bytes": None}, "row 1")
    table = write_table(tmp_path, address)
    *_, record = open_input(PredictOptions(model="model", dataset=table)).read_records(range(11))
    assert "only http, https and hf" in (prepare_image(None, record).error or "")  # type: ignore
    assert not network.requested


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "inner.org",
        "169.254.169.254",
        "192.168.1.1",
        "0.0.0.0",
        "::1",
        "::ffff:10.0.0.1",
    ],
)
def test_private_addresses_are_refused_also_after_a_redirect(network: Network, host: str) -> None:
    secret = f"http://[{host}]/secret" if ":" in host else f"http://{host}/secret"
    network.redirects = {"http://photos.org/a.png": "/b.png", "http://photos.org/b.png": secret}

    for address in (secret, "http://photos.org/a.png"):
        with raises_one_line("not fetched", "private network"):
            fetch(address)

    assert network.requested == ["http://photos.org/a.png", "http://photos.org/b.png"]
    assert fetch(secret, is_by_hand=True) == b"content"


def test_redirects_are_followed_to_web_addresses_only(network: Network) -> None:
    network.redirects = {"http://photos.org/a": "/b", "http://photos.org/c": "file:///etc/passwd"}
    assert fetch("http://photos.org/a") == b"content"
    with raises_one_line("redirects to file"):
        fetch("http://photos.org/c")
    network.redirects = {"http://photos.org/a": "/a"}
    with raises_one_line("redirects more than"):
        fetch("http://photos.org/a")


def test_a_host_that_does_not_answer_is_asked_once(network: Network) -> None:
    network.addresses["silent.org"] = "93.184.216.34"
    for name in ("a", "b", "c"):
        with raises_one_line(f"silent.org/{name}", error=FetchError):
            fetch(f"http://silent.org/{name}")
    assert network.requested == ["http://silent.org/a"]


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("hf://datasets/ann/photos/a/1.png", "datasets/ann/photos/resolve/main/a/1.png"),
        ("hf://datasets/photos@abc/1.png", "datasets/photos/resolve/abc/1.png"),
        ("hf://ann/vit@refs/pr/1/1.png", "ann/vit/resolve/refs%2Fpr%2F1/1.png"),
    ],
)
def test_files_on_the_hub_are_fetched(network: Network, address: str, path: str) -> None:
    assert fetch(address) == b"content"
    (url,) = network.requested
    assert url.endswith(path)


@pytest.mark.parametrize("address", ["http://photos.org/a.png", "hf://datasets/ann/photos/a.png"])
def test_nothing_is_fetched_offline(
    network: Network, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with raises_one_line("HF_HUB_OFFLINE", error=FetchError):
        fetch(address)
    assert not network.requested


def test_an_address_that_is_not_valid_is_an_unreadable_image() -> None:
    """It does not end a prediction, as a failing network does."""
    record = ImageRecord(0, "name", "http://photos.org/a\x01.png", is_by_hand=True)
    assert "not a valid address" in (prepare_image(None, record).error or "")  # type: ignore
