"""Baseline without a broker: FastAPI runs a plain `def` in its pool of threads; Pillow's codecs release the GIL."""

from fastapi import FastAPI, UploadFile
from pillow_mirror import answer, mirrored, save

app = FastAPI()


@app.post("/query")
def query(image: UploadFile) -> dict[str, str]:
    data = image.file.read()
    save(mirrored(data))
    return answer(data)
