"""Trains the shipped model's MTP module to guess up to three tokens ahead: `make draft-module`.

    traces of scripted agents -> what the frozen model says next -> three passes of the module -> its weights

Run it again after Ctrl-C and it goes on where it stopped; it starts from the weights that the model folder
held when the work folder was made. Only the module's weights change: every other tensor is compared bit for
bit before anything is written.
"""

import argparse
import dataclasses
import random
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from base_model_card import add_draft_module
from draft_acceptance import measure
from longforge.bench.serve_speculation import SEED as BENCH_SEED
from longforge.chat import Tokenizer
from longforge.errors import LongforgeError, RunError
from longforge.forge.code_search.index import CodeIndex, build_index
from longforge.forge.code_search.prompts import TOOL_SPECS
from longforge.forge.code_search.questions import QuestionSet
from longforge.forge.code_search.scripted import AVERAGE_HABITS, BEST_HABITS, run_scripted
from longforge.forge.code_search.tools import CodeTools
from longforge.forge.code_search.traces import TraceMaker
from longforge.kernels.host_memory import keep_freed_memory
from longforge.model import CausalLM
from longforge.training.config import PretrainConfig, load_config
from longforge.training.data import Batch
from longforge.training.drafting import PASS_WEIGHTS, DraftTrainer, draft_scores
from longforge.training.launch import finished_model
from longforge.training.pretrain import Evaluate, StepReport
from longforge.training.samples import Conversation, ConversationSource
from longforge.training.scores import held_out_batches
from longforge.training.sources import build_stream

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "src" / "longforge" / "model" / "shipped" / "micro"
WORK = HERE.parent / "build" / "draft-module"
WEIGHTS = "model.safetensors"
HELD_OUT_TRACES = 48
LEFT_OUT = 64
"""Conversations of `longforge bench serve` whose subjects are not trained on: more than are measured."""


@dataclass(frozen=True)
class Talks:
    """Numbered conversations, by turns those of average agents, which sampling resembles, and of the best,
    which greedy decoding resembles."""

    average: TraceMaker
    best: TraceMaker

    def conversation(self, number: int) -> Conversation:
        maker = self.best if number % 2 else self.average
        trace = maker.trace(number // 2)
        return Conversation(trace.messages, trace.tools)


def main() -> int:
    options = _options()
    keep_freed_memory()
    config = load_config(options.config).with_schedule(steps=options.steps, minutes=options.minutes)
    start = options.work / "start"
    if not start.exists():
        shutil.copytree(options.model, start)
    _say("reading the standard library")
    index = build_index()
    trainer = _trainer(config, start, index, options.work / "run")
    if trainer.resume():
        _say(f"going on after step {trainer.done}")
    if not trainer.run():
        _say(f"stopped after step {trainer.done}; run the same command to go on")
        return 130
    if not options.keep_shipped:
        _say("measuring and writing the model")
        ship(trainer, config, index, start, options.out)
        _say(f"written: {options.out}")
    return 0


def _trainer(config: PretrainConfig, start: Path, index: CodeIndex, run: Path) -> DraftTrainer:
    tokenizer, tools = Tokenizer.load(start), CodeTools(index.tree)
    model = CausalLM.from_pretrained(start, dtype=torch.float32)
    block_size = model.config.block_size
    talks = training_talks(index, tools, config.seed)
    stream = build_stream(config, tokenizer, block_size, conversations=talks.conversation)
    batches = _held_out(index, tools, tokenizer, config, block_size)
    return DraftTrainer(model, stream, config, run, evaluate=_held_out_hook(batches), report=_show)


def training_talks(index: CodeIndex, tools: CodeTools, seed: int) -> Talks:
    """Conversations about the train split, less the subjects of those that the benchmark talks about."""
    measured = {q.symbol for q in islice(QuestionSet(index).stream("train", BENCH_SEED), LEFT_OUT)}
    questions = QuestionSet(index)
    train, held_out = questions.questions["train"], questions.questions["held_out"]
    for kind in train:
        held_out[kind] += [q for q in train[kind] if q.symbol in measured]
        train[kind] = [q for q in train[kind] if q.symbol not in measured]
    return Talks(
        TraceMaker(index, tools, seed=seed, habits=AVERAGE_HABITS, questions=questions),
        TraceMaker(index, tools, seed=seed + 1, habits=BEST_HABITS, questions=questions),
    )


def _held_out(
    index: CodeIndex, tools: CodeTools, tokenizer: Tokenizer, config: PretrainConfig, block_size: int
) -> list[Batch]:
    rng = random.Random(config.seed)
    questions = QuestionSet(index).sample("held_out", config.seed, HELD_OUT_TRACES)
    spoken = [run_scripted(q, tools.call, BEST_HABITS, rng) for q in questions]
    source = ConversationSource(lambda i: Conversation(spoken[i].messages, TOOL_SPECS), tokenizer)
    samples = [source.sample(i) for i in range(len(spoken))]
    return held_out_batches(samples, tokens=config.data.tokens_per_step, block_size=block_size)


def _held_out_hook(batches: list[Batch]) -> Evaluate:
    def evaluate(model: CausalLM, step: int) -> Mapping[str, float]:
        scores = draft_scores(model, batches)
        _say(f"step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        return scores

    return evaluate


def _show(report: StepReport) -> None:
    if report.step % 20 == 0:
        _say(
            f"step {report.step}/{report.planned}  loss {report.mtp_loss:.4f}  "
            f"index {report.index_loss:.3f}  {report.tokens_per_second:,.0f} tokens/s  "
            f"{report.seconds / 60:.1f} min"
        )


def ship(trainer: DraftTrainer, config: PretrainConfig, index: CodeIndex, start: Path, out: Path) -> None:
    """Writes the module's weights into the model folder `out`, and what they bring into its card.

    Before and after are measured on written weights. Raises RunError if `out` holds another model by now.
    """
    new = start.parent / "model"
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(start, new)
    finished_model(trainer.model, torch.bfloat16).save_pretrained(new)
    if not out.exists():
        shutil.copytree(start, out)
    refuse_other_changes(out / WEIGHTS, new / WEIGHTS)
    result: dict[str, Any] = {
        "made": time.strftime("%Y-%m-%d"),
        "command": "make draft-module",
        "config": dataclasses.asdict(config),
        "pass_weights": PASS_WEIGHTS,
        "steps": trainer.done,
        "tokens": trainer.tokens,
        "minutes": trainer.seconds / 60,
        "before": measure(start, index),
        "after": measure(new, index),
    }
    shutil.copyfile(new / WEIGHTS, out / f".{WEIGHTS}.part")
    (out / f".{WEIGHTS}.part").replace(out / WEIGHTS)
    add_draft_module(out, result)


def refuse_other_changes(old: Path, new: Path) -> None:
    """Raises RunError if anything but the MTP module's weights differs between two files of tensors."""
    before, after = load_file(old), load_file(new)
    if before.keys() != after.keys():
        raise RunError(f"{old}: the tensors that were trained are needed, others are there")
    for name, tensor in before.items():
        alike = tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        same = alike and torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
        if not (same or (alike and ".mtp." in name)):
            raise RunError(f"{old}: {name} is not the trained model's; remove the work folder to begin anew")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "draft_module.toml")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="model folder to start from")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the resumable state")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the finished model")
    parser.add_argument("--minutes", type=float, help="time limit of the training (default: the config's)")
    parser.add_argument("--steps", type=int, help="planned steps (default: the config's)")
    parser.add_argument("--keep-shipped", action="store_true", help="train only; write no model")
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LongforgeError as error:
        sys.exit(f"draft_module: {error}")
