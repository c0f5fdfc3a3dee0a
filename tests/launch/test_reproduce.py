"""`stabletrain reproduce` through the command line: original and repeat are processes of their own."""

import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from processes import LAUNCH

pytestmark = pytest.mark.slow

SAVES = ("plugins/checkpoints=save", "plugins/resume=exactly", "plugins/clip=zscore")


def run_id(folder: Path) -> str:
    return str(yaml.safe_load((folder / "run.yaml").read_text())["logger"]["run_id"])


def test_a_run_is_made_again_from_the_tracker_alone(cli) -> None:
    """Bugs: the repeat needs the original's folder; checkpoints by time change bits; ``--check`` leaves a run in the
    store; a config is trusted because it names a package; a changed line of the user's code is not named first; the
    repeat of a repeat ends early."""
    code = cli.folder / "mine.py"
    code.write_text((LAUNCH / "tiny_workload.py").read_text())
    (cli.folder / "tiny.yaml").write_text((LAUNCH / "tiny.yaml").read_text().replace("tiny_workload.", "mine."))
    words = (*SAVES, "plugins.checkpoints.every=1s", "model.pause=0.05", "trainer.max_steps=40", "logger=mlflow")
    done = cli("train", "./tiny.yaml", "--trust", "mine", *words, "run_dir=first")
    assert done.returncode == 0, done.stderr
    assert len(list((cli.folder / "first" / "checkpoints").glob("step-*"))) > 1
    original = run_id(cli.folder / "first")
    shutil.rmtree(cli.folder / "first")

    untrusted = cli("reproduce", original[:8], "--check")
    assert untrusted.returncode == 2
    assert "package 'mine' is not trusted" in untrusted.stderr
    assert "Traceback" not in untrusted.stderr

    same = cli("reproduce", original[:8], "--check", "--trust", "mine", "plugins.checkpoints.every=10min")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "\nbit-identical over 40 steps\n" in same.stdout
    assert "without effect on these steps:\n  config: plugins.checkpoints.every 1s -> 10min\n" in same.stdout
    assert len(cli.runs()) == 1

    code.write_text(code.read_text().replace("- 1.0)", "- 1.001)"))
    changed = cli("reproduce", original, "--check", "--steps", "5", "--trust", "mine")
    assert changed.returncode == 1, changed.stderr
    assert "\ndiffers from step 0 on\n" in changed.stdout
    assert "the loss differs first" in changed.stdout
    assert "the most likely cause first:\n  code: mine/mine.py changed\n" in changed.stdout

    again = cli("reproduce", original, "--trust", "mine", "model.pause=0", "--steps", "5")
    assert again.returncode == 0, again.stderr
    (repeat,) = [run for run in cli.runs() if run.info.run_id != original]
    assert repeat.data.tags["reproduces"] == original
    assert repeat.data.tags["reproduces.changed"] == "model.pause=0"
    assert repeat.data.params["trainer.max_steps"] == "40"
    assert repeat.info.status == "FINISHED"


def test_a_resumed_run_is_made_again_segment_by_segment(cli) -> None:
    """Bugs: the second part starts from the original's checkpoint, or at another step; a run that SIGTERM has ended
    goes on to its end; the steps before the resume are those of the original, copied."""
    common = (*SAVES, "model.pause=0.03", "logger=mlflow", "trainer.max_steps=100")
    tiny = ("train", str(LAUNCH / "tiny.yaml"), "--trust", "tiny_workload")
    process = cli.start(*tiny, *common, "run_dir=first")
    file, deadline = cli.folder / "first" / "steps.bin", time.monotonic() + 120
    while not (file.exists() and file.stat().st_size > 17 * 20):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    cut = file.stat().st_size // 17
    stopped = cli("reproduce", "first", "--check", "--trust", "tiny_workload", "model.pause=0")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert f"\nbit-identical over {cut} steps\n" in stopped.stdout

    run = run_id(cli.folder / "first")
    resumed = cli(*tiny, *common, "model.pause=0", "resume=first", f"logger.run_id={run}", "run_dir=second")
    assert resumed.returncode == 0, resumed.stderr
    for folder in ("first", "second"):
        shutil.rmtree(cli.folder / folder)
    done = cli("reproduce", run, "--check", "--trust", "tiny_workload", "model.pause=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"part 1 of 2: bit-identical over {cut} steps\n" in done.stdout
    assert f"part 2 of 2: bit-identical over {100 - cut} steps\n" in done.stdout
