"""The page of a run is whole and needs no network."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mosaic_jax import report
from mosaic_jax.run.metrics import MetricsFile
from mosaic_jax.run.reader import load
from mosaic_jax.types import UserError
from tests.report.written import FIGURES, mosaic_lines, write_answers, write_run


class Reader(HTMLParser):
    """What a page holds: tags that are still open, pictures, links and cells."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[bytes] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            self.pictures.append(base64.b64decode(given["src"].partition("base64,")[2]))
            assert given["alt"]
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_of_a_run_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    write_answers(run)
    (run / "command.txt").write_text("python -m mosaic_jax.main --config=<any>")
    report.write_page([load(run)], tmp_path / "page.html")
    read = Reader((tmp_path / "page.html").read_text())
    assert read.open == []
    assert len(read.pictures) == len(FIGURES) + 2  # confusions and experts
    assert all(picture.startswith(b"\x89PNG") for picture in read.pictures)
    assert all(address.startswith("data:") for address in read.addresses)
    for word in ("student after fine-tuning", "70.0", "What it cost", "knowledge_distillation"):
        assert word in read.words
    assert "python -m mosaic_jax.main --config=<any>" in read.words


def test_a_page_reads_the_record_of_a_run_once(tmp_path: Path, monkeypatch: Any) -> None:
    run, reads = write_run(tmp_path / "run", mosaic_lines()), []
    read = MetricsFile.read
    monkeypatch.setattr(MetricsFile, "read", lambda file: reads.append(file.path) or read(file))
    report.show(run, Console(quiet=True))
    assert reads == [run / "metrics.jsonl"]


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["name"] = "<script>alert(1)</script>"
    (run / "config.json").write_text(json.dumps(settings))
    report.write_page([load(run)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_page_that_cannot_be_written_is_an_answer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    with pytest.raises(UserError, match=r"cannot write .*page\.html"):
        report.write_page([load(run)], tmp_path / "nowhere" / "page.html")
