"""The package as a user meets it: imports, names, README, command line."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread

import rmsjax
from rmsjax import __main__ as main_job
from rmsjax._text import text_table
from tests.helpers.marks import slow
from tests.test_notebooks import assert_same_picture, assert_same_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python(code):
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_is_light():
    """Neither flax nor optax nor matplotlib, which most programs that measure a norm do not need."""
    heavy = python("import rmsjax, sys; print(*{'flax', 'optax', 'matplotlib', 'sklearn'} & set(sys.modules))")
    assert heavy.split() == []


def test_every_name_resolves():
    for name in dir(rmsjax):
        assert getattr(rmsjax, name) is not None
    with pytest.raises(AttributeError, match="module 'rmsjax' has no attribute 'rms_norm'"):
        rmsjax.rms_norm  # noqa: B018


@pytest.mark.parametrize("name", ["rmsjax", *(f"rmsjax.{name}" for name in rmsjax._MODULES)])
def test_dir_shows_what_is_public_alone(name):
    """Neither imports nor names with an underscore; and all that the module defines without one."""
    module = importlib.import_module(name)
    own = {key for key, value in vars(module).items() if getattr(value, "__module__", "") == name}
    own -= {"T"}  # of typing
    assert {key for key in own if not key.startswith("_")} <= set(dir(module))
    assert dir(module) == sorted(module.__all__)
    assert [key for key in dir(module) if key.startswith("_")] == []
    assert all(getattr(value, "__module__", name).startswith("rmsjax") for key, value in public_values(module))


def public_values(module):
    """Functions and classes."""
    values = {key: getattr(module, key) for key in dir(module)}
    return [(key, value) for key, value in values.items() if inspect.isroutine(value) or inspect.isclass(value)]


def test_type_checkers_see_the_names_that_there_are():
    tree = ast.parse(Path(rmsjax.__file__).read_text("utf-8"))
    imported = [name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names]
    assert {name.asname for name in imported if name.asname} - {"_Scope"} | {"Scope"} == set(dir(rmsjax))


def test_all_names_can_be_imported_without_matplotlib():
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda name: 'mat' not in name and find(name)"
    found = python(f"{hide}\nfrom rmsjax import *\nprint('plot' in globals(), 'geometry' in globals(), clip_by_rms)")
    assert found.startswith("False True <function clip_by_rms")


def test_version_comes_from_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", rmsjax.__version__)
    try:
        installed = importlib.metadata.version("rmsjax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")
    assert installed == rmsjax.__version__


def code_blocks():
    """(code, what the README says that it prints, or "")."""
    return re.findall(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", README, re.M | re.S)


@pytest.mark.slow
def test_readme_code_runs(capsys, tmp_path, monkeypatch):
    """All blocks, one after another as a reader pastes them; what they print is what is shown."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code, printed in code_blocks():
            exec(code, names)
            out = capsys.readouterr().out
            if printed:
                assert_same_text(printed, out, trained=True)
    assert (tmp_path / "widths.png").stat().st_size > 10_000
    assert len(code_blocks()) == 5
    assert sum(bool(printed) for _, printed in code_blocks()) == 1


def test_readme_is_short():
    assert len(README.encode()) <= 9000
    assert README.index("```python") < 3000  # code within the first screens


def test_readme_has_the_two_commands():
    assert re.findall(r"^pip install .*", README, re.M) == [
        "pip install '.[demo]' && python -m rmsjax",
        "pip install '.[test]' && python -m pytest",
    ]


def test_readme_names_all_that_is_public():
    """The table has every function, class and module; states are what `rms_states` finds."""
    table = README.split("## All names")[1].split("\n\n")[1]
    named = set(re.findall(r"`(?:nnx\.|linen\.)?(\w+)`", table)) | {"nnx", "linen"}
    public = {name for name in dir(rmsjax) if not name.startswith("_") and not name.endswith("State")}
    assert public - named == {"Scope", "RMSReport", "RMSRow"}
    assert {name for name in named - public if name != "RMSNorm"} == set()


