"""System metrics of a run (``system/...``): MLflow's own monitor, started and stopped without holding up the training.

MLflow's monitor ends by itself, without a word, as soon as the run's status is not RUNNING. So it is started when the
run is open; on a resume it goes on counting where it was, since its x axis is a counter of its own.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from typing import Any

from stabletrain.tracking.store_errors import first_line, translate_errors

log = logging.getLogger(__name__)

_MONITOR = "mlflow.system_metrics.system_metrics_monitor"
_LONGEST_STOP = 5.0
"""Seconds to wait for the last metrics."""


class SystemMetrics:
    """Measures CPU, memory, disk, network and GPUs of this machine every 10 seconds, in a thread.

    Args:
        uri: MLflow tracking URI.
        run_id: the run, with status RUNNING.
        node: number of this machine, if the run has several; None: there is one.
    """

    def __init__(self, uri: str, run_id: str, node: int | None = None) -> None:
        self._arguments: dict[str, Any] = {"run_id": run_id, "tracking_uri": uri, "resume_logging": True}
        self._arguments["node_id"] = None if node is None else f"node_{node}"
        self._monitor: Any = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._start, name="stabletrain-system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send the last metrics and end; a store that does not answer is not waited for."""
        self._stopped.set()
        ending = threading.Thread(target=self._finish, name="stabletrain-system-metrics-end", daemon=True)
        ending.start()
        ending.join(_LONGEST_STOP)

    def _start(self) -> None:
        try:
            logger = logging.getLogger(_MONITOR)
            if logger.level == logging.NOTSET:
                # it says that it starts, stops, has no GPU, and all of an error of a server, which the logger says, too
                logger.setLevel(logging.ERROR)
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            if _lacks_gpu_package():
                log.info("no system metrics of the GPUs: pip install nvidia-ml-py")
            with translate_errors(self._arguments["tracking_uri"]):
                monitor = SystemMetricsMonitor(**self._arguments)
            if not self._stopped.is_set():
                self._monitor = monitor
                monitor.start()
        except Exception as error:
            log.warning("no system metrics: %s", first_line(error))

    def _finish(self) -> None:
        self._thread.join()
        if self._monitor is not None:
            self._monitor.finish()


def this_node() -> int | None:
    """Return the number of this machine among those of the run; None if there is one, or nobody says it.

    The variables are those of torchrun and SLURM.
    """
    for number, total, each in (("GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("SLURM_NODEID", "SLURM_NNODES", "")):
        words = [os.environ.get(name, "1") for name in (number, total, each) if name]
        if number in os.environ and all(word.isdecimal() for word in words):
            node, size, *per = map(int, words)
            return node if size > (per[0] if per else 1) else None
    return None


def _lacks_gpu_package() -> bool:
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available() and torch.version.hip is None
    return has_gpu and importlib.util.find_spec("pynvml") is None
