"""C2: Kafka (Apache Kafka 3.x and 4.x, and what speaks its protocol), by a consumer group over one topic of jobs.

Theory of operation. A worker is a member of a consumer group and owns some of the partitions of the topic of jobs; what
it owns it hands out, several jobs of a partition at once. The group commits one offset for each partition: that of its
first unfinished job. What is known of the jobs behind it (which are done, how often the others were started) is the
**metadata of that offset**, so it is written in the same commit and read by whoever owns the partition next. A start
is committed before the child is fed. A reply is delivered before its job is marked as done.

A partition leaves a living worker only when the jobs that it holds of it have ended: until then the worker delays the
rebalance, for `KEEP_SECONDS` at most. A killed or frozen worker leaves the group when its session ends. A job that its
worker no longer beats for (its start or its reply failed) is put on another partition when its lease ends; so is one
that waits behind slow jobs while another worker is idle.

====================== =================== ============================================================================
topic                  partitions          what
====================== =================== ============================================================================
`safelight.jobs`       `?partitions=` (16) Job, with the partition where its reply is awaited
`safelight.replies`    the same number     Reply, with its inbox; a gateway reads one partition, from its end on, and
                                           may share it with others: nothing is left behind when a gateway dies
`safelight.control`    1                   Presence, and withdrawals: all gateways and all workers read it
`safelight.quarantine` 1                   Quarantined with its image, by the job's id; dropped by a tombstone
====================== =================== ============================================================================

Nothing is deleted on acknowledging: topics age (`RETENTION`), and the backlog is the group's lag. A message's header
is the record header `safelight`. `?prefix=` stands for `safelight` in the names of topics and group.
https://kafka.apache.org/documentation/#design, https://docs.confluent.io/platform/current/clients/librdkafka/html/
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]
from confluent_kafka.cimpl import NewTopic
from msgspec.structs import replace

from safelight.brokers import Delivery, Renewed
from safelight.brokers.aside import KEPT_BYTES, KEPT_MS, within_bounds
from safelight.brokers.refusals import check_size, not_a_job, result_too_large, too_large
from safelight.brokers.told import OLDEST_JOB_SECONDS, Living, Withdrawn, withdrawal
from safelight.errors import (
    BrokerAwayError,
    BrokerFullError,
    ConfigurationError,
    MalformedMessageError,
    SafelightError,
    TooLargeError,
)
from safelight.message import Job, Presence, Quarantined, Reply, decode, encode, now_ms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from confluent_kafka import Message

__all__ = ["KafkaBroker"]

log = logging.getLogger(__name__)

HEADER, KIND, REPLY_TO, INBOX = "safelight", "kind", "reply-to", "inbox"
PRESENCE, WITHDRAWAL, LEARN = b"presence", b"withdrawal", b"learn"
DONE = -1  # in place of a count of starts

PARTITIONS = 16
LARGEST_BYTES = 33 * 1024 * 1024
OVERHEAD_BYTES = 64 * 1024  # a batch's and a message's headers
ANSWER_SECONDS = 5.0
HALF_OPEN_SECONDS = 10.0  # a connection that answers nothing for so long; the largest image takes its time, too
SESSION_SECONDS = 6.0  # the least that brokers allow by default (group.min.session.timeout.ms)
HEARTBEAT_SECONDS = 0.5  # how soon others learn of a rebalance
KEEP_SECONDS = 10.0  # a job that runs longer than this delays no rebalance: it is taken from its worker
STUCK_SECONDS = 15.0  # a membership whose thread does not come back from the driver for so long is given up
LOOK_SECONDS = 1.0
POLL_SECONDS = 0.005  # the driver's thread cannot be woken from a poll, and a start must not wait for long
START_SECONDS = 0.001  # a start follows when a job was handed out: so long it is waited for before the next poll
COMMIT_SECONDS = 0.05  # what is done is committed with the next start, or after this
READ_SECONDS = 0.1
FIRST_SECONDS = 2.0  # jobs may have aged out of the topic: what is never there must not hold up the rest
FULL_SECONDS = 0.5  # a worker with no room for so long pauses its partitions, and only looks for rebalances
RECONNECT_SECONDS = 0.1
WINDOW = 256  # jobs of a partition from the first unfinished one on; their marks fit in 4 KB of metadata
SHARED_COUNT = 64  # jobs that a worker gives away with each beat, at most

MINUTE_MS = 60_000
JOBS, REPLIES, CONTROL, QUARANTINE = "jobs", "replies", "control", "quarantine"
RETENTION: dict[str, dict[str, int | str]] = {
    JOBS: {"retention.ms": 60 * MINUTE_MS, "segment.ms": 15 * MINUTE_MS},
    REPLIES: {"retention.ms": 10 * MINUTE_MS, "segment.ms": 5 * MINUTE_MS},
    CONTROL: {"retention.ms": 10 * MINUTE_MS, "segment.ms": 5 * MINUTE_MS},
    QUARANTINE: {
        "retention.ms": KEPT_MS,
        "retention.bytes": KEPT_BYTES,
        "segment.bytes": KEPT_BYTES // 2,  # only whole segments that are closed are deleted, and compacted
        "segment.ms": KEPT_MS // 7,
        "cleanup.policy": "compact,delete",
    },
}
# A commit between a rebalance's beginning and its end, from a member that stays; it is taken when that has ended.
REBALANCING = {KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS}
ABSENT = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}
LEADERLESS = {KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE}
REFUSED = {
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}
UNMAKEABLE = {
    KafkaError.INVALID_CONFIG,
    KafkaError.INVALID_PARTITIONS,
    KafkaError.INVALID_REPLICATION_FACTOR,
    KafkaError.POLICY_VIOLATION,
}
TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
FULL = {KafkaError._QUEUE_FULL, KafkaError.POLICY_VIOLATION, KafkaError.THROTTLING_QUOTA_EXCEEDED}


class _AbsentError(BrokerAwayError):
    """A topic is not there (any longer)."""


class _Place(NamedTuple):
    """Where a job lies, who was handed it, and the partition of the replies where its own is awaited."""

    member: _Member
    partition: int
    offset: int
    reply_to: int


class _Record(NamedTuple):
    """A message as the driver gives it, once it is known to be one."""

    partition: int
    offset: int
    key: bytes
    headers: dict[str, bytes]
    value: bytes | None

    @classmethod
    def of(cls, message: Message) -> _Record:
        headers: Any = message.headers()
        return cls(
            message.partition() or 0, message.offset() or 0, message.key() or b"", dict(headers or ()), message.value()
        )

    @property
    def header(self) -> bytes:
        """Ours; empty if there is none."""
        return self.headers.get(HEADER) or b""

    @property
    def body(self) -> bytes:
        return self.value or b""

    @property
    def reply_to(self) -> int:
        told = self.headers.get(REPLY_TO) or b""
        return int(told) if told.isdigit() else 0


class _Options:
    """What a URL says."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        self.prefix = query.pop("prefix", "safelight")
        try:
            self.partitions = int(query.pop("partitions", PARTITIONS))
            self.replicas = int(query.pop("replicas", -1))  # as many as the cluster has for new topics
            self.largest = int(query.pop("largest", LARGEST_BYTES))
        except ValueError as exc:
            raise ConfigurationError(f"The broker's URL has a word where a number must be: {exc}.") from exc
        user, _, servers = parts.netloc.rpartition("@")
        self.client: dict[str, Any] = {
            "bootstrap.servers": servers,
            "security.protocol": ("SASL_" if user else "") + ("SSL" if parts.scheme == "kafkas" else "PLAINTEXT"),
            "log_level": 0,  # it writes to standard error, 20 lines a second while the broker is away
            "reconnect.backoff.max.ms": 500,
            "socket.timeout.ms": int(HALF_OPEN_SECONDS * 1_000),  # by default a minute
            "socket.connection.setup.timeout.ms": int(ANSWER_SECONDS * 1_000),
            "socket.nagle.disable": True,
            "message.max.bytes": self.largest + OVERHEAD_BYTES,
        }
        if user:
            name, _, password = user.partition(":")
            credentials = {"sasl.username": unquote(name), "sasl.password": unquote(password)}
            self.client |= {"sasl.mechanism": "PLAIN"} | credentials
        self.client |= query
        self.consumer: dict[str, Any] = self.client | {
            "group.id": f"{self.prefix}.workers",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "fetch.error.backoff.ms": 100,
            "fetch.queue.backoff.ms": 5,  # by default a full queue stops fetching for a second
            "queued.min.messages": 1,  # what is here cannot start elsewhere, and goes before what is older there
            "fetch.max.bytes": max(50 * 1024 * 1024, self.largest + OVERHEAD_BYTES),
            "receive.message.max.bytes": max(100_000_000, self.largest + 16 * OVERHEAD_BYTES),
        }

    def topic(self, name: str) -> str:
        return f"{self.prefix}.{name}"


