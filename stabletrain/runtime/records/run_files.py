"""The names of the files in a run's folder, for all modules that write or read them. Standard library only.

| name                   | written by                         | holds                                             |
|------------------------|------------------------------------|---------------------------------------------------|
| `run.yaml`             | the launcher                       | the resolved config, input of the worker          |
| `worker.log`           | the worker                         | log records and warnings; of several, of rank 0   |
| `logs/attempt-<n>/`    | each of several workers            | log records and warnings of every rank            |
| `result.json`          | the worker, or else the launcher   | how the run ended                                 |
| `ends/rank-<n>.json`   | the worker                         | how one process ended; result.json has the cause  |
| `attempts.jsonl`       | the launcher                       | when and how each attempt of the run ended        |
| `crash-<n>.txt`        | the launcher                       | how each rank of a failed attempt ended           |
| `job.sbatch`           | the launcher, with SLURM           | the batch script; its output is `slurm-<job>.out` |
| `job.json`             | the SLURM job                      | the attempt that runs; removed when it has ended  |
| `checkpoints/`         | checkpoint callbacks               | checkpoints; `interrupted.ckpt` after a signal    |
| `events.jsonl`         | the guard                          | the events of all plugins                         |
| `steps.bin`            | the worker                         | loss, norm and end of every attempted step        |
| `resumes.json`         | the worker                         | the attempted steps at which it was resumed       |
| `environment/`         | launcher and worker                | versions, settings, code, data, git: see below    |
| `stability.png`        | the launcher, if it can draw       | loss, norm and interventions, for the artifacts   |
| `interventions.jsonl`  | plugins that restore earlier state | the rollbacks, to replay them                     |
| `diagnosis-<step>/`    | plugins that stop a run            | a report of the model's state                     |
| `metrics-unsent.jsonl` | the MLflow logger                  | metrics that the store did not accept             |
| `mlflow-unsent/`       | the launcher, or the MLflow logger | a run whose server did not respond, to be sent    |
| `sample.txt`           | the text workload                  | a sample of the trained model                     |
| `strategy.json`        | the strategy, if it shards         | which modules are units, and their share          |
| `lr_range.csv`         | the schedule of a range test       | rate and loss of every attempted step             |
| `step_times.json`      | the steps that a plan measures     | seconds of each of them, and the device           |
| `landscape/`           | `stabletrain landscape`            | the loss around the weights: JSON and pictures    |
| `chaos/`               | faults of `stabletrain.chaos`      | the steps at which they were applied              |

In ``environment/``: ``git.json`` and diffs (the launcher); ``environment.json``, ``requirements.txt`` and ``code.json``
(the worker, once it is built), ``data.json`` (the worker, at the first batch).
"""

from pathlib import Path

RUN_YAML = "run.yaml"
RUN_YAML_RECORD = ("trust", "typed", "choices")
"""Keys of run.yaml that no config has: they say how the command line named the run's parts."""
WORKER_LOG = "worker.log"
LOGS = "logs"
RESULT = "result.json"
ATTEMPTS = "attempts.jsonl"
CRASH_PREFIX = "crash-"
ENDS = "ends"
SLURM_SCRIPT = "job.sbatch"
SLURM_ATTEMPT = "job.json"
CHECKPOINTS = "checkpoints"
INTERRUPTED_CHECKPOINT = "interrupted.ckpt"
EVENTS = "events.jsonl"
STEPS = "steps.bin"
RESUMED = "resumes.json"
ENVIRONMENT = "environment"
CODE = "code.json"
DATA = "data.json"
PICTURE = "stability.png"
INTERVENTIONS = "interventions.jsonl"
DIAGNOSIS_PREFIX = "diagnosis-"
UNSENT_METRICS = "metrics-unsent.jsonl"
UNSENT_RUNS = "mlflow-unsent"
SAMPLE = "sample.txt"
STRATEGY = "strategy.json"
LR_RANGE = "lr_range.csv"
STEP_TIMES = "step_times.json"
LANDSCAPE = "landscape"
CHAOS = "chaos"


def slurm_output(job: str) -> str:
    """Return the name of the file with a SLURM job's output.

    Args:
        job: the job's number, or ``"%j"``, which sbatch replaces by it.

    >>> slurm_output("4711")
    'slurm-4711.out'
    """
    return f"slurm-{job}.out"


def rank_log(attempt: int, rank: int) -> str:
    """Return the path in a run's folder of the log of one of several ranks.

    Args:
        attempt: from 1.
        rank: of the process.

    >>> rank_log(2, 0)
    'logs/attempt-2/rank-0.log'
    """
    return f"{LOGS}/attempt-{attempt}/rank-{rank}.log"


def crash_report(attempt: int) -> str:
    """Return the name of the file that says how each rank of an attempt ended.

    Args:
        attempt: from 1.

    >>> crash_report(1)
    'crash-1.txt'
    """
    return f"{CRASH_PREFIX}{attempt}.txt"


def artifacts(folder: Path) -> list[Path]:
    """Return the files and folders that are copied to the tracking store when a run has ended; some may be missing.

    Args:
        folder: the run's folder.
    """
    records = (EVENTS, STEPS, PICTURE, RESUMED, INTERVENTIONS, RESULT, ATTEMPTS)
    names = (*records, SAMPLE, STRATEGY, LR_RANGE, LANDSCAPE, ENVIRONMENT)
    files = [folder / name for name in names]
    return [*files, *sorted(folder.glob(f"{DIAGNOSIS_PREFIX}*")), *sorted(folder.glob(f"{CRASH_PREFIX}*.txt"))]
