"""Baseline: mosec, an inference server with its own HTTP front in Rust and worker processes behind it.

The image is the request's bare body, as mosec has it; the answer is JSON, its default. WORKERS is how many processes.
"""

import os

from mosec import Server, Worker
from pillow_mirror import answer, mirrored, save


class Mirror(Worker):
    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> dict[str, str]:
        save(mirrored(data))
        return answer(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Mirror, num=int(os.environ["WORKERS"]), route="/query")
    server.run()
