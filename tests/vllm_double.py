"""A double of vLLM's server on localhost: a small model, the answers that vLLM 0.32 gives, and planted faults.

What it answers was copied from a real server; tests/test_vllm_server.py compares both.
"""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Answer = tuple[int, Any]
DEV = ("/collective_rpc", "/update_weight_version", "/reset_prefix_cache", "/weight_info")
LORA = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class VllmDouble:
    """model: what it starts from, again at each restart. processed: the log-probabilities that it returns.

    faults: names of faults, each for the next request of its kind, or for all with a star: "500", "hang", "drop",
    "fewer", "mixed up", "no logprobs", "restart before", "restart after" (completions); "reload fails", "reload hangs",
    "reload lies" (reload_weights); "reset lies", "reset refused" (the prefix cache); "adapter refused".
    requests: path and body of each request. more: answers to other paths.
    """

    def __init__(
        self, model: Any, tokenizer: Any, lora: bool = False, dev: bool = True, key: str = "", port: int = 0
    ) -> None:
        self.first, self.tokenizer, self.lora, self.dev, self.key = (
            copy.deepcopy(model).eval(),
            tokenizer,
            lora,
            dev,
            key,
        )
        self.processed, self.longest = False, 256
        self.faults: list[str] = []
        self.more: dict[str, Any] = {}
        self.requests: list[tuple[str, Any]] = []
        self.released = threading.Event()
        self._lock = threading.RLock()
        self.restart()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def reply(self, body: Any) -> None:
                with double._lock:
                    double.requests.append((self.path, body))
                if double.key and self.headers.get("authorization") != f"Bearer {double.key}":
                    status, content = 401, {"error": f"Unauthorized: {self.headers.get('authorization')}"}
                else:
                    status, content = double.answer(self.path, body)
                if status == 0:  # the process died
                    self.close_connection = True
                    return
                raw = b"" if content is None else json.dumps(content).encode()
                with suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("content-length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def restart(self) -> None:
        """Forget all weights that were loaded."""
        self.model, self.version = copy.deepcopy(self.first), "default"
        self.adapters: dict[str, Any] = {}
        self.read: dict[tuple[str, tuple[int, ...]], Any] = {}

    def asked(self, path: str) -> list[Any]:
        """The bodies of all POST requests to a path."""
        return [body for to, body in self.requests if to == path and body is not None]

    def _has(self, fault: str) -> bool:
        if f"{fault}*" in self.faults:
            return True
        if fault in self.faults:
            self.faults.remove(fault)
            return True
        return False

    def answer(self, path: str, body: Any) -> Answer:
        """Return status and content."""
        if (path in DEV and not self.dev) or (path in LORA and not self.lora):
            return 404, {"detail": "Not Found"}
        if path == "/health":
            return 200, None
        if body is None and path in ("/v1/models", "/weight_info"):
            names = ["tiny", *self.adapters]
            models = {"object": "list", "data": [{"id": name, "max_model_len": self.longest} for name in names]}
            return 200, models if path == "/v1/models" else {"weight_version": self.version}
        calls = {
            "/collective_rpc": self._reload, "/update_weight_version": self._name, "/reset_prefix_cache": self._reset,
            "/v1/load_lora_adapter": self._adapter, "/v1/unload_lora_adapter": self._unload,
            "/v1/completions": self._completions,
        }  # fmt: skip
        if path in self.more:
            return 200, self.more[path]
        if path not in calls:
            return 404, {"detail": "Not Found"}
        return (405, {"detail": "Method Not Allowed"}) if body is None else calls[path](body)

    def _reload(self, body: Any) -> Answer:
        if self._has("reload hangs"):
            self.released.wait(30)
        folder = Path(body["kwargs"]["weights_path"])
        if self._has("reload fails") or not folder.is_dir():
            return 500, {"error": {"message": "Call to collective_rpc method failed: Worker failed", "code": 500}}
        if not self._has("reload lies"):
            with self._lock:
                self.model = copy.deepcopy(self.model)  # what was read keeps the old one
                self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        return 200, {"results": [None]}

    def _name(self, body: Any) -> Answer:
        self.version = body["new_version"]
        return 200, {"success": True, "new_version": self.version}

    def _reset(self, body: Any) -> Answer:
        if self._has("reset refused"):
            return 200, {"success": False}
        if not self._has("reset lies"):
            self.read.clear()
        return 200, {"success": True}

    def _adapter(self, body: Any) -> Answer:
        from peft import PeftModel

        if self._has("adapter refused"):
            return 500, {"error": {"message": "LoRA rank 8 is greater than max_lora_rank 4.", "code": 500}}
        self.adapters[body["lora_name"]] = PeftModel.from_pretrained(
            copy.deepcopy(self.model), body["lora_path"]
        ).eval()
        return 200, None

    def _unload(self, body: Any) -> Answer:
        del self.adapters[body["lora_name"]]
        return 200, None

    def _completions(self, body: Any) -> Answer:
        known = body["model"] == "tiny" or body["model"] in self.adapters
        if not known:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        sampling = body["max_tokens"] > 1 or body.get("n", 1) > 1  # not the known prompt
        if sampling and self._has("500"):
            return 500, {"error": {"message": "EngineCore encountered an issue", "code": 500}}
        if sampling and self._has("drop"):
            return 0, None
        if sampling and self._has("hang"):
            self.released.wait(30)
            return 503, None
        if sampling and self._has("restart before"):
            self.restart()
        with self._lock, torch.no_grad():
            choices = [self._choice(body, i) for i in range(body.get("n", 1))]
        if sampling and self._has("restart after"):
            self.restart()
        if sampling and self._has("fewer"):
            choices = choices[:-1]
        if sampling and self._has("no logprobs"):
            choices[0]["logprobs"]["token_logprobs"].pop()
        return 200, {"choices": choices[::-1] if sampling and self._has("mixed up") else choices}

    def _choice(self, body: Any, index: int) -> dict[str, Any]:
        prompt, tokens, logps, text = body["prompt"], list[int](), list[float](), ""
        lm = self.adapters.get(body["model"], self.model)
        lm = self.read.setdefault((body["model"], tuple(prompt)), lm)  # the prefix cache: of the weights that read it
        draw = torch.Generator().manual_seed(body["seed"] + index)
        reason = "length"
        bare = torch.empty(0)
        while len(tokens) < min(body["max_tokens"], self.longest - len(prompt)):
            logits = lm(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].double()
            bare = logits.log_softmax(-1)
            chosen = _processed(logits, body, tokens)
            token = int(chosen.argmax() if not body["temperature"] else chosen.exp().multinomial(1, generator=draw))
            tokens.append(token)
            logps.append(float((chosen if self.processed else bare)[token]))
            text = self.tokenizer.decode(tokens)
            late = len(tokens) > body.get("min_tokens", 0)
            if token in body.get("stop_token_ids", []) or (late and any(s in text for s in body.get("stop", []))):
                reason = "stop"
                break
        asked = [*tokens[:1], *body.get("logprob_token_ids", [])]
        top = [{f"token_id:{t}": float(bare[t]) for t in asked}]
        return {
            "index": index, "text": text, "finish_reason": reason, "stop_reason": None, "token_ids": tokens,
            "logprobs": {"token_logprobs": logps, "top_logprobs": top}, "prompt_token_ids": prompt,
        }  # fmt: skip


def _processed(logits: torch.Tensor, body: Any, tokens: list[int]) -> torch.Tensor:
    """The distribution that is sampled from, as log-probabilities."""
    logits = logits.clone()
    if len(tokens) < body.get("min_tokens", 0):
        logits[body["stop_token_ids"]] = -torch.inf
    if body["temperature"]:
        logits /= body["temperature"]
    if body["top_k"]:
        logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
    if body["top_p"] < 1:
        ordered, at = logits.softmax(-1).sort(descending=True)
        logits[at[ordered.cumsum(-1) - ordered >= body["top_p"]]] = -torch.inf
    return logits.log_softmax(-1)


@contextmanager
def vllm_double(*args: Any, **options: Any) -> Iterator[VllmDouble]:
    """Run a double during the block."""
    double = VllmDouble(*args, **options)
    thread = threading.Thread(target=double.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield double
    finally:
        double.released.set()
        double.server.shutdown()
        double.server.server_close()
        thread.join()


def main() -> None:
    """Serve a folder's model in a process of its own: vllm_double.py serve FOLDER ... --host HOST --port PORT."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, port = sys.argv[2], int(sys.argv[sys.argv.index("--port") + 1])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    VllmDouble(model, tokenizer, port=port).server.serve_forever()


if __name__ == "__main__":
    main()
