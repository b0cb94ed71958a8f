"""Makes the demo model that the package ships: `make base-model`.

    standard library -> AST index -> traces of scripted agents + source text -> tokenizer -> training ->
    folder

Run it again after Ctrl-C and it goes on where it stopped. Everything but the clock is fixed by the seed.
"""

import argparse
import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from base_model_card import write_card
from base_model_habits import evaluate_habits
from longforge.chat import Tokenizer, render, train_tokenizer
from longforge.errors import LongforgeError
from longforge.forge.code_search.index import CodeIndex, build_index
from longforge.forge.code_search.prompts import TOOL_SPECS
from longforge.forge.code_search.questions import Question, QuestionSet
from longforge.forge.code_search.scripted import BEST_HABITS, run_scripted
from longforge.forge.code_search.tools import CodeTools
from longforge.forge.code_search.traces import TraceMaker, corpus
from longforge.kernels.host_memory import keep_freed_memory
from longforge.model import PRESETS, CausalLM
from longforge.training.config import PretrainConfig, load_config
from longforge.training.data import Batch
from longforge.training.launch import finished_model, new_model
from longforge.training.pretrain import METRICS, Pretrainer
from longforge.training.progress import TrainingBar
from longforge.training.samples import Conversation, ConversationSource
from longforge.training.scores import held_out_batches, teacher_forced_scores
from longforge.training.sources import build_stream

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "src" / "longforge" / "model" / "shipped" / "micro"
WORK = HERE.parent / "build" / "base-model"
TOKENIZER_TRACES = 3000
HELD_OUT_TRACES = 64


@dataclass(frozen=True)
class Material:
    """What is made before training: the environment, the tokenizer, the held-out side."""

    index: CodeIndex
    tools: CodeTools
    maker: TraceMaker
    tokenizer: Tokenizer
    texts: list[str]
    held_out: list[Question]
    held_out_batches: list[Batch]

    def conversation(self, number: int) -> Conversation:
        trace = self.maker.trace(number)
        return Conversation(trace.messages, trace.tools)


def main() -> int:
    options = _options()
    keep_freed_memory()
    config = load_config(options.config).with_schedule(steps=options.steps, minutes=options.minutes)
    options.work.mkdir(parents=True, exist_ok=True)
    _say("reading the standard library")
    material = prepare(config, options.work)
    model = new_model(config, material.tokenizer)
    stream = build_stream(
        config,
        material.tokenizer,
        model.config.block_size,
        conversations=material.conversation,
        texts=material.texts,
    )
    with TrainingBar() as bar:
        trainer = Pretrainer(
            model,
            stream,
            config,
            options.work / "run",
            evaluate=_held_out_hook(material, config, options.habits_every),
            report=bar,
        )
        if trainer.resume():
            _say(f"going on after step {trainer.done}")
        finished = trainer.run()
    if not finished:
        _say(f"stopped after step {trainer.done}; run the same command to go on")
        return 130
    if not options.keep_shipped:
        _say("measuring and writing the model")
        ship(trainer, material, config, options.work / "run", options.out, options.questions)
        _say(f"written: {options.out}")
    return 0


