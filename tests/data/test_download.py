"""Sets that are fetched, and what is said where they cannot be."""

import dataclasses
import hashlib
import http.server
import threading

import pytest

from experiments import small_sets
from mosaic_jax.data import catalog, load
from mosaic_jax.types import UserError
from tests.data.written import replace_set

pytestmark = pytest.mark.usefixtures("nowhere")


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def served(monkeypatch, server, right=True):
    folder, address = server
    small_sets.write("svhn", folder)
    downloads = []
    for name in ("train_32x32.mat", "test_32x32.mat"):
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        downloads.append((f"{address}/{name}", md5 if right else "0" * 32))
    replace_set(monkeypatch, "svhn", dataclasses.replace(catalog.SETS["svhn"], downloads=downloads))


def test_a_set_that_is_nowhere_is_fetched_once(nowhere, monkeypatch, server):
    served(monkeypatch, server)
    assert len(load("svhn").train_labels) == 20
    for file in server[0].iterdir():
        file.unlink()
    assert len(load("svhn").train_labels) == 20


def test_a_fetched_file_with_another_checksum_is_not_kept(nowhere, monkeypatch, server):
    served(monkeypatch, server, right=False)
    with pytest.raises(UserError, match=r"train_32x32\.mat could not be fetched .*hash") as caught:
        load("svhn")
    assert "\n" not in str(caught.value)
    assert not list((nowhere / "cache/mosaic_jax/data/svhn").glob("*.mat"))


def test_without_a_network_the_answer_names_places_and_host(nowhere):
    with pytest.raises(UserError, match=r"'svhn' not found; looked in .*could not be fetched"):
        load("svhn")
