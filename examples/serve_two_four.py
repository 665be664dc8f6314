"""Prune to 2:4, let this device say whether packed weights are faster on it, and serve what it chose over HTTP.

python examples/serve_two_four.py [PORT]
curl -d 'def main(' http://127.0.0.1:8080
"""

from __future__ import annotations

import sys
import tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import llmprune

MAX_PROMPT_BYTES = 4096


def choose(folder: Path) -> Path:
    """Prune and pack the bundled model; the packed checkpoint if it is faster here, else the dense one."""
    report = llmprune.prune(
        "demo", pattern="2:4", method="sparsegpt", out=folder / "dense", num_samples=8, seq_len=128, max_eval_tokens=2048,
        latency=False, dtype="float32",
    )  # fmt: skip
    print(report.verdict.text)
    packed = llmprune.convert(folder / "dense", to="packed", out=folder / "packed").out
    speed = llmprune.benchmark(packed, against=folder / "dense", prefill_tokens=(), batch_sizes=(1,), seconds=2)
    print(speed.verdict.text)
    return Path(packed) if speed.verdict.status == "faster" else folder / "dense"


def make_server(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, port: int) -> HTTPServer:
    """A server on loopback that goes on with the text of a POST, one request at a time."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            prompt = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MAX_PROMPT_BYTES)).decode(errors="replace")
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            body = tokenizer.decode(tokens[0], skip_special_tokens=True).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer(("127.0.0.1", port), Handler)


def main(port: int) -> None:
    """Serve until Ctrl-C."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = choose(Path(folder))
        with make_server(llmprune.load(chosen), AutoTokenizer.from_pretrained(chosen), port) as server:
            print(f"serving the {chosen.name} checkpoint on http://127.0.0.1:{server.server_port}", flush=True)
            server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8080)
