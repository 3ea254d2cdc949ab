"""A server with vLLM's interface and this project's decoder behind it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_pretrained
from lwz_trainer.model.parameter_names import checkpoint_slices
from lwz_trainer.rollout import Request, RolloutEngine
from tests.trainer.fault_server import FaultServer, Hang, Reply, Reset

__all__ = ["FakeVllm"]

Override = Callable[[str, dict[str, Any]], Reply | Hang | Reset | None]


@dataclass(eq=False)
class FakeVllm:
    """Answers as `vllm serve` in dev mode does.

    Args:
        model_dir: what it serves at first.
        override: sees (path, body) of each request; None leaves the answer to the server.
    """

    model_dir: Path
    override: Override = lambda path, body: None
    label: str = "default"
    has_processed_logprobs: bool = True
    events: list[str] = field(default_factory=list)
    """What changed the weights, the cache or the label, in order."""

    def __post_init__(self) -> None:
        model, tokenizer = load_pretrained(str(self.model_dir), dtype=torch.float32, device="cpu")
        self.model: Decoder = model
        self._tokenizer: Any = tokenizer
        self.server = FaultServer(self._answer)

    def _answer(self, body: dict[str, Any], number: int) -> Reply | Hang | Reset:
        path = self.server.paths[number]
        overridden = self.override(path, body)
        if overridden is not None:
            return overridden
        answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "/weight_info": lambda _: {"weight_version": self.label},
            "/collective_rpc": self._reload,
            "/reset_prefix_cache": self._reset,
            "/update_weight_version": self._rename,
            "/v1/completions": self._complete,
        }
        if path not in answers:
            return Reply("no such page", status=404)
        return Reply(json.dumps(answers[path](body)))

    def _reload(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights"
        tensors = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            # Like vLLM on a CPU it would not notice a tied head that is not named.
            assert "lm_head.weight" in tensors
            for piece in checkpoint_slices(self.model.config):
                parameters[piece.parameter][piece.start : piece.stop] = tensors[piece.name]
        self.events.append("reload")
        return {"results": [None]}

    def _reset(self, _body: dict[str, Any]) -> dict[str, Any]:
        self.events.append("reset")
        return {"success": True}

    def _rename(self, body: dict[str, Any]) -> dict[str, Any]:
        self.label = body["new_version"]
        self.events.append("label")
        return {"success": True, "new_version": self.label}

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["return_token_ids"]
        assert body["logprobs"] == 0
        temperature = body["temperature"]
        engine = RolloutEngine(
            self.model,
            self._tokenizer,
            eos_ids=tuple(body["stop_token_ids"]),
            config=RolloutConfig(
                max_completion_tokens=body["max_tokens"],
                temperature=temperature,
                top_p=body["top_p"],
                top_k=body["top_k"],
                stop=tuple(body["stop"]),
                page_size=8,
            ),
            memory_limit_bytes=1 << 26,
        )
        request = Request(0, body["prompt"], [0])
        (sample,), _ = engine.generate([request], seed=body["seed"], step=0, policy_version=0)
        scale = 1.0 if self.has_processed_logprobs else temperature
        choice = {
            "index": 0,
            "text": sample.text,
            "token_ids": sample.completion_ids,
            "logprobs": {"token_logprobs": [scale * value for value in sample.logprobs]},
        }
        return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
