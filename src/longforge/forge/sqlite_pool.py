"""The data pool in one SQLite file.

Every write is one transaction. A process killed at any moment loses at most the write it was in (WAL,
synchronous=NORMAL; a power cut may lose the latest writes, each of them whole).
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DatabaseError, OperationalError

from longforge.errors import InputError, RunError
from longforge.forge.pool import Finished, GroupRow
from longforge.protocol import Call, Episode, Group

__all__ = ["SqlitePool"]

SCHEMA_VERSION = 1

_meta = sa.MetaData()
_groups = sa.Table(
    "groups",
    _meta,
    sa.Column("group_id", sa.Text, primary_key=True),
    sa.Column("phase", sa.Text, nullable=False),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.UniqueConstraint("phase", "sequence"),
)
_episodes = sa.Table(
    "episodes",
    _meta,
    sa.Column("episode_id", sa.Text, primary_key=True),
    sa.Column("group_id", sa.ForeignKey("groups.group_id"), nullable=False, index=True),
    sa.Column("place", sa.Integer, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("ended", sa.Boolean, nullable=False),
    sa.Column("reward", sa.Float),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("record", sa.Text, nullable=False),
)
_calls = sa.Table(
    "calls",
    _meta,
    sa.Column("call_id", sa.Text, primary_key=True),
    sa.Column("episode_id", sa.ForeignKey("episodes.episode_id"), nullable=False, index=True),
    sa.Column("place", sa.Integer, nullable=False),
    sa.Column("prompt_ids", sa.LargeBinary, nullable=False),
    sa.Column("sampled_ids", sa.LargeBinary, nullable=False),
    sa.Column("logprobs", sa.LargeBinary, nullable=False),
    sa.Column("versions", sa.LargeBinary, nullable=False),
    sa.Column("stop_reason", sa.Text, nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("parent_id", sa.Text),
    sa.Column("seconds", sa.Float, nullable=False),
)
_batches = sa.Table(
    "batches",
    _meta,
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("place", sa.Integer, primary_key=True),
    sa.Column("group_id", sa.ForeignKey("groups.group_id"), nullable=False, unique=True),
)


class SqlitePool:
    """`Pool` in a file. Log-probabilities are kept as float32, ids and versions as int32."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        event.listen(self._engine, "connect", _prepare_connection)
        event.listen(self._engine, "begin", _begin)
        try:
            with self._write() as connection:
                version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
                if version not in (0, SCHEMA_VERSION):
                    raise RunError(f"pool {path}: version {SCHEMA_VERSION} expected, got {version}")
                _meta.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except DatabaseError as error:
            raise RunError(f"pool {path}: not a readable SQLite file ({error.orig})") from error

    def submit(self, group: Group, *, phase: str, step: int) -> None:
        row = {"group_id": group.group_id, "phase": phase, "sequence": group.sequence}
        with self._write() as connection:
            new = insert(_groups).values(**row, status="running", step=step)
            if connection.execute(new.on_conflict_do_nothing(index_elements=["group_id"])).rowcount == 0:
                return
            connection.execute(
                sa.insert(_episodes),
                [
                    {
                        "episode_id": episode.episode_id,
                        "group_id": group.group_id,
                        "place": place,
                        "task": json.dumps(episode.task),
                        "ended": False,
                        "outcome": "",
                        "record": "{}",
                    }
                    for place, episode in enumerate(group.episodes)
                ],
            )

    def add_call(self, call: Call) -> bool:
        with self._write() as connection:
            ended = sa.select(_episodes.c.ended).where(_episodes.c.episode_id == call.episode_id)
            state = connection.execute(ended).scalar_one_or_none()
            if state is None:
                raise InputError(
                    f"pool: call {call.call_id} names episode {call.episode_id}, which is not there"
                )
            if state:
                return False
            new = insert(_calls).values(**_call_row(call)).on_conflict_do_nothing()
            return connection.execute(new).rowcount == 1

    def finish_episode(
        self, episode_id: str, *, reward: float, outcome: str, record: dict[str, Any]
    ) -> Finished:
        mine = _episodes.c.episode_id == episode_id
        with self._write() as connection:
            group_id = connection.execute(sa.select(_episodes.c.group_id).where(mine)).scalar_one_or_none()
            if group_id is None:
                raise InputError(f"pool: episode {episode_id} is not there")
            end = sa.update(_episodes).where(mine, ~_episodes.c.ended)
            values = {"ended": True, "reward": reward, "outcome": outcome, "record": json.dumps(record)}
            if connection.execute(end.values(**values)).rowcount == 0:
                return Finished(False, group_id, False)
            left = sa.select(sa.func.count()).where(_episodes.c.group_id == group_id, ~_episodes.c.ended)
            completed = connection.execute(left).scalar_one() == 0
            if completed:
                self._move(connection, group_id, "running", "completed")
            return Finished(True, group_id, completed)

    def groups(self, phase: str, status: str | None = None) -> list[GroupRow]:
        query = sa.select(_groups).where(_groups.c.phase == phase).order_by(_groups.c.sequence)
        if status is not None:
            query = query.where(_groups.c.status == status)
        with self._engine.connect() as connection:
            return [GroupRow(**row) for row in connection.execute(query).mappings()]

    def group(self, group_id: str) -> Group:
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(_groups).where(_groups.c.group_id == group_id)).one_or_none()
            if row is None:
                raise InputError(f"pool: group {group_id} is not there")
            in_group = sa.select(_episodes).where(_episodes.c.group_id == group_id)
            episodes = connection.execute(in_group.order_by(_episodes.c.place)).all()
            members = [episode.episode_id for episode in episodes]
            in_episodes = sa.select(_calls).where(_calls.c.episode_id.in_(members)).order_by(_calls.c.place)
            calls = [_call(call) for call in connection.execute(in_episodes)]
        return Group(
            group_id,
            row.sequence,
            tuple(_episode(e, tuple(c for c in calls if c.episode_id == e.episode_id)) for e in episodes),
        )

    def unfinished(self, phase: str) -> list[Episode]:
        query = sa.select(_episodes).join(_groups).where(_groups.c.phase == phase, ~_episodes.c.ended)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(_groups.c.sequence, _episodes.c.place))
            return [_episode(row, ()) for row in rows]

    def drop_unfinished_calls(self) -> int:
        running = sa.select(_episodes.c.episode_id).where(~_episodes.c.ended)
        with self._write() as connection:
            return connection.execute(sa.delete(_calls).where(_calls.c.episode_id.in_(running))).rowcount

    def filter_group(self, group_id: str) -> None:
        with self._write() as connection:
            self._move(connection, group_id, "completed", "filtered")

    def consume(self, step: int, group_ids: Sequence[str]) -> None:
        with self._write() as connection:
            recorded = self._batch(connection, step)
            if recorded == tuple(group_ids):
                return
            if recorded:
                raise RunError(
                    f"pool: step {step} has taken {', '.join(recorded)}; it cannot take other groups"
                )
            for place, group_id in enumerate(group_ids):
                self._move(connection, group_id, "completed", "consumed")
                connection.execute(sa.insert(_batches).values(step=step, place=place, group_id=group_id))

    def batch(self, step: int) -> tuple[str, ...]:
        with self._engine.connect() as connection:
            return self._batch(connection, step)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """A transaction that takes the write lock at its start, so that what it read stays true.

        Errors: RunError where the system refuses it (disk full, no permission, locked).
        """
        try:
            with self._engine.connect().execution_options(write=True) as connection, connection.begin():
                yield connection
        except OperationalError as error:
            raise RunError(f"pool {self._path}: it cannot be written ({error.orig})") from error

    @staticmethod
    def _batch(connection: sa.Connection, step: int) -> tuple[str, ...]:
        query = sa.select(_batches.c.group_id).where(_batches.c.step == step).order_by(_batches.c.place)
        return tuple(connection.execute(query).scalars())

    @staticmethod
    def _move(connection: sa.Connection, group_id: str, before: str, after: str) -> None:
        mine = _groups.c.group_id == group_id
        change = sa.update(_groups).where(mine, _groups.c.status == before).values(status=after)
        if connection.execute(change).rowcount == 1:
            return
        found = connection.execute(sa.select(_groups.c.status).where(mine)).scalar_one_or_none()
        raise RunError(
            f"pool: group {group_id} must be {before} to become {after}, it is {found or 'not there'}"
        )


