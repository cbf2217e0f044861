"""Put a model before EleutherAI's lm-eval, which asks it what its tasks need.

lm-eval (an optional dependency: `llmos_jax[eval]`) knows a model as an `LM` that says
how likely a continuation is, how likely a whole document is, and how a prompt goes on.
`LlmosLM` answers with the programs that training and serving have. Where lm-eval leaves
a choice, it is made as in lm-eval's own `hf` model, so that figures compare: marks that
a text spells out are marks, contexts that are too long lose their beginning, a document
follows the mark that begins texts (else the one that ends them), and one that is too
long is scored in windows, each token once.

Importing this module registers the model as `llmos` with lm-eval.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmos_jax import data, driver, lowering, resolve, serving, training
from llmos_jax.errors import ConfigError, DataError, did_you_mean
from llmos_jax.telemetry import log
from llmos_jax.training.likelihood import (
    Judge,
    Judged,
    Likelihoods,
    open_likelihoods,
)

Request = tuple[Any, list[int], list[int]]
"""What was asked in text (None: part of a document), and its context and end in ids."""

MAX_GEN_TOKS = 256
"""Tokens of an answer where a task sets no limit: what lm-eval's own models take."""
BOOTSTRAP_ITERS = 1000
"""Draws for the standard error of a metric that has no formula: its third digit hardly
moves, and lm-eval's own 100 000 take minutes."""
_GOES_ON = "\ufdd2"  # a character that Unicode promises never to use


