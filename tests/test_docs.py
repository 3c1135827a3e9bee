"""The documentation is true where a machine can tell: the configuration page, commands, links."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from spire_dist.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ENDINGS = "|".join(("&&", r"\|", ";", ">"))
"""What ends a command within a line of shell."""


def code_lines(text: str) -> list[str]:
    """Lines of fenced and of indented code blocks, continuations joined."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4,}(\S.*)$", text, flags=re.MULTILINE)
    return "".join(fenced).splitlines() + indented


def commands(text: str) -> list[str]:
    """Every `spire-dist ...` that starts a line of code."""
    starts = (re.match(r"\s*(?:\$ )?(spire-dist .*)", line) for line in code_lines(text))
    return [re.split(rf"\s(?:{ENDINGS})\s", found[1])[0] for found in starts if found]


def mentions(text: str) -> list[str]:
    """Every `spire-dist ...` within a sentence; its arguments may be left out."""
    return re.findall(r"(?<!`)`(spire-dist [^`]+)`(?!`)", text)


def parse(command: str) -> None:
    """Let the command line read a command without running it; raises or exits where it would."""
    group = get_command(app)
    words = shlex.split(command, comments=True)[1:]
    context = group.make_context("spire-dist", list(words))
    _, verb, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
    verb.make_context(words[0], rest, parent=context)


def test_config_page_is_what_its_script_writes():
    script = runpy.run_path(str(ROOT / "docs" / "make_config_page.py"))
    assert script["PAGE"].read_text() == script["page"](), "run: python docs/make_config_page.py"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_code_blocks_parse(page: Path):
    for command in commands(page.read_text()):
        try:
            parse(command)
        except Exception as error:
            pytest.fail(f"{page.name}: {command}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_verbs_and_options_in_sentences_exist(page: Path):
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for mention in mentions(page.read_text()):
        _, verb, *rest = mention.split()
        if verb.startswith("-") or verb.isupper():  # an option of the command itself, a placeholder
            continue
        assert verb in verbs, mention
        known = {name for parameter in verbs[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known | {"--help"}, mention


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page: Path):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{page.name}: {target}"


def test_the_reader_of_commands_finds_them_and_sees_mistakes():
    text = (
        "Run\n\n    spire-dist fsc a b  # compare\n\n```bash\n$ spire-dist train my.toml \\\n    --run r && ls\n```\n"
    )
    assert commands(text) == ["spire-dist train my.toml --run r", "spire-dist fsc a b  # compare"]
    for command in commands(text):
        parse(command)
    for wrong in ("spire-dist trian", "spire-dist train --epochs 3", "spire-dist prep only.star"):
        with pytest.raises(Exception, match=r"No such|Missing"):
            parse(wrong)
