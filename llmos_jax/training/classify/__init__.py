"""Training of classifiers: their step, their scores, what the loop needs of them."""

from llmos_jax.training.classify.score import (
    ClassScore,
    ClassScorer,
    Judged,
    total_class_score,
)
from llmos_jax.training.classify.session import (
    class_batches,
    class_figures,
    class_score,
    open_class_scorer,
    open_class_session,
)
from llmos_jax.training.classify.step import ClassLesson, class_step, class_sums
from llmos_jax.training.classify.summary import (
    classes_of,
    confusion_of,
    summarise_classes,
)

__all__ = [
    "ClassScore",
    "ClassScorer",
    "Judged",
    "ClassLesson",
    "class_batches",
    "class_figures",
    "class_score",
    "class_step",
    "class_sums",
    "classes_of",
    "confusion_of",
    "open_class_scorer",
    "open_class_session",
    "summarise_classes",
    "total_class_score",
]
