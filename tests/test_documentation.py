"""The documentation that pdoc makes: without a warning, each public name on its page, formulas as they were written."""

import html
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rmsjax

ROOT = Path(__file__).parent.parent
MODULES = ["rmsjax", *(f"rmsjax.{name}" for name in rmsjax._MODULES)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """From module to the HTML of its page, without the source code that can be unfolded there."""
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-W", "error", "-m", "pdoc", "--math", "-d", "google", "-o", out, "rmsjax"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-3000:]
    source = re.compile(r'<div class="pdoc-code codehilite">.*?</div>', re.S)
    return {
        ".".join(path.relative_to(out).with_suffix("").parts): source.sub("", path.read_text("utf-8"))
        for path in out.rglob("*.html")
        if path.name != "index.html"
    }


def test_there_is_a_page_for_each_public_module_alone(pages):
    assert set(pages) == set(MODULES)


def public(module):
    """The public names of a module, but for modules."""
    names = dir(importlib.import_module(module))
    return [name for name in names if not inspect.ismodule(getattr(importlib.import_module(module), name))]


@pytest.mark.parametrize("module", MODULES)
def test_each_public_name_is_on_its_page_and_no_other(module, pages):
    sections = re.findall(r'<section id="(\w+)">\s*(.*?)</section>', pages[module], re.S)
    shown = {name: text for name, text in sections if '<div class="docstring">' in text}
    assert set(shown) == set(public(module))


@pytest.mark.parametrize("module", MODULES)
def test_formulas_arrive_as_they_were_written(module, pages):
    """Markdown eats some backslashes, as of braces, and takes some underscores for italics."""
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", pages[module])).split())
    formulas = []
    for name in public(module):
        doc = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
        formulas += re.findall(r"\$[^$]+\$", re.sub(r"^ *(>>>|\.\.\.) .*$|`[^`\n]*`", "", doc, flags=re.M))
    missing = [formula for formula in formulas if as_rendered(formula) not in text]
    assert missing == []
    assert formulas or module in ("rmsjax.plot", "rmsjax.testing")


def as_rendered(formula):
    r"""The underscore in \text{max\_rms} needs no backslash in MathJax."""
    return " ".join(formula.replace(r"\_", "_").split())


def test_what_takes_no_scope_is_named_in_the_guide():
    public = {name: getattr(rmsjax, name) for name in rmsjax.__all__}
    signatures = {name: inspect.signature(value) for name, value in public.items() if inspect.isfunction(value)}
    alone = {
        f"`{name}`"
        for name, signature in signatures.items()
        if "tree" in signature.parameters or "GradientTransformation" in str(signature.return_annotation)
        if "scope" not in signature.parameters
    }
    assert alone
    sentence = re.search(r"All functions of trees, .*?:\n", inspect.getdoc(rmsjax), re.S).group()
    assert set(re.findall("`.*?`", sentence)) == {"`scope`", *alone}
