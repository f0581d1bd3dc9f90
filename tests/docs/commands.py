"""The commands that pages and docstrings tell a user to type."""

import ast
import itertools
import re
import shlex
from pathlib import Path

from tests.helpers import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "mosaic_jax"
FOLDERS = ("configs", "experiments", "mosaic_jax")
MODULES = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]

Words = list[str]


def in_blocks(text: str) -> list[Words]:
    """Return the commands of the fenced shell blocks, `&&` chains taken apart."""
    return _split("\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)))


def in_line(text: str) -> list[Words]:
    """Return the commands `python -m ...` between backticks outside fenced blocks.

    A mention of the main program without a config is no whole command.
    """
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    each = [shlex.split(code) for code in re.findall(r"`(python -m [^`]+)`", text)]
    return [
        words
        for words in each
        if words[2] != "mosaic_jax.main" or any(word.startswith("--config=") for word in words)
    ]


def in_docstring(source: str) -> list[Words]:
    """Return the commands of a module's docstring: its indented lines, and between backticks."""
    text = ast.get_docstring(ast.parse(source)) or ""
    indented = re.findall(r"^ {4}((?:python -m|pip) [^\\\n]*(?:\\\n[^\\\n]*)*)", text, flags=re.M)
    return [*_split("\n".join(indented)), *in_line(text)]


def _split(text: str) -> list[Words]:
    """Return the words of each command, continued lines joined and `&&` chains taken apart."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("#")[0].split("&&")]
    return [words for words in (shlex.split(part) for part in parts) if words]


def found() -> dict[str, list[Words]]:
    """Return every command by the name of its page or module."""
    pages = {
        page.name: [*in_blocks(page.read_text()), *in_line(page.read_text())] for page in PAGES
    }
    modules = {str(path.relative_to(ROOT)): in_docstring(path.read_text()) for path in MODULES}
    return {name: each for name, each in (pages | modules).items() if each}


def without_environment(words: Words) -> Words:
    """Return a command without the variables set in front of it."""
    return list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))


def module_of(words: Words) -> str | None:
    """Return the module that a command runs, or None for another program."""
    is_python = Path(words[0]).name.startswith("python")
    return words[2] if is_python and words[1:2] == ["-m"] else None


def by_module() -> dict[str, list[Words]]:
    """Return the arguments of every `python -m MODULE`, but of the main program, by module."""
    modules: dict[str, list[Words]] = {}
    for words in (without_environment(words) for each in found().values() for words in each):
        if module_of(words) not in (None, "venv", "mosaic_jax.main"):
            modules.setdefault(words[2], []).append(words[3:])
    return modules
