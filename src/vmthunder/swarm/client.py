"""Requests to the tracker of a `vmthunder server`. Belongs to one event loop."""

from vmthunder.serverclient import ServerClient


class TrackerClient(ServerClient):
    """A connection to the tracker."""

    async def ask(self, method: str, path: str, body: bytes = b"", *, timeout_s: float) -> bytes:
        """The body of the answer, JSON. Raises what `request` raises; NotFound: the server has no tracker."""
        missing = f"{self.url} has no tracker; use a `vmthunder server`, without --no-p2p"
        return await self.request(method, path, body, timeout_s=timeout_s, missing=missing)
