"""The run as a whole, on a model of a few thousand weights."""

import dataclasses
import json
import os
import resource
import signal

import pytest
import torch

from longforge.errors import RunError
from longforge.model.causal_lm import CausalLM
from longforge.training.config import OptimiserConfig, PretrainConfig, ScheduleConfig
from longforge.training.data import BatchStream
from longforge.training.pretrain import METRICS, Pretrainer
from longforge.training.state import latest_state
from small_training import TINY, Repeats


def config(**schedule):
    plan = ScheduleConfig(**{"steps": 12, "warmup_steps": 2, "log_every": 1, **schedule})
    return PretrainConfig(schedule=plan, optimiser=OptimiserConfig(bf16=False))


def trainer(folder, plan, **options):
    torch.manual_seed(7)
    stream = BatchStream({"repeats": (Repeats(), 1.0)}, tokens=96, block_size=4, seed=3)
    return Pretrainer(CausalLM(TINY), stream, plan, folder, **options)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    plan = config(dense_share=0.3, mtp_share=0.5)
    whole = trainer(tmp_path / "whole", plan)
    assert whole.run()
    first = trainer(tmp_path / "parts", plan)
    for _ in range(7):
        first.step()
    first.save()
    second = trainer(tmp_path / "parts", plan)
    torch.nn.init.zeros_(second.model.lm_head.weight)
    assert second.resume() and second.done == 7
    assert second.run()
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_ctrl_c_ends_after_the_step_and_leaves_a_state_to_resume(tmp_path):
    plan = config()

    def interrupt(report):
        if report.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    assert trainer(tmp_path, plan, report=interrupt).run() is False
    assert latest_state(tmp_path).name == "state-0000004"
    again = trainer(tmp_path, plan)
    assert again.resume() and again.run()
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_lines_of_steps_after_the_state_are_forgotten_on_resume(tmp_path):
    plan = config()
    run = trainer(tmp_path, plan)
    run.run()
    (tmp_path / METRICS).write_text('{"step": 11}\n{"step": 12}\n{"step": 13}\n{"step": 1')
    again = trainer(tmp_path, plan)
    again.resume()
    assert (tmp_path / METRICS).read_text() == '{"step": 11}\n{"step": 12}\n'


def test_the_index_loss_falls_in_the_dense_warm_up(tmp_path):
    run = trainer(tmp_path, config(steps=1000, dense_share=1.0, mtp_share=0.0, warmup_steps=10))
    losses = [run.step().index_loss for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[5:15])


def test_detached_mtp_leaves_the_main_model_as_it_would_be_without(tmp_path):
    runs = [
        trainer(tmp_path / name, config(mtp_share=share, mtp_detached_share=1.0))
        for name, share in (("with", 1.0), ("without", 0.0))
    ]
    for run in runs:
        for _ in range(4):
            run.step()
    with_mtp, without = (run.model.state_dict() for run in runs)
    moved = [name for name in with_mtp if not torch.equal(with_mtp[name], without[name])]
    assert moved and all(name.startswith("mtp.") for name in moved)


def test_joint_mtp_reaches_the_main_model(tmp_path):
    runs = []
    for name, share in (("with", 1.0), ("without", 0.0)):
        plan = config(mtp_share=share, mtp_detached_share=0.0)
        # No clipping, and one step: the shared table alone may not be what makes the difference.
        plan = dataclasses.replace(plan, optimiser=OptimiserConfig(bf16=False, clip=1e9))
        runs.append(trainer(tmp_path / name, plan))
        runs[-1].step()
    a, b = (run.model.model.layers[0].self_attn.qkv_proj.weight for run in runs)
    assert not torch.equal(a, b)


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path):
    run = trainer(tmp_path, config())
    run.step()
    run.save()
    run.step()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # as on a full disk
    try:
        with pytest.raises(RunError, match="state-0000002: a folder that can be written is needed, got"):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state-0000001"]
    again = trainer(tmp_path, config())
    assert again.resume() and again.done == 1


@pytest.mark.parametrize("broken", ["model.norm.weight", "mtp.0.final_layernorm.weight"])
def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(tmp_path, broken):
    run = trainer(tmp_path, config(mtp_share=1.0))
    torch.nn.init.constant_(run.model.get_parameter(broken), float("nan"))
    with pytest.raises(RunError, match="step 1: expected a finite loss, got") as error:
        run.step()
    assert "\n" not in str(error.value)


class Clock:
    """Each look at it comes half a second after the last."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


def test_the_plan_shrinks_to_the_time_limit_and_the_rate_still_ends_at_zero(tmp_path):
    run = trainer(tmp_path, config(steps=100_000, minutes=0.5), clock=Clock())
    factors = []
    while run.done < run.planned:
        factors.append(run.step().lr_factor)
    assert run.done == 60 and run.seconds == 30.0
    assert factors[-1] < 0.05


def test_scores_are_written_between_steps(tmp_path):
    run = trainer(tmp_path, config(evaluate_every=5), evaluate=lambda model, step: {"answers": step / 100})
    run.run()
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert {row["step"]: row["held_out"] for row in rows if "held_out" in row} == {
        5: {"answers": 0.05}, 10: {"answers": 0.1}, 12: {"answers": 0.12},
    }  # fmt: skip
