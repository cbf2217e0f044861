"""Two processes serve as one: the first decides, the other does as it does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from engines import asked, engine_of, request_of

from llmos_jax import resolve

SERVE = """
import json, os, sys
from pathlib import Path
os.dup2(2, 1)  # gloo talks on stdout
from llmos_jax import driver, lowering, resolve, service
sys.path[:0] = [{here!r}]
from engines import asked, request_of
lowering.join_processes()
with lowering.shared_fate():
    opened, config = resolve.open_with_config(sys.argv[1], sys.argv[3:])
    ready = service.make_ready(opened, config, driver.plan)
    if lowering.is_first_process():
        engine = ready.engine()
        engine.wait_until_ready()
        prompts = json.loads({prompts!r})
        requests = [request_of(i, prompt, 12) for i, prompt in enumerate(prompts)]
        answers = [one.tokens for one in asked(engine, requests)]
        engine.stop()
        said = {{"answers": answers, "problem": engine.state().problem}}
    else:
        ready.follow()
        said = {{}}
Path(sys.argv[2], os.environ["JAX_PROCESS_ID"]).write_text(json.dumps(said))
"""
PROMPTS = [(np.arange(20 * index + 1) * 11 % 256).tolist() for index in range(3)]


@pytest.mark.slow
def test_two_processes_answer_as_one(small_run: Path, tmp_path: Path) -> None:
    import small
    from processes import PATIENCE_S, free_port

    sizes = ["serve.seats=2", "serve.step_tokens=16", "serve.cache_gib=0.01"]
    here = str(Path(__file__).parent)
    code = SERVE.format(here=here, prompts=json.dumps(PROMPTS))
    address = f"127.0.0.1:{free_port()}"
    started: list[subprocess.Popen[str]] = [
        small.start(
            ["-c", code, str(small_run), str(tmp_path), *sizes, "plan.mesh.tensor=4"],
            devices=2,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, said[-2000:]
    first, other = (json.loads((tmp_path / str(i)).read_text()) for i in range(2))
    opened, _ = resolve.open_with_config(str(small_run), [])
    with engine_of(opened.skeleton, opened.params(dtype="float32")) as alone:
        requests = [request_of(i, prompt, 12) for i, prompt in enumerate(PROMPTS)]
        wanted = [one.tokens for one in asked(alone, requests)]
    assert first == {"answers": wanted, "problem": ""}
    assert other == {}
