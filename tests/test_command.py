"""The command `hyperlm`: its words, what it runs and says, and what a wheel installs. Beside foreign modules of the same names as ours."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import SMALLEST, write_prose

import hyperlm
from hyperlm import cli, command, runs, startup

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train", "bench", "chat")


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed("train", "--plan"): exit code, output and errors of that, in this process."""

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(startup, "quiet", lambda: None)
    monkeypatch.setattr(cli, "end", end)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/hyperlm", *words])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_word_and_says_where_the_scripts_are(words, typed):
    code, out, err = typed(*words)
    assert (code, err) == (0, "") and all(f"hyperlm {word}" in out for word in command.WORDS) and str(ROOT) in out
    assert max(map(len, out.replace(str(ROOT), "").splitlines())) <= 80


def test_the_version(typed):
    assert typed("--version") == (0, f"hyperlm {hyperlm.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["tran"], "hyperlm tran: no such command; did you mean train?"),
        (["docter", "x"], "hyperlm docter: no such command; did you mean doctor?"),
        (["--preset", "small"], "hyperlm --preset: no such command; choose from train, bench, chat, doctor"),
        (["train", "--preset", "smal"], "--preset smal: choose from small, standard, max, max-ssm, study, glance"),
        (["chat"], "no run with a checkpoint under runs/; train one with: hyperlm train --preset small"),
        (["chat", "runs/none"], "runs/none: no such run; `ls runs` shows those that exist"),
        (["bench"], "name what to measure: phase7, phase8, softmax, hybrid or folders of runs; or a --suite"),
    ],
)
def test_what_cannot_be_run_is_one_line(words, error, typed):
    assert typed(*words) == (2, "", f"error: {error}\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script_names_the_command_that_was_typed(script, typed):
    code, out, _ = typed(script, "--help")
    assert code == 0 and out.startswith(f"usage: hyperlm {script} ") and f"    hyperlm {script} " in out and "python " not in out


def test_a_run_names_the_command_that_was_typed(prose, typed):
    code, out, _ = typed("train", *SMALLEST, "--data.sources", str(prose), "--train.steps", "2", "--name", "r")
    assert code == 0 and out.endswith("talk to it with: hyperlm chat runs/r\n")
    assert runs.read_json(Path("runs/r/env.json"))["command"].startswith("hyperlm train --model.d-model 32 ")
    code, out, _ = typed("chat", "--prompt", "A", "--max-tokens", "2")
    assert code == 0 and out.startswith("A")


def test_the_doctor_is_train_with_a_flag(typed, monkeypatch):
    import train

    monkeypatch.setattr(train, "main", lambda argv: print(argv) or 1)
    assert typed("doctor", "--train.device", "cpu") == (1, "['--doctor', '--train.device', 'cpu']\n", "")
    assert sys.argv[0] == "hyperlm train"


@pytest.mark.parametrize("word", command.WORDS)
def test_every_word_is_quiet_before_its_slow_imports(word):
    """The first of them is not there: one line with what installs it."""
    code = "import sys; sys.modules['torch'] = None; from hyperlm.command import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, word], check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: the package torch is missing: pip install torch")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("argv0", "installed", "words"),
    [
        ("train.py", False, "python chat.py"),
        ("/x/bench.py", False, "python chat.py"),
        ("hyperlm train", False, "hyperlm chat"),
        ("x.py", True, "hyperlm chat"),
    ],
)
def test_messages_name_what_is_at_hand(argv0, installed, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argv0])
    monkeypatch.setattr(startup, "INSTALLED", installed)
    assert startup.command("chat") == words


# -- what is installed -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this checkout, by way of the sdist, as `pip wheel` makes one."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "sdist").mkdir()
    build = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"

    def built(what: str, source: Path) -> Path:
        done = subprocess.run([sys.executable, "-c", build, what, str(folder)], cwd=source, check=True, capture_output=True, text=True)
        return folder / done.stdout.split()[-1]

    source = folder / "source"
    for path in [*ROOT.glob("*.*"), ROOT / "LICENSE", *ROOT.glob("hyperlm/**/*.py")]:
        if path.is_file():
            (copy := source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    sdist = built("sdist", source)
    subprocess.run([sys.executable, "-m", "tarfile", "-e", str(sdist), str(folder / "sdist")], check=True)
    return built("wheel", next((folder / "sdist").iterdir()))


@pytest.fixture
def foreign(tmp_path, monkeypatch) -> Path:
    """The current folder has modules of its own with the names of ours, which no command may import; so has PYTHONPATH."""
    for name in (*SCRIPTS, "configs"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not yours')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_wheel_has_the_package_with_the_scripts_in_it_and_nothing_else(wheel):
    ours = {str(path.relative_to(ROOT)) for path in ROOT.glob("hyperlm/**/*.py")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        scripts = {f"hyperlm/scripts/{name}.py": (ROOT / f"{name}.py").read_bytes() for name in (*SCRIPTS, "configs")}
        assert found == ours | set(scripts)
        assert all(archive.read(name) == content for name, content in scripts.items())
        (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        assert f"\nVersion: {hyperlm.__version__}\n" in archive.read(metadata).decode()


def test_every_folder_of_the_package_is_named():
    """A package that pyproject.toml forgets is in no wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in ROOT.glob("hyperlm/**/*.py")}
    assert set(settings["packages"]) == {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"hyperlm.scripts"}


@pytest.mark.parametrize("word", [*SCRIPTS, "doctor"])
def test_an_unpacked_wheel_runs_its_own_scripts_beside_foreign_ones(word, wheel, foreign, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(foreign), str(tmp_path / "unpacked")])}
    find = (
        "import sys; from hyperlm import command, startup; sys.argv = ['hyperlm', sys.argv[1]]; command.importlib.import_module = lambda name: print(name, sys.path[0]) or sys.exit()\n"
        "command.main()"
    )
    done = subprocess.run([sys.executable, "-c", find, word], cwd=foreign, env=env, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [command.WORDS[word][0], str(tmp_path / "unpacked" / "hyperlm" / "scripts")]


@pytest.mark.slow
def test_a_wheel_in_a_fresh_environment_trains_resumes_and_talks(wheel, foreign, tmp_path):
    """Installed by pip; its dependencies are those of this environment."""
    venv.create(tmp_path / "venv")
    scheme = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site, programs = (Path(sysconfig.get_path(name, "venv", scheme)) for name in ("purelib", "scripts"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = programs / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run([*words], cwd=foreign, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    text = str(write_prose(tmp_path / "prose.txt"))
    made = run(programs / "hyperlm", "train", "--preset", "small", *SMALLEST, "--data.sources", text, "--train.steps", "2", "--name", "r")
    assert made.endswith("talk to it with: hyperlm chat runs/r\n")
    assert "steps 2 to 4" in run(programs / "hyperlm", "train", "--resume", "runs/r", "--train.steps", "4")
    assert run(programs / "hyperlm", "chat", "--prompt", "A word", "--seed", "0", "--max-tokens", "4").startswith("A word")
    assert "bits per byte" in run(python, "-m", "hyperlm", "bench", "runs/r", "--name", "b")
    assert run(programs / "hyperlm", "chat", "runs/x", code=2).startswith("error: runs/x: no such run")
    assert run(python, "-c", "import hyperlm; print(hyperlm.load().step)") == "4\n"
    assert run(python, "-c", "import importlib.util as u; print(u.find_spec('hyperlm').origin)").startswith(str(site))
