"""What others would write for the same work, each as its own documentation would have it, and how each is started.

A baseline is one file of this folder, run from the folder's own `.venv`, which `pyproject.toml` and `uv.lock` beside
this describe. Gateways and pools have a process per usable core; none logs its requests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from system import Part, Place, System

__all__ = ["BASELINES", "install", "ready"]

HERE = Path(__file__).parent
UV = HERE.parent.parent / ".venv/bin/uv"
VENV = HERE / ".venv"
THREADS = 32  # of each gunicorn worker: two of them answer 64 connections at once
TIMEOUT_MS = 60_000  # mosec's for a request; its default of 3 s is for few connections


def install() -> None:
    """Make the environment, or bring it up to date, for the Python that runs this."""
    if _sync().returncode:
        raise SystemExit("bench: the environment of the baselines could not be made; the lines above say why")


def ready() -> bool:
    """Whether the environment is as `install` would leave it."""
    return _sync("--check", errors=subprocess.DEVNULL).returncode == 0


def _sync(*options: str, errors: int | None = None) -> subprocess.CompletedProcess[bytes]:
    uv = str(UV) if UV.exists() else shutil.which("uv")
    if uv is None:
        raise SystemExit(f"bench: the baselines need uv: neither {UV} nor one on PATH is there")
    command = [uv, "sync", "-q", "--locked", "--project", str(HERE), "--python", sys.executable, *options]
    variables = {"UV_PROJECT_ENVIRONMENT": str(VENV), "UV_SYSTEM_CERTS": os.environ.get("UV_SYSTEM_CERTS", "true")}
    return subprocess.run(command, env=os.environ | variables, stderr=errors, check=False)


def _part(kind: str, place: Place, program: str, *arguments: str) -> Part:
    environment = {"STORE": str(place.store), "WORKERS": str(place.workers)}
    if place.redis_url is not None:
        environment["REDIS_URL"] = place.redis_url
    return Part(kind, [str(VENV / "bin" / program), *arguments], environment)


def _uvicorn(place: Place, application: str) -> Part:
    address = ["--host", "127.0.0.1", "--port", str(place.port)]
    options = ["--app-dir", str(HERE), "--workers", str(place.workers), "--log-level", "warning"]
    return _part("gateway", place, "uvicorn", *address, *options, application)


def _flask_celery(place: Place) -> list[Part]:
    pool = ["worker", "--concurrency", str(place.workers)]
    options = ["--chdir", str(HERE), "--bind", f"127.0.0.1:{place.port}", "--no-control-socket"]
    options += ["--workers", str(place.workers), "--worker-class", "gthread", "--threads", str(THREADS)]
    return [
        _part("worker", place, "celery", "--workdir", str(HERE), "--app", "flask_celery:celery", *pool),
        _part("gateway", place, "gunicorn", *options, "flask_celery:app"),
    ]


def _fastapi_taskiq(place: Place) -> list[Part]:
    options = ["--app-dir", str(HERE), "--log-level", "WARNING", "--workers", str(place.workers)]
    options += ["--use-process-pool", "--max-process-pool-processes", "1"]
    return [
        _part("worker", place, "taskiq", "worker", *options, "fastapi_taskiq:broker"),
        _uvicorn(place, "fastapi_taskiq:app"),
    ]


def _fastapi_faststream(place: Place) -> list[Part]:
    options = ["--app-dir", str(HERE), "--log-level", "warning", "--workers", str(place.workers)]
    return [
        _part("worker", place, "faststream", "run", *options, "fastapi_faststream:worker"),
        _uvicorn(place, "fastapi_faststream:app"),
    ]


def _mosec_pillow(place: Place) -> list[Part]:
    options = ["--address", "127.0.0.1", "--port", str(place.port), "--timeout", str(TIMEOUT_MS)]
    options += ["--path", str(place.folder / "mosec"), "--log-level", "warning"]
    return [_part("gateway", place, "python", str(HERE / "mosec_pillow.py"), *options)]


def _fastapi_threads(place: Place) -> list[Part]:
    return [_uvicorn(place, "fastapi_threads:app")]


BASELINES: tuple[System, ...] = (
    System("Flask + Celery + Redis", needs_redis=True, parts=_flask_celery),
    System("FastAPI + Taskiq + Redis", needs_redis=True, parts=_fastapi_taskiq),
    System("FastAPI + FastStream + Redis", needs_redis=True, parts=_fastapi_faststream),
    System("mosec", needs_redis=False, parts=_mosec_pillow, raw_body=True),
    System("FastAPI + threads, no broker", needs_redis=False, parts=_fastapi_threads),
)