@pytest.fixture
def as_for_a_user(quick_compiles):
    """Standard promotion, as in a user's program."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("as_for_a_user")
def test_main_job(tmp_path, capsys, monkeypatch):
    """What it prints is in form, all widths are level, and the README shows the picture that it draws."""
    monkeypatch.setenv("COLUMNS", "200")  # no table is folded
    picture = tmp_path / "picture.png"
    assert main_job.main(["--steps", "20", "--out", str(picture)]) == 0
    out, err = capsys.readouterr()
    check, rulers, training = re.split(r"^\d\. ", out, flags=re.M)[1:]
    assert len(re.findall(r"^\S+( +[+-]0\.\d\d ±0\.\d\d){3} +level$", check, re.M)) == 12
    assert re.search(r"^verdict: level$", check, re.M)
    widths = "64 +{0} ?128 +{0} ?256 +{0} ?512"
    ruler = " +slope +".join(f"{name} {widths.format(name)}" for name in ("RMS", "L2"))
    assert re.search(rf"^layer +{ruler} +slope$", rulers, re.M)
    assert re.search(rf"^ +width {widths.format('width')}$", training, re.M)
    assert re.search(r"^test accuracy( +\d+\.\d%){4}$", training, re.M)
    assert re.search(r"^mean gradient RMS( +\d\.\de[+-]\d\d){4}$", training, re.M)
    assert re.search(r"^steps clipped( +\d+%){4}$", training, re.M)
    assert "80/80" in err  # the bar reached its end
    assert_same_picture(*(imread(path)[..., :3] for path in (ROOT / "notebooks/rmsjax.png", picture)))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--widths", "64"], "expected two or more different widths, got [64]"),
        (["--widths", "64", "64"], "expected two or more different widths"),
        (["--widths", "0", "64"], "0 is not a positive number"),
        (["--steps", "many"], "invalid positive value: 'many'"),
        (["--seed", "-1"], "argument --seed: -1 is negative"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--out", "/no/such/folder/picture.png"], "argument --out: no folder /no/such/folder"),
        (["--out", "picture"], "argument --out: expected a name that ends in .png, .pdf, .svg, got picture"),
        (["--out", "picture.docx"], "argument --out: expected a name that ends in .png"),
        (["--out", "/proc/picture.png"], "argument --out: cannot write in folder /proc"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main_job.main(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_missing_extra_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main_job.main([]) == 2
    assert "needs sklearn: pip install matplotlib scikit-learn tqdm\n" in capsys.readouterr().err


def test_a_folder_gets_a_picture_of_the_usual_name(tmp_path):
    assert main_job.parse(["--out", str(tmp_path)]).out == tmp_path / "rmsjax.png"
    assert list(tmp_path.iterdir()) == []  # it was only tried


def test_help_shows_defaults_and_an_example_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit, match="0"):
        main_job.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 60
    text = " ".join(" ".join(lines).split())
    assert text.count("(default: ") == 4
    assert "example: python -m rmsjax --widths " in text


def test_tables_fit_into_the_terminal(monkeypatch):
    """Columns that do not fit go below, with the first one once more; without a terminal there is no limit."""
    rows = [["layer", "RMS 64", "RMS 128", "slope"], ["first/norm", "1", "2", "+1.00"]]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert len(text_table(rows).splitlines()) == 2
    monkeypatch.setenv("COLUMNS", "28")
    assert text_table(rows).splitlines() == [
        *("layer       RMS 64  RMS 128", "first/norm       1        2", ""),
        *("layer       slope", "first/norm  +1.00"),
    ]
    monkeypatch.setenv("COLUMNS", "5")  # hopeless: a column by itself
    assert text_table(rows).splitlines()[:2] == ["layer       RMS 64", "first/norm       1"]
    monkeypatch.setenv("COLUMNS", "60")
    widths, norms = np.array([64, 128, 256, 512]), np.ones((4, 1, 2, 1))
    record = rmsjax.WidthRecord(("layer",), widths, np.arange(1), norms, norms, widths[:, None], norms[..., 0])
    assert max(map(len, f"{record}\n{record.width_table()}".splitlines())) <= 60


@pytest.mark.parametrize("seconds", [1.0, slow(0.0), slow(4.0), slow(9.0)])
def test_ctrl_c_ends_in_one_line_at_once(seconds, tmp_path):
    """Whether it comes while modules load, XLA compiles or a width trains."""
    command = [sys.executable, "-u", "-m", "rmsjax", "--widths", "256", "512", "1024", "--out", tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline().startswith("Checks and trains a classifier of handwritten digits at widths 256")
        time.sleep(seconds)
        job.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, errors = job.communicate(timeout=60)
        assert time.monotonic() - sent < 2
    assert job.returncode == 130
    assert errors.rstrip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_reader_that_stops_is_no_error(tmp_path):
    command = f"{sys.executable} -m rmsjax --widths 8 16 --steps 2 --out {tmp_path} | head -n 1"
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (141, 1)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
