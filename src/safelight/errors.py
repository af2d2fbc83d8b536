"""The exception tree: what can go wrong, each with a stable code, an HTTP status and a sentence for a person.

Errors cross the broker as their `code` and `detail` (never as text to parse again); `from_code` finds the class at
the other end. What goes to the log is apart from what a client reads: a `detail` never holds a path, an address or
a traceback.
"""

from __future__ import annotations

__all__ = [
    "BrokerAwayError",
    "BrokerFullError",
    "ConfigurationError",
    "DeadlinePassedError",
    "EmptyImageError",
    "GatewayFullError",
    "HeadersTooLargeError",
    "ImageError",
    "InternalError",
    "MalformedMessageError",
    "MalformedRequestError",
    "MethodNotAllowedError",
    "NoImageError",
    "NoWorkerError",
    "NotAcceptableError",
    "NotFoundError",
    "QuarantinedError",
    "RequestTooSlowError",
    "SafelightError",
    "SeveralImagesError",
    "StoreFullError",
    "TooLargeError",
    "TooManyFramesError",
    "TooManyPixelsError",
    "UnknownOperationError",
    "UnsupportedFormatError",
    "from_code",
]


class SafelightError(Exception):
    """The root of the tree; `detail` defaults to the class's own sentence."""

    code = "internal"
    status = 500
    sentence = "Something went wrong inside; the request's id finds it in the log."

    def __init__(self, detail: str | None = None) -> None:
        self.detail = detail or self.sentence
        super().__init__(self.detail)


class ConfigurationError(SafelightError):
    """A setting or a machine that cannot work; shown by the command line as one sentence, never to a client."""

    code = "configuration"


class MalformedMessageError(SafelightError):
    """Bytes on the broker that are not a message of ours (or one of a version that we do not know)."""

    code = "malformed_message"


class InternalError(SafelightError):
    """A defect of ours."""


class MalformedRequestError(SafelightError):
    """400: the request cannot be understood."""

    code = "malformed_request"
    status = 400
    sentence = "The request could not be understood."


class NoImageError(MalformedRequestError):
    """400: a form without a part named `image`."""

    code = "no_image"
    sentence = 'The form has no part named "image"; send one, as in: curl -F "image=@./picture.jpg".'


class SeveralImagesError(MalformedRequestError):
    """400: a form with two parts named `image`."""

    code = "several_images"
    sentence = 'The form has more than one part named "image"; send one image in each request.'


class EmptyImageError(MalformedRequestError):
    """400: zero bytes of image."""

    code = "empty_image"
    sentence = "The image is empty; check the file that was sent."


class NotFoundError(SafelightError):
    """404."""

    code = "not_found"
    status = 404
    sentence = "There is nothing at this address; POST images to /query."


class MethodNotAllowedError(SafelightError):
    """405."""

    code = "method_not_allowed"
    status = 405
    sentence = "This address does not take that method; POST images to /query."


class NotAcceptableError(SafelightError):
    """406: the `Accept` header allows nothing that we can answer with."""

    code = "not_acceptable"
    status = 406
    sentence = "The Accept header allows neither JSON nor the type of the resulting image."


class RequestTooSlowError(SafelightError):
    """408: headers or body did not arrive in time."""

    code = "request_too_slow"
    status = 408
    sentence = "The request arrived too slowly; send it again over a faster connection."


class TooLargeError(SafelightError):
    """413: too many bytes."""

    code = "too_large"
    status = 413
    sentence = "The image has too many bytes."


class UnsupportedFormatError(SafelightError):
    """415: the first bytes are not those of an allowed format."""

    code = "unsupported_format"
    status = 415
    sentence = "The bytes are not an image of a supported format; send JPEG, PNG, GIF, WebP, TIFF, BMP or AVIF."


class ImageError(SafelightError):
    """422: an image that cannot be processed. Operations raise it (or a subclass) with a sentence of their own."""

    code = "unprocessable_image"
    status = 422
    sentence = "The image is damaged or cut short and cannot be processed."


class TooManyPixelsError(ImageError):
    """422: a picture larger than `formats.MAX_PIXELS`."""

    code = "too_many_pixels"
    sentence = "The picture has too many pixels."


class TooManyFramesError(ImageError):
    """422: an animation with too many frames, or too many pixels over all of them."""

    code = "too_many_frames"
    sentence = "The animation has too many frames."


class QuarantinedError(ImageError):
    """422: every attempt crashed, hung or failed; the job is kept aside with its cause."""

    code = "quarantined"
    sentence = "Every attempt to process this image failed; it was kept aside for a person to look at."


class UnknownOperationError(SafelightError):
    """422: an operation that no living worker offers."""

    code = "unknown_operation"
    status = 422
    sentence = "No worker offers this operation; `safelight operations` lists those that are."


class HeadersTooLargeError(SafelightError):
    """431."""

    code = "headers_too_large"
    status = 431
    sentence = "The request's headers are over 32 KB; send fewer or shorter ones."


class UnavailableError(SafelightError):
    """503: try again; the response carries `Retry-After`."""

    status = 503


class GatewayFullError(UnavailableError):
    """503: this gateway holds as much as it may."""

    code = "gateway_full"
    sentence = "The gateway holds as much work as it may; send the request again in a moment."


class NoWorkerError(UnavailableError):
    """503: no worker has given a sign of life."""

    code = "no_worker"
    sentence = "No worker is running; start one (`safelight worker`) and send the request again."


class BrokerAwayError(UnavailableError):
    """503: the broker cannot be reached, or will not take commands."""

    code = "broker_away"
    sentence = "The message broker cannot be reached; send the request again in a moment."


class BrokerFullError(BrokerAwayError):
    """503: the broker has no room for a job or a reply."""

    code = "broker_full"
    sentence = "The message broker has no room; send the request again in a moment."


class DeadlinePassedError(SafelightError):
    """504."""

    code = "deadline_passed"
    status = 504
    sentence = "The request was not finished by its deadline; send it again, or with a longer ?timeout=."


class StoreFullError(SafelightError):
    """507: the resulting image cannot be saved."""

    code = "store_full"
    status = 507
    sentence = "The resulting image could not be saved: the store is full or read-only."


def _tree(root: type[SafelightError]) -> dict[str, type[SafelightError]]:
    classes = {root.code: root}
    for child in root.__subclasses__():
        classes = _tree(child) | classes
    return classes


def from_code(code: str, detail: str) -> SafelightError:
    """The error that a reply names; an unknown code (a newer worker's) becomes an `InternalError`."""
    return _tree(SafelightError).get(code, InternalError)(detail)
