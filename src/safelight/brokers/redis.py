"""C2: Redis (7 and later) and Valkey (8 and later), by streams.

Theory of operation. Jobs are entries of one stream, read by the consumer group `workers`; the group's list of
pending entries is the list of leases. An entry's idle time is the age of its lease: the beat renews it by
`XCLAIM … JUSTID`, and any worker takes over what stayed idle for longer than a lease by `XAUTOCLAIM … JUSTID`,
without locks. An entry's delivery count is one more than its **starts**: `XREADGROUP` sets it to 1, a start sets it
(`XCLAIM … RETRYCOUNT`), nothing else touches it. An entry that is answered is acknowledged and deleted with the
reply, so the stream's length is the backlog; an entry that is withdrawn is deleted, and its holder's next renewal
does not return it.

=============================== =========== ====================================================================
key                             kind        what
=============================== =========== ====================================================================
`{safelight}:jobs`              stream      entries of `header` and `body`; never trimmed: workers delete what is late
`{safelight}:inbox:ID`          stream      replies for one gateway; expires a minute after its last refresh
`{safelight}:workers`           hash        worker -> Presence, stamped with the server's time
`{safelight}:withdrawn:ID:JOB`  string      a job withdrawn after it was given back as another entry
`{safelight}:quarantine`        hash        job id -> Quarantined
`{safelight}:quarantine:ID`     string      its image
=============================== =========== ====================================================================

One hash tag puts all keys on one shard of a cluster, so that transactions work there. Any node may be named: a new
connection asks whether our keys are there, and goes where it is told; a node that says later that it has them no more
(`ELSEWHERE_CODES`) is left, as if the connection had been lost. So it is with a primary and its replicas that are all
named, without a cluster.

In **full memory** a server refuses what adds (`XADD`, `HSET`, `SET`), and a transaction that holds it, whole; it goes
on to hand out, to renew, to count a start and to delete. A script that is flagged `allow-oom` adds all the same: by it
goes what takes no more room than it gives back, and what is small. So a job is deleted with an answer to it, always.

A group keeps a **consumer's name** for ever, and with the name its pending entries, which are undeliverable once it is
deleted. So a script, which nothing comes between, deletes names with nothing pending: a worker's own when it closes,
and those that did nothing for minutes. A name that is deleted while its worker lives is made anew by the next entry
for it, also while that worker waits in a blocked read. (Redis 7.0 calls such a one idle; 7.2 and Valkey do not.)
Commands: https://valkey.io/commands/.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import hiredis
from msgspec.structs import replace
from redis import exceptions as driver
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from safelight.brokers import Delivery, Renewed, each_host, look_up
from safelight.brokers.aside import KEPT_MS, within_bounds
from safelight.brokers.refusals import check_size, no_room, not_a_job, result_too_large, too_large
from safelight.errors import (
    BrokerAwayError,
    BrokerFullError,
    ConfigurationError,
    InternalError,
    MalformedMessageError,
    SafelightError,
    TooLargeError,
)
from safelight.message import Job, Presence, Quarantined, Reply, decode, encode, now_ms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from redis.asyncio.connection import AbstractConnection

__all__ = ["RedisBroker"]

log = logging.getLogger(__name__)

JOBS = b"{safelight}:jobs"
GROUP = b"workers"
WORKERS = b"{safelight}:workers"
WITHDRAWN = b"{safelight}:withdrawn:"
QUARANTINE = b"{safelight}:quarantine"

BLOCK_MS = 1_000  # a blocked read is never cancelled (what it was handed would be lost until its lease ends): it ends
ANSWER_SECONDS = 5.0  # a connection that answers nothing for this long is half open
CLOSE_SECONDS = 1.0
BEAT_SECONDS = 1.0
RECONNECT_SECONDS = 0.1
INBOX_MS = 60_000
WORKERS_MS = 60_000
JOBS_MS = 3_600_000  # a system that nobody runs any more leaves nothing behind
OLDEST_JOB_MS = 360_000  # the longest timeout is 300 s; what is older has been answered
READ_COUNT = 64
BIG_VALUE_BYTES = 16 * 1024  # so much is not copied to be written
SWEEP_SECONDS = 60.0  # from one of a worker's looks for names of the dead to the next, on the average
IDLE_NAME_MS = 300_000
SMALL_BYTES = 4_096  # so much may be added in full memory
SPARE = 0.25  # and so much of a job's size may its reply be larger: an allocator's size classes are as coarse

# https://valkey.io/topics/eval-intro/, https://redis.io/docs/latest/develop/programmability/lua-api/#script_flags
# Keys: ours. Arguments: commands, each after the number of its words. All are done and nothing between them.
IN_FULL_MEMORY = b"""#!lua flags=allow-oom
local at = 1
while at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, last))
  at = last + 1