class _Cluster:
    """Topics, and what can be asked of them. All methods block."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._refusal: KafkaError | None = None  # since the last answer
        try:
            self._admin = AdminClient(options.client | {"error_cb": self._on_error})
        except KafkaException as exc:
            raise ConfigurationError(f"The broker's URL cannot be used: {exc.args[0].str()}.") from exc
        self.partitions = self.inboxes = options.partitions
        self._ids: dict[str, str] = {}
        self._looked_at = 0.0
        self._asker: Consumer | None = None
        self._asking = threading.Lock()

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in REFUSED:  # others that follow only say that there is no connection
            self._refusal = error

    def prepare(self, *, is_first: bool = False) -> None:
        """Make the topics that are not there, and look at those that are. `BrokerAwayError`, `ConfigurationError`."""
        try:
            topics = self._admin.list_topics(timeout=ANSWER_SECONDS).topics
            if absent := [name for name in RETENTION if self._options.topic(name) not in topics]:
                self._make(absent)
                topics = self._made()
            if is_first:
                self._check_sizes()
            self._ids = self._ids or self._asked_ids()
        except KafkaException as exc:
            self._admin.poll(0)
            raise _error(self._refusal or exc.args[0]) from exc
        self._refusal = None
        self.partitions, self.inboxes = (len(topics[self._options.topic(n)].partitions) for n in (JOBS, REPLIES))

    def _make(self, names: list[str]) -> None:
        largest = {"max.message.bytes": self._options.largest + OVERHEAD_BYTES}
        new = [
            NewTopic(
                self._options.topic(name),
                self._options.partitions if name in (JOBS, REPLIES) else 1,
                self._options.replicas,
                config={key: str(value) for key, value in (RETENTION[name] | largest).items()},
            )
            for name in names
        ]
        for future in self._admin.create_topics(new, request_timeout=ANSWER_SECONDS).values():
            try:
                future.result()
            except KafkaException as exc:
                if exc.args[0].code() in UNMAKEABLE:
                    raise ConfigurationError(f"A topic that is not there cannot be made: {exc.args[0].str()}.") from exc
                if exc.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another end of ours made it meanwhile
                    raise

    def _made(self) -> dict[str, Any]:
        """The topics, once all have leaders."""
        until = time.monotonic() + ANSWER_SECONDS
        while True:
            topics: dict[str, Any] = self._admin.list_topics(timeout=ANSWER_SECONDS).topics
            ours = [topics.get(self._options.topic(name)) for name in RETENTION]
            if all(topic and all(p.leader >= 0 for p in topic.partitions.values()) for topic in ours):
                return topics
            if time.monotonic() > until:
                raise BrokerAwayError
            time.sleep(RECONNECT_SECONDS)

    def _asked_ids(self) -> dict[str, str]:
        names = TopicCollection([self._options.topic(name) for name in RETENTION])
        asked = self._admin.describe_topics(names, request_timeout=ANSWER_SECONDS)
        return {name: str(future.result().topic_id) for name, future in asked.items()}

    def look(self) -> None:
        """See that the topics are those that were prepared, if that was not seen just now; `BrokerAwayError` if not.

        One that is deleted and soon made anew has another id, and nothing else tells: its readers may wait for ever.
        """
        with self._asking:
            if time.monotonic() - self._looked_at < LOOK_SECONDS:
                return
            try:
                ids = self._asked_ids()
            except KafkaException as exc:
                raise _error(exc.args[0]) from exc
            self._looked_at = time.monotonic()
            before, self._ids = self._ids, ids
        if ids != before:
            raise _AbsentError

    @property
    def jobs_id(self) -> str:
        """The id of the topic of jobs."""
        return self._ids[self._options.topic(JOBS)]

    def _check_sizes(self) -> None:
        names = [self._options.topic(name) for name in (JOBS, REPLIES, QUARANTINE)]
        asked = self._admin.describe_configs(
            [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names], request_timeout=ANSWER_SECONDS
        )
        for resource, future in asked.items():
            largest = int(future.result()["max.message.bytes"].value)
            if largest < self._options.largest + OVERHEAD_BYTES:
                raise ConfigurationError(
                    f"The topic {resource.name} takes messages of {largest:,} bytes at most, and "
                    f"{self._options.largest + OVERHEAD_BYTES:,} are needed: raise its max.message.bytes, or give the "
                    f"broker's URL a smaller ?largest= (bytes of an image)."
                )

    def backlog(self) -> int:
        """The group's lag without what is done behind the first unfinished job; `BrokerAwayError`.

        By a consumer that never reads: the same question of `AdminClient` ends the process by a failed assertion when
        the connection is lost meanwhile (https://github.com/confluentinc/librdkafka/issues/4605).
        """
        self.look()
        places = [TopicPartition(self._options.topic(JOBS), number) for number in range(self.partitions)]
        with self._asking:
            if self._asker is None:
                self._asker = Consumer(self._options.consumer)
            try:
                committed = _patiently(self._asker, self._asker.committed, places)
                begins, ends = [
                    _patiently(
                        self._asker,
                        self._asker.offsets_for_times,
                        [TopicPartition(place.topic, place.partition, symbol) for place in places],
                    )
                    for symbol in (OFFSET_BEGINNING, OFFSET_END)
                ]
            except KafkaException as exc:
                raise _error(exc.args[0]) from exc
        lag = 0
        for place, begin, end in zip(committed, begins, ends, strict=True):
            known = _Partition.of(place, self.jobs_id)
            lag += max(0, end.offset - max(known.next, begin.offset))
            lag -= sum(starts == DONE for starts in known.marks.values())
        return lag

    def close(self) -> None:
        if self._asker is not None:
            self._asker.close()

    def kept(self) -> list[tuple[Quarantined, bytes]]:
        """What is in quarantine, the oldest first, with images."""
        consumer = Consumer(self._options.consumer | {"enable.partition.eof": True})
        found: dict[bytes, tuple[Quarantined, bytes]] = {}
        try:
            consumer.assign([TopicPartition(self._options.topic(QUARANTINE), 0, OFFSET_BEGINNING)])
            while (record := self._next_kept(consumer)) is not None:
                found.pop(record.key, None)
                if record.value is not None:
                    with suppress(MalformedMessageError):
                        found[record.key] = (decode(Quarantined, record.header), record.value)
        finally:
            consumer.close()
        images = {record.id: image for record, image in found.values()}
        return [(record, images[record.id]) for record in within_bounds(record for record, _ in found.values())]

    @staticmethod
    def _next_kept(consumer: Consumer) -> _Record | None:
        """The next record; None at the end."""
        message = consumer.poll(ANSWER_SECONDS)
        if message is None:
            raise BrokerAwayError
        error = message.error()
        if error is None:
            return _Record.of(message)
        if error.code() != KafkaError._PARTITION_EOF:
            raise _error(error)
        return None


class _Writer:
    """A producer, and the thread that serves its reports."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._is_closed = False
        self._producer: Producer | None = None
        self._threads: list[threading.Thread] = []  # of this producer, and of those before it that have not ended

    def open(self) -> Producer:
        """The producer; a new one needs a while until it can write."""
        if self._producer is None:
            ours = {"enable.idempotence": True, "linger.ms": 0, "message.timeout.ms": int(ANSWER_SECONDS * 1_000)}
            self._producer = Producer(self._options.client | ours)
            thread = threading.Thread(target=self._serve, args=(self._producer,), name="producer", daemon=True)
            self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
            thread.start()
        return self._producer

    def _serve(self, producer: Producer) -> None:
        while not self._is_closed and (self._producer is producer or len(producer)):
            producer.poll(READ_SECONDS)

    async def write(self, name: str, partition: int, header: bytes, body: bytes | None = b"", **more: bytes) -> int:
        """Append to a topic; its offset there, once all replicas in sync have it. `more`: a key, further headers.

        `TooLargeError`; `BrokerFullError` when it is refused for now; `BrokerAwayError`.
        """
        check_size(body or b"", self._options.largest)
        loop = asyncio.get_running_loop()
        report: asyncio.Future[int] = loop.create_future()

        def on_delivery(error: KafkaError | None, message: Message) -> None:
            _call(loop, _tell, report, message.offset() if error is None else _error(error))

        key = more.pop("key", None)
        headers: list[tuple[str, str | bytes | None]] = [(HEADER, header), *more.items()]
        try:
            self.open().produce(
                self._options.topic(name), body, key, partition, on_delivery=on_delivery, headers=headers
            )
        except KafkaException as exc:
            if exc.args[0].fatal():
                self.renew()
            raise _error(exc.args[0]) from exc
        except BufferError as exc:
            raise BrokerFullError from exc
        return await report

    def renew(self) -> None:
        """The next message has a new producer; the old one's reports still come."""
        self._producer = None

    async def close(self) -> None:
        """End, also the threads: one that is in the driver while the interpreter ends may crash it."""
        self._is_closed = True
        for thread in self._threads:
            await asyncio.to_thread(thread.join)


class _Reader:
    """A thread that reads partitions for itself, and hands what comes to the loop; None: something was lost."""

    def __init__(self, options: _Options, deliver: Callable[[_Record | None], None], inbox: bytes = b"") -> None:
        self._inbox = inbox
        self._consumer = Consumer(options.consumer | {"auto.offset.reset": "error"})
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    async def open(self, places: list[TopicPartition], *, since: int | None = None) -> None:
        """Begin at what comes from now on, or at what is not older than `since` (Unix milliseconds)."""
        try:
            self._consumer.assign(await asyncio.to_thread(self._positioned, places, since))
        except KafkaException as exc:
            await asyncio.to_thread(self._consumer.close)
            raise _error(exc.args[0]) from exc
        self._thread.start()

    def _positioned(self, places: list[TopicPartition], since: int | None) -> list[TopicPartition]:
        if since is not None:
            asked = [TopicPartition(place.topic, place.partition, since) for place in places]
            places = _patiently(self._consumer, self._consumer.offsets_for_times, asked)
        # The symbolic end would be looked up by the first fetch, and miss what comes before it.
        ends = [TopicPartition(place.topic, place.partition, OFFSET_END) for place in places]
        ends = _patiently(self._consumer, self._consumer.offsets_for_times, ends)
        return [end if place.offset < 0 else place for place, end in zip(places, ends, strict=True)]

    def _run(self) -> None:
        while not self._is_closing:
            message = self._consumer.poll(READ_SECONDS)
            if message is None:
                continue
            error = message.error()
            if error is None:
                record = _Record.of(message)
                if record.headers.get(INBOX, self._inbox) == self._inbox:  # else another gateway's reply
                    _call(self._loop, self._deliver, record)
            elif error.code() in ABSENT or error.code() == KafkaError._AUTO_OFFSET_RESET:
                break
        _call(self._loop, self._deliver, None)
        self._consumer.close()

    def end(self) -> None:
        """Read no more; where it was open, that is told as a loss."""
        self._is_closing = True

    async def close(self) -> None:
        self.end()
        await asyncio.to_thread(self._thread.join)


class _Told(msgspec.Struct):
    """The metadata of a committed offset: in which topic (its name may be another's by now), and the marks of jobs."""

    topic_id: str
    marks: dict[int, int]  # distance from the offset -> starts, or DONE


class _Partition(msgspec.Struct):
    """What its owner knows of a partition of jobs: how far it was read, and what became of the jobs.

    As an offset with metadata it says all of it again: jobs that are not marked have not been started.
    """

    next: int  # the first offset that was not read; -1: nothing was
    marks: dict[int, int]

    @classmethod
    def of(cls, committed: TopicPartition, topic_id: str) -> _Partition:
        told = _Told(topic_id, {})
        with suppress(msgspec.DecodeError):  # somebody else's
            told = msgspec.json.decode(committed.metadata or "", type=_Told)
        if told.topic_id != topic_id or committed.offset < 0:
            return cls(-1, {})
        offset = committed.offset
        return cls(offset, {offset + distance: starts for distance, starts in told.marks.items()})

    @property
    def is_interrupted(self) -> bool:
        """Whether a job that somebody else had started was not read yet."""
        return any(starts > 0 and offset >= self.next for offset, starts in self.marks.items())

    def commit(self, topic: str, topic_id: str, number: int) -> TopicPartition:
        """The offset of the first job that is not done, with what is known of those behind it."""
        first = min((offset for offset, starts in self.marks.items() if starts != DONE), default=self.next)
        first = min(first, self.next)
        self.marks = {offset: starts for offset, starts in self.marks.items() if offset >= first}
        known = {offset - first: starts for offset, starts in self.marks.items() if starts}
        told = msgspec.json.encode(_Told(topic_id, known))
        return TopicPartition(topic, number, first, metadata=told.decode())


class _Held(msgspec.Struct):
    """A job that was handed out."""

    delivery: Delivery
    renewed: float  # by the leases' clock
    is_started: bool = False


class _Leases:
    """Their length, and their clock, which stands while a beat waits for the broker: a worker that asks it is alive.

    Else a broker that is slow for longer than a lease ends them all, and what is at work is begun once more.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waited = 0.0
        self._waiting_since: float | None = None

    def now(self) -> float:
        """In seconds."""
        return (self._waiting_since or time.monotonic()) - self._waited

    def has_ended(self, renewed: float) -> bool:
        return self.now() - renewed > self._seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Around a beat."""
        self._waiting_since = begun = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - begun  # first: another thread may see the clock go back, but not ahead
            self._waiting_since = None


class _Start(NamedTuple):
    """A start that is to be committed before its child is fed."""

    place: _Place
    committed: asyncio.Future[None]


class _Member(threading.Thread):
    """A worker's membership of the group. One thread has the consumer: it blocks other threads' calls while it polls.

    The thread reads until one job is here that nobody has claimed: what is here cannot start elsewhere. `arrived` and
    `expired` are called in the loop.
    """

    def __init__(
        self,
        options: _Options,
        cluster: _Cluster,
        leases: _Leases,
        arrived: Callable[[_Place, _Record], None],
        expired: Callable[[Delivery, int], None],
    ) -> None:
        super().__init__(name="consumer", daemon=True)
        self._options = options
        self._topic = options.topic(JOBS)
        self._cluster = cluster
        self._leases = leases
        self._arrived = arrived
        self._expired = expired
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Event()
        self._is_closing = False
        self._is_leaving = False
        self._is_rejoining = False
        self._topic_id = ""
        self._paused: set[int] = set()
        self._full_since: float | None = None
        self._committed_at = self._assigned_at = 0.0
        self._turned_at = time.monotonic()
        # Both threads'.
        self._lock = threading.Lock()
        self._partitions: dict[int, _Partition] = {}
        self._changed: set[int] = set()
        self._starting: list[_Start] = []  # not committed yet
        self._starting_again: list[_Start] = []  # whose commit came in the middle of a rebalance
        self._unclaimed: set[_Place] = set()
        self._has_claimed = False
        self._held: dict[_Place, _Held] = {}
        self.start()

    # The loop's.

    def claim(self, place: _Place, job: Job) -> Delivery | None:
        """Hand out what has arrived, if it is still ours."""
        with self._lock:
            if place not in self._unclaimed:
                return None
            self._unclaimed.discard(place)
            starts = max(job.starts, self._partitions[place.partition].marks[place.offset])
            delivery = Delivery(job, starts, place)
            self._held[place] = _Held(delivery, self._leases.now())
            self._has_claimed = True
        self._wake.set()
        return delivery

    async def started(self, place: _Place, starts: int) -> None:
        """Return when it is committed that a job was started so often; if it cannot be, it was not."""
        committed: asyncio.Future[None] = self._loop.create_future()
        self._mark(place, starts, is_started=True)
        with self._lock:
            self._starting.append(_Start(place, committed))
        self._wake.set()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await committed
        except (BrokerAwayError, TimeoutError) as exc:
            self._mark(place, starts - 1, is_started=False)
            raise BrokerAwayError from exc

    def _mark(self, place: _Place, starts: int, *, is_started: bool) -> None:
        with self._lock:
            if (held := self._held.get(place)) is None:
                raise BrokerAwayError
            held.is_started = is_started
            self._partitions[place.partition].marks[place.offset] = starts
            self._changed.add(place.partition)

    def finish(self, place: _Place) -> None:
        """A job is done; committed soon."""
        with self._lock:
            self._unclaimed.discard(place)
            held = self._held.pop(place, None)
            if held is None and place.offset not in self._marks(place.partition):
                return
            self._marks(place.partition)[place.offset] = DONE
            self._changed.add(place.partition)
        self._wake.set()

    def _marks(self, partition: int) -> dict[int, int]:
        return self._partitions[partition].marks if partition in self._partitions else {}

    def renew(self, place: _Place) -> bool:
        """Renew the lease of a job; false if it is not held any longer."""
        with self._lock:
            if (held := self._held.get(place)) is not None:
                held.renewed = self._leases.now()
        return held is not None

    def has(self, place: _Place) -> bool:
        """Whether a job, which may be nobody's, is in a partition that is still ours, and not done."""
        with self._lock:
            return self._marks(place.partition).get(place.offset, DONE) != DONE

    def elsewhere(self) -> int:
        """A partition that another worker owns, if there is one."""
        with self._lock:
            others = [number for number in range(self._cluster.partitions) if number not in self._partitions]
        return random.choice(others or range(self._cluster.partitions))  # noqa: S311 - spreads load

    @property
    def is_full(self) -> bool:
        """Whether a job has waited here for long."""
        return self._full_since is not None and time.monotonic() - self._full_since >= FULL_SECONDS

    def rejoin(self) -> None:
        """Begin again; what is held is lost."""
        self._is_rejoining = True
        self._wake.set()

    def leave(self) -> None:
        """Read no more, and leave the group when all that is held has ended."""
        self._is_leaving = True
        self._wake.set()

    async def close(self) -> None:
        """Leave the group now."""
        self._is_closing = True
        self._wake.set()
        await asyncio.to_thread(self.join, STUCK_SECONDS)

    @property
    def is_stuck(self) -> bool:
        """Whether the driver keeps the thread: now and then a commit is never answered, after a broker's restart
        (confluent-kafka-python#1801). Then the driver leaves the group by itself, but the thread never comes back.
        """
        return self.is_alive() and time.monotonic() - self._turned_at > STUCK_SECONDS

    def give_up(self) -> None:
        """Lose all that is held; the thread ends if it ever comes back."""
        self._is_closing = True
        self._forget(set(self._partitions))

    @property
    def has_left(self) -> bool:
        return self._is_leaving or not self.is_alive()

    # The thread's.

    def run(self) -> None:
        """Belong to the group, again and again, until told to end."""
        while not self._has_ended():
            self._turned_at = time.monotonic()
            try:
                self._cluster.prepare()
                self._belong()
            except (KafkaException, SafelightError) as exc:
                log.debug("no member: %s", exc)
                self._wake.wait(RECONNECT_SECONDS)
            self._forget(set(self._partitions))

    def _has_ended(self) -> bool:
        return self._is_closing or (self._is_leaving and not self._held)

    def _belong(self) -> None:
        membership = {
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": int(SESSION_SECONDS * 1_000),
            "heartbeat.interval.ms": int(HEARTBEAT_SECONDS * 1_000),
            "max.poll.interval.ms": int(STUCK_SECONDS * 1_000),
        }
        self._topic_id = self._cluster.jobs_id
        consumer = Consumer(self._options.consumer | membership)
        try:
            told = {"on_assign": self._on_assign, "on_revoke": self._on_revoke, "on_lost": self._on_lost}
            consumer.subscribe([self._topic], **{name: self._guarded(react) for name, react in told.items()})
            self._is_rejoining = False
            while not (self._has_ended() or self._is_rejoining):
                self._turned_at = time.monotonic()
                self._wake.clear()
                self._commit(consumer)
                self._look_for_expired()
                message = self._poll(consumer)
                if message is not None:
                    self._take(message)
        finally:
            with suppress(KafkaException):
                self._commit(consumer, is_last=True)
            consumer.close()

    def _poll(self, consumer: Consumer) -> Message | None:
        now = time.monotonic()
        with self._lock:
            is_full = bool(self._unclaimed) or self._is_leaving
            has_claimed, self._has_claimed = self._has_claimed, False
        self._full_since = (self._full_since or now) if is_full else None
        self._pause(consumer)
        if not is_full:
            if has_claimed and self._wake.wait(START_SECONDS):
                return None
            return consumer.poll(POLL_SECONDS)
        self._wake.wait(COMMIT_SECONDS)
        return consumer.poll(0) if self.is_full else None  # all is paused: this is for rebalances

    def _pause(self, consumer: Consumer) -> None:
        """Read no partition while there is no room for long, and none with too many jobs behind an unfinished one.

        What was at work in a worker that died comes first: until it was read, which is soon, only those partitions are.
        """
        with self._lock:
            is_full = self.is_full
            is_new = time.monotonic() - self._assigned_at < FIRST_SECONDS
            first = {n for n, known in self._partitions.items() if is_new and known.is_interrupted} or self._partitions
            wanted = {
                n for n, known in self._partitions.items() if is_full or n not in first or len(known.marks) >= WINDOW
            }
        for numbers, change in ((wanted - self._paused, consumer.pause), (self._paused - wanted, consumer.resume)):
            if numbers:
                change([TopicPartition(self._topic, number) for number in numbers])
        self._paused = wanted

    def _take(self, message: Message) -> None:
        if (error := message.error()) is not None:
            if error.code() in ABSENT or error.fatal():
                raise KafkaException(error)
            log.debug("no message: %s", error)
            return
        record = _Record.of(message)
        place = _Place(self, record.partition, record.offset, record.reply_to)
        with self._lock:
            known = self._partitions.get(place.partition)
            if known is None:
                return
            known.next = place.offset + 1
            self._changed.add(place.partition)
            if known.marks.setdefault(place.offset, 0) == DONE:
                return
            self._unclaimed.add(place)
        _call(self._loop, self._arrived, place, record)

    def _look_for_expired(self) -> None:
        with self._lock:
            places = [place for place, held in self._held.items() if self._leases.has_ended(held.renewed)]
            ended = [(self._held.pop(p).delivery, self._marks(p.partition)[p.offset]) for p in places]
        for delivery, starts in ended:
            _call(self._loop, self._expired, delivery, max(starts, delivery.starts))

    def _commit(self, consumer: Consumer, *, is_last: bool = False) -> None:
        now = time.monotonic()
        with self._lock:
            if not (self._starting or is_last or now - self._committed_at >= COMMIT_SECONDS):
                return
            held = set(self._held)
            starting = self._starting_again + self._starting
            self._starting, self._starting_again = [], []
            changed = {n: self._partitions[n] for n in self._changed & self._partitions.keys()}
            offsets = [
                known.commit(self._topic, self._topic_id, number)
                for number, known in changed.items()
                if known.next >= 0
            ]
            self._changed = set()
        failure: KafkaException | None = None
        if offsets:
            try:
                consumer.commit(offsets=offsets, asynchronous=False)
            except KafkaException as exc:
                log.debug("not committed: %s", exc)
                failure = exc
                with self._lock:
                    self._changed |= set(changed)
                    if exc.args[0].code() in REBALANCING and not is_last:
                        self._starting_again, starting = starting, []
        self._committed_at = time.monotonic()
        for start in starting:
            is_ours = failure is None and start.place in held
            _call(self._loop, _tell, start.committed, None if is_ours else BrokerAwayError())

    # What the driver calls in the thread, within a poll.

    def _guarded(self, react: Callable[[Consumer, list[TopicPartition]], None]) -> Callable[..., None]:
        """An error begins again; raised through the driver it would come out of the poll as something not catchable."""

        def call(consumer: Consumer, places: list[TopicPartition]) -> None:
            try:
                react(consumer, places)
            except KafkaException as exc:
                log.debug("the membership begins again: %s", exc)
                self._is_rejoining = True

        return call

    def _on_assign(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        begins = []
        for place in consumer.committed(places, timeout=ANSWER_SECONDS):
            known = _Partition.of(place, self._topic_id)
            offset = known.next if known.next >= 0 else OFFSET_BEGINNING
            begins.append(TopicPartition(self._topic, place.partition, offset))  # no epoch: it may be another topic's
            with self._lock:
                self._partitions[place.partition] = known
        self._assigned_at = time.monotonic()
        consumer.incremental_assign(begins)
        if begins:
            consumer.resume(begins)  # what was paused when it left us still is
        self._pause(consumer)  # at once: the poll that we are in may return a message

    def _on_revoke(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        """Keep partitions until the jobs that are held of them have ended, if that is soon."""
        numbers = {place.partition for place in places}
        with self._lock:
            self._unclaimed = {place for place in self._unclaimed if place.partition not in numbers}
        until = time.monotonic() + KEEP_SECONDS
        while self._holds(numbers) and time.monotonic() < until and not (self._is_closing or self._is_rejoining):
            self._wake.clear()
            self._commit(consumer)
            self._look_for_expired()
            self._wake.wait(COMMIT_SECONDS)
        with self._lock:
            for place, held in self._held.items():
                if place.partition in numbers and held.is_started and not self._is_closing:
                    self._partitions[place.partition].marks[place.offset] -= 1  # it is taken from a worker that lives
                    self._changed.add(place.partition)
        with suppress(KafkaException):
            self._commit(consumer, is_last=True)
        self._forget(numbers)
        consumer.incremental_unassign(places)

    def _holds(self, numbers: set[int]) -> bool:
        with self._lock:
            return any(place.partition in numbers for place in self._held)

    def _on_lost(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        self._forget({place.partition for place in places})
        consumer.incremental_unassign(places)

    def _forget(self, numbers: set[int]) -> None:
        with self._lock:
            self._unclaimed = {place for place in self._unclaimed if place.partition not in numbers}
            self._held = {place: held for place, held in self._held.items() if place.partition not in numbers}
            self._partitions = {n: known for n, known in self._partitions.items() if n not in numbers}
            self._paused -= numbers


class KafkaBroker:
    """A broker at `kafka://host:port,host:port`, or `kafkas://` (TLS); with `user:password@` by SASL.

    `lease` in seconds. A query holds `partitions`, `replicas` (of topics that are made), `prefix`, `largest` (bytes of
    an image), and librdkafka's options by their names (`?ssl.ca.location=/ca.pem&sasl.mechanism=SCRAM-SHA-512`):
    https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md
    """

    def __init__(self, url: str, *, lease: float) -> None:
        self._options = _Options(url)
        self._cluster = _Cluster(self._options)
        self._writer = _Writer(self._options)
        self._workers = Living(lease)
        self._next_partition = random.randrange(PARTITIONS)  # noqa: S311 - so that not all gateways begin with the same
        # A gateway's.
        self._reader: _Reader | None = None
        # A worker's.
        self._worker: str | None = None
        self._leases = _Leases(lease)
        self._member: _Member | None = None
        self._ready: asyncio.Queue[tuple[_Place, Job]] = asyncio.Queue()  # the member bounds it
        self._errands: set[asyncio.Task[None]] = set()
        self._control: _Reader | None = None
        self._control_read = -1
        self._has_read = asyncio.Event()
        self._opening_control = asyncio.Lock()
        self._withdrawn = Withdrawn()

    async def connect(self) -> None:
        """Connect, and make the topics that are not there."""
        await asyncio.to_thread(self._cluster.prepare, is_first=True)
        self._writer.open()

    async def close(self) -> None:
        """Leave the group, and take back this worker's presence."""
        for errand in self._errands:
            errand.cancel()
        if self._member is not None:
            await self._member.close()
        if self._worker is not None:
            with suppress(SafelightError, TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._announce(Presence(worker=self._worker, operations=[], free=0, slots=0))
        for reader in (self._reader, self._control):
            if reader is not None:
                await reader.close()
        await self._writer.close()
        await asyncio.to_thread(self._cluster.close)

    async def _write(self, name: str, partition: int, header: bytes, body: bytes | None = b"", **more: bytes) -> int:
        with self._anew_if_absent():
            return await self._writer.write(name, partition, header, body, **more)

    @contextmanager
    def _anew_if_absent(self) -> Iterator[None]:
        """When topics were deleted, who reads them is not told; whoever opens them again makes them."""
        try:
            yield
        except _AbsentError:
            self._writer.renew()
            for reader in (self._reader, self._control):
                if reader is not None:
                    reader.end()
            if self._member is not None:
                self._member.rejoin()
            raise

    # The gateway's.

    async def send(self, job: Job) -> None:
        """Append to the next partition in turn."""
        self._next_partition = (self._next_partition + 1) % self._cluster.partitions
        await self._send(job, self._next_partition, self._awaited_at(job.reply_to))

    def _awaited_at(self, inbox: str) -> int:
        return zlib.crc32(inbox.encode()) % self._cluster.inboxes

    async def _send(self, job: Job, partition: int, reply_to: int) -> None:
        await self._write(JOBS, partition, *encode(job), **{REPLY_TO: b"%d" % reply_to})

    async def withdraw(self, job: Job) -> None:
        """Tell all workers; who is handed the job throws it away."""
        await self._write(CONTROL, 0, withdrawal(job), kind=WITHDRAWAL)

    async def replies(self, inbox: str) -> AsyncIterator[Reply | Renewed]:
        """Read this inbox's partition; a connection that was lost loses nothing."""
        while True:
            arrivals: asyncio.Queue[_Record | None] = asyncio.Queue()  # bounded by what this gateway has sent
            try:
                await asyncio.to_thread(self._cluster.prepare)
                reader = _Reader(self._options, arrivals.put_nowait, inbox.encode())
                await reader.open([self._place(REPLIES, self._awaited_at(inbox)), self._place(CONTROL, 0)])
            except SafelightError as exc:
                log.debug("no inbox: %s", exc.detail)
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            self._reader = reader
            yield Renewed()
            while (record := await arrivals.get()) is not None:
                if (reply := self._reply(record)) is not None:
                    yield reply

    def _place(self, name: str, partition: int) -> TopicPartition:
        return TopicPartition(self._options.topic(name), partition)

    def _reply(self, record: _Record) -> Reply | None:
        """The reply in a record, if it is one."""
        try:
            if record.headers.get(KIND) == PRESENCE:
                self._workers.hear(decode(Presence, record.header))
            elif INBOX in record.headers:
                return decode(Reply, record.header, record.body)
        except MalformedMessageError as exc:
            log.warning("a message in the inbox is %s; it is ignored", exc.detail)
        return None

    async def presence(self) -> list[Presence]:
        """Whose sign of life came within two leases; `BrokerAwayError` if the broker does not answer."""
        await self.backlog()
        return self._workers.now()

    async def backlog(self) -> int:
        """The lag, less what is done out of turn."""
        with self._anew_if_absent():
            return await asyncio.to_thread(self._cluster.backlog)

    # The worker's.

    async def jobs(self, worker: str, stopping: Callable[[], bool]) -> AsyncIterator[Delivery]:
        """Jobs of the partitions that this worker owns, in their order within each."""
        self._worker = worker
        while not stopping():
            try:
                delivery = await self._next()
            except SafelightError as exc:
                log.debug("no job: %s", exc.detail)
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            if delivery is not None:
                yield delivery
        if self._member is not None:
            self._member.leave()

    async def _next(self) -> Delivery | None:
        await self._open_control()
        if self._member is not None and self._member.is_stuck:
            await self._learn()  # the broker answers: it is not for its sake
            await asyncio.sleep(LOOK_SECONDS)  # what was asked while it was away is answered now
            if self._member.is_stuck:
                log.warning("the driver has not come back for %.0f s; joining the group anew", STUCK_SECONDS)
                self._member.give_up()
                self._member = None
        if self._member is None or self._member.has_left:
            self._member = _Member(self._options, self._cluster, self._leases, self._on_job, self._on_expired)
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                place, job = await self._ready.get()
        except TimeoutError:
            return None
        if job in self._withdrawn:
            place.member.finish(place)
            return None
        return place.member.claim(place, job)

    def _on_job(self, place: _Place, record: _Record) -> None:
        """What is not a job is kept aside, and what was withdrawn is thrown away."""
        body = record.body
        try:
            job = decode(Job, record.header, body)
        except MalformedMessageError as exc:
            log.warning("a message on the queue is %s; it is kept in quarantine", exc.detail)
            self._run(self._put_aside(place, not_a_job(exc, body), body))
            return
        if job in self._withdrawn:
            place.member.finish(place)
        else:
            self._ready.put_nowait((place, job))

    def _run(self, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _put_aside(self, place: _Place, record: Quarantined, body: bytes) -> None:
        while True:
            with suppress(BrokerAwayError):
                await self._keep_aside(record, body)
                return place.member.finish(place)
            await asyncio.sleep(RECONNECT_SECONDS)

    def _on_expired(self, delivery: Delivery, starts: int) -> None:
        log.warning("job %s: its lease has ended; it goes to another partition", delivery.job.id)
        self._run(self._pass_on(delivery.handle, replace(delivery.job, starts=starts)))

    async def _pass_on(self, place: _Place, job: Job) -> None:
        """Once the broker takes it."""
        while place.member.has(place):
            with suppress(BrokerAwayError):
                await self._move(place, job)
                break
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _move(self, place: _Place, job: Job) -> None:
        """The same job on a partition of another worker's, then this one is done."""
        await self._send(job, place.member.elsewhere(), place.reply_to)
        place.member.finish(place)

    async def _open_control(self) -> None:
        async with self._opening_control:
            if self._control is None:
                await asyncio.to_thread(self._cluster.prepare)
                control = _Reader(self._options, self._on_control)
                await control.open([self._place(CONTROL, 0)], since=now_ms() - OLDEST_JOB_SECONDS * 1_000)
                self._control, self._control_read = control, -1

    def _on_control(self, record: _Record | None) -> None:
        if record is None:
            self._control = None
            return
        self._control_read = record.offset
        kind = record.headers.get(KIND)
        if kind == WITHDRAWAL:
            self._withdrawn.hear(record.header)
        elif kind == PRESENCE:
            with suppress(MalformedMessageError):
                self._workers.hear(decode(Presence, record.header))
        self._has_read.set()

    async def _announce(self, presence: Presence) -> None:
        await self._learn(encode(presence)[0], PRESENCE)

    async def _learn(self, header: bytes = b"", kind: bytes = LEARN) -> None:
        """Tell all, and return when all is known that others have told before."""
        offset = await self._write(CONTROL, 0, header, kind=kind)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while self._control is not None and self._control_read < offset:
                    self._has_read.clear()
                    await self._has_read.wait()
        except TimeoutError as exc:
            raise BrokerAwayError from exc

    async def start(self, delivery: Delivery, starts: int) -> None:
        """Commit; a start that is still inside the driver would end with the process."""
        await delivery.handle.member.started(delivery.handle, starts)

    async def beat(self, held: Sequence[Delivery], presence: Presence) -> list[Delivery]:
        """Announce; what lies in a partition that was lost, or was withdrawn, is no longer held."""
        self._worker = presence.worker
        for delivery in held:
            delivery.handle.member.renew(delivery.handle)
        with self._leases.stopped():
            with self._anew_if_absent():
                await asyncio.to_thread(self._cluster.look)
            await self._open_control()
            await self._announce(presence)
            for delivery in held:
                if delivery.job in self._withdrawn:
                    delivery.handle.member.finish(delivery.handle)
            await self._share()
        return [delivery for delivery in held if not delivery.handle.member.renew(delivery.handle)]

    async def _share(self) -> None:
        """Jobs that have waited here for long go to workers that have room."""
        if self._member is None or not self._member.is_full or not self._others_have_room():
            return
        for _ in range(SHARED_COUNT):
            try:
                async with asyncio.timeout(READ_SECONDS):
                    place, job = await self._ready.get()
            except TimeoutError:
                return
            if (delivery := place.member.claim(place, job)) is not None:
                with suppress(BrokerAwayError):
                    await self._move(place, replace(job, starts=delivery.starts))

    def _others_have_room(self) -> bool:
        return any(presence.free for presence in self._workers.now() if presence.worker != self._worker)

    async def reply(self, delivery: Delivery, reply: Reply) -> None:
        """Deliver to the partition of the inbox, then mark the job as done. A result that is too large is a failure."""
        place: _Place = delivery.handle
        inbox = delivery.job.reply_to.encode()
        try:
            await self._write(REPLIES, place.reply_to, *encode(reply), inbox=inbox)
        except TooLargeError as exc:
            told = result_too_large(reply, exc)
            await self._write(REPLIES, place.reply_to, *encode(told), inbox=inbox)
        place.member.finish(place)

    async def give_back(self, delivery: Delivery, starts: int) -> None:
        """Move it, if it was not withdrawn."""
        place: _Place = delivery.handle
        if not place.member.renew(place):
            return  # somebody else has it
        await self._learn()
        if delivery.job in self._withdrawn:
            place.member.finish(place)
        else:
            await self._move(place, replace(delivery.job, starts=starts))

    async def hand_over(self, delivery: Delivery) -> bool:
        """Give it back if another worker has room; in a partition of one that has not it might wait for long."""
        if not self._others_have_room():
            return False
        await self.give_back(delivery, delivery.starts)
        return True

    async def quarantine(self, delivery: Delivery, record: Quarantined, reply: Reply) -> None:
        """Keep aside, reply, mark as done."""
        await self._keep_aside(record, delivery.job.image)
        await self.reply(delivery, reply)

    async def _keep_aside(self, record: Quarantined, image: bytes) -> None:
        await self._write(QUARANTINE, 0, encode(record)[0], image, key=record.id.encode())

    # A person's.

    async def quarantined(self) -> list[Quarantined]:
        """The records, the oldest first; images are read too, and thrown away."""
        return [record for record, _ in await asyncio.to_thread(self._cluster.kept)]

    async def take_out(self, job_id: str) -> tuple[Quarantined, bytes] | None:
        """One record with its image."""
        kept = await asyncio.to_thread(self._cluster.kept)
        return next((each for each in kept if each[0].id == job_id), None)

    async def drop(self, job_id: str) -> bool:
        """Delete one, by a tombstone."""
        if await self.take_out(job_id) is None:
            return False
        await self._write(QUARANTINE, 0, b"", None, key=job_id.encode())
        return True


def _patiently(
    consumer: Consumer, ask: Callable[..., list[TopicPartition]], places: list[TopicPartition]
) -> list[TopicPartition]:
    """An answer without errors; asked again while partitions have no leader, as those of a topic that was just made.

    One that never reads does not learn by itself who leads now: it is told to look.
    """
    until = time.monotonic() + ANSWER_SECONDS
    while True:
        error: KafkaError | None
        try:
            answer = ask(places, timeout=ANSWER_SECONDS)
        except KafkaException as exc:
            error = exc.args[0]
        else:
            error = next((place.error for place in answer if place.error), None)
            if error is None:
                return answer
        if error.code() not in LEADERLESS or time.monotonic() > until:
            raise KafkaException(error)
        time.sleep(RECONNECT_SECONDS)
        consumer.list_topics(places[0].topic, timeout=ANSWER_SECONDS)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """From a thread, in the loop, if it still runs."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _tell(future: asyncio.Future[Any], outcome: Any) -> None:
    if not future.done():
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _error(error: KafkaError) -> SafelightError:
    """The driver's error as ours."""
    log.debug("the driver says: %s", error)
    code = error.code()
    if code in REFUSED:
        return ConfigurationError(f"The broker refuses us: {error.str()}.")
    if code in TOO_LARGE:
        return too_large(None)
    if code in ABSENT:
        return _AbsentError()
    return BrokerFullError() if code in FULL else BrokerAwayError()
