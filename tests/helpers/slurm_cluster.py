"""A real SLURM of one node on this machine, from Debian's packages extracted into a folder: tools/get_slurm.sh.

Nothing is installed: the daemons (munged, slurmctld, slurmd) have their configuration, sockets and state in a temporary
folder, use free ports, and end with the ``with`` block, together with every process that a job has left.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

ENV = "STABLETRAIN_SLURM"
"""Environment variable with the folder of the packages."""
HOW = f"SLURM is not there: sh tools/get_slurm.sh FOLDER, then {ENV}=FOLDER"
_CACHE = Path("~/.cache/stabletrain/slurm")

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser={user}
SlurmdUser={user}
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,defer_batch=0
ReturnToService=2
KillWait=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def packages() -> Path | None:
    """The folder of the extracted packages; None if there is none."""
    for folder in (os.environ.get(ENV), str(_CACHE.expanduser())):
        if folder and (Path(folder) / "usr/sbin/slurmctld-wlm").exists():
            return Path(folder).absolute()
    return None


class Cluster:
    """A running SLURM; use it in a ``with`` statement.

    Args:
        folder: temporary, with a short path: sockets are in it.
        root: the folder of the packages.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        (libraries,) = root.glob("usr/lib/*-linux-gnu")
        self._libraries = f"{libraries}:{libraries}/slurm-wlm"
        self._plugins = libraries / "slurm-wlm"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.bin = folder / "bin"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which sbatch, scontrol and so on are found."""
        return {"PATH": f"{self.bin}:{os.environ['PATH']}", "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        for name in ("munge", "state", "spool", "bin"):
            (self.folder / name).mkdir(mode=0o700)
        controller_port, node_port = _free_ports()
        config = _CONFIG.format(
            host=socket.gethostname().partition(".")[0],
            folder=self.folder,
            plugins=self._plugins,
            user=getpass.getuser(),
            controller_port=controller_port,
            node_port=node_port,
        )
        (self.folder / "slurm.conf").write_text(config)
        for program in (self.root / "usr/bin").iterdir():  # the libraries are for these programs only
            wrapper = self.bin / program.name
            wrapper.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={shlex.quote(self._libraries)} exec {program} "$@"\n')
            wrapper.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        munge = [f"--{name}={self.folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}", *munge)
            self.until(lambda: (self.folder / "munge" / "socket").exists(), "munged has a socket")
            conf, stepd = str(self.folder / "slurm.conf"), str(self.root / "usr/sbin/slurmstepd-wlm")
            self._start("slurmctld-wlm", "-D", "-f", conf)
            self._start("slurmd-wlm", "-D", "-f", conf, "-d", stepd)
            self.until(lambda: self("sinfo", "-h", "-o", "%T").strip() == "idle", "the node is idle")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def __call__(self, *words: str) -> str:
        """Run a program of SLURM and return what it prints, errors too."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout + done.stderr

    def job(self, number: str) -> Mapping[str, str]:
        """What SLURM says about a job: JobState, Restarts, Reason and so on."""
        words = self("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def steps(self) -> list[int]:
        """The daemons of job steps, whose children are the tasks; the batch script's is not among them."""
        return [each.pid for each in psutil.process_iter() if self._is_step(each) and ".batch" not in _title(each)]

    def until(self, is_so: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Wait until something is so; what the daemons have logged is in the error if it is not in time."""
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end:
                logs = [path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log"))]
                raise TimeoutError("\n".join([f"not within {seconds:.0f} s: {what}", *logs, self("squeue", "--long")]))
            time.sleep(0.2)

    def _start(self, name: str, *words: str) -> None:
        environment = {**os.environ, "LD_LIBRARY_PATH": self._libraries}
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            daemon = [str(self.root / "usr/sbin" / name), *words]
            self._daemons.append(subprocess.Popen(daemon, env=environment, stdout=log, stderr=log))

    def _end(self) -> None:
        if len(self._daemons) == 3:
            with contextlib.suppress(subprocess.TimeoutExpired, TimeoutError):
                self("scancel", "--full", "--signal=KILL", "--state=RUNNING", f"--user={getpass.getuser()}")
                self.until(lambda: not self("squeue", "-h", "--states=RUNNING,COMPLETING"), "all jobs have ended", 5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if self._started(process):
                    process.kill()

    def _started(self, process: psutil.Process) -> bool:
        """Whether a process belongs to a job: its daemon has the node's log open; its processes name this SLURM."""
        if self._is_step(process):
            return True
        variables = process.environ()
        return variables.get("SLURM_CONF") == str(self.folder / "slurm.conf") and "SLURM_JOB_ID" in variables

    def _is_step(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            if Path(process.exe()) == self.root / "usr/sbin/slurmstepd-wlm":
                return any(each.path == str(self.folder / "slurmd.log") for each in process.open_files())
        return False


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]
