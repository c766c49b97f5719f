"""README, the documents under .github/ and tests/, and the notebooks: what they point at is there."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^()\s]+)\)|\b(?:href|src)=\"([^\"]+)\"")


def documents():
    """(path, its Markdown) of all."""
    for path in sorted([ROOT / "README.md", *(ROOT / ".github").glob("*.md"), *(ROOT / "tests").rglob("*.md")]):
        yield path, path.read_text("utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        yield path, "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


DOCUMENTS = dict(documents())


def links(text):
    """All targets in a Markdown text, of links and of pictures, but not those in its code."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)
    return [one or other for one, other in LINK.findall(prose)]


def anchors(text):
    """What a heading is called in an address, as Git hosts make it."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path, text):
    """The relative links of a text at this path that lead nowhere."""
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and anchor not in anchors(text if target == path else target.read_text("utf-8"))):
            yield link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_open(path):
    assert list(broken(path, DOCUMENTS[path])) == []


def test_a_broken_link_would_be_noticed():
    good = "[a](LICENSE) ![b](notebooks/rmsjax.png) [c](#here) `[d](code)` [e](https://jax.dev)\n\n## Here\n"
    assert links(good) == ["LICENSE", "notebooks/rmsjax.png", "#here", "https://jax.dev"]
    assert list(broken(ROOT / "README.md", good)) == []
    bad = '[a](LICENCE) [b](#there) [c](../LICENSE) <img src="no.png">\n\n## Here\n'
    assert list(broken(ROOT / "README.md", bad)) == ["LICENCE", "#there", "../LICENSE", "no.png"]


def own_addresses(text):
    """Addresses on the web that would be the project's own: it has none, wherever its repository lives."""
    return re.findall(r"https?://[^\s\"')>]*rmsjax[^\s\"')>]*", text)


def test_no_address_on_the_web_is_claimed_to_be_ours():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a Git checkout")
    texts = [ROOT / name for name in listed.stdout.split() if not name.endswith((".png", ".npz"))]
    found = {path: own_addresses(path.read_text("utf-8")) for path in texts if path != Path(__file__) and path.exists()}
    assert {path: addresses for path, addresses in found.items() if addresses} == {}
    assert own_addresses("[x](https://github.com/rmsjax/rmsjax/issues)") == ["https://github.com/rmsjax/rmsjax/issues"]
    assert "urls" not in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