def _prepare_connection(connection: Any, _record: Any) -> None:
    # The driver's own transaction handling would begin late and commit early; `_begin` does it instead.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _call_row(call: Call) -> dict[str, Any]:
    return {
        "call_id": call.call_id,
        "episode_id": call.episode_id,
        "place": call.index,
        "prompt_ids": np.asarray(call.prompt_ids, "<i4").tobytes(),
        "sampled_ids": np.asarray(call.sampled_ids, "<i4").tobytes(),
        "logprobs": np.asarray(call.logprobs, "<f4").tobytes(),
        "versions": np.asarray(call.versions, "<i4").tobytes(),
        "stop_reason": call.stop_reason,
        "label": call.label,
        "parent_id": call.parent_id,
        "seconds": call.seconds,
    }


def _call(row: Any) -> Call:
    return Call(
        row.call_id,
        row.episode_id,
        row.place,
        tuple(np.frombuffer(row.prompt_ids, "<i4").tolist()),
        tuple(np.frombuffer(row.sampled_ids, "<i4").tolist()),
        tuple(np.frombuffer(row.logprobs, "<f4").tolist()),
        tuple(np.frombuffer(row.versions, "<i4").tolist()),
        row.stop_reason,
        row.label,
        row.parent_id,
        row.seconds,
    )


def _episode(row: Any, calls: tuple[Call, ...]) -> Episode:
    task, record = json.loads(row.task), json.loads(row.record)
    return Episode(row.episode_id, row.group_id, task, calls, row.reward, row.outcome, record)
