"""C2: RabbitMQ (3.10 to 4.x), by a quorum queue for jobs and a queue for each gateway and each worker.

Theory of operation. A job is a message of one quorum queue; a delivery that is not acknowledged is its lease, which
ends with the connection of whoever holds it (or with its heartbeats, when the holder is frozen). A worker has as many
consumers as it has asked for jobs at once, each with a prefetch of 1, so it holds no more than it can start soon.
A reply is published and confirmed before its job is acknowledged, which deletes the job.

A queue cannot be written to in the middle, so a job's **starts** are told to the gateway that waits for it, which keeps
them as long as it waits. A worker that is handed a job for the second time asks that gateway; where there is none any
more, nobody waits for the job. (The broker's own count, `x-delivery-count`, does not tell a job that merely waited in
a worker that died from one that was at work in it, and its meaning changed in 4.3: it counts when a gateway is silent.
Streams would keep starts, but those of 3.10 did not come back after the broker was killed.) Signs of life go to all
gateways, withdrawals to all workers.

============================= ============== ======================================================================
name                          kind           what
============================= ============== ======================================================================
`safelight.jobs`              quorum queue   bounded in number, refuses what is over; a message expires late
`safelight.inbox.ID`          classic queue  a gateway's: replies, starts and questions for them, presence;
                                             expires a minute after its consumer is gone
`safelight.worker.ID`         exclusive one  a worker's: withdrawals, answers to its questions, its own marks
`safelight.quarantine`        quorum queue   Quarantined with its image; bounded by number, bytes and age
`safelight.presence`          fanout         Presence, to all inboxes; one without slots has left
`safelight.withdrawn`         fanout         the inbox and the id of a job that nobody waits for, to all workers
============================= ============== ======================================================================

All but the exclusive ones are durable, and declared anew with each connection. A message's header is the AMQP header
`safelight`; its AMQP type tells the kind where there are several. In a cluster the quorum queues have replicas and the
others have not: a gateway whose inbox went with its node takes an inbox of another name (a job's AMQP `reply_to` tells
the one that its gateway had) and sends again what is unanswered.
https://www.rabbitmq.com/docs/quorum-queues, https://www.rabbitmq.com/docs/confirms, https://www.rabbitmq.com/docs/alarms
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections import deque
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import aiormq
from aiormq import exceptions as driver
from aiormq import spec
from msgspec.structs import replace

from safelight.brokers import Delivery, Renewed, each_host, look_up
from safelight.brokers.aside import KEPT_BYTES, KEPT_JOBS, KEPT_MS
from safelight.brokers.refusals import check_size, not_a_job, result_too_large, too_large
from safelight.brokers.told import Living, Withdrawn, withdrawal
from safelight.errors import (
    BrokerAwayError,
    BrokerFullError,
    ConfigurationError,
    MalformedMessageError,
    SafelightError,
    TooLargeError,
)
from safelight.message import Job, Presence, Quarantined, Reply, decode, encode, new_id, now_ms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage

__all__ = ["RabbitBroker"]

log = logging.getLogger(__name__)
logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # it tells each lost connection by several tracebacks

HEADER = "safelight"
JOBS, INBOX, WORKER, QUARANTINE = "safelight.jobs", "safelight.inbox.", "safelight.worker.", "safelight.quarantine"
PRESENCE, WITHDRAWN = "safelight.presence", "safelight.withdrawn"
GIVEN_UP = -1  # in place of a count of starts: nobody waits for the job
# Types of messages.
REPLY, START, QUESTION, ANSWER, MARK, WITHDRAWAL = "reply", "start", "question", "answer", "mark", "withdrawal"

OLDEST_VERSION = (3, 10)  # the first whose quorum queues let messages expire
ANSWER_SECONDS = 5.0
GATEWAY_SECONDS = 2.0  # a gateway that says nothing for so long is as good as dead
BLOCKED_SECONDS = 0.2  # a connection that may not publish for so long is refused (an alarm of memory or disk)
LOOK_SECONDS = 1.0
DELETED_SECONDS = 1.0  # a queue declared anew while it is being deleted is deleted with all that it took (3.10)
CLOSE_SECONDS = 1.0
RECONNECT_SECONDS = 0.1
HEARTBEAT_SECONDS = 4  # three times as long without a sign, and the other end is gone
EXPIRY_GRACE_MS = 60_000  # after its deadline; gateways' and workers' clocks decide what is late, this only cleans up
SMALL_MESSAGE_BYTES = 256 * 1024
READ_COUNT = 64

LIMITS = {"x-max-length": 20_000, "x-overflow": "reject-publish"}
QUEUES: dict[str, dict[str, Any]] = {
    JOBS: {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000, **LIMITS},
    QUARANTINE: {
        "x-queue-type": "quorum",
        "x-delivery-limit": 1_000_000,  # each look at it counts
        "x-max-length": KEPT_JOBS,
        "x-max-length-bytes": KEPT_BYTES,
        "x-message-ttl": KEPT_MS,
    },
}
INBOX_ARGUMENTS: dict[str, Any] = {"x-expires": 60_000, **LIMITS}
WORKER_ARGUMENTS: dict[str, Any] = {"x-max-length": 20_000}

# "PRECONDITION_FAILED - message size 33554432 is larger than configured max size 16777216"
TOO_LARGE = re.compile(r"message size \d+ .* max size (\d+)")
# What the driver raises when a connection is lost; the last when it is lost while it is being made.
AWAY = (driver.AMQPError, OSError, RuntimeError, StopAsyncIteration)
REFUSED = (driver.AuthenticationError, driver.ProbableAuthenticationError, driver.ConnectionNotAllowed)


class _UnroutableError(Exception):
    """There is no queue of that name, or the node that has it is down."""


class _NackedError(BrokerFullError):
    """A queue does not take the message."""


class _Handle(NamedTuple):
    """A delivery: the channel and the consumer that it came by, its number there, the message's own id, and the queue
    of whoever waits for it.
    """

    channel: AbstractChannel
    consumer: str
    tag: int
    message: str
    inbox: str


Arrivals = asyncio.Queue["DeliveredMessage | None"]  # None: the channel was closed, or its consumer cancelled


class _Link:
    """One connection and one channel on it, made when needed and anew when lost, with all queues declared.

    Publishing and consuming have one each: a broker that is short of memory or disk stops reading from connections
    that publish, and acknowledgements must get through.
    """

    def __init__(self, urls: Sequence[str], *, confirms: bool) -> None:
        self._urls = deque(urls)
        self._confirms = confirms
        self._making = asyncio.Lock()
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None

    async def channel(self) -> AbstractChannel:
        """The channel, which is another one if the last was closed. `BrokerAwayError`, `ConfigurationError`."""
        async with self._making:
            if self._channel is None or self._channel.is_closed:
                self._channel = await self._opened()
            return self._channel

    async def extra(self) -> AbstractChannel:
        """A channel of the caller's own on the same connection."""
        async with self._making:
            return await self._opened()

    def drop(self, channel: AbstractChannel) -> None:
        """Use another one from now on; what is under way on this one may end there."""
        if self._channel is channel:
            self._channel = None

    async def _opened(self) -> AbstractChannel:
        with _away():
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    if self._connection is None or not self._connection.is_opened:
                        await self.close()
                        self._connection = await self._connected()
                    return await self._connection.channel(publisher_confirms=self._confirms, on_return_raises=True)
            except REFUSED as exc:
                raise ConfigurationError(
                    f"The broker refuses the user, the password or the virtual host: {exc}."
                ) from exc

    async def _connected(self) -> AbstractConnection:
        connection = await self._reached()
        try:
            await self._declare(await connection.channel())
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _reached(self) -> AbstractConnection:
        """A connection to any node; the one that was tried last, or lost, has its next turn after all others."""
        for _ in self._urls.copy():
            self._urls.rotate(-1)
            try:
                await look_up(urlsplit(self._urls[-1]).hostname or "localhost")
                return await aiormq.connect(self._urls[-1])
            except REFUSED:
                raise
            except Exception as exc:
                if not _is_of_a_lost_connection(exc):
                    raise
                log.debug("cannot connect: %r", exc)
        raise BrokerAwayError

    @staticmethod
    async def _declare(channel: AbstractChannel) -> None:
        try:
            for name, arguments in QUEUES.items():
                await channel.queue_declare(name, durable=True, arguments=arguments)
            for name in (PRESENCE, WITHDRAWN):
                await channel.exchange_declare(name, exchange_type="fanout", durable=True)
        except driver.ChannelPreconditionFailed as exc:
            raise ConfigurationError(
                f"The broker has something of another kind under a name that is needed; delete it, or use another "
                f"virtual host: {exc}."
            ) from exc
        await channel.close()

    async def close(self) -> None:
        if self._connection is not None:
            with _unless_away():
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._connection.close()


