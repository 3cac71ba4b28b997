"""The script of a job, without a cluster; `tests/journeys/test_slurm.py` has one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import provenance, slurm
from launch.__main__ import main
from launch.slurm import check, fill, hand_in, plan, which_run
from tests.launch.test_options import called
from tests.launch.test_scheduler import commands, says  # noqa: F401
from trainer.compose import compose
from trainer.errors import Refused

OUT: dict[str, Any] = {"capture_output": True, "text": True}
WORDS = ['run.name="it\'s mine"', "train.steps=5", "optimizer.lr=1e-3"]


def test_the_script_says_what_was_asked(tmp_path: Path) -> None:
    flags = ["--nodes=2-4", "--nproc=8", "--time=8:00:00", "--partition=gpu", "--gpus=8", "--warn-s=200"]
    flags += ["--setup=module load cuda", "--srun=--container-image=a b", "--sbatch=--constraint=a100"]
    text = plan(called("slurm", *flags, "--", *WORDS, f"run.dir={tmp_path}", "checkpoint.memory.every=1")).text
    lines = text.splitlines()
    for flag in (
        "--nodes=2-4",
        "--time=8:00:00",
        "--partition=gpu",
        "--gres=gpu:8",
        "--signal=B:USR1@200",
        "--requeue",
        "--open-mode=append",
        "--constraint=a100",
        f"--output={tmp_path}/launch/job-%j.log",
    ):
        assert f"#SBATCH {flag}" in lines
    assert "module load cuda" in lines and "'--container-image=a b')" in text and "--nproc 8" in text
    assert "elastic.grace_s=180" in text and "launch.keeper" in text and "{{" not in text
    assert f"mkdir -p {tmp_path}/launch && sbatch" in text
    plain = plan(called("slurm", "--", *WORDS, "elastic.grace_s=7")).text
    assert "launch.keeper" not in plain and plain.count("grace_s") == 1


def test_the_warning_is_the_one_that_is_configured() -> None:
    text = plan(called("slurm", "--", "elastic.signal=SIGUSR2")).text
    assert "#SBATCH --signal=B:USR2@120" in text and "' USR2\n" in text and "USR1" not in text
    with pytest.raises(Refused, match=r"elastic\.signal=TERM cannot warn a job of SLURM"):
        check(called("slurm", "--", "elastic.signal=TERM"))


def test_a_path_with_a_blank_is_quoted_as_sbatch_reads_it() -> None:
    text = plan(called("slurm", "--", "run.dir='/a b'")).text
    assert '#SBATCH --output="/a b/launch/job-%j.log"' in text and "mkdir -p '/a b/launch'" in text


@pytest.mark.parametrize(
    "words",
    [
        ["run.name='a\ntouch PWNED #'"],
        ["run.dir='runs/a\ntouch PWNED #'"],
        ["run.dir='runs/a\rb'"],
        ["launch.partition='gpu\n#SBATCH --uid=0'"],
        ["launch.sbatch=['--x\ntouch PWNED']"],
        ["launch.exclude='n1\u2028n2'"],
        ["run.dir='runs/a\"b'"],
    ],
)
def test_a_name_is_never_a_line_of_the_script(words: list[str]) -> None:
    with pytest.raises(Refused):
        plan(called("slurm", "--", *words))


def test_neither_is_the_directory_that_it_is_typed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a\ntouch PWNED").mkdir()
    monkeypatch.chdir(tmp_path / "a\ntouch PWNED")
    with pytest.raises(Refused, match="more than one line of the job's script"):
        plan(called("slurm", "--"))


def test_signs_of_sbatch_in_a_name_stand_for_themselves() -> None:
    text = plan(called("slurm", "--", "run.dir='runs/100%j#1'")).text
    assert '/runs/100%%j#1/launch/job-%j.log"' in text


def test_a_value_is_put_in_as_it_is() -> None:
    """Neither looked into, nor are its blank lines its template's."""
    assert fill("{{a}}\nx {{b}}\n{{c}}\ny\n", {"a": "{{b}}\n\n\nz", "b": "\\1{{a}}", "c": ""}) == (
        "{{b}}\n\n\nz\nx \\1{{a}}\ny\n"
    )