end
"""
# Keys: the stream. Arguments: the group, a name ("" for none), milliseconds. Deletes consumers with nothing pending:
# the one of that name, and those that are idle for longer.
FORGET_NAMES = b"""#!lua flags=allow-oom
for _, told in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local name, pending, idle = told[2], told[4], told[6]
  if pending == 0 and (name == ARGV[2] or idle > tonumber(ARGV[3])) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
  end
end
"""

# Codes of a server that is not, or not yet, the one that has our keys: another may be.
# https://valkey.io/topics/cluster-spec/#redirection-and-resharding
ELSEWHERE_CODES = {"MOVED", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "LOADING"}
# Codes of servers that are up and yet take no commands, for now. https://valkey.io/topics/protocol/#simple-errors
AWAY_CODES = {*ELSEWHERE_CODES, "ASK", "TRYAGAIN", "MISCONF", "NOREPLICAS", "BUSY"}
TOO_LARGE = "invalid bulk length"  # the server's proto-max-bulk-len
GROUP_GONE_CODES = {"NOGROUP", "UNBLOCKED"}

# Writes nothing, and is refused by whoever would refuse a write to our keys.
PROBE = ("DEL", b"{safelight}:none")
MOST_NODES = 64  # tried for one connection

Command = tuple[Any, ...]
Node = tuple[str, int]  # host and port; no host: a socket in the file system
NOT_YET = object()  # what the parser returns until an answer is whole


def _code(error: Exception) -> str:
    return str(error).partition(" ")[0]


def _ours(error: Exception) -> SafelightError:
    """A server's error as one of ours."""
    code = _code(error)
    if code == "OOM":
        return BrokerFullError()
    if code in AWAY_CODES:
        return BrokerAwayError()
    if TOO_LARGE in str(error):
        return too_large(None)
    return InternalError(f"the broker answered: {error}")


def _packed(commands: Sequence[Command]) -> list[bytes]:
    """Commands as they are written, in pieces; a big last argument is a piece of its own, so that it is not copied."""
    pieces: list[bytes] = []
    small: list[bytes] = []
    for command in commands:
        last = command[-1]
        if isinstance(last, bytes) and len(last) >= BIG_VALUE_BYTES:
            small += [hiredis.pack_command((*command[:-1], b"")).removesuffix(b"$0\r\n\r\n"), b"$%d\r\n" % len(last)]
            pieces += [b"".join(small), last]
            small = [b"\r\n"]
        else:
            small.append(hiredis.pack_command(command))
    return [*pieces, b"".join(small)]