class RabbitBroker:
    """A broker at `amqp://user:password@host:port/vhost` or `amqps://` (TLS); `lease` in seconds, of presence alone.

    Several nodes of a cluster are told by commas (`amqp://user:password@a:5672,b:5672/vhost`). A query holds aiormq's
    options (`?cafile=/ca.pem`): https://github.com/mosquito/aiormq#url-parameters
    """

    def __init__(self, url: str, *, lease: float) -> None:
        if "heartbeat=" not in url:
            url += ("&" if "?" in url else "?") + f"heartbeat={HEARTBEAT_SECONDS}"
        urls = each_host(url)
        random.shuffle(urls)  # so that the ends spread over the nodes
        self._lease = lease
        self._publishing = _Link(urls, confirms=True)
        self._consuming = _Link(urls, confirms=False)
        self._proven = SMALL_MESSAGE_BYTES  # so much the broker takes
        self._largest: int | None = None  # and no more than this, as it told when it refused a message
        self._inbox: str | None = None
        self._sent: dict[str, dict[str, int]] = {}  # job -> its messages, and how often each was started
        self._workers = Living(lease)
        # A worker's.
        self._worker: str | None = None
        self._jobs: AbstractChannel | None = None
        self._consumers: list[str] = []
        self._arrivals = Arrivals()
        self._held: set[_Handle] = set()
        self._control: AbstractChannel | None = None
        self._control_queue = ""
        self._opening_control = asyncio.Lock()
        self._expected: dict[str, asyncio.Future[bytes]] = {}  # what this worker waits for on its own queue
        self._withdrawn = Withdrawn()

    async def connect(self) -> None:
        """Connect, look at the server's version, and declare all queues."""
        await self._consuming.channel()
        told = str((await self._publishing.channel()).connection.server_properties.get("version", ""))
        if tuple(map(int, re.findall(r"\d+", told)[:2])) < OLDEST_VERSION:
            raise ConfigurationError(
                f"The broker is RabbitMQ {told}; it must be {'.'.join(map(str, OLDEST_VERSION))} or later."
            )

    async def close(self) -> None:
        """Take back this worker's presence or delete this gateway's inbox, then close."""
        with suppress(SafelightError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._worker is not None:
                    await self._announce(Presence(worker=self._worker, operations=[], free=0, slots=0))
                if self._inbox is not None:
                    channel = await self._consuming.channel()
                    with _away():
                        await channel.queue_delete(self._inbox)
        await self._publishing.close()
        await self._consuming.close()

    async def _publish(
        self,
        queue: str,
        header: bytes,
        body: bytes = b"",
        *,
        exchange: str = "",
        kind: str | None = None,
        message_id: str | None = None,
        reply_to: str | None = None,
        expires_ms: int | None = None,
        is_mandatory: bool = False,
    ) -> None:
        """Put a message on a queue, or on all of an exchange; done when the broker has confirmed it.

        `TooLargeError`; `BrokerFullError` when the queue refuses it or an alarm of the broker's stops all writing;
        `_UnroutableError` when it `is_mandatory` and the queue is not there.
        """
        check_size(body, self._largest)
        properties = spec.Basic.Properties(
            headers={HEADER: header.decode()},
            delivery_mode=2,
            message_type=kind,
            message_id=message_id,
            reply_to=reply_to,
            expiration=None if expires_ms is None else str(max(0, expires_ms)),
        )
        message = {"exchange": exchange, "routing_key": queue, "properties": properties, "mandatory": is_mandatory}
        nacking = None
        if len(body) <= self._proven:
            channel = await self._publishing.channel()
            try:
                await self._confirmed(channel, body, message)
            except _NackedError:  # 3.10: a channel that was open when a queue's leader died may do so for ever
                nacking = channel
            else:
                return
        # A broker that refuses a message for its size closes the channel, and all that is under way on it.
        channel = await self._publishing.extra()
        try:
            await self._confirmed(channel, body, message)
        finally:
            with _unless_away():
                await channel.close()
        self._proven = max(self._proven, len(body))
        if nacking is not None:
            self._publishing.drop(nacking)

    async def _confirmed(self, channel: AbstractChannel, body: bytes, message: dict[str, Any]) -> None:
        with _away():
            await _writable(channel)
            try:
                await channel.basic_publish(body, **message, timeout=ANSWER_SECONDS)
            except driver.PublishError as exc:
                raise _UnroutableError from exc
            except driver.DeliveryError as exc:
                raise _NackedError from exc
            except driver.ChannelPreconditionFailed as exc:
                if (told := TOO_LARGE.search(str(exc))) is None:
                    raise BrokerAwayError from exc
                self._largest = int(told[1])
                raise too_large(self._largest) from exc
            except TimeoutError as exc:
                await _writable(channel)
                await self._publishing.close()
                raise BrokerAwayError from exc

    # The gateway's.

    async def send(self, job: Job) -> None:
        """Publish to the queue of jobs; its message has an id of its own, since one job may be sent again."""
        self._sent.setdefault(job.id, {})
        await self._send(job, self._inbox or INBOX + job.reply_to)

    async def _send(self, job: Job, inbox: str) -> None:
        header, body = encode(job)
        expires = job.deadline - now_ms() + EXPIRY_GRACE_MS
        try:
            await self._publish(
                JOBS, header, body, message_id=new_id(), reply_to=inbox, expires_ms=expires, is_mandatory=True
            )
        except _UnroutableError as exc:  # the queue was deleted: a new connection declares it anew
            await asyncio.sleep(DELETED_SECONDS)
            await self._publishing.close()
            raise BrokerAwayError from exc

    async def withdraw(self, job: Job) -> None:
        """Tell all workers; the job stays on the queue until one of them throws it away."""
        self._sent.pop(job.id, None)
        await self._publish("", withdrawal(job), exchange=WITHDRAWN, kind=WITHDRAWAL)

    async def replies(self, inbox: str) -> AsyncIterator[Reply | Renewed]:
        """Consume from the inbox; what is still there after a lost connection has lost nothing, nor have the jobs."""
        self._inbox = INBOX + inbox
        is_new = True
        while True:
            try:
                is_new = is_new or not await self._has_inbox(self._inbox)
                arrivals = await self._open_inbox(self._inbox)
            except _UnroutableError:
                self._inbox = f"{INBOX}{inbox}.{new_id()}"
                continue
            except SafelightError as exc:
                log.debug("no inbox: %s", exc.detail)
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            if is_new:
                yield Renewed()
            is_new = False
            while (message := await arrivals.get()) is not None:
                with _unless_away():
                    await message.channel.basic_ack(message.delivery_tag or 0, wait=False)
                if (reply := await self._reply(message)) is not None:
                    yield reply

    async def _reply(self, message: DeliveredMessage) -> Reply | None:
        """The reply in a message of the inbox; all that is none is dealt with here."""
        header, kind = _header(message), message.header.properties.message_type
        try:
            if kind == REPLY:
                reply = decode(Reply, header, message.body)
                self._sent.pop(reply.id, None)
                return reply
            if kind in (START, QUESTION):
                await self._told_of_starts(kind, header, message.header.properties.reply_to or "")
            else:
                self._workers.hear(decode(Presence, header))
        except (MalformedMessageError, ValueError) as exc:
            log.warning("a message in the inbox cannot be read and is ignored: %s", exc)
        return None

    async def _told_of_starts(self, kind: str, header: bytes, worker: str) -> None:
        job, message, count = header.decode().split()
        counts = self._sent.get(job)
        if kind == START:
            if counts is not None:
                counts[message] = int(count)
            return
        told = b"%d" % (GIVEN_UP if counts is None else counts.get(message, 0))
        with suppress(SafelightError):
            await self._publish(worker, told, kind=ANSWER, message_id=message)

    async def _has_inbox(self, name: str) -> bool:
        """Whether an inbox is there; `_UnroutableError` if the node that has it is down."""
        channel = await self._consuming.extra()
        with _away():
            try:
                await channel.queue_declare(name, passive=True, timeout=ANSWER_SECONDS)
            except driver.ChannelNotFoundEntity:
                return False
            except TimeoutError as exc:  # so does 4.0, where 3.x tells that the home node is down
                await self.backlog()  # which is answered
                raise _UnroutableError from exc
            await channel.close()
        return True

    async def _open_inbox(self, name: str) -> Arrivals:
        channel = await self._consuming.extra()
        with _away():
            try:
                await channel.queue_declare(name, durable=True, arguments=INBOX_ARGUMENTS)
            except driver.ChannelNotFoundEntity as exc:  # "home node 'rabbit@a' of durable queue ... is down"
                raise _UnroutableError from exc
            await channel.queue_bind(name, PRESENCE)
            await channel.basic_qos(prefetch_count=READ_COUNT)
            return await _arrivals(channel, name)

    async def presence(self) -> list[Presence]:
        """Whose sign of life came to the inbox within two leases; `BrokerAwayError` if the broker does not answer."""
        await self.backlog()
        return self._workers.now()

    async def backlog(self) -> int:
        """What the queue has ready, and what workers hold by their last word: AMQP tells only the first.

        A heavy job takes two places, and counts twice until it is answered.
        """
        channel = await self._consuming.channel()
        with _away():
            told = await channel.queue_declare(JOBS, passive=True, timeout=ANSWER_SECONDS)
        held = sum(presence.slots - presence.free for presence in self._workers.now())
        return (told.message_count or 0) + held

    # The worker's.

    async def jobs(self, worker: str, stopping: Callable[[], bool]) -> AsyncIterator[Delivery]:
        """Consume; what was handed out and is unacknowledged when a connection ends comes first, to whom it may."""
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
        await self._stop_consuming()

    async def _next(self) -> Delivery | None:
        if self._jobs is None or self._jobs.is_closed:
            self._jobs = await self._open_jobs()
        if len(self._consumers) <= len(self._held):
            with _away():
                told = await self._jobs.basic_consume(JOBS, self._arrivals.put, timeout=ANSWER_SECONDS)
            self._consumers.append(told.consumer_tag or "")
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                message = await self._arrivals.get()
        except TimeoutError:
            return None
        if message is None:  # closed, or the queue was deleted
            with _unless_away():
                await self._jobs.close()
                await asyncio.sleep(DELETED_SECONDS)
            return None
        try:
            return await self._delivery(message)
        except SafelightError:
            await self._requeue(_handle(message))
            raise

    async def _open_jobs(self) -> AbstractChannel:
        await self._open_control()
        channel = await self._consuming.extra()
        self._consumers, self._held, self._arrivals = [], set(), Arrivals()
        _tell_end(channel, self._arrivals)
        with _away():
            await channel.queue_declare(JOBS, durable=True, arguments=QUEUES[JOBS], timeout=ANSWER_SECONDS)
            await channel.basic_qos(prefetch_count=1)  # of each consumer
        return channel

    async def _delivery(self, message: DeliveredMessage) -> Delivery | None:
        """The job in a message; what is not a job is kept aside, and what was withdrawn is thrown away."""
        handle = _handle(message)
        self._held.add(handle)
        try:
            job = decode(Job, _header(message), message.body)
        except MalformedMessageError as exc:
            log.warning("a message on the queue is %s; it is kept in quarantine", exc.detail)
            await self._keep_aside(not_a_job(exc, message.body), message.body)
            await self._acknowledge(handle)
            return None
        starts = await self._starts(job, message, handle)
        if starts == GIVEN_UP:
            await self._acknowledge(handle)
            return None
        return Delivery(job, job.starts + starts, handle)

    async def _starts(self, job: Job, message: DeliveredMessage, handle: _Handle) -> int:
        """How often this message was started, as its gateway knows; `GIVEN_UP` if nobody waits for it."""
        if job in self._withdrawn:
            return GIVEN_UP
        if not message.redelivered:
            return 0
        question = f"{job.id} {handle.message} 0".encode()
        try:
            told = await self._asked(handle.message, handle.inbox, question, QUESTION)
            return int(told)
        except _UnroutableError:
            return GIVEN_UP
        except TimeoutError:
            return int(str((message.header.properties.headers or {}).get("x-delivery-count", 0)))

    async def _asked(self, name: str, inbox: str | None, header: bytes, kind: str) -> bytes:
        """What comes back to this worker's own queue under `name`, after a message to `inbox` (None: to that queue)."""
        await self._open_control()
        expected: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._expected[name] = expected
        queue = self._control_queue
        try:
            await self._put_in(inbox or queue, header, kind=kind, message_id=name, reply_to=queue)
            async with asyncio.timeout(GATEWAY_SECONDS):
                return await expected
        finally:
            del self._expected[name]

    async def _learn(self) -> None:
        """Return when all is known that others have told before this call."""
        try:
            await self._asked(new_id(), None, b"", MARK)
        except (TimeoutError, _UnroutableError) as exc:
            raise BrokerAwayError from exc

    async def _open_control(self) -> None:
        async with self._opening_control:
            if self._control is not None and not self._control.is_closed:
                return
            channel = await self._consuming.extra()
            with _away():
                name = WORKER + new_id()  # the one before may still be there: not known yet to be lost
                await channel.queue_declare(name, exclusive=True, arguments=WORKER_ARGUMENTS)
                await channel.queue_bind(name, WITHDRAWN)
                await channel.basic_consume(name, self._on_control, no_ack=True, timeout=ANSWER_SECONDS)
            self._control, self._control_queue = channel, name

    async def _on_control(self, message: DeliveredMessage) -> None:
        name = message.header.properties.message_id
        if (expected := self._expected.get(name or "")) is not None:
            if not expected.done():
                expected.set_result(_header(message))
        elif message.header.properties.message_type == WITHDRAWAL:
            self._withdrawn.hear(_header(message))

    async def start(self, delivery: Delivery, starts: int) -> None:
        """Tell the gateway, confirmed: a client that is killed takes with it what the broker has not come to yet."""
        handle: _Handle = delivery.handle
        header = f"{delivery.job.id} {handle.message} {starts - delivery.job.starts}".encode()
        with suppress(BrokerAwayError):  # while it takes nothing, what was handed out goes on, uncounted
            await self._publish(handle.inbox, header, kind=START)
        if handle.channel.is_closed:  # somebody else has it
            raise BrokerAwayError

    async def beat(self, held: Sequence[Delivery], presence: Presence) -> list[Delivery]:
        """Announce; what came by a channel that was closed since, or was withdrawn, is no longer held."""
        self._worker = presence.worker
        await self._announce(presence)
        await self._learn()
        lost = [
            each
            for each in held
            if each.handle not in self._held or each.handle.channel.is_closed or each.job in self._withdrawn
        ]
        for delivery in lost:
            await self._acknowledge(delivery.handle)
        return lost

    async def _announce(self, presence: Presence) -> None:
        header, _ = encode(presence)
        with suppress(BrokerFullError):  # one inbox is full or its node is down: the others have it
            await self._publish("", header, exchange=PRESENCE)

    async def _put_in(self, inbox: str, header: bytes, body: bytes = b"", **properties: Any) -> None:
        """Publish to an inbox; `_UnroutableError` if it is gone, or its node is: its gateway will ask anew."""
        try:
            await self._publish(inbox, header, body, is_mandatory=True, **properties)
        except BrokerFullError as exc:  # what a cluster says too when the node is down
            if not await self._has_inbox(inbox):
                raise _UnroutableError from exc
            raise

    async def reply(self, delivery: Delivery, reply: Reply) -> None:
        """Publish to the inbox if it is still there, then acknowledge. A result that is too large is a failure."""
        inbox = delivery.handle.inbox
        with suppress(_UnroutableError):
            try:
                await self._put_in(inbox, *encode(reply), kind=REPLY)
            except TooLargeError as exc:
                await self._put_in(inbox, *encode(result_too_large(reply, exc)), kind=REPLY)
        await self._acknowledge(delivery.handle)

    async def give_back(self, delivery: Delivery, starts: int) -> None:
        """The same job as a new message, at the end of the queue, then the old one's acknowledgement."""
        handle: _Handle = delivery.handle
        if handle not in self._held or handle.channel.is_closed:
            return  # somebody else has it
        await self._learn()
        if delivery.job not in self._withdrawn:
            await self._send(replace(delivery.job, starts=starts), handle.inbox)
        await self._end_consumer(handle)
        await self._acknowledge(handle)

    async def hand_over(self, delivery: Delivery) -> bool:
        """`basic.nack`: it goes to its place at the head of the queue, since that has a delivery limit."""
        if delivery.handle in self._held:  # else somebody else has it
            await self._end_consumer(delivery.handle)
            await self._requeue(delivery.handle)
        return True

    async def _end_consumer(self, handle: _Handle) -> None:
        """Before what it was handed is given back: it would be handed that at once."""
        if handle.consumer in self._consumers:
            self._consumers.remove(handle.consumer)
            with _unless_away():
                await handle.channel.basic_cancel(handle.consumer, timeout=ANSWER_SECONDS)

    async def quarantine(self, delivery: Delivery, record: Quarantined, reply: Reply) -> None:
        """Keep aside, reply, acknowledge."""
        await self._keep_aside(record, delivery.job.image)
        await self.reply(delivery, reply)

    async def _keep_aside(self, record: Quarantined, image: bytes) -> None:
        await self._publish(QUARANTINE, encode(record)[0], image)

    async def _acknowledge(self, handle: _Handle) -> None:
        """Delete a message of ours; one whose channel is gone is with somebody else by now."""
        if handle in self._held:
            self._held.discard(handle)
            with _unless_away():
                await handle.channel.basic_ack(handle.tag, wait=False)

    async def _requeue(self, handle: _Handle) -> None:
        """Give a message back to the queue, to whom it may."""
        self._held.discard(handle)
        with _unless_away():
            await handle.channel.basic_nack(handle.tag, requeue=True, wait=False)

    async def _stop_consuming(self) -> None:
        """Take no more, and give back what has arrived and was not handed out."""
        if self._jobs is None or self._jobs.is_closed:
            return
        with _unless_away():
            while self._consumers:  # a job that is given back meanwhile ends its own
                await self._jobs.basic_cancel(self._consumers.pop(), timeout=ANSWER_SECONDS)
            while not self._arrivals.empty():
                if (message := self._arrivals.get_nowait()) is not None:
                    await self._requeue(_handle(message))

    # A person's.

    @asynccontextmanager
    async def _kept(self) -> AsyncIterator[list[tuple[Quarantined, DeliveredMessage]]]:
        """All that is in quarantine, with images; what is not acknowledged meanwhile goes back to its place.

        Of a job that was sent anew and failed again the newest record is kept, the one before is deleted here.
        """
        channel = await self._consuming.extra()
        with _away():
            found: dict[str, tuple[Quarantined, DeliveredMessage]] = {}
            while (message := await channel.basic_get(QUARANTINE, timeout=ANSWER_SECONDS)).delivery_tag is not None:
                with suppress(MalformedMessageError):
                    record = decode(Quarantined, _header(message))
                    if (before := found.pop(record.id, None)) is not None:
                        await channel.basic_ack(before[1].delivery_tag or 0)
                    found[record.id] = (record, message)
            try:
                yield sorted(found.values(), key=lambda each: each[0].at)
            finally:
                await channel.basic_nack(0, multiple=True, requeue=True)
                await channel.close()

    async def quarantined(self) -> list[Quarantined]:
        """All records, the oldest first; the broker deletes what is too old or too much."""
        async with self._kept() as found:
            return [record for record, _ in found]

    async def take_out(self, job_id: str) -> tuple[Quarantined, bytes] | None:
        """One record with its image."""
        async with self._kept() as found:
            return next(((record, message.body) for record, message in found if record.id == job_id), None)

    async def drop(self, job_id: str) -> bool:
        """Delete one."""
        async with self._kept() as found:
            for record, message in found:
                if record.id == job_id:
                    await message.channel.basic_ack(message.delivery_tag or 0)
                    return True
        return False


@contextmanager
def _away() -> Iterator[None]:
    """The driver's errors, a lost connection's, as ours; a cancellation as one.

    The driver may answer a cancellation with an error of its own, and `asyncio.wait_for` of Python 3.11, which it uses,
    forgets one that comes together with the answer: who was cancelled would go on for ever. And it cancels what waits
    on a channel that is lost: who was not cancelled would end.
    """
    try:
        yield
    except (Exception, asyncio.CancelledError) as exc:
        if not (_is_of_a_lost_connection(exc) or isinstance(exc, asyncio.CancelledError)):
            raise
        log.debug("the driver says: %r", exc)
        raise (asyncio.CancelledError() if _is_cancelled() else BrokerAwayError()) from exc
    if _is_cancelled():
        raise asyncio.CancelledError


def _is_of_a_lost_connection(exc: BaseException) -> bool:
    """The driver raises a bare `Exception` when a connection ended and told no reason."""
    return isinstance(exc, AWAY) or type(exc) is Exception


@contextmanager
def _unless_away() -> Iterator[None]:
    """Do it if the connection is there; what it would do is done by the connection's end otherwise."""
    with suppress(BrokerAwayError), _away():
        yield


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _writable(channel: AbstractChannel) -> None:
    """Return while the broker takes messages; `BrokerFullError` if it has blocked this connection."""
    try:
        async with asyncio.timeout(BLOCKED_SECONDS):
            await channel.connection.ready()
    except TimeoutError:
        raise BrokerFullError from None


def _tell_end(channel: AbstractChannel, arrivals: Arrivals) -> None:
    channel.closing.add_done_callback(lambda _: arrivals.put_nowait(None))
    channel.on_consumer_cancel_callbacks.add(lambda _: arrivals.put_nowait(None))


async def _arrivals(channel: AbstractChannel, queue: str) -> Arrivals:
    """Messages of a queue as they come, and None once no more will."""
    arrivals = Arrivals()
    _tell_end(channel, arrivals)
    await channel.basic_consume(queue, arrivals.put, timeout=ANSWER_SECONDS)
    return arrivals


def _handle(message: DeliveredMessage) -> _Handle:
    told = message.header.properties
    name, inbox = told.message_id or "", told.reply_to or ""
    return _Handle(message.channel, message.consumer_tag or "", message.delivery_tag or 0, name, inbox)


def _header(message: DeliveredMessage) -> bytes:
    """Our header; empty if there is none."""
    told = (message.header.properties.headers or {}).get(HEADER, "")
    return told.encode() if isinstance(told, str) else bytes(told) if isinstance(told, bytes | bytearray) else b""
