"""Every block of the documentation runs as it stands, or says why not; every flag in it exists."""

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import doc_files
from tools import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(r"<!-- (test|test-slow|not run): (.+?) -->")
FENCE = re.compile(r"^( *)```+(\S*)\s*$")
RUN_LANGUAGES = ("bash", "python")
OTHER_LANGUAGES = ("text", "json", "yaml", "toml", "ini")

# What a road finds in its folder at the start (the how-to pages: `doc_files`), and what is made shorter than the page.
SETUP = {
    "road": """
        txfm simulate sim --cells 400 --bulk-samples 40 --genes 400 --programs 24 --perturbations 6
        mv sim/sim_blood.h5ad first.h5ad
        mv sim/sim_lines.h5ad second.h5ad
        mv sim/relationships pairs
    """,
}
SHORTER = {
    "road": {"--loop.steps 2000": "--loop.steps 4 --mask.n_unmasked 32 --model.width 32 --model.blocks 2"},
    "first_steps": {"steps: 400": "steps: 4", "n_unmasked: 96": "n_unmasked: 32"},
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    marker: str
    """test, test-slow, not run, or empty"""
    name: str
    """of the road; the reason of a block that is not run"""

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page with the marker above each."""
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    above, start, language = "", None, ""
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if fence and start is None:
            start, language = number, fence[2]
        elif fence and start is not None:
            found = MARKER.fullmatch(above)
            marker, name = (found[1], found[2]) if found else ("", "")
            text = "\n".join(lines[start : number - 1])
            blocks.append(Block(page=page, line=start, language=language, text=text, marker=marker, name=name))
            above, start = "", None
        elif start is None and line.strip():
            above = line.strip()
    assert start is None, f"{page}:{start}: a block that does not end"
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
ROADS = {block.name: block.marker for block in BLOCKS if block.marker in ("test", "test-slow")}


def test_every_block_runs_or_says_why_not() -> None:
    for block in BLOCKS:
        if block.language in RUN_LANGUAGES:
            assert block.marker, f"{block.where}: write <!-- test: NAME --> or <!-- not run: why --> above it"
        else:
            assert block.language in OTHER_LANGUAGES, f"{block.where}: {block.language!r} is no language of ours"


def test_a_road_lies_on_one_page() -> None:
    for name in ROADS:
        blocks = [block for block in BLOCKS if block.name == name]
        assert len({(block.page, block.marker) for block in blocks}) == 1, name
    assert SETUP.keys() | SHORTER.keys() | doc_files.PAGES.keys() <= ROADS.keys()


def script_of(name: str) -> str:
    """Return the blocks of a road as one bash script."""
    parts = [SETUP.get(name, "")]
    for block in BLOCKS:
        if block.name != name or block.marker == "not run":
            continue
        text = block.text if block.language == "bash" else f"python - <<'END_OF_PYTHON'\n{block.text}\nEND_OF_PYTHON"
        parts.append(f"echo {shlex.quote('== ' + block.where)} >&2\n{text}")
    script = "\n".join(parts)
    for long, short in SHORTER.get(name, {}).items():
        assert long in script, f"{name}: {long!r} is not on the page any more"
        script = script.replace(long, short)
    return script


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if kind == "test-slow" else []) for name, kind in ROADS.items()],
)
def test_a_road_runs(name: str, tmp_path: Path) -> None:
    doc_files.PAGES.get(name, lambda folder: None)(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}  # what is this small loses by a second thread
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script_of(name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def txfm_commands(text: str) -> list[list[str]]:
    """Return the calls of verbs in a block, as verb and the words after it."""
    calls = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if "txfm" in line or "tools/" in line else []
        for position, word in enumerate(words):
            script = re.fullmatch(r"(?:.*/)?tools/(\w+)\.py", word)
            if script:
                calls.append([script[1], *words[position + 1 :]])
            elif Path(word).name == "txfm" and position + 1 < len(words):
                calls.append(words[position + 1 :])
    return calls


@functools.cache
def help_of(verb: tuple[str, ...]) -> str:
    """Return the help of a verb, or of one kind of it."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert cli.main([*verb, "--help"]) == 0
    return stdout.getvalue()


def unknown_flags(call: Sequence[str]) -> list[str]:
    """Return the flags of a call that its verb does not have."""
    verb = (call[0],)
    if "usage: txfm " + call[0] + " KIND" in help_of(verb):
        verb = (call[0], call[1])
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", help_of(verb)))
    flags = [word.split("=")[0] for word in call if re.match(r"--?[a-zA-Z]", word)]
    return [flag for flag in flags if flag not in known]


CALLS = [(block, call) for block in BLOCKS if block.language == "bash" for call in txfm_commands(block.text)]


def test_every_flag_exists() -> None:
    assert len(CALLS) > 15
    for block, call in CALLS:
        if call[0].startswith("-"):
            continue
        assert call[0] in cli.VERBS, f"{block.where}: no verb {call[0]!r}"
        assert unknown_flags(call) == [], f"{block.where}: {shlex.join(call)}"


def test_flags_named_in_the_text_exist() -> None:
    known = {"--help", "--version", "--json", "--config", "--print_config"}
    for verb in cli.VERBS:
        text = help_of((verb,))
        for kind in re.findall(r"^  (\w+) ", text.partition("kinds:")[2], re.MULTILINE):
            text += help_of((verb, kind))
        known |= set(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*", text))
    for page in PAGES:
        text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            if code.startswith(("make", "accelerate", "pip", "<!--")):
                continue
            for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*", code):
                assert flag in known, f"{page.relative_to(ROOT)}: `{code}` names the unknown {flag}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_an_unknown_flag_would_be_found() -> None:
    (call,) = txfm_commands("txfm ingest h5ad \\\n  x.h5ad --store s --batches b  # --comment")
    assert call == ["ingest", "h5ad", "x.h5ad", "--store", "s", "--batches", "b"]
    assert unknown_flags(call) == ["--batches"]
    (call,) = txfm_commands("A=b accelerate launch --multi_gpu tools/train.py --shards c --mask.n 3")
    assert unknown_flags(call) == ["--mask.n"]