class _Line(asyncio.Protocol):
    """One connection: commands are written in their order, those of one turn of the event loop together, and answers
    return in that order.

    The driver makes it (sockets, TLS, user, password and database are its work); then its transport is read here, since
    the driver's command layer and its streams cost several times as much for each job (`docs/why.md`).
    """

    def __init__(self, connection: AbstractConnection, patience: float) -> None:
        self._connection = connection  # its transport would close with it
        self._transport: asyncio.Transport = connection._writer.transport  # type: ignore[assignment, union-attr]
        self._patience = patience
        self._parser = hiredis.Reader(notEnoughData=NOT_YET)
        self._waiting: deque[tuple[int, float, asyncio.Future[list[Any]]]] = deque()
        self._batch: list[Any] = []
        self._unwritten: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None
        self._lost = asyncio.Event()
        self._is_elsewhere = False
        self._transport.set_protocol(self)

    @property
    def is_open(self) -> bool:
        """False as soon as it is lost, also before `connection_lost` was called, or as our keys are elsewhere."""
        return not self._is_elsewhere and not self._transport.is_closing()

    def write(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Write `commands`; their answers, errors among them as values, or `BrokerAwayError` if they do not come."""
        answers: asyncio.Future[list[Any]] = self._loop.create_future()
        self._waiting.append((len(commands), self._loop.time() + self._patience, answers))
        if not self._unwritten:
            self._loop.call_soon(self.flush)
        self._unwritten += _packed(commands)
        if self._watch is None:
            self._watch = self._loop.call_later(self._patience, self._look)
        return answers

    def flush(self) -> None:
        """Hand what waits to be written to the system, now and not at the end of this turn."""
        if self._unwritten and not self._transport.is_closing():  # else `connection_lost` fails those who wait
            self._transport.writelines(self._unwritten)
        self._unwritten = []

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (answer := self._parser.gets()) is not NOT_YET:
                self._batch.append(answer)
                is_refused = False
                if isinstance(answer, Exception):
                    is_refused = TOO_LARGE in str(answer)  # and no further answer comes
                    self._is_elsewhere |= _code(answer) in ELSEWHERE_CODES
                if is_refused or len(self._batch) == self._waiting[0][0]:
                    batch, self._batch = self._batch, []
                    _, _, answers = self._waiting.popleft()
                    if not answers.done():
                        answers.set_result(batch)
        except (hiredis.HiredisError, IndexError) as exc:
            log.debug("the broker's answer cannot be read: %s", exc)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set()
        if self._watch is not None:
            self._watch.cancel()
        while self._waiting:
            _, _, answers = self._waiting.popleft()
            if not answers.done():
                answers.set_exception(BrokerAwayError())

    def _look(self) -> None:
        """End a connection whose oldest batch was not answered in time: it is half open."""
        self._watch = None
        if self._waiting:
            left = self._waiting[0][1] - self._loop.time()
            if left <= 0:
                self._transport.abort()
            else:
                self._watch = self._loop.call_later(left, self._look)

    async def close(self) -> None:
        """Close; done when the socket is (TLS takes its leave first)."""
        await self._connection.disconnect(nowait=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._lost.wait()


class _Nodes:
    """The servers that may have our keys: those that the URL names, and those of their cluster."""

    def __init__(self, url: str) -> None:
        pools = [
            ConnectionPool.from_url(
                one, protocol=2, socket_timeout=None, socket_connect_timeout=None, retry=Retry(NoBackoff(), 0)
            )
            for one in each_host(url)
        ]
        self._class, self._options = pools[0].connection_class, pools[0].connection_kwargs
        is_socket = "path" in self._options
        hosts = [(p.connection_kwargs.get("host", "localhost"), p.connection_kwargs.get("port", 6379)) for p in pools]
        self._named: list[Node] = [("", 0)] if is_socket else hosts
        self._known = [*self._named]  # the one that had our keys comes first

    async def connect(self, patience: float) -> _Line:
        """A connection to the server that has our keys; `BrokerAwayError` if none of those that are known has."""
        untried, tried = deque(self._known), set[Node]()
        while untried and len(tried) < MOST_NODES:
            node = untried.popleft()
            if node in tried:
                continue
            tried.add(node)
            try:
                line = await self._reach(node, patience)
            except BrokerAwayError:
                self._known.sort(key=node.__eq__)  # after all others, the next time
                continue
            try:
                probed, slots = await line.write([PROBE, ("CLUSTER", "SLOTS")])
                others = _others(node, slots)
                if line.is_open:
                    self._known = list(dict.fromkeys([node, *self._named, *others]))
                    return line
                untried.extendleft(_moved(node, probed))
                untried.extend(others)
            except BrokerAwayError:
                pass
            finally:
                if not line.is_open:
                    await line.close()
        raise BrokerAwayError

    async def _reach(self, node: Node, patience: float) -> _Line:
        host, port = node
        options = self._options | ({"host": host, "port": port} if host else {})
        connection = self._class(**options)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                if host:
                    await look_up(host)
                await connection.connect()  # type: ignore[no-untyped-call]
        except driver.AuthenticationError as exc:
            raise ConfigurationError(f"The broker refuses the user or the password: {exc}.") from exc
        except (driver.RedisError, OSError) as exc:
            log.debug("cannot connect: %s", exc)
            await connection.disconnect(nowait=True)
            raise BrokerAwayError from exc
        return _Line(connection, patience)


def _moved(node: Node, answer: Any) -> list[Node]:
    """The node of `MOVED SLOT HOST:PORT`, which `node` answered."""
    if not isinstance(answer, Exception) or _code(answer) != "MOVED":
        return []
    host, _, port = str(answer).split(" ")[2].rpartition(":")
    return _beside(node, host, port)


def _others(node: Node, slots: Any) -> list[Node]:
    """The nodes of `CLUSTER SLOTS`, whose entries are first slot, last slot, nodes; none where there is no cluster."""
    if isinstance(slots, Exception):
        return []
    return [found for entry in slots for host, port, *_ in entry[2:] for found in _beside(node, host, port)]


def _beside(node: Node, host: bytes | str | None, port: str | int) -> list[Node]:
    """What `node` calls `host` and `port`; a host that it does not know is its own. A socket leads nowhere else."""
    name = host.decode() if isinstance(host, bytes) else host
    return [(node[0] if name in (None, "", "?") else name.strip("[]"), int(port))] if node[0] else []


class _Pipe:
    """One connection for many callers, made when it is needed and anew when it was lost."""

    def __init__(self, nodes: _Nodes, patience: float) -> None:
        self._nodes = nodes
        self._patience = patience
        self._line: _Line | None = None
        self._connecting = asyncio.Lock()

    async def call(self, *commands: Command) -> list[Any]:
        """The answers to `commands`, errors among them as values; `BrokerAwayError` if they do not come."""
        return await (await self.line()).write(commands)

    async def one(self, *command: Any) -> Any:
        """The answer to one command; its error is raised as ours."""
        return _checked(await self.call(command))[0]

    async def transaction(self, *commands: Command) -> list[Any]:
        """All of `commands` or none; their answers."""
        answers = _checked(await self.call(("MULTI",), *commands, ("EXEC",)))[-1]
        return _checked(answers)

    async def exchange(self, *commands: Command) -> None:
        """A transaction that gives back the room that it takes, so that it is done in full memory too."""
        try:
            await self.transaction(*commands)
        except BrokerFullError:
            await self.in_full_memory(*commands)

    async def in_full_memory(self, *commands: Command) -> None:
        """All of `commands` or none, whatever room there is; `BrokerFullError` where scripts are forbidden."""
        words = [word for command in commands for word in (len(command), *command)]
        try:
            await self.one("EVAL", IN_FULL_MEMORY, 1, JOBS, *words)
        except InternalError as exc:
            log.warning("the broker refuses the way out of full memory: %s", exc.detail)
            raise BrokerFullError from exc

    async def post(self, *commands: Command) -> None:
        """Write `commands` and leave their answers unread: once written they arrive, even if this process dies."""
        line = await self.line()
        line.write(commands).add_done_callback(_ignore)
        line.flush()

    async def line(self) -> _Line:
        """The connection; another one if the last was lost. `BrokerAwayError`."""
        if self._line is None or not self._line.is_open:
            async with self._connecting:
                if self._line is None or not self._line.is_open:
                    await self.close()
                    self._line = await self._nodes.connect(self._patience)
        return self._line

    async def close(self) -> None:
        if self._line is not None:
            await self._line.close()


def _ignore(answers: asyncio.Future[list[Any]]) -> None:
    if not answers.cancelled():
        answers.exception()


def _checked(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise _ours(answer) from answer
    return answers


class RedisBroker:
    """A broker at `redis://`, `rediss://` (TLS), `valkey://`, `valkeys://` or `unix://`; `lease` in seconds.

    Several nodes of a cluster, or a primary and its replicas, are told by commas (`valkey://a:6379,b:6379/0`). The URL
    may hold user, password and database, and redis-py's options as a query (`?ssl_ca_certs=/ca.pem`):
    https://redis.readthedocs.io/en/stable/connections.html#redis.asyncio.connection.ConnectionPool.from_url
    """

    def __init__(self, url: str, *, lease: float) -> None:
        if url.startswith("valkey"):  # redis-py does not know the name: valkeys:// becomes rediss://
            url = "redis" + url.removeprefix("valkey")
        try:
            nodes = _Nodes(url)
        except (ValueError, TypeError) as exc:
            raise ConfigurationError(f"The broker's URL cannot be read: {exc}.") from exc
        self._lease_ms = round(lease * 1_000)
        self._pipe = _Pipe(nodes, ANSWER_SECONDS)
        self._blocking = _Pipe(nodes, ANSWER_SECONDS + BLOCK_MS / 1_000)
        self._sent: dict[str, list[bytes]] = {}  # job -> its entries; more than one after sending again
        self._inbox: bytes | None = None
        self._worker: bytes | None = None
        self._clock_line: _Line | None = None
        self._clock_offset = 0  # the clock of that line's server minus our monotonic one, in milliseconds
        self._cursor: bytes = b"0-0"  # of XAUTOCLAIM, which looks at a few entries a call
        self._largest: int | None = None  # bytes of an argument that the server takes, where it tells

    async def connect(self) -> None:
        """Connect and look at the server: its version, its limits, a memory policy that would evict jobs."""
        info = _info(await self._pipe.one("INFO"))
        if int(info.get("redis_version", "0").partition(".")[0]) < 7:
            raise ConfigurationError(f"The broker is version {info.get('redis_version')}; it must be 7 or later.")
        [limit] = await self._pipe.call(("CONFIG", "GET", "proto-max-bulk-len"))
        if isinstance(limit, list) and len(limit) == 2:  # managed services forbid CONFIG
            self._largest = int(limit[1])
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and info.get("maxmemory", "0") != "0":
            log.warning(
                "the broker's maxmemory-policy is %s: when its memory is full it deletes jobs; set noeviction", policy
            )

    async def close(self) -> None:
        """Take back this worker's presence or delete this gateway's inbox, then close."""
        with suppress(SafelightError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._worker is not None:
                    await self._pipe.call(("HDEL", WORKERS, self._worker), _forget_names(self._worker))
                if self._inbox is not None:
                    await self._pipe.one("DEL", self._inbox)
        await self._pipe.close()
        await self._blocking.close()

    # The gateway's.

    async def send(self, job: Job) -> None:
        """`XADD`, without a length: that would delete admitted jobs."""
        header, body = encode(job)
        check_size(body, self._largest)
        entry = await self._pipe.one("XADD", JOBS, "*", "header", header, "body", body)
        self._sent.setdefault(job.id, []).append(entry)

    async def withdraw(self, job: Job) -> None:
        """Delete the job's entries; their holder's next renewal does not return them."""
        if entries := self._sent.pop(job.id, None):
            _, deleted = await self._pipe.transaction(*_delete(entries))
            if not deleted:  # a worker gave it back: it is an entry that we do not know, and its holders look here
                await self._pipe.one("SET", _withdrawn(job), "", "PX", OLDEST_JOB_MS)

    async def replies(self, inbox: str) -> AsyncIterator[Reply | Renewed]:
        """`XREAD` from the inbox. Each read carries the deletion of what the one before returned."""
        key = self._inbox = b"{safelight}:inbox:" + inbox.encode()
        gone = True
        while True:
            if gone:
                last, chores, refreshed = b"0-0", list[Command](), 0.0
                if not await self._make_inbox(key):
                    await asyncio.sleep(RECONNECT_SECONDS)
                    continue
                yield Renewed()
            now = time.monotonic()
            beat: list[Command] = [("PEXPIRE", key, INBOX_MS)] if now - refreshed >= BEAT_SECONDS else []
            try:
                answers = await self._blocking.call(
                    *beat,
                    *chores,
                    ("XREAD", "COUNT", READ_COUNT, "BLOCK", BLOCK_MS, "STREAMS", key, last),
                )
                _checked(answers)
                # A server that was emptied keeps connections open: only the refresh tells that the inbox is gone.
                gone = bool(beat) and answers[0] == 0
            except SafelightError:
                await asyncio.sleep(RECONNECT_SECONDS)
                gone = True
            if gone:
                continue
            refreshed = now if beat else refreshed
            entries = answers[-1][0][1] if answers[-1] else []
            chores = [("XDEL", key, *(entry for entry, _ in entries))] if entries else []
            for entry, fields in entries:
                last = entry
                reply = _reply(fields)
                if reply is None:
                    continue
                if len(sent := self._sent.pop(reply.id, ())) > 1:
                    chores.extend(_delete(sent))
                yield reply

    async def _make_inbox(self, key: bytes) -> bool:
        """Whether the inbox is there, made if it was not; a stream needs an entry, and this one is not a reply."""
        try:
            if not await self._pipe.one("PEXPIRE", key, INBOX_MS):
                await self._pipe.exchange(("XADD", key, "*", "made", now_ms()), ("PEXPIRE", key, INBOX_MS))
        except SafelightError:
            return False
        return True

    async def presence(self) -> list[Presence]:
        """Whose stamp is at most two leases old by the server's clock; stamps of long ago are deleted."""
        answers = _checked(await self._pipe.call(("TIME",), ("HGETALL", WORKERS)))
        now, names, headers = _milliseconds(answers[0]), answers[1][::2], answers[1][1::2]
        fresh, stale = [], []
        for name, header in zip(names, headers, strict=True):
            try:
                presence = decode(Presence, header)
            except MalformedMessageError:
                stale.append(name)
                continue
            age = abs(now - presence.seen)  # the clock may be another server's by now, and behind the one before
            if age <= 2 * self._lease_ms:
                fresh.append(presence)
            elif age > WORKERS_MS:
                stale.append(name)
        if stale:
            await self._pipe.one("HDEL", WORKERS, *stale)
        return fresh

    async def backlog(self) -> int:
        """`XLEN`: an answered job is deleted, so this is what waits or is worked on."""
        return int(await self._pipe.one("XLEN", JOBS))

    # The worker's.

    async def jobs(self, worker: str, stopping: Callable[[], bool]) -> AsyncIterator[Delivery]:
        """`XREADGROUP`, and once a beat a look for leases that ended."""
        self._worker = worker.encode()
        swept = -math.inf
        while not stopping():
            try:
                delivery = None
                if time.monotonic() - swept >= BEAT_SECONDS:
                    delivery = await self._take_over()
                    if delivery is None:
                        swept = time.monotonic()
                delivery = delivery or await self._next()
            except BrokerAwayError:
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            if delivery is not None:
                yield delivery

    async def _next(self) -> Delivery | None:
        """The next job: one that waits, asked for in the same write as the reply before it; else the first to come."""
        ask: Command = ("XREADGROUP", "GROUP", GROUP, self._worker, "COUNT", 1)
        [answer] = await self._pipe.call((*ask, "STREAMS", JOBS, b">"))
        if answer is None:
            [answer] = await self._blocking.call((*ask, "BLOCK", BLOCK_MS, "STREAMS", JOBS, b">"))
        if await self._group_was_gone(answer) or not answer:
            return None
        entry, fields = answer[0][1][0]
        return await self._delivery(entry, fields, starts=0)

    async def _take_over(self) -> Delivery | None:
        """One job whose lease ended. A call looks at about ten entries, so the cursor is kept from one to the next."""
        while True:
            command = ("XAUTOCLAIM", JOBS, GROUP, self._worker, self._lease_ms, self._cursor, "COUNT", 1, "JUSTID")
            [answer] = await self._pipe.call(command)
            if await self._group_was_gone(answer):
                return None
            self._cursor, claimed = answer[0], answer[1]
            for entry in claimed:
                found, pending = _checked(
                    await self._pipe.call(("XRANGE", JOBS, entry, entry), ("XPENDING", JOBS, GROUP, entry, entry, 1))
                )
                if found and pending:
                    return await self._delivery(entry, found[0][1], starts=pending[0][3] - 1)
            if self._cursor == b"0-0":
                return None

    async def _group_was_gone(self, answer: Any) -> bool:
        """Make the group when `answer` says there is none (a new server, or an emptied one)."""
        if not isinstance(answer, Exception):
            return False
        if _code(answer) not in GROUP_GONE_CODES:
            raise _ours(answer) from answer
        create = ("XGROUP", "CREATE", JOBS, GROUP, "0", "MKSTREAM")
        [made] = await self._pipe.call(create)
        if isinstance(made, Exception) and _code(made) == "OOM":
            await self._pipe.in_full_memory(create)
        elif isinstance(made, Exception) and _code(made) != "BUSYGROUP":
            raise _ours(made) from made
        return True

    async def _delivery(self, entry: bytes, fields: list[bytes], starts: int) -> Delivery | None:
        """The job in an entry; what is not a job is kept aside, so that it is not handed out for ever."""
        members = dict(zip(fields[::2], fields[1::2], strict=True))
        body = members.get(b"body", b"")
        try:
            job = decode(Job, members.get(b"header", b""), body)
        except MalformedMessageError as exc:
            log.warning("a message on the queue is %s; it is kept in quarantine", exc.detail)
            await self._keep_aside(not_a_job(exc, body, entry.decode()), body, *_delete([entry]))
            return None
        return Delivery(job, job.starts + starts, entry)

    async def start(self, delivery: Delivery, starts: int) -> None:
        """Set the entry's delivery count to one more than its starts."""
        count = starts - delivery.job.starts + 1
        await self._pipe.post(("XCLAIM", JOBS, GROUP, self._worker, 0, delivery.handle, "RETRYCOUNT", count, "JUSTID"))

    async def beat(self, held: Sequence[Delivery], presence: Presence) -> list[Delivery]:
        """Renew and announce; all keys of ours get their time to live here."""
        while (line := await self._pipe.line()) is not self._clock_line:  # another server's clock may be another
            [clock] = _checked(await line.write([("TIME",)]))
            self._clock_line, self._clock_offset = line, _milliseconds(clock) - _monotonic_ms()
        seen = _monotonic_ms() + self._clock_offset
        self._worker = presence.worker.encode()
        header, _ = encode(replace(presence, seen=seen))
        renewal: list[Command] = []
        if held:
            entries = [delivery.handle for delivery in held]
            renewal = [
                ("XCLAIM", JOBS, GROUP, self._worker, 0, *entries, "JUSTID"),
                ("MGET", *(_withdrawn(delivery.job) for delivery in held)),
            ]
        announcement: list[Command] = [("HSET", WORKERS, self._worker, header), ("PEXPIRE", WORKERS, WORKERS_MS)]
        is_sweeping = random.random() < BEAT_SECONDS / SWEEP_SECONDS  # noqa: S311 - so that workers take turns
        sweep = [_forget_names()] if is_sweeping else []
        commands = (("TIME",), *announcement, ("PEXPIRE", JOBS, JOBS_MS), *sweep, *renewal)
        clock, announced, *others = await line.write(commands)
        if isinstance(clock, Exception):
            raise _ours(clock) from clock
        self._clock_offset = _milliseconds(clock) - _monotonic_ms()
        if isinstance(announced, Exception):
            if _code(announced) == "OOM":
                await self._pipe.in_full_memory(*announcement)
            else:
                log.warning("the broker takes no announcement: %s", announced)
        return await self._lost(held, *others[-2:]) if held else []

    async def _lost(self, held: Sequence[Delivery], renewed: Any, withdrawn: Any) -> list[Delivery]:
        """Those of `held` that were not renewed, and those that were withdrawn by name, whose entries are deleted."""
        if isinstance(renewed, Exception):
            if _code(renewed) not in GROUP_GONE_CODES:
                raise _ours(renewed) from renewed
            renewed = []
        _checked([withdrawn])
        given_up = {delivery.handle for delivery, mark in zip(held, withdrawn, strict=True) if mark is not None}
        if given_up:
            await self._pipe.transaction(*_delete(list(given_up)))
        return [delivery for delivery in held if delivery.handle not in renewed or delivery.handle in given_up]

    async def reply(self, delivery: Delivery, reply: Reply) -> None:
        """`XADD` to the inbox if it is still there, `XACK`, `XDEL`. A result that is too large is a failure."""
        try:
            check_size(reply.image, self._largest)
            await self._finish(delivery, reply)
        except TooLargeError as exc:
            await self._finish(delivery, result_too_large(reply, exc))

    async def _finish(self, delivery: Delivery, reply: Reply) -> None:
        acknowledge = _delete([delivery.handle])
        try:
            await self._pipe.transaction(_answer(delivery, reply), *acknowledge)
        except BrokerFullError:
            if len(reply.image) > SMALL_BYTES + (1 + SPARE) * len(delivery.job.image):
                reply = no_room(reply)
            await self._pipe.in_full_memory(*acknowledge, _answer(delivery, reply))

    async def give_back(self, delivery: Delivery, starts: int) -> None:
        """The same job as a new entry, at the end of the queue, in one transaction with the old one's deletion."""
        acknowledge = _delete([delivery.handle])
        if await self._pipe.one("EXISTS", _withdrawn(delivery.job)):
            await self._pipe.transaction(*acknowledge)
            return
        header, body = encode(replace(delivery.job, starts=starts))
        await self._pipe.exchange(*acknowledge, ("XADD", JOBS, "*", "header", header, "body", body))

    async def hand_over(self, delivery: Delivery) -> bool:
        """As a new entry: where none waits that nobody holds, the end of the queue is its beginning."""
        entries, pending = await self._pipe.call(("XLEN", JOBS), ("XPENDING", JOBS, GROUP))
        if await self._group_was_gone(pending) or entries > pending[0]:
            return False
        await self.give_back(delivery, delivery.starts)
        return True

    async def quarantine(self, delivery: Delivery, record: Quarantined, reply: Reply) -> None:
        """Keep aside, reply, acknowledge. With no room to keep it, the reply alone must do."""
        also = [_answer(delivery, reply), *_delete([delivery.handle])]
        try:
            await self._keep_aside(record, delivery.job.image, *also)
        except BrokerFullError:
            log.warning("the broker has no room to keep job %s in quarantine", record.id)
            await self._pipe.in_full_memory(*also)

    async def _keep_aside(self, record: Quarantined, image: bytes, *also: Command) -> None:
        before = await self.quarantined()
        kept = {each.id for each in within_bounds([*before, record])}
        drop = [each.id.encode() for each in before if each.id not in kept]
        await self._pipe.transaction(
            *_forget(drop),
            ("HSET", QUARANTINE, record.id, encode(record)[0]),
            ("PEXPIRE", QUARANTINE, KEPT_MS),
            ("SET", QUARANTINE + b":" + record.id.encode(), image, "PX", KEPT_MS),
            *also,
        )

    # A person's.

    async def quarantined(self) -> list[Quarantined]:
        """All records, the oldest first; what is over a bound (several workers may add at once) is deleted."""
        answer = await self._pipe.one("HGETALL", QUARANTINE)
        records = []
        for header in answer[1::2]:
            with suppress(MalformedMessageError):
                records.append(decode(Quarantined, header))
        kept = within_bounds(records)
        names = {record.id.encode() for record in kept}
        if over := [name for name in answer[::2] if name not in names]:
            await self._pipe.transaction(*_forget(over))
        return kept

    async def take_out(self, job_id: str) -> tuple[Quarantined, bytes] | None:
        """One record with its image."""
        header, image = _checked(
            await self._pipe.call(("HGET", QUARANTINE, job_id), ("GET", QUARANTINE + b":" + job_id.encode()))
        )
        return (decode(Quarantined, header), image) if header is not None and image is not None else None

    async def drop(self, job_id: str) -> bool:
        """Delete one record and its image."""
        return bool((await self._pipe.transaction(*_forget([job_id.encode()])))[0])


def _delete(entries: Sequence[bytes]) -> list[Command]:
    return [("XACK", JOBS, GROUP, *entries), ("XDEL", JOBS, *entries)]


def _forget_names(own: bytes = b"") -> Command:
    return ("EVAL", FORGET_NAMES, 1, JOBS, GROUP, own, IDLE_NAME_MS)


def _withdrawn(job: Job) -> bytes:
    return WITHDRAWN + f"{job.reply_to}:{job.id}".encode()  # a person may send the same job anew from another inbox


def _forget(jobs: Sequence[bytes]) -> list[Command]:
    if not jobs:
        return []
    return [("HDEL", QUARANTINE, *jobs), ("DEL", *(QUARANTINE + b":" + job for job in jobs))]


def _answer(delivery: Delivery, reply: Reply) -> Command:
    header, body = encode(reply)
    inbox = b"{safelight}:inbox:" + delivery.job.reply_to.encode()
    # NOMKSTREAM: a plain XADD would make a dead gateway's inbox again, without an expiry.
    return ("XADD", inbox, "NOMKSTREAM", "*", "header", header, "body", body)


def _reply(fields: list[bytes]) -> Reply | None:
    members = dict(zip(fields[::2], fields[1::2], strict=True))
    if b"header" not in members:
        return None
    try:
        return decode(Reply, members[b"header"], members.get(b"body", b""))
    except MalformedMessageError as exc:
        log.warning("a message in the inbox is %s; it is ignored", exc.detail)
        return None


def _info(answer: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in answer.decode().splitlines())
    return {name: value for name, colon, value in lines if colon}


def _milliseconds(answer: list[bytes]) -> int:
    seconds, microseconds = answer
    return int(seconds) * 1_000 + int(microseconds) // 1_000


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000