def prepare(config: PretrainConfig, work: Path) -> Material:
    """The environment, the tokenizer (made once, kept in `work`) and the held-out traces."""
    index = build_index()
    tools = CodeTools(index.tree)
    questions = QuestionSet(index)
    maker = TraceMaker(index, tools, seed=config.seed, questions=questions)
    texts = list(corpus(index))
    if (work / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(work)
    else:
        tokenizer = _make_tokenizer(maker, texts, config.vocab_size or 2048)
        tokenizer.save(work)
    held_out = questions.sample("held_out", config.seed, 400)
    rng = random.Random(config.seed)
    spoken = [run_scripted(q, tools.call, BEST_HABITS, rng) for q in held_out[:HELD_OUT_TRACES]]
    source = ConversationSource(lambda i: Conversation(spoken[i].messages, TOOL_SPECS), tokenizer)
    batches = held_out_batches(
        [source.sample(i) for i in range(len(spoken))],
        tokens=config.data.tokens_per_step,
        block_size=PRESETS[config.model].block_size,
    )
    return Material(index, tools, maker, tokenizer, texts, held_out, batches)


def _make_tokenizer(maker: TraceMaker, texts: list[str], vocab_size: int) -> Tokenizer:
    """BPE pieces from traces and every eighth piece of source text."""
    traces = (maker.trace(i) for i in range(TOKENIZER_TRACES))
    rendered = [render(trace.messages, trace.tools, add_generation_prompt=False) for trace in traces]
    return train_tokenizer([*rendered, *texts[::8]], vocab_size)


def _held_out_hook(
    material: Material, config: PretrainConfig, habits_every: int
) -> Callable[[CausalLM, int], Mapping[str, float]]:
    """Teacher-forced scores each time, the real tool loop on 64 questions every `habits_every` steps."""
    dense_until = config.schedule.dense_share * config.schedule.steps

    def evaluate(model: CausalLM, step: int) -> Mapping[str, float]:
        phase = "warmup" if step < dense_until else "sparse"
        scores = teacher_forced_scores(model, material.held_out_batches, phase=phase)
        if habits_every and step % habits_every == 0 and scores["answers"] > 0.2:
            found, _ = evaluate_habits(
                model, material.tokenizer, material.tools, material.held_out[:64], seed=step
            )
            model.train()
            scores |= {"success": found.success, "success_seconds": found.seconds}
        _say(f"step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        return scores

    return evaluate


def ship(
    trainer: Pretrainer, material: Material, config: PretrainConfig, run: Path, out: Path, questions: int
) -> None:
    """Writes weights in bf16, tokenizer, card and curve; every number is measured on the written weights."""
    out.mkdir(parents=True, exist_ok=True)
    finished_model(trainer.model, torch.bfloat16).save_pretrained(out)
    material.tokenizer.save(out)
    model = CausalLM.from_pretrained(out, dtype=torch.float32).eval()
    recalls = [model.selection_recall(batch.ids, batch.layout) for batch in material.held_out_batches]
    tokens = [batch.ids.numel() for batch in material.held_out_batches]
    weighted = [
        sum(r * n for r, n in zip(layer, tokens, strict=True)) / sum(tokens)
        for layer in zip(*recalls, strict=True)
    ]
    asked = material.held_out[:questions]
    habits = {
        f"temperature {t:g}": evaluate_habits(
            model, material.tokenizer, material.tools, asked, temperature=t, seed=1
        )[0].as_json()
        for t in (1.0, 0.0)
    }
    result = {
        "made": time.strftime("%Y-%m-%d"),
        "command": "make base-model",
        "config": dataclasses.asdict(config),
        "steps": trainer.done,
        "tokens": trainer.tokens,
        "minutes": trainer.seconds / 60,
        "model": dataclasses.asdict(model.config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "teacher_forced": teacher_forced_scores(model, material.held_out_batches),
        "selection_recall": weighted,
        "held_out": habits,
        "traces_right": _share_of_right_traces(material),
    }
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    write_card(out, result, rows)


def _share_of_right_traces(material: Material, n: int = 1000) -> float:
    """How often the scripted agents of the traces are right: where a perfect imitator would start."""
    return sum(material.maker.trace(i).correct for i in range(n)) / n


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "base_model.toml")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the resumable state")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the finished model")
    parser.add_argument("--minutes", type=float, help="time limit of the training (default: the config's)")
    parser.add_argument("--steps", type=int, help="planned steps (default: the config's)")
    parser.add_argument(
        "--habits-every", type=int, default=300, help="steps between real tool loops; 0: never"
    )
    parser.add_argument("--questions", type=int, default=256, help="held-out questions of the final measure")
    parser.add_argument("--keep-shipped", action="store_true", help="train only; write no model")
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LongforgeError as error:
        sys.exit(f"base_model: {error}")
