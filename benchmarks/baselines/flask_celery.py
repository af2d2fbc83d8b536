"""Baseline: Flask in gunicorn's threads, a Celery task over Redis; the view waits for the result, then saves it.

Of the four serializers in Celery's guide ("Calling Tasks"), JSON, the default, sends bytes as Base64 and pickle is
refused by a worker that runs as root; msgpack carries bytes as they are, so it is what the guide suggests for images.
"""

import os

from celery import Celery
from flask import Flask, request
from pillow_mirror import answer, mirrored, save

TIMEOUT_SECONDS = 60

app = Flask(__name__)
celery = Celery("flask_celery", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])
celery.conf.update(
    task_serializer="msgpack",
    result_serializer="msgpack",
    accept_content=["json", "msgpack"],  # workers greet one another in JSON
    result_expires=TIMEOUT_SECONDS,
)


@celery.task
def mirror(image: bytes) -> bytes:
    return mirrored(image)


@app.post("/query")
def query() -> dict[str, str]:
    image = request.files["image"].read()
    save(mirror.delay(image).get(timeout=TIMEOUT_SECONDS))
    return answer(image)
