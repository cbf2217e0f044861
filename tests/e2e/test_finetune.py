"""Fine-tuning a real model on conversations: what a user does, end to end."""

from __future__ import annotations

import json
import random

import jax
import numpy as np
import pytest
import real_models
import small

from llmos_jax import data, driver, interchange, resolve, serving

NAMES = (
    "Ana Boris Chen Dalia Emeka Fatima Goran Hana Ivan Jonas Keiko Lars Mei Nadia Omar "
    "Petra Rosa Sami Tomas Ursula Vera Wanda Yusuf Zora"
).split()
CITIES = (
    "Lima Oslo Cairo Kyoto Quito Turin Lagos Delhi Perth Porto Dakar Hanoi Sofia Tunis"
).split()
JOBS = "baker nurse pilot tailor farmer teacher judge painter miner".split()
SAID = (
    "{name} is a {job} from {city}.",
    "In {city} there lives a {job} called {name}.",
    "My neighbour {name} came from {city} to work as a {job}.",
    "The {job} {name} was born in {city}.",
)
LEARNT, HELD_OUT = 200, 40


def conversations():
    """[(what the user says, the answer in the format to learn)], all different."""
    chosen = random.Random(1)
    rows = set()
    while len(rows) < LEARNT + HELD_OUT:
        name, city = chosen.choice(NAMES), chosen.choice(CITIES)
        rows.add((chosen.choice(SAID), name, city, chosen.choice(JOBS)))
    rows = sorted(rows)
    chosen.shuffle(rows)
    return [
        (said.format(name=name, city=city, job=job), f"<{name}|{city}|{job}>")
        for said, name, city, job in rows
    ]


def right(model, asked):
    """Share of the questions that a model answers word for word."""
    tokenizer = model.tokenizer
    generator = serving.Generator(
        model.skeleton, model.params(), compute_dtype="float32"
    )
    answers = 0
    for said, wanted in asked:
        found = generator.complete(
            data.chat_prompt_ids(tokenizer, [{"role": "user", "content": said}]),
            max_tokens=24,
            sampling=serving.Sampling(),
            stop_ids=tokenizer.stop_ids,
        )
        answers += tokenizer.decode(found.token_ids).strip() == wanted
    return answers / len(asked)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a LoRA run on 200 conversations, as a user starts it."""
    folder = tmp_path_factory.mktemp("finetune")
    learnt = folder / "learn.jsonl"
    with learnt.open("w") as file:
        for said, answer in conversations()[:LEARNT]:
            turns = [
                {"role": "user", "content": said},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    settings = {
        "model": real_models.gguf("smollm2"),
        "data.train": learnt,
        "data.validation_share": 0.05,
        "run.dir": folder / "run",
        "lora.rank": 8,
        "batch.seq_len": 256,
        "batch.global": 4,
        "train.steps": 25,
        "train.warmup_steps": 3,
        "train.learning_rate": 2e-3,
        "train.compute_dtype": "float32",
        "train.max_minutes": 20,
        "train.eval_every": 0,
        "generate.prompts": "[]",
    }
    texts = [f"{key}={value}" for key, value in settings.items()]
    train = small.start(["-m", "llmos_jax.train", *small.flags(texts)], devices=1)
    _, errors = train.communicate(timeout=1500)
    assert train.returncode == 0, errors[-3000:]
    return folder / "run"


@pytest.mark.slow
def test_lora_learns_a_format_from_200_conversations(run):
    asked = conversations()[LEARNT:]
    assert right(resolve.open_model(str(real_models.gguf("smollm2"))), asked) < 0.1
    assert right(resolve.open_model(str(run)), asked) > 0.9


@pytest.mark.slow
def test_merged_and_exported_it_says_the_same_in_transformers(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path / "merged"
    driver.convert(str(run), str(folder))
    ours = resolve.open_model(str(run))
    generator = serving.Generator(ours.skeleton, ours.params(), compute_dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for said, _ in conversations()[-8:]:
        turns = [{"role": "user", "content": said}]
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ids = data.chat_prompt_ids(ours.tokenizer, turns)
        assert prompt.input_ids[0].tolist() == ids.tolist()
        made = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        theirs = made[0, len(ids) :].tolist()
        found = generator.complete(
            ids,
            max_tokens=24,
            sampling=serving.Sampling(),
            stop_ids=ours.tokenizer.stop_ids,
        )
        found = list(found.token_ids)
        assert theirs[: len(found)] == found
        assert set(theirs[len(found) :]) <= ours.tokenizer.stop_ids


@pytest.mark.slow
def test_peft_reads_our_adapter_and_we_read_peft_s(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    driver.convert(str(run), str(tmp_path / "adapter"), form="peft")
    ours = resolve.open_model(str(run))
    ids = ours.tokenizer.encode(real_models.TEXT)[:64]
    params = ours.params(dtype="float32")
    tokens = jax.numpy.asarray(ids[None].astype(np.int32))
    wanted = np.asarray(ours.skeleton.bind(params)(tokens))[0]

    path = real_models.gguf("smollm2")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        theirs = model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    assert np.abs(theirs - wanted).max() < 2e-3

    model.save_pretrained(tmp_path / "peft")
    laid = resolve.lay_over(resolve.open_model(str(path)), str(tmp_path / "peft"))
    found = laid.params(dtype="float32")
    assert laid.skeleton.spec.lora == ours.skeleton.spec.lora
    for name in ours.skeleton.table.trained:
        assert np.array_equal(np.asarray(found[name]), np.asarray(params[name])), name


def test_peft_of_a_tiny_model_computes_what_we_do(tmp_path):
    """A fresh PEFT adapter with random factors over a random Llama."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=4,
            lora_alpha=10,
            target_modules=["q_proj", "o_proj", "down_proj"],
            init_lora_weights=False,
        ),
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = np.arange(20)[None] * 5 % 128
    with torch.no_grad():
        wanted = model(torch.tensor(ids)).logits.numpy()
    under = interchange.open_archive(tmp_path / "base")
    laid = interchange.Adapted(
        under, interchange.read_adapter(str(tmp_path / "adapter"))
    )
    params = laid.params()
    found = laid.skeleton.bind(params)(jax.numpy.asarray(ids.astype(np.int32)))
    assert np.abs(np.asarray(found) - wanted).max() < 1e-4
    spec, joined = interchange.merged(laid.skeleton.spec, params)
    assert spec == under.skeleton.spec
    plain = under.skeleton.bind(joined)(jax.numpy.asarray(ids.astype(np.int32)))
    assert np.abs(np.asarray(plain) - wanted).max() < 1e-4