def test_set_up_lines_are_in_the_script_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "ask", lambda *_: "")
    monkeypatch.setattr(slurm, "submit", lambda *_: "7")
    monkeypatch.setattr(provenance, "code", lambda _: ("revision", b""))
    ways = ["--setup=export T=hf_secret", "--"], ["--", "launch.setup=['export T=hf_secret']"]
    for number, words in enumerate(ways):
        run = tmp_path / str(number)
        call = called("slurm", *words, f"run.dir={run}")
        assert hand_in(plan(call)) == "7"
        holding = [path.name for path in run.rglob("*") if path.is_file() and "hf_secret" in path.read_text()]
        script = (run / "launch" / "job.sbatch").read_text()
        assert holding == ["job.sbatch"] and script.count("hf_secret") == 1
        assert (run / "launch" / "job.sbatch").stat().st_mode & 0o777 == 0o600


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("signals", "commands_", "ran"),
    [
        ([], [], ["begin", "health", "admit", "train", "end"]),
        (["USR1 health"], [], ["begin", "health", "early"]),
        (["TERM health"], [], ["begin", "health", "leave"]),
        (["USR1 train"], [], ["begin", "health", "admit", "train", "warned", "end"]),
        (["TERM train"], [], ["begin", "health", "admit", "train", "leave"]),
        # Cancelled soon after the warning; and ended by the time limit, as long after it as was told.
        (["USR1 train", "TERM train"], [], ["begin", "health", "admit", "train", "warned", "leave"]),
        (["USR1 train", "TERM train"], ["--warn-s=10"], ["begin", "health", "admit", "train", "warned", "end"]),
        ([], ["begin"], ["begin"]),
        ([], ["admit"], ["begin", "health", "admit"]),
    ],
)
def test_what_the_script_does(tmp_path: Path, signals: list[str], commands_: list[str], ran: list[str]) -> None:
    """The script itself, with commands in the place of SLURM's and of ours that note that they were run."""
    flags = [word for word in commands_ if word.startswith("--")]
    text = plan(called("slurm", *flags, "--", f"run.dir={tmp_path}/run")).text
    (tmp_path / "script").write_text(text)
    say = f"echo $word >> {tmp_path}/ran"
    heard = f"for _ in $(seq 100); do grep -qs warned {tmp_path}/ran && break; sleep 0.1; done"
    signalling = ""
    for signal, during in (one.split() for one in signals):
        then = heard if (signal, during) == ("USR1", "train") else ":"
        signalling += f'[ "$word" = {during} ] && {{ sleep 0.3; kill -{signal} $PPID; {then}; }}\n'
    for name, body in {
        "scontrol": "echo n1",
        "srun": f"""
case "$*" in *launch.health*) word=health ;; *"launch torchrun"*) word=train ;; *) exit ;; esac
{say}
trap 'echo warned >> {tmp_path}/ran' USR1
{signalling}
exit 0""",
        "python": f"""
[ "$2" = launch.job ] || {{ echo 1; exit; }}
word=$3
{say}
{"".join(f"[ $word = {word} ] && exit 1; " for word in commands_ if not word.startswith("--"))}
exit 0""",
    }.items():
        says(tmp_path, name, body)
    text = (tmp_path / "script").read_text().replace(sys.executable, f"{tmp_path}/python")
    place = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    environment = {**os.environ, **place, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", text], env=environment, timeout=60)
    assert (tmp_path / "ran").read_text().split() == ran


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_after_something_is_saved_the_job_goes_on_from_it(tmp_path: Path) -> None:
    text = plan(called("slurm", "--", f"run.dir={tmp_path}", "resume=none")).text
    lines = [line for line in text.splitlines() if line.startswith(("run=", '[ "$(cat "$run/launch/begun"'))]
    script = "\n".join([*lines, 'printf "%s\n" "${overrides[@]}"'])
    (tmp_path / "launch").mkdir()

    def overrides() -> list[str]:
        done = subprocess.run(["bash", "-c", script], env={"SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}, **OUT)
        return done.stdout.split()

    assert compose(overrides()).resume == "none"
    (tmp_path / "launch" / "begun").write_text("6\n")
    assert compose(overrides()).resume == "none"
    (tmp_path / "launch" / "begun").write_text("7\n")
    assert compose(overrides()).resume == "auto"


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_a_run_that_has_a_job_gets_no_second_one(
    tmp_path: Path,
    commands: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    (run / "launch").mkdir(parents=True)
    (run / "launch" / "job").write_text("3\n")
    says(commands, "sbatch", "echo 4")
    says(commands, "squeue", 'echo "PENDING|Resources"')
    assert main(["slurm", "--", f"run.dir={run}"]) == 2
    assert "has a job already: 3 is PENDING" in capsys.readouterr().err and len(list((run / "launch").iterdir())) == 1
    says(commands, "squeue", 'echo "COMPLETED|None"')
    assert main(["slurm", "--", f"run.dir={run}"]) == 0
    assert (run / "launch" / "job").read_text() == "4\n"


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_it_is_a_script_and_its_overrides_arrive(tmp_path: Path) -> None:
    call = called("slurm", "--", *WORDS, "model.dropout=0.0")
    text = plan(call).text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    echo = f'{which_run([call, call])}\nprintf "%s\\n" "$run" "${{overrides[@]}}"'
    done = subprocess.run(["bash", "-c", echo], env={"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == call.overrides


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_what_slurm_does_not_take_leaves_no_job(
    tmp_path: Path,
    commands: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    says(commands, "sbatch", '[ "$1" = --version ] || { echo "sbatch: error: invalid partition: x" >&2; exit 1; }')
    run = tmp_path / "run"
    assert main(["slurm", "--partition", "x", "--", f"run.dir={run}"]) == 2
    assert capsys.readouterr().err.startswith("launch: sbatch says: invalid partition: x. Mend that")
    assert not (run / "launch" / "job").exists()


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_without_slurm_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["slurm", "--", f"run.dir={tmp_path / 'run'}"]) == 2
    assert not (tmp_path / "run").exists()


def test_gpus_are_for_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused, match=r"--nproc 8 and --gpus 4: a machine has fewer GPUs than processes"):
        check(called("slurm", "--nproc=8", "--gpus=4"))
    plan(called("slurm", "--nproc=8", "--gpus=8"))
    assert capsys.readouterr().err == ""
    plan(called("slurm", "--nproc=1", "--gpus=8"))
    assert "7 GPUs of each machine stay idle. --nproc 8 uses all" in capsys.readouterr().err
