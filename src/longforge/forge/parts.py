"""The parts of a run, built and taken down in order. None of them knows the conductor.

engine process <- gateway <- agents          pool  feed  trainer -> publisher -> engine process
                    on the background loop          on the conductor's thread
"""

import queue
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from longforge.chat import Tokenizer
from longforge.errors import CheckpointError
from longforge.forge.background import BackgroundLoop, HttpServer
from longforge.forge.config import SHIPPED_MODEL, ForgeConfig
from longforge.forge.engine_client import EngineClient, load_weights
from longforge.forge.engine_process import EngineProcess
from longforge.forge.environment import ENVIRONMENTS, Environment
from longforge.forge.gateway import Gateway
from longforge.forge.interrupts import StopFlag
from longforge.forge.pool import Pool
from longforge.forge.publish import Publisher
from longforge.forge.rollout import EpisodeEnd, Rollouts
from longforge.forge.run_folder import RunFolder
from longforge.forge.sqlite_pool import SqlitePool
from longforge.forge.trainer import Trainer
from longforge.kernels.host_memory import keep_freed_memory
from longforge.model import CausalLM, shipped

__all__ = ["Parts", "Source", "build_parts", "load_source"]

ENGINE_MODEL = "policy"


@dataclass(frozen=True)
class Parts:
    """Everything that a conductor drives."""

    environment: Environment
    pool: Pool
    trainer: Trainer
    publisher: Publisher
    engine: EngineProcess
    gateway: Gateway
    rollouts: Rollouts
    ended: "queue.SimpleQueue[EpisodeEnd]"
    """Episodes that have ended, for the conductor's thread."""


@dataclass(frozen=True)
class Source:
    """What a run is made of before it leaves a trace: whatever a user may have got wrong is checked here."""

    model: CausalLM
    tokenizer: Tokenizer
    environment: Environment


def load_source(config: ForgeConfig, stack: ExitStack) -> Source:
    """Loads the model and opens the environment. Errors: one line about what is wrong with either."""
    folder = shipped.path() if config.model == SHIPPED_MODEL else Path(config.model)
    if not folder.is_dir():
        raise CheckpointError(f"model {folder}: expected a model folder, there is none")
    tokenizer = Tokenizer.load(folder)
    # fp32 whatever the folder holds: a small update would be lost in bf16's rounding.
    model = CausalLM.from_pretrained(folder, dtype=torch.float32)
    build = ENVIRONMENTS[config.environment.kind]
    environment = build(config.environment, config.agent, config.rollout.max_tokens)
    stack.callback(environment.close)
    environment.held_out_tasks(config.seed, config.evaluation.questions)  # raises where there are too few
    return Source(model, tokenizer, environment)


def build_parts(folder: RunFolder, source: Source, stack: ExitStack, stop: StopFlag) -> Parts:
    """Starts everything; `stack` takes it down, last started first."""
    config, environment, tokenizer = folder.config, source.environment, source.tokenizer
    keep_freed_memory()
    torch.set_num_threads(config.trainer.threads)
    trainer = Trainer(source.model, config.trainer, temperature=config.rollout.temperature)
    trainer.load(folder.checkpoint)
    pool = SqlitePool(folder.pool)
    stack.callback(pool.close)
    pool.drop_unfinished_calls()

    url: list[str] = []
    publisher = Publisher(
        folder.weights, tokenizer, lambda path, version: load_weights(url[0], path, version)
    )
    weights = publisher.write(trainer.model, trainer.step)
    engine = EngineProcess(weights, config.engine, folder.log("engine"))
    stack.callback(engine.stop)
    loop = stack.enter_context(BackgroundLoop())
    agents = environment.agents(folder.log("agent"))
    loop.run(agents.start())
    stack.callback(lambda: loop.run(agents.close(), seconds=10))

    trainer.warm_up()  # while the engine does the same
    url.append(engine.wait_ready(stop.check))
    if trainer.step:
        load_weights(url[0], weights, trainer.step)
    client = EngineClient(url[0], ENGINE_MODEL)
    gateway = Gateway(
        tokenizer=tokenizer,
        engine=client,
        pool=pool,
        family=trainer.model.config.family,
        context=trainer.model.config.max_positions,
        model_name=ENGINE_MODEL,
        seed=config.seed,
    )
    stack.callback(lambda: loop.run(client.close(), seconds=10))
    server = HttpServer(gateway.app, loop)
    stack.callback(server.close)
    ended: queue.SimpleQueue[EpisodeEnd] = queue.SimpleQueue()
    make = partial(
        Rollouts, loop=loop, gateway=gateway, gateway_url=server.url, agents=agents, ended=ended.put
    )
    rollouts = make(
        environment=environment,
        pool=pool,
        deadline=config.agent.deadline,
        concurrency=config.agent.concurrency,
    )
    stack.callback(rollouts.cancel)
    return Parts(environment, pool, trainer, publisher, engine, gateway, rollouts, ended)