@register_model("llmos")
class LlmosLM(TemplateLM):
    """Whatever `resolve.open_model` opens, as lm-eval knows models.

    Weights are read when the first question comes: onto the plan's mesh to judge
    continuations, onto one device to answer prompts.
    """

    def __init__(
        self,
        model: str,
        overrides: Sequence[str] = (),
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Open a model.

        Args:
            model: whatever has weights.
            overrides: config keys; in a single text, spaces lie between them.
            batch_size: sequences of a step; None: what the config says, which is 8 for
                each device if nothing is set.
            max_length: tokens of the longest sequence; None: the model's context.

        Raises:
            CheckpointError: nothing there, or damaged.
            ConfigError: a value that cannot be used.
        """
        super().__init__()
        lowering.keep_compiled_programs()
        words = overrides.split() if isinstance(overrides, str) else overrides
        self._opened, config = resolve.open_with_config(model, words)
        resolve.check_speaks(self._opened.skeleton.spec, "evaluate --tasks")
        self._tokenizer = self._opened.tokenizer
        if batch_size is not None:
            count = _whole("batch_size", batch_size)
            batch = replace(config.batch, global_=count, per_device=None)
            config = replace(config, batch=batch)
        self._config = config
        context = self._opened.skeleton.spec.max_seq_len
        self._max_length = (
            context if max_length is None else _whole("max_length", max_length, context)
        )
        self._mesh: dict[str, int] | None = None
        self._judge = Judge(
            max_length=self._max_length,
            open_at=self._open_at,
            read=self._opened.params,
        )
        self._speaker: serving.Generator | None = None
        names = {token: name for name, token in self._tokenizer.vocabulary().items()}
        self._end_text = names[self.eot_token_id]
        self._sampled: Counter[tuple[str, str]] = Counter()

    @property
    def facts(self) -> dict[str, Any]:
        """The model's name and the training step of its weights."""
        return {"model": self._opened.skeleton.spec.name, "step": self._opened.step}

    @property
    def eot_token_id(self) -> int:
        """The mark that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        marks = self._tokenizer.marks
        return marks.eos_id if marks.bos_id is None else marks.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where a task sets no limit."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches know the tokenizer by."""
        return f"{self._opened.skeleton.spec.name}-{self._tokenizer.fingerprint}"

    # --- text ---

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text in which marks are marks.

        Args:
            string: the text.
            add_special_tokens: whether it gets the mark that the model expects in front
                of every text; None: unless the text begins with the prefix already.
            kwargs: what other models take.
        """
        ids = [int(one) for one in self._tokenizer.encode_markup(string)]
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != [self.prefix_token_id]
        if not (add_special_tokens and self._tokenizer.marks.adds_bos):
            return ids
        return [self._tokenizer.begin_id, *ids]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the model's template; None where none is wanted."""
        return self._tokenizer.marks.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, up to the header of the answer, or (without
        the header) up to the last word of the last message, for the model to go on.

        A template that refuses the conversation gets it without system messages.

        Raises:
            ConfigError: the model came without a template, or its template fails.
            DataError: the template refuses the conversation.
        """
        spoken = [one for one in chat_history if one["role"] != "system"]
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except DataError:
            if len(spoken) == len(chat_history):
                raise
        log("the chat template refuses system messages: they are left out.")
        return self._rendered(spoken, add_generation_prompt)

    def _rendered(self, messages: list[dict[str, Any]], asks: bool) -> str:
        if asks:
            return data.render_chat(
                self._tokenizer, messages, add_generation_prompt=True
            )
        last = {**messages[-1], "content": f"{messages[-1]['content']}{_GOES_ON} "}
        text = data.render_chat(self._tokenizer, [*messages[:-1], last])
        said, found, after = text.rpartition(_GOES_ON)
        if not found:
            raise DataError("the chat template leaves out the last message.")
        # A template that trims messages would have trimmed this one's end as well.
        return said if after.startswith(" ") else said.rstrip()

    # --- likelihoods ---

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each document, in nats."""
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            # Where texts begin with a mark, lm-eval's `hf` model scores that mark too,
            # after the prefix; so does this.
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(one)) for one in cut]
            windows += found
            owners += [index] * len(found)
        sums = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for index, (log_prob, _) in zip(owners, scored, strict=True):
            sums[index] += log_prob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return each end's log-probability in nats, and whether it is greedy."""
        say = partial(log, enabled=not disable_tqdm and lowering.is_first_process())
        most = self.max_length + 1
        too_long = sum(len(one[1]) + len(one[2]) > most for one in requests)
        if too_long:
            say(
                f"{too_long} of {len(requests)} requests are longer than "
                f"{self.max_length} tokens: their contexts lose the beginning."
            )
        found = self._judge.judge(
            [self._judged(*request) for request in requests],
            training.said_now_and_then(say, "likelihoods"),
        )
        answers = [(one.log_prob, one.is_greedy) for one in found]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _judged(self, text: Any, context: list[int], end: list[int]) -> Judged:
        if not 0 < len(end) <= self.max_length:
            raise DataError(
                f"a continuation of {len(end)} tokens cannot be scored, only one of 1 "
                f"to {self.max_length}: {repr(text)[:200]}. Mend the task, or its text."
            )
        ids = (context + end)[-(self.max_length + 1) :]
        return Judged(ids=ids, count=len(end))

    def _open_at(self, length: int) -> Likelihoods:
        """Plan and lower the program for a length; all share the mesh of the first."""
        asked = resolve.to_score(self._config)
        asked = replace(asked, batch=replace(asked.batch, seq_len=length))
        if self._mesh is not None:
            asked = replace(asked, plan=replace(asked.plan, mesh=self._mesh))
        chosen = driver.plan(asked)
        self._mesh = dict(chosen.mesh.sizes)
        dtype = self._config.train.compute_dtype
        return open_likelihoods(self._opened.skeleton, chosen, dtype)

    # --- answers ---

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Return what the model says after each context, up to a stop.

        Raises:
            ConfigError: settings that have no meaning here, no room for an answer, or
                several processes.
        """
        if not lowering.is_only_process():
            raise ConfigError(
                "tasks that let the model speak run in one process; this run has "
                "several. Run them on one machine."
            )
        say = partial(log, enabled=not disable_tqdm)
        tell = training.said_now_and_then(say, "answers")
        answers = []
        for done, request in enumerate(requests, start=1):
            context, settings = request.args
            answers.append(self._answer(context, settings))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
            tell(done, len(requests))
        return answers

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        wish = _wish_of(settings)
        room = self.max_length - wish.max_tokens
        if room < 1:
            raise ConfigError(
                f"an answer of {wish.max_tokens} tokens leaves no room for a prompt in "
                f"{self.max_length}. Set max_gen_toks in the task's generation_kwargs."
            )
        if wish.sampling.temperature:
            # Asked again, it is to say something else.
            asked = (context, repr(sorted(settings.items())))
            wish = replace(
                wish, sampling=replace(wish.sampling, seed=self._sampled[asked])
            )
            self._sampled[asked] += 1
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return self._said(ids, wish)

    def _said(self, ids: list[int], wish: _Wish) -> str:
        if self._speaker is None:
            placed = self._judge.params  # of use here where one device has all of them
            if placed is None or math.prod((self._mesh or {}).values()) > 1:
                placed = self._opened.params()
            self._speaker = serving.Generator(
                self._opened.skeleton,
                placed,
                compute_dtype=self._config.train.compute_dtype,
            )
        decoder, said = data.StreamDecoder(self._tokenizer), ""
        stops = (*wish.until, self._end_text)

        def hear(token: int) -> bool:
            """Whether a text was said that is a stop; the generator knows tokens."""
            nonlocal said
            said += decoder.push(token)
            return any(stop in said for stop in stops)

        self._speaker.complete(
            np.asarray(ids, np.int32),
            max_tokens=wish.max_tokens,
            sampling=wish.sampling,
            stop_ids=self._tokenizer.marks.stop_ids,
            on_token=hear,
        )
        said += decoder.flush()
        return min((said.split(stop)[0] for stop in stops), key=len)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """A task's generation_kwargs."""

    until: tuple[str, ...]
    max_tokens: int
    sampling: serving.Sampling


