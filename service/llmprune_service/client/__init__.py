"""Submit and follow jobs from Python: :class:`Client` over HTTP, :func:`enqueue` straight into the queue's database."""

from llmprune_service.client.direct import enqueue
from llmprune_service.client.rest import Client
from llmprune_service.client.sweeps import SweepClient
from llmprune_service.client.transport import ApiError, ServiceError, ServiceUnreachable

__all__ = ["ApiError", "Client", "ServiceError", "ServiceUnreachable", "SweepClient", "enqueue"]
