"""Program + data -> Checkpoint: the step, the loop, the scores."""

from llmos_jax.training.answers import (
    Answers,
    Asked,
    Source,
    WithAnswers,
    collect,
)
from llmos_jax.training.conduct import conduct, text_batches, text_figures
from llmos_jax.training.evaluate import Score, score_step, total_score
from llmos_jax.training.folder import RunFolder, open_folder
from llmos_jax.training.lesson import Lesson, TeacherModel
from llmos_jax.training.local import LocalState, local_replicas, replica_bytes_per_step
from llmos_jax.training.loop import Hooks, Outcome, Pace, run
from llmos_jax.training.loss import tiled_loss, token_losses
from llmos_jax.training.optimizer import learning_rate, make_optimizer
from llmos_jax.training.qat import check_qat, quantization_of
from llmos_jax.training.refit import refit
from llmos_jax.training.scorer import (
    Distance,
    Scorer,
    Windows,
    distance,
    open_comparison,
    open_scorer,
    said_now_and_then,
)
from llmos_jax.training.session import (
    Session,
    bits_per_byte,
    lower_train_step,
    open_session,
)
from llmos_jax.training.step import TrainState, init_state, mean_loss, train_step
from llmos_jax.training.summary import summarise
from llmos_jax.training.teacher import (
    Taught,
    Teacher,
    answer_step,
    asker,
    check_distill,
    check_mesh,
    check_room,
    open_teacher,
)

__all__ = [
    "Answers",
    "Asked",
    "Distance",
    "Hooks",
    "Lesson",
    "LocalState",
    "Outcome",
    "Pace",
    "RunFolder",
    "Score",
    "Scorer",
    "Session",
    "Source",
    "Taught",
    "Teacher",
    "TeacherModel",
    "TrainState",
    "Windows",
    "WithAnswers",
    "answer_step",
    "asker",
    "bits_per_byte",
    "check_distill",
    "check_mesh",
    "check_qat",
    "check_room",
    "collect",
    "conduct",
    "distance",
    "init_state",
    "learning_rate",
    "local_replicas",
    "lower_train_step",
    "make_optimizer",
    "mean_loss",
    "open_comparison",
    "open_folder",
    "open_scorer",
    "open_session",
    "open_teacher",
    "quantization_of",
    "refit",
    "replica_bytes_per_step",
    "run",
    "said_now_and_then",
    "score_step",
    "summarise",
    "text_batches",
    "text_figures",
    "tiled_loss",
    "token_losses",
    "total_score",
    "train_step",
]
