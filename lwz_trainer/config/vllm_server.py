"""The `rollout.server` section: a vLLM server that samples from the policy's weights.

Each field's docstring is its help text on the command line.
"""

from dataclasses import dataclass

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.errors import UserError

__all__ = ["VllmServerConfig"]


@dataclass(frozen=True)
class VllmServerConfig:
    """Only read with rollout.engine vllm_server."""

    base_url: str = ""
    """Where it is, up to and with the version: http://localhost:8000/v1."""
    model: str = ""
    """The model's name at that server (--served-model-name, else the path given to vllm serve)."""
    api_key_env: str = ""
    """Environment variable that holds the API key; empty for a server without one."""
    weights_dir: str = ""
    """Directory that this process and the server see under the same path; weights pass through."""
    timeout_s: float = 7200.0
    """A completion, or a reload of the weights, without an answer after this long has failed."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise UserError(f"rollout.server.timeout_s must be above 0, got {self.timeout_s}")

    def require(self) -> None:
        """Refuses what a server engine cannot do without.

        Raises:
            UserError: an address, name or directory is missing.
        """
        for name in ("base_url", "model", "weights_dir"):
            if not getattr(self, name):
                raise UserError(
                    f"rollout.engine vllm_server needs rollout.server.{name}: set it (docs/vllm.md "
                    "has an example), or use rollout.engine own"
                )

    def endpoint(self, concurrency: int) -> EndpointConfig:
        """The client's view: one attempt decides nothing, an unreadable answer is no sample."""
        return EndpointConfig(
            base_url=self.base_url,
            model=self.model,
            api_key_env=self.api_key_env,
            concurrency=concurrency,
            timeout_s=self.timeout_s,
        )
