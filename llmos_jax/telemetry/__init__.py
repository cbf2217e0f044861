"""Record what a run did and show it: metrics, progress, figures, report, environment.

Writing needs only the standard library; matplotlib, tensorboardX, jinja2 and rich are
imported where they are used, so that importing this package costs milliseconds.
"""

from llmos_jax.telemetry.confusion import Confusion, class_rows, confusion_figure
from llmos_jax.telemetry.environment import environment, versions
from llmos_jax.telemetry.figures import (
    Plot,
    loss_figure,
    memory_figure,
    throughput_figure,
)
from llmos_jax.telemetry.goodput import PHASES, Goodput, Ledger, process_began
from llmos_jax.telemetry.heartbeat import (
    Heartbeat,
    open_heartbeat,
    read_heartbeat,
)
from llmos_jax.telemetry.leaving import answering, leave
from llmos_jax.telemetry.metrics import MetricsWriter, read_metrics
from llmos_jax.telemetry.plan_page import page_of_front, page_of_plan
from llmos_jax.telemetry.progress import TrainProgress, log
from llmos_jax.telemetry.report import write_report

__all__ = [
    "Confusion",
    "PHASES",
    "Goodput",
    "Heartbeat",
    "Ledger",
    "MetricsWriter",
    "Plot",
    "TrainProgress",
    "answering",
    "class_rows",
    "confusion_figure",
    "environment",
    "leave",
    "log",
    "loss_figure",
    "memory_figure",
    "open_heartbeat",
    "page_of_front",
    "page_of_plan",
    "process_began",
    "read_heartbeat",
    "read_metrics",
    "throughput_figure",
    "versions",
    "write_report",
]