_MOST_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def _wish_of(settings: dict[str, Any]) -> _Wish:
    """Read generation_kwargs by lm-eval's names; ConfigError for one of no meaning."""
    known = {"until", "do_sample", "temperature", "top_k", "top_p", *_MOST_NAMES}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ConfigError(
            f"generation_kwargs: {unknown[0]} has no meaning here."
            f"{did_you_mean(unknown[0], known)} Take it out of the task."
        )
    until = settings.get("until") or []
    limits = (settings[name] for name in _MOST_NAMES if settings.get(name) is not None)
    does_sample = settings.get("do_sample")
    temperature = settings.get("temperature", 1.0 if does_sample else 0.0)
    return _Wish(
        until=tuple(filter(None, [until] if isinstance(until, str) else until)),
        max_tokens=_whole("max_gen_toks", next(limits, MAX_GEN_TOKS)),
        sampling=serving.Sampling(
            temperature=0.0 if does_sample is False else float(temperature),
            top_k=int(settings.get("top_k", 0)),
            top_p=float(settings.get("top_p", 1.0)),
        ).check(),
    )


def _whole(name: str, value: Any, most: int | None = None) -> int:
    """A number from 1 to `most`, which lm-eval may hand over as text."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or (most is not None and number > most):
        limit = "" if most is None else f" to {most}, the model's context"
        raise ConfigError(f"{name} = {value}: it must be a whole number from 1{limit}.")
    return number


def run_tasks(
    model: str,
    tasks: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    folder: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Model + names of lm-eval's tasks -> {"model", "step", "tasks", "documents"}.

    `tasks` has the metrics of each task (and of each group) by name, `documents` how
    many of each were asked.

    Args:
        model: whatever has weights.
        tasks: names of tasks or groups.
        overrides: config keys.
        folder: YAML files of tasks beside lm-eval's own.
        limit: documents of each task; None: all.

    Raises:
        ConfigError: an unknown task, or one that asks for what is not here.
        DataError: the files of a task cannot be read.
    """
    lowering.join_processes()
    manager = _tasks_of(tasks, folder)
    # lm-eval would fork to draw for standard errors, which may hang beside JAX.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with lowering.shared_fate():
        subject = LlmosLM(model, overrides)
        try:
            found = lm_eval.simple_evaluate(
                subject,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                log_samples=False,
                bootstrap_iters=BOOTSTRAP_ITERS,
            )
        except OSError as problem:
            if problem.errno is not None:
                raise
            raise DataError(
                f"lm-eval cannot read what its tasks need: {problem}"
            ) from None
    counts = found["n-samples"]
    return {
        **subject.facts,
        "tasks": {name: _metrics(row) for name, row in found["results"].items()},
        "documents": {name: counts[name]["effective"] for name in counts},
    }


def _tasks_of(names: Sequence[str], folder: str | None) -> TaskManager:
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise ConfigError(
            f"{folder} is no folder; name one that has tasks' YAML files."
        )
    place = None if folder is None else str(Path(folder).expanduser())
    if place is not None:
        # lm-eval's own tasks are many thousand files: seconds to read, so only at need.
        manager = TaskManager(include_path=place, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=place)
    for name in names:
        if name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks)
            raise ConfigError(
                f"lm-eval knows no task {name!r}."
                + (near if near.startswith(" Did") else " Name a folder with its YAML.")
            )
    return manager


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """The figures of a task as lm-eval reports it, whose keys are `metric,filter`."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in row.items()
        if "," in key and isinstance(value, int | float)
    }
