"""Ray Serve's idiom for many models: `@serve.multiplexed` for adapters, `@serve.batch` for rows.

As its pages on model multiplexing and on dynamic request batching show. Adapters are loaded into
one PEFT model and switched between; a batch holds the requests of one adapter. All adapters must
have two labels: one PEFT model gives all of them heads of its own size.

python -m benchmarks.peers.ray_idiom BASE STORE PORT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.requests import Request


class Adapter:
    """One adapter in the replica's model; Serve calls `__del__` when it evicts it."""

    def __init__(self, replica: Any, name: str) -> None:
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        self.replica, self.name = replica, name
        folder = str(Path(replica.store) / name)
        if replica.model is None:
            model = AutoModelForSequenceClassification.from_pretrained(replica.base, num_labels=2)
            replica.model = PeftModel.from_pretrained(model, folder, adapter_name=name).eval()
        else:
            replica.model.load_adapter(folder, adapter_name=name)

    def __del__(self) -> None:
        self.replica.model.delete_adapter(self.name)


@serve.deployment(max_ongoing_requests=256)
class Classifier:
    def __init__(self, base: str, store: str) -> None:
        from transformers import AutoTokenizer

        self.base, self.store = base, store
        self.model: Any = None
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    @serve.multiplexed(max_num_models_per_replica=64)
    async def get_model(self, model_id: str) -> Adapter:
        return Adapter(self, model_id)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def answer(self, texts: list[str]) -> list[list[float]]:
        """Return each text's probabilities; Serve gives a batch of one model id."""
        import torch

        adapter = await self.get_model(serve.get_multiplexed_model_id())
        self.model.set_adapter(adapter.name)
        inputs = self.tokenizer(
            texts, return_tensors="pt", truncation=True, padding=True, max_length=128
        )
        with torch.inference_mode():
            return self.model(**inputs).logits.softmax(-1).tolist()

    async def __call__(self, request: Request) -> list[float]:
        return await self.answer((await request.json())["text"])


def build(base: str, store: str) -> Application:
    """Return the application; a request names its adapter in `serve_multiplexed_model_id`."""
    return Classifier.bind(base, store)


if __name__ == "__main__":
    given_base, given_store, port = sys.argv[1:]
    serve.start(http_options={"port": int(port)})
    serve.run(build(given_base, given_store), blocking=True)
