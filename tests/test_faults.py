"""The fault-injection campaign: that it finds what is wrong, and, by hand (`pytest -m slow`), that a few rounds of it find nothing."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import faults
import numpy as np
import orbax.checkpoint as ocp
import pytest
from faults import RUN, Failure, Outcome

LINE = "error: runs/x/checkpoints/step_00000008 is damaged; delete it to go on from step 4\n"


def ended(code: int, err: str = "", out: bytes = b"", **more) -> Outcome:
    return Outcome("python train.py", code, out, err, **more)


def test_a_refusal_in_one_line_passes():
    faults.refused(ended(2, LINE), "step_00000008")
    faults.refused(ended(2, "a warning\n" + LINE), "tokenizer.json", "step_00000008")


REFUSALS = {
    "success": ended(0),
    "another code": ended(1, LINE),
    "no line": ended(2, ""),
    "two error lines": ended(2, LINE + LINE),
    "much beside it": ended(2, "one\ntwo\n" + LINE),
    "nothing named": ended(2, "error: something is damaged\n"),
    "a traceback": ended(2, "Traceback (most recent call last)\n" + LINE),
    "a traceback of a thread, on stdout": ended(2, LINE, b"Exception ignored in: <module 'threading'>"),
    "slow exit": ended(2, LINE, after_error=1e6),
    "hung": ended(2, LINE, hung=True),
}


@pytest.mark.parametrize("outcome", REFUSALS.values(), ids=REFUSALS.keys())
def test_any_other_refusal_is_found(outcome):
    with pytest.raises(Failure):
        faults.refused(outcome, "step_00000008")


STOPS = {
    "as wanted": (ended(143, "stopped by SIGTERM\n"), 1, False, True),
    "announced as well": (ended(143, "SIGTERM: finishing the step and saving\nstopped\n"), 1, False, True),
    "before the first line of the program": (ended(-15), 1, True, True),
    "by the system, later": (ended(-15), 1, False, False),
    "in silence": (ended(143), 1, False, False),
    "code of a success": (ended(0, "stopped\n"), 1, False, False),
    "after all was done": (ended(0, "", b"step\ndone  runs/x"), 1, False, True),
    "with many lines": (ended(143, "one\ntwo\n"), 1, False, False),
    "slowly": (ended(143, "stopped\n"), 1e6, False, False),
}


@pytest.mark.parametrize(("outcome", "seconds", "early", "fine"), STOPS.values(), ids=STOPS.keys())
def test_how_a_signal_may_end_a_run(outcome, seconds, early, fine):
    if fine:
        faults.stopped(outcome, signal.SIGTERM, seconds, early)
    else:
        with pytest.raises(Failure):
            faults.stopped(outcome, signal.SIGTERM, seconds, early)


@pytest.mark.parametrize(("hurt", "fine"), [("step_00000008", True), ("step_00000004", False)])
def test_advice_to_delete_a_whole_checkpoint_is_found(hurt, fine):
    paths = [Path("work") / RUN / "checkpoints" / hurt / "meta/metadata"]
    if fine:
        faults.advised(ended(2, LINE), paths)
    else:
        with pytest.raises(Failure, match="step_00000008, which is whole"):
            faults.advised(ended(2, LINE), paths)


@pytest.mark.parametrize("how", faults.DAMAGE)
def test_damage_changes_the_file(tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(before := random.Random(0).randbytes(2000))
    faults.DAMAGE[how](path, random.Random(1))
    assert not path.is_file() or path.read_bytes() != before


def test_rounds_are_a_function_of_seed_and_number(tmp_path, monkeypatch):
    said = {kind: (lambda at, references: str(at.rng.random())) for kind in faults.KINDS}
    monkeypatch.setattr(faults, "ROUNDS", said)
    play = [[faults.play(n, seed, [*faults.KINDS], tmp_path, None) for n in (3, 4)] for seed in (0, 0, 1)]
    drawn = [[(r.kind, r.outcome) for r in results] for results in play]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0][0] != drawn[0][1]


# -- a finished run, and what can be wrong with one ------------------------------------------------------------------------------------


def rewrite_records(run: Path, change) -> None:
    path = run / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))


def other_loss(line: str) -> str:
    record = json.loads(line)
    return json.dumps(record | {"loss": float(np.nextafter(record["loss"], 9))})


def nudge(run: Path, item: str) -> None:
    """Change the lowest bit of one number in the newest checkpoint."""
    folder = run / f"checkpoints/step_{faults.STEPS:08d}" / item
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as storage:
        tree = storage.restore(folder.absolute())
        part = tree if item == "params" else tree["v"]
        changed = np.array(part["head"]["weight"])
        changed.view(np.uint32).flat[7] ^= 1
        part["head"]["weight"] = changed
        shutil.rmtree(folder)
        storage.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))


TAMPERING = {
    "a parameter": (lambda run: nudge(run, "params"), "1 parameters and moments differ, such as params/head/weight"),
    "a moment": (lambda run: nudge(run, "opt"), "1 parameters and moments differ, such as opt/v/head/weight"),
    "a record lost": (lambda run: rewrite_records(run, lambda lines: lines[:3] + lines[4:]), "metrics.jsonl has 23 steps"),
    "a record twice": (lambda run: rewrite_records(run, lambda lines: [*lines[:4], *lines[3:]]), "metrics.jsonl has 25 steps"),
    "another loss": (lambda run: rewrite_records(run, lambda lines: [other_loss(lines[0]), *lines[1:]]), "other values in its steps [1]"),
    "no JSON": (lambda run: rewrite_records(run, lambda lines: [*lines, '{"step": 25, "loss": NaN}']), "NaN is no JSON"),
    "half a save": (lambda run: (run / "checkpoints/step_00000028.orbax-checkpoint-tmp").mkdir(), "unfinished saves"),
    "no summary": (lambda run: (run / "training_summary.json").unlink(), "training_summary.json cannot be read"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json is not what it was"),
    "no last checkpoint": (lambda run: shutil.rmtree(run / f"checkpoints/step_{faults.STEPS:08d}"), "the newest checkpoint is [20]"),
    "half a cache": (lambda run: (run.parent.parent.parent / "cache/hyperlm/0123.part").mkdir(), "the cache has leftovers"),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> faults.References:
    return faults.References(tmp_path_factory.mktemp("references"))


@pytest.mark.slow
@pytest.mark.parametrize("what", [None, *TAMPERING])
def test_what_is_wrong_with_a_run_is_found(tmp_path, references, what):
    reference = references.get("run", "phase8")
    place = faults.make_place(tmp_path)
    faults.copy_run(reference, place)
    if what is None:
        assert list(faults.differences(place, reference)) == []
        return
    tamper, message = TAMPERING[what]
    tamper(place.run)
    found = list(faults.differences(place, reference))
    assert any(message in line for line in found), found


SABOTAGE = {
    "a record less": "lines = open('runs/x/metrics.jsonl').readlines(); open('runs/x/metrics.jsonl', 'w').writelines(lines[1:])",
    "a traceback": "print('Traceback (most recent call last)', file=sys.stderr)",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SABOTAGE)
def test_a_program_that_resumes_badly_fails_its_round(tmp_path, references, monkeypatch, how):
    references.get("run", "phase8")
    real = faults.REPOSITORY / "train.py"
    lines = [
        "import runpy, sys",
        f"sys.path.insert(0, {str(real.parent)!r})",
        f"try:\n    runpy.run_path({str(real)!r}, run_name='__main__')",
        f"except SystemExit as e:\n    if '--resume' in sys.argv and not e.code:\n        {SABOTAGE[how]}\n    raise",
    ]
    (tmp_path / "train.py").write_text("\n".join(lines))
    monkeypatch.setattr(faults, "REPOSITORY", tmp_path)
    monkeypatch.setattr(faults, "SHORT", ["phase8"])
    monkeypatch.setattr(faults, "SIGNALS", [signal.SIGKILL])
    monkeypatch.setattr(faults, "draw_moment", lambda rng, left: faults.Moment("step", 14, 0.0))
    result = faults.play(0, 0, ["kill"], tmp_path / "rounds", references)
    assert result.outcome == "FAILED" and not result.why.startswith("the round itself")
    assert result.struck["SIGKILL"] + result.struck["SIGKILL within a save"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_few_rounds_lose_nothing(tmp_path, references, kind):
    if kind == "disk" and (why := faults.can_mount(tmp_path / "disk")):
        pytest.skip(why)
    results = [faults.play(number, 0, [kind], tmp_path, references) for number in range(3)]
    failures = [faults.describe(r, 0, [kind]) for r in results if r.outcome == "FAILED"]
    assert not failures, "\n".join(failures)
    assert not os.path.ismount(tmp_path / "disk") and not list(tmp_path.glob("round*"))
