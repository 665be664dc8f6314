"""Submit a job to a running service, follow it, read the report, and download the checkpoint.

llmprune serve &
python examples/submit_over_http.py
"""

import os
import tempfile
from pathlib import Path

from llmprune_service.client import Client


def main() -> None:
    """Prune the bundled model to 50 % with Wanda, at LLMPRUNE_URL or on this host."""
    with Client(os.environ.get("LLMPRUNE_URL", "http://127.0.0.1:8000")) as client:
        job = client.submit(
            method="wanda", sparsity=0.5, num_samples=16, seq_len=256, max_eval_tokens=4096, latency=False, dtype="float32",
            metadata={"example": "http"},
        )  # fmt: skip
        for event in client.events(job.id):
            if event.type == "job.block":
                print(f"block {event.data['block']}: {event.data['sparsity']:.0%} in {event.data['seconds']:.1f} s")
        job = client.get(job.id)
        if job.status != "succeeded":
            raise SystemExit(f"{job.id} {job.status}: {job.error}")
        print(client.report(job.id).verdict.text)
        folder = client.download(job.id, Path(tempfile.mkdtemp()) / "checkpoint")
        print(f"checkpoint in {folder}")


if __name__ == "__main__":
    main()
